"""Submit, attach, follow, cancel: the only module that starts jobs.

A job's identity is in the run folder (job/job.json), so any notebook or terminal finds it again.
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from . import job_agent
from .errors import DisaggError
from .experiment import load_recorded
from .run_folder import read_json_lines

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
SCRIPT_LOG = "job/disagg_405B_slurm_log.txt"


class JobError(DisaggError):
    """A job cannot be submitted, found or followed."""


@dataclass(frozen=True)
class JobState:
    """What is known of a job from its run folder and its launcher."""

    run_dir: Path
    job_id: str | None
    state: str  # not started | running | done | failed | lost
    phase: str  # newest line of phases.jsonl, or ''
    phase_time_s: float  # Unix time at which it began
    reason: str  # why it failed, or ''
    progress: dict | None  # newest line of progress.jsonl: issued, done, failed, outstanding, tokens, total

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed", "lost")


def _record(run_dir: Path) -> dict | None:
    path = run_dir / "job/job.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        return {"launcher": "local", "job_id": None}  # another process is writing it this very moment


def _process(record: dict) -> psutil.Process | None:
    """The job's process, if it is still the same one: a pid alone may have gone to another program."""
    try:
        process = psutil.Process(int(record["job_id"]))
        same = abs(process.create_time() - record["create_time_s"]) < 1.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.NoSuchProcess, KeyError, TypeError):
        return None


def submit(run_dir: Path) -> JobState:
    """Start the run's job, once: a folder that has one is attached to instead.

    Raises
    ------
    JobError : no such launcher here, or the job script could not be started.
    """
    experiment = load_recorded(run_dir)
    if experiment.launcher != "local":
        raise JobError(
            f"{run_dir.name}: launcher: slurm is not built yet. Submit by hand: cd {run_dir} && sbatch job.sh, "
            f"or make a run with launcher: local and engine: rehearsal"
        )
    record_path = run_dir / "job/job.json"
    try:
        # Exclusive creation decides between two notebooks that press the button at once.
        record = record_path.open("x")
    except FileExistsError:
        return job_state(run_dir)
    with record, (run_dir / SCRIPT_LOG).open("ab") as log:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in SECRETS and not name.startswith("SLURM_")
        }
        process = subprocess.Popen(
            ["bash", "job.sh"],
            cwd=run_dir,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # outlives the notebook's kernel
        )
        threading.Thread(target=process.wait, daemon=True).start()  # reaps it, should it end before we do
        created = psutil.Process(process.pid).create_time()
        json.dump({"launcher": "local", "job_id": process.pid, "create_time_s": created}, record)
    return job_state(run_dir)


def job_state(run_dir: Path) -> JobState:
    """What the job is doing now."""
    record = _record(run_dir)
    phases = read_json_lines(run_dir / "job/phases.jsonl")
    alive = record is not None and (record["job_id"] is None or _process(record) is not None)
    if not alive:  # read once more: the job may have ended between the two looks
        phases = read_json_lines(run_dir / "job/phases.jsonl")
    phase = phases[-1]["phase"] if phases else ""
    reason = ""
    if job_agent.ended(phases):
        state = "done" if phase == "done" else "failed"
        reason = phase.partition(": ")[2]
    elif record is None:
        state = "not started"
    elif alive:
        state = "running"
    else:
        state = "lost"
        reason = f"the job script is gone without a last word: {job_agent.last_lines(run_dir / SCRIPT_LOG)}"
    progress = read_json_lines(run_dir / "job/progress.jsonl")
    return JobState(
        run_dir=run_dir,
        job_id=None if record is None else str(record["job_id"]),
        state=state,
        phase=phase,
        phase_time_s=phases[-1]["time_s"] if phases else 0.0,
        reason=reason,
        progress=progress[-1] if progress else None,
    )


def follow(run_dir: Path, poll_s: float = 0.5) -> Iterator[JobState]:
    """Yield the job's state until it has ended; the last one yielded has `ended`.

    Raises
    ------
    JobError : the run has no job.
    """
    while True:
        state = job_state(run_dir)
        if state.state == "not started":
            raise JobError(f"{run_dir.name} has no job yet: submit it first (04_launch)")
        yield state
        if state.ended:
            return
        time.sleep(poll_s)


def progress_line(state: JobState, tokens_per_s: float | None = None) -> str:
    """One line for people: phase, queries done, tokens/s, outstanding."""
    p = state.progress
    if state.ended:
        return state.phase or f"{state.state}: {state.reason}"
    if p is None or p["mode"] != state.phase:
        return state.phase or "starting"
    speed = "" if tokens_per_s is None else f", {tokens_per_s:,.0f} tokens/s"
    failed = f", {p['failed']} FAILED" if p["failed"] else ""
    total = p["total"] if p["total"] is not None else "?"
    return f"{state.phase}: {p['done']}/{total} queries done, {p['outstanding']} outstanding{speed}{failed}"


def watch(run_dir: Path, every_s: float = 5.0, out=print) -> JobState:
    """Follow the job to its end, with a line at each new phase and every `every_s` seconds.

    Raises
    ------
    JobError : the job failed or was lost; the message has the reason and where to look.
    """
    said_at, said_phase, before = 0.0, None, None
    for state in follow(run_dir):
        now = time.monotonic()
        if state.phase == said_phase and now - said_at < every_s and not state.ended:
            continue
        p, speed = state.progress, None
        if (
            p is not None
            and before is not None
            and p["mode"] == before["mode"]
            and p["time_s"] > before["time_s"]
        ):
            speed = (p["tokens"] - before["tokens"]) / (p["time_s"] - before["time_s"])
        out(f"{time.strftime('%H:%M:%S')}  {progress_line(state, speed)}")
        said_at, said_phase, before = now, state.phase, p
    if state.state != "done":
        raise JobError(
            f"{run_dir.name}: {state.state}: {state.reason}. Logs: {run_dir / 'logs'}, {run_dir / SCRIPT_LOG}"
        )
    return state


def cancel(run_dir: Path, grace_s: float = 20.0) -> JobState:
    """End the job as scancel would: teardown runs; after `grace_s` whatever is left is killed.

    Raises
    ------
    JobError : the run has no job.
    """
    record = _record(run_dir)
    if record is None:
        raise JobError(f"{run_dir.name} has no job to cancel")
    process = _process(record)
    if process is not None:
        family = process.children(recursive=True)
        process.send_signal(signal.SIGTERM)
        psutil.wait_procs([process], timeout=grace_s)
        for survivor in [process, *family]:
            if survivor.is_running():
                survivor.kill()
    return job_state(run_dir)
