"""The notebooks' parameters, the notebooks headless and in order, and the command line."""

import ast
import datetime
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from .errors import DisaggError
from .experiment import (
    DEFAULT_PARAMS_FILES,
    REPOSITORY,
    Experiment,
    ParameterError,
    load_experiment,
    load_recorded,
    parameter_kind,
    parameter_names,
    refuse_contradiction,
    refuse_unknown,
)

NOTEBOOKS = REPOSITORY / "notebooks"
CHAIN = ("00_setup", "01_model_download", "03_configuration", "04_launch", "05_analysis")
OF_A_NOTEBOOK = ("params_files", "run_dir")  # parameters that are about the notebook, not the experiment


# -- a notebook's parameters


def parameters_cell(makes_runs: bool) -> str:
    """Source of a notebook's parameters cell: one typed, commented line for every key it accepts.

    Parameters
    ----------
    makes_runs : True for the notebooks that resolve parameters (00, 01, 03); False for those that take
        a run folder as it is (04, 05), where a given value is checked against the folder.
    """
    files = repr(list(DEFAULT_PARAMS_FILES)) if makes_runs else "None"
    lines = [
        f"params_files: list = {files}  # YAML files, later ones win; relative to the repository's root",
        'run_dir: str = ""  # run folder; empty means '
        + ("a new one in results/" if makes_runs else "the newest in results/"),
        "# None means not given: then the params files decide, then the default.",
    ]
    for name in parameter_names():
        field = Experiment.model_fields[name]
        kind, options = parameter_kind(name)
        choice = f" ({' | '.join(options)})" if options else ""
        default = "" if field.default is None or kind is list else f"; default {field.default}"
        lines.append(f"{name}: {kind.__name__} = None  # {field.description}{choice}{default}")
    return "\n".join(lines)


def _literal_assignments(source: str) -> list[str]:
    """The names a cell assigns, if it does nothing but assign literals; otherwise nothing."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return []
    names = []
    for statement in statements:
        targets = (
            statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        )
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or not isinstance(targets[0], ast.Name):
            return []
        try:
            ast.literal_eval(statement.value)
        except ValueError:
            return []
        names.append(targets[0].id)
    return names


def notebook_values(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a notebook's parameters have now, as given by its cell, an edit of it, or papermill.

    Parameters
    ----------
    namespace : the notebook's `globals()`.

    Raises
    ------
    ParameterError : the parameters cell, or the one that papermill injected after it, names what no
        notebook accepts. (papermill itself only warns.)
    """
    accepted = (*OF_A_NOTEBOOK, *parameter_names())
    cells = [_literal_assignments(source) for source in namespace.get("In", [])]
    # From the last time that the parameters cell itself ran: earlier cells may hold a slip since mended.
    own = max((i for i, names in enumerate(cells) if set(accepted) <= set(names)), default=0)
    for names in cells[own:]:
        refuse_unknown(names, accepted, "this notebook's parameters")
    return {name: namespace[name] for name in accepted if namespace.get(name) is not None}


def notebook_experiment(namespace: Mapping[str, Any]) -> Experiment:
    """The Experiment that a notebook's parameters describe (00, 01, 03).

    Raises
    ------
    ParameterError, TopologyError
    """
    values = notebook_values(namespace)
    files = values.pop("params_files", DEFAULT_PARAMS_FILES)
    values.pop("run_dir", None)
    return load_experiment(files, values)


def notebook_run(namespace: Mapping[str, Any]) -> tuple[Path, Experiment]:
    """The run folder that a notebook's `run_dir` means, and its recorded Experiment (04, 05).

    Raises
    ------
    ParameterError : a given value differs from what the run was made with.
    RunFolderError : there is no such run.
    """
    from .run_folder import find_run

    values = notebook_values(namespace)
    files = values.pop("params_files", None)
    run = find_run(values.pop("run_dir", None))
    experiment = load_recorded(run)
    refuse_contradiction(experiment, files or (), values, run)
    return run, experiment


# -- the notebooks, headless


