"""All notebooks, headless, in order."""

import datetime
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DisaggError
from ..experiment.loading import load_experiment
from ..files import REPOSITORY

NOTEBOOKS = REPOSITORY / "notebooks"
CHAIN = ("00_setup", "01_model_download", "02_plan", "03_configuration", "04_launch", "05_analysis")


def _report(folder: Path) -> Path:
    """HTML beside each executed notebook; returns the page of the last one."""
    from ..sharing.pages import notebook_page

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
    from ..run.folder import RESULTS, free_run_dir
    from ..run.manifest import write_manifest

    experiment = load_experiment(params_files, given)
    run = free_run_dir(experiment, run_dir)
    import papermill
    from traitlets.config import Config

    from ..results.rows import format_table, runs_table

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
    out("\n" + format_table(runs_table([run])))
    out(f"\nreport: {report}")
    return run
