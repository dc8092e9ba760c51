"""Which run is meant where none is named: by what it is for and by what its job does, never by luck."""

import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import JobError, RunFolderError
from ..files import read_json, read_json_lines
from ..job.phases import ended
from ..run.folder import EXAMPLE, newest_names, newest_runs
from . import launch

ACTIVE = ("queued", "running")


def active_runs(results: Path | None = None) -> list[Path]:
    """The runs in results/ (or another folder of runs) whose job waits or runs; newest first."""
    return [run for run in newest_runs(results) if launch.job_state(run).state in ACTIVE]


def measured(run: Path) -> bool:
    """Whether LoadGen left logs in a run and its job has ended, if its phases are known."""
    phases = read_json_lines(run / "job/phases.jsonl")
    return any(run.glob("mlperf/*/mlperf_log_detail.txt")) and (not phases or bool(ended(phases)))


def run_for(purpose: str) -> Path:
    """The run that a notebook or a command means where none is named.

    Parameters
    ----------
    purpose : launch: the one whose job is active, else the newest without a job. follow: the one whose job is active.
        read: the newest with LoadGen's logs, else the newest that had a job.

    Raises
    ------
    RunFolderError : there is none, or there are several active ones; the message lists them.
    """
    runs = [run for run in newest_runs() if run.name != EXAMPLE]
    unsent = [run for run in runs if launch.job_state(run, ask=False).state == "not started"]
    if purpose == "read":
        candidates = [run for run in runs if measured(run)] + [run for run in runs if run not in unsent]
        return _first(candidates, "a run whose job was submitted (04_launch)")
    active = active_runs()
    if len(active) > 1:
        raise RunFolderError(f"{len(active)} jobs are active, needed one: name it.\n{labels(active)}")
    if purpose == "follow":
        return _first(active, "a run whose job is queued or running")
    needed = "a run whose job is active or not submitted yet: write one in 03_configuration"
    return _first([*active, *unsent], needed)


def _first(runs: Sequence[Path], needed: str) -> Path:
    if not runs:
        raise RunFolderError(
            f"results/: found no run that is meant here, needed {needed}. The newest: {newest_names()}"
        )
    return runs[0]


def labels(runs: Sequence[Path]) -> str:
    return "\n".join(f"  {run_label(run)}" for run in runs)


def run_label(run: Path) -> str:
    """One line that tells a run from others: its name and what became of it."""
    return f"{run.name}: {state_word(run)}"


def state_word(run: Path) -> str:
    """not submitted, running since when, its verdict, or how its job ended."""
    state = launch.job_state(run, ask=False)
    if state.state == "not started":
        return "not submitted"
    if state.state in ACTIVE:
        state = launch.job_state(run)
    if state.state in ACTIVE:
        minutes, seconds = divmod(int(time.time() - state.phase_time_s), 60)
        return f"{state.phase}, for {minutes}:{seconds:02d}" if state.phase else state.state
    if state.state != "done":
        return f"{state.state}: {state.reason.splitlines()[0][:60]}"
    valid = read_json(run / "tables/result.json").get("valid")  # the verdict that 05 wrote
    return "done, not judged yet" if valid is None else "VALID" if valid else "INVALID"


def submit_alone(run: Path, beside: bool = False) -> launch.JobState:
    """`launch.submit`, refused while another run of the same folder is active, unless that is wanted.

    Raises
    ------
    JobError : another job is active; nothing was submitted.
    """
    with launch.only_one(run.parent / ".submit.lock"):  # the second one sees the first one's job
        record = launch.read_record(run)
        if not beside and (record is None or record["job_id"] is None):
            others = [other for other in active_runs(run.parent) if other.resolve() != run.resolve()]
            if others:
                raise JobError(
                    f"{run.name}: not submitted, another job is active:\n{labels(others)}\nFollow or cancel that one, or "
                    f"submit beside it: `disagg launch {run.name} --beside`, or submit_beside: true in 04"
                )
        return launch.submit(run)