def _report(folder: Path) -> Path:
    """HTML beside each executed notebook; returns the page of the last one."""
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    # The list of all parameters stays in the notebook; a reader wants the given ones, in the injected cell.
    hide = {"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ["parameters"]}}
    exporter = HTMLExporter(config=Config(hide))
    page = folder / "nothing.html"
    for path in sorted(folder.glob("*.ipynb")):
        page = path.with_suffix(".html")
        page.write_text(exporter.from_filename(str(path))[0], encoding="utf-8")
    return page


def run_chain(
    params_files: Sequence[str], given: Mapping[str, Any], run_dir: str = "", out=click.echo
) -> Path:
    """Execute the notebooks with papermill, one after the other; returns the run folder.

    Raises
    ------
    ParameterError, RunFolderError : before anything is started.
    DisaggError : a notebook failed; the message says which, why, and where its executed copy is.
    """
    from .run_folder import RESULTS, free_run_dir, write_manifest

    experiment = load_experiment(params_files, given)
    run = free_run_dir(experiment, run_dir)
    import papermill
    from traitlets.config import Config

    from . import results

    files = [str(Path(f).expanduser()) for f in params_files]
    out(f"run folder: {run}")
    RESULTS.mkdir(exist_ok=True)
    executed = Path(tempfile.mkdtemp(prefix=".notebooks-", dir=RESULTS))
    for name in CHAIN:
        out(f"\n== {name} ({datetime.datetime.now():%H:%M:%S})")
        parameters = {"params_files": files, "run_dir": str(run), **given}
        if run.exists() and executed != run / "notebooks":
            for path in executed.iterdir():
                path.rename(run / "notebooks" / path.name)
            executed.rmdir()
            executed = run / "notebooks"
        copy = executed / f"{name}.ipynb"
        try:
            papermill.execute_notebook(
                NOTEBOOKS / f"{name}.ipynb",
                copy,
                parameters=parameters,
                cwd=NOTEBOOKS,
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                # Sockets in the file system, not TCP ports that any user of this machine could reach.
                config=Config({"KernelManager": {"transport": "ipc"}}),
            )
        except papermill.PapermillExecutionError as error:
            raise DisaggError(
                f"{name} stopped: {error.ename}: {error.evalue}\nIts executed copy: {copy}"
            ) from None
    report = _report(executed)
    write_manifest(run)
    out("\n" + results.format_table(results.runs_table([run])))
    out(f"\nreport: {report}")
    return run


# -- the command line


def _pairs(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
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


class _Group(click.Group):
    """Our own errors end a command with their message and status 1, not with a traceback."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except DisaggError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            context.exit(1)


params_argument = click.argument("params", nargs=-1, type=click.Path())
given_option = click.option(
    "-p", "given", nargs=2, multiple=True, metavar="NAME VALUE", help="One parameter; repeatable."
)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def main():
    """MLPerf v5.1 Llama-3.1-405B on disaggregated TensorRT-LLM: rehearse, launch, judge."""


@main.command()
@params_argument
@given_option
@click.option("--run-dir", default="", help="The run folder to make; default: a new one in results/.")
def run(params, given, run_dir):
    """Run all notebooks, headless, with the params files PARAMS (default: params/rehearsal.yaml)."""
    run_chain(_params_files(params), _pairs(given), str(Path(run_dir).absolute()) if run_dir else "")


def _params_files(names: Sequence[str]) -> list[str]:
    """The params files of a command line: looked for from here, then from the repository's root."""
    here = [Path(name).expanduser().absolute() for name in names]
    found = [
        str(path) if path.exists() and not (REPOSITORY / name).exists() else name
        for path, name in zip(here, names, strict=True)
    ]
    return found or list(DEFAULT_PARAMS_FILES)


@main.command()
def parameters():
    """List every parameter with its default and meaning."""
    for name in parameter_names():
        field = Experiment.model_fields[name]
        click.echo(f"{name}: {field.default}  # {field.description}")


@main.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path())
@click.option("--csv", "csv_file", type=click.Path(), help="Write the table here, too; one row a run.")
def results(folders, csv_file):
    """Print one row for each run folder or LoadGen log folder."""
    from . import results as tables

    table = tables.runs_table(folders)
    if csv_file:
        if Path(csv_file).exists():
            raise ParameterError(
                f"--csv: {csv_file} is there already, and nothing is overwritten. Choose another name"
            )
        table.to_csv(csv_file, index=False)
    click.echo(tables.format_table(table))
    if (table["error"].fillna("") != "").any():
        sys.exit(1)


@main.command()
@params_argument
@given_option
def check(params, given):
    """Check PARAMS against every rule before the queue; exit status 1 if an error is found."""
    from . import preflight

    checks = preflight.check_experiment(load_experiment(_params_files(params), _pairs(given)))
    click.echo(preflight.checks_text(checks))
    errors = sum(not c.ok and c.level == "error" for c in checks)
    warnings = sum(not c.ok and c.level == "warning" for c in checks)
    click.echo(f"{len(checks)} rules: {errors} errors, {warnings} warnings")
    sys.exit(1 if errors else 0)


@main.command("attach")
@click.argument("run_dir", default="")
def attach(run_dir):
    """Follow the job of a run folder (default: the newest) to its end."""
    from .launch import watch
    from .run_folder import find_run

    watch(find_run(run_dir), out=click.echo)


@main.command()
@click.argument("run_dir", default="")
def cancel(run_dir):
    """End the job of a run folder (default: the newest); its servers are ended, too."""
    from . import launch
    from .run_folder import find_run

    state = launch.cancel(find_run(run_dir))
    click.echo(f"{state.run_dir.name}: {state.phase or state.state}")
