"""How a notebook gets its parameters, and all notebooks headless, in order."""

import ast
import datetime
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import DisaggError
from .experiment import (
    DEFAULT_PARAMS_FILES,
    REPOSITORY,
    Experiment,
    load_experiment,
    load_recorded,
    parameter_kind,
    parameter_names,
    refuse_contradiction,
    refuse_unknown,
)

NOTEBOOKS = REPOSITORY / "notebooks"
CHAIN = ("00_setup", "01_model_download", "02_plan", "03_configuration", "04_launch", "05_analysis")
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
    from .export import notebook_page

    notebooks = sorted(folder.glob("*.ipynb"))
    for path in notebooks:
        page = notebook_page(path.read_text(encoding="utf-8"), [other.stem for other in notebooks])
        path.with_suffix(".html").write_text(page, encoding="utf-8")
    return notebooks[-1].with_suffix(".html")


def run_chain(
    params_files: Sequence[str],
    given: Mapping[str, Any],
    run_dir: str = "",
    with_plan: bool = False,
    out=print,
) -> Path:
    """Execute the notebooks with papermill, one after the other (02_plan only if asked); returns the run folder.

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
        if name == "02_plan" and not with_plan:
            continue
        out(f"\n== {name} ({datetime.datetime.now():%H:%M:%S})")
        parameters = {"params_files": files, "run_dir": str(run), **given}
        copy = executed / f"{name}.ipynb"
        # Sockets in a folder of our own, not TCP ports that any user of this machine could reach; its path is short,
        # because a socket's path may have about 107 bytes.
        with tempfile.TemporaryDirectory(prefix="k", dir="/tmp") as sockets:
            kernel = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/k"}})
            try:
                papermill.execute_notebook(
                    NOTEBOOKS / f"{name}.ipynb",
                    copy,
                    parameters=parameters,
                    cwd=NOTEBOOKS,
                    progress_bar=False,
                    stdout_file=sys.stdout,
                    stderr_file=sys.stderr,
                    config=kernel,
                )
            except papermill.PapermillExecutionError as error:
                raise DisaggError(
                    f"{name} stopped: {error.ename}: {error.evalue}\nIts executed copy: {copy}"
                ) from None
            except KeyboardInterrupt:
                raise DisaggError(
                    f"interrupted in {name}. A job that was submitted goes on: "
                    f"`python -m disagg_lib attach {run}`, or `cancel`"
                ) from None
        if name == "03_configuration":  # this chain's own: another chain's folder would have stopped it there
            for path in executed.iterdir():
                path.rename(run / "notebooks" / path.name)
            executed.rmdir()
            executed = run / "notebooks"
    report = _report(executed)
    write_manifest(run)
    out("\n" + results.format_table(results.runs_table([run])))
    out(f"\nreport: {report}")
    return run
