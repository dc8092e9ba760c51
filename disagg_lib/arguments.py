"""What the commands share: their errors and order, params files, values given by hand, runs by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from .errors import DisaggError, ParameterError
from .experiment.loading import experiment_from, refuse_unknown
from .experiment.parameters import Experiment, parameter_names
from .files import REPOSITORY, expand

INTERRUPTED = 130  # a shell's status for Ctrl-C
ORDER = ("plan", "check", "run", "launch", "attach", "cancel", "results", "export", "simulate", "calibrate", "lengths", "evaluate", "parameters")  # fmt: skip


class Command(click.Command):
    """`-p name=value` is `-p name value`, as everybody types it first."""

    def parse_args(self, context, args):
        words: list[str] = []
        for word in args:
            name, equals, value = word.partition("=")
            words += [name, value] if equals and words[-1:] == ["-p"] else [word]
        return super().parse_args(context, words)


class Group(click.Group):
    """Our own errors end a command with their message and status 1, not with a traceback; Ctrl-C with what goes on."""

    command_class = Command

    def invoke(self, context):
        try:
            return super().invoke(context)
        except DisaggError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            context.exit(1)
        except KeyboardInterrupt as stop:
            click.echo(f"\n{stop}" if str(stop) else "\nStopped.", err=True)
            context.exit(INTERRUPTED)

    def list_commands(self, context):
        return sorted(super().list_commands(context), key=lambda name: ORDER.index(name))


def given_values(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """-p NAME VALUE: the value is read as YAML reads it, so 4 is a number and [performance] a list."""
    values = {}
    for name, text in pairs:
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            values[name] = text
        if isinstance(values[name], dict):
            values[name] = text
    refuse_unknown(values, parameter_names(), "-p")
    return values


def params_paths(names: Sequence[str]) -> list[str] | None:
    """The params files of a command line: looked for from the repository's root, then from here; None: none was given."""
    found = []
    for name in names:
        here = expand(name).absolute()
        found.append(str(here) if here.exists() and not (REPOSITORY / name).exists() else name)
    return found or None


def experiment_of(params: Sequence[str], given: Sequence[tuple[str, str]]) -> Experiment:
    return experiment_from(params_paths(params), given_values(given), "-p")


def refuse_existing(option: str, path: str | Path) -> None:
    if Path(path).exists():
        raise ParameterError(
            f"{option}: {path} is there already, and nothing is overwritten. Choose another name"
        )


def write_csv(table, path: str | None) -> None:
    if path:
        refuse_existing("--csv", path)
        try:
            table.to_csv(path, index=False)
        except OSError as error:
            raise ParameterError(f"--csv: {path}: cannot be written ({error.strerror or error})") from None


def run_folder(run_dir: str, purpose: str = "read") -> Path:
    """The run of a path, a name or a part of one; none given: the one that is meant for this purpose."""
    from .cluster.runs import run_for
    from .run.folder import find_run

    if not run_dir:
        return run_for(purpose)
    is_here = (Path(run_dir) / "experiment.yaml").is_file()
    return find_run(str(Path(run_dir).absolute()) if is_here else run_dir)


def completed_runs(context, parameter, incomplete: str) -> list[str]:
    from .run.folder import newest_runs

    return [run.name for run in newest_runs() if incomplete in run.name]


def _completed_names(context, parameter, incomplete: str) -> list[str]:
    return [name for name in parameter_names() if name.startswith(incomplete)]


def _completed_params(context, parameter, incomplete: str) -> list[str]:
    files = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "params").glob("*.yaml"))
    return [name for name in files if name.startswith(incomplete) or name.startswith(f"params/{incomplete}")]


params_argument = click.argument("params", nargs=-1, type=click.Path(), shell_complete=_completed_params)
run_argument = click.argument("run_dir", metavar="[RUN]", default="", shell_complete=completed_runs)
given_option = click.option(
    "-p", "given", nargs=2, multiple=True, metavar="NAME=VALUE", shell_complete=_completed_names, help="One parameter; repeatable."
)  # fmt: skip
verbose_option = click.option("-v", "--verbose", is_flag=True, help="Print all that the notebooks print.")
beside_option = click.option("--beside", is_flag=True, help="Submit although another job is active.")
trust_option = click.option(
    "--trust-dataset", is_flag=True, help="Open a pickle of unknown checksum (a pickle can run code)."
)
csv_option = click.option("--csv", "csv_file", type=click.Path(), help="Write the rows here, too.")
