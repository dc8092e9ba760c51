"""All notebooks, headless, in order; or the last two, for a run folder that is there."""

import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cluster import launch
from ..cluster.machine import room_check
from ..cluster.preflight import check_experiment
from ..cluster.runs import ACTIVE
from ..errors import DisaggError, PreflightError
from ..experiment.loading import experiment_from
from ..experiment.parameters import Experiment
from ..files import REPOSITORY
from ..run.folder import RESULTS, free_run_dir
from ..run.manifest import write_manifest
from .outcome import outcome_text
from .screen import Screen

NOTEBOOKS = REPOSITORY / "notebooks"
CHAIN = ("00_setup", "01_model_download", "02_plan", "03_configuration", "04_launch", "05_analysis")
LAST = CHAIN[-2:]  # what a run folder still needs
ORIGINAL_QPS = Experiment.model_fields["server_target_qps"].default
MADE_ON_THE_WAY = ("model_folder",)  # rules that 01 meets; 00's setup jobs meet the image's


class Stopped(KeyboardInterrupt):
    """Somebody pressed Ctrl-C; the message says what goes on and how to go on."""


@dataclass(frozen=True)
class Chain:
    """One pass through notebooks: what they are given, where their executed copies go, who is told."""

    run: Path
    parameters: Mapping[str, Any]
    screen: Screen
    verbose: bool = False

    def execute(self, name: str, folder: Path) -> None:
        """One notebook, with papermill; its executed copy in `folder`.

        Raises
        ------
        DisaggError : it failed; the message says which, why, and where its executed copy is.
        Stopped : Ctrl-C.
        """
        import papermill

        run = self.run if name == "04_launch" else None
        try:
            row = self.screen.row(name.replace("_", " "), run)
            with row, _sockets() as kernel, _stderr_kept(self.verbose):
                papermill.execute_notebook(
                    NOTEBOOKS / f"{name}.ipynb",
                    folder / f"{name}.ipynb",
                    parameters=dict(self.parameters),
                    cwd=NOTEBOOKS,
                    progress_bar=False,
                    stdout_file=sys.stdout if self.verbose else None,
                    stderr_file=sys.stderr if self.verbose else None,
                    config=kernel,
                )
        except papermill.PapermillExecutionError as error:
            raise DisaggError(
                f"{name} stopped: {error.ename}: {error.evalue}\nIts executed copy: {folder / name}.ipynb"
            ) from None
        except KeyboardInterrupt:
            raise Stopped(how_to_go_on(self.run, name)) from None


def how_to_go_on(run: Path, name: str) -> str:
    """After Ctrl-C: whether a job goes on, and the command that goes on with this run."""
    shown = shlex.quote(run.name if run.parent == RESULTS else str(run))
    if not (run / "experiment.yaml").is_file():
        return f"Stopped in {name}; nothing was submitted. The same command starts again; a download goes on where it was."
    state = launch.job_state(run)
    if state.state in ACTIVE:
        return (
            f"Stopped watching; job {state.job_id} goes on. Watch again: disagg attach {shown}; "
            f"go on to the report: disagg launch {shown}; end it: disagg cancel {shown}"
        )
    submitted = "its job has ended" if state.ended else "nothing was submitted"
    return f"Stopped in {name}; {submitted}. Go on: disagg launch {shown}"


@contextmanager
def _sockets() -> Iterator[Any]:
    """The kernel's sockets in a folder of our own, not TCP ports that any user of this machine could reach.

    Its path is short, because a socket's path may have about 107 bytes.
    """
    from traitlets.config import Config

    with tempfile.TemporaryDirectory(prefix="k", dir="/tmp") as folder:
        yield Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/k"}})


@contextmanager
def _stderr_kept(verbose: bool) -> Iterator[None]:
    """What the kernel says on the terminal beside our rows (at Ctrl-C a traceback of its own) goes nowhere."""
    if verbose:
        yield
        return
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def refuse_hopeless(experiment: Experiment) -> None:
    """Before hours of download and queue: everything that can be known now, but for what the chain itself makes.

    Raises
    ------
    PreflightError : nothing was downloaded or submitted.
    """
    later = MADE_ON_THE_WAY + (("image", "client_dir") if experiment.setup_jobs == "all" else ())
    checks = [*check_experiment(experiment), room_check(experiment)]
    unmet = [c for c in checks if not c.ok and c.level == "error" and c.rule not in later]
    if unmet:
        lines = "\n".join(f"  {c.rule or c.requirement}: {c.found}. To do: {c.fix}" for c in unmet)
        raise PreflightError(
            f"{len(unmet)} error{'s' * (len(unmet) > 1)}, nothing was downloaded or submitted:\n{lines}\n"
            "`disagg check` says more; --anyway goes on all the same"
        )


def run_chain(
    params_files: Sequence[str] | None,
    given: Mapping[str, Any],
    run_dir: str = "",
    with_plan: bool = False,
    out: Callable[[str], None] = print,
    verbose: bool = False,
    anyway: bool = False,
    beside: bool = False,
) -> Path:
    """Execute the notebooks with papermill, one after the other (02_plan only if asked); returns the run folder.

    Parameters
    ----------
    verbose : all that the notebooks print. anyway : although preflight finds errors. beside : although another job is active.

    Raises
    ------
    ParameterError, RunFolderError, PreflightError : before anything is started.
    DisaggError : a notebook failed. Stopped : Ctrl-C.
    """
    experiment = experiment_from(params_files, given, "-p")
    run = free_run_dir(experiment, run_dir)
    if not anyway:
        refuse_hopeless(experiment)
    out(f"run folder: {run}")
    RESULTS.mkdir(exist_ok=True)
    files = {}
    if params_files is not None:
        files = {"params_files": [str(Path(f).expanduser()) for f in params_files]}
    chain = Chain(run, _parameters(run, beside) | files | dict(given), Screen(out), verbose)
    executed = Path(tempfile.mkdtemp(prefix=".notebooks-", dir=RESULTS))
    for name in CHAIN[:-2]:
        if name != "02_plan" or with_plan:
            chain.execute(name, executed)
    for path in executed.iterdir():  # the run folder is our own: another's would have stopped the chain in 03
        path.rename(run / "notebooks" / path.name)
    executed.rmdir()
    _to_the_report(chain, out)
    if not (files or given):
        load = f"params/rehearsal.yaml -p server_target_qps={ORIGINAL_QPS:g}"
        out(f"\nThe original's load, and why not: disagg run {load}")
    return run


def launch_run(
    run: Path, out: Callable[[str], None] = print, verbose: bool = False, beside: bool = False
) -> Path:
    """Submit a run or attach to its job, follow it to the end, and analyse it: 04 and 05."""
    return _to_the_report(Chain(run, _parameters(run, beside), Screen(out), verbose), out)


def _parameters(run: Path, beside: bool) -> dict[str, Any]:
    return {"run_dir": str(run)} | ({"submit_beside": True} if beside else {})


def _to_the_report(chain: Chain, out: Callable[[str], None]) -> Path:
    """04 and 05, a page of HTML beside each executed notebook, and the outcome in words."""
    from ..sharing.pages import notebook_page

    folder = chain.run / "notebooks"
    for name in LAST:
        chain.execute(name, folder)
    notebooks = sorted(folder.glob("*.ipynb"))
    for path in notebooks:
        page = notebook_page(path.read_text(encoding="utf-8"), [other.stem for other in notebooks])
        path.with_suffix(".html").write_text(page, encoding="utf-8")
    write_manifest(chain.run)
    out(f"\n{outcome_text(chain.run)}\n\nreport: {notebooks[-1].with_suffix('.html')}")
    return chain.run
