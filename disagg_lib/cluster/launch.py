"""Submit, attach, follow, cancel: the only module that starts jobs and the only one that talks to Slurm.

A job's identity is in the run folder (job/job.json), so any notebook or terminal finds it again. What a job is
doing is read from the run folder's own files first; Slurm is asked for what they cannot say: the queue, and how
a job ended that left no last word.
"""

import fcntl
import json
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from ..errors import JobError, NoAnswer
from ..experiment.loading import load_recorded
from ..experiment.parameters import Experiment
from ..files import read_json, read_json_lines
from ..job.deaths import last_lines
from ..job.phases import ended
from .slurm import SLURM_STATES, find_by_comment, job_environment, job_word, knows_segment, queue_note, slurm

SCRIPT_LOG = "job/disagg_405B_slurm_log.txt"

FINAL_WORD_S = 15.0  # a shared file system may hide that long the last lines of a job that has ended


@dataclass(frozen=True)
class JobState:
    """What is known of a job from its run folder and its launcher."""

    run_dir: Path
    job_id: str | None
    state: str  # not started | queued | running | done | failed | lost
    phase: str  # newest line of phases.jsonl, or ''
    phase_time_s: float  # Unix time at which it began
    reason: str  # why it failed, or ''
    progress: dict | None  # newest line of progress.jsonl: issued, done, failed, outstanding, tokens, total
    note: str = ""  # what the launcher says: place in the queue and why, or that it does not answer

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed", "lost")


def _record_path(run_dir: Path) -> Path:
    return run_dir / "job/job.json"


def read_record(run_dir: Path) -> dict | None:
    try:
        return json.loads(_record_path(run_dir).read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        raise JobError(
            f"{_record_path(run_dir)}: not as this release writes it. Look for the job with squeue"
        ) from None


def _write_record(run_dir: Path, record: dict) -> None:
    draft = _record_path(run_dir).with_suffix(".draft")
    draft.write_text(json.dumps(record) + "\n")
    draft.replace(_record_path(run_dir))


@contextmanager
def only_one(path: Path) -> Iterator[int]:
    """Two notebooks that press the button at once take turns at this file; yields the lock's descriptor.

    sbatch inherits it: a kernel that is killed while sbatch is under way leaves the lock to sbatch, so that nobody
    looks for the job before it can be found.
    """
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def submit(run_dir: Path) -> JobState:
    """Start the run's job, once: a folder that has one is attached to instead.

    Raises
    ------
    JobError : the launcher is absent or refused the job; nothing was started.
    NoAnswer : Slurm does not answer; run it again, and a job that did get through is found, not sent twice.
    """
    experiment = load_recorded(run_dir)
    with only_one(run_dir / "job/submit.lock") as lock:
        record = read_record(run_dir)
        if record is None or record["job_id"] is None:
            if ended(read_json_lines(run_dir / "job/phases.jsonl")):
                raise JobError(
                    f"{run_dir.name}: its job was run by hand and has ended. Make a new run (03_configuration)"
                )
            _refuse_outdated(run_dir, experiment)
            start = _submit_local if experiment.launcher == "local" else _submit_slurm
            _write_record(run_dir, start(run_dir, experiment, record, lock))
    return job_state(run_dir)


def _refuse_outdated(run_dir: Path, experiment: Experiment) -> None:
    """The stand-in server is this release's: a rehearsal's job script of an earlier one would not find its own."""
    if experiment.engine == "rehearsal" and not (run_dir / "job/program").is_dir():
        made_by = read_json(run_dir / "manifest.json").get("git", {}).get("commit") or "an earlier release"
        raise JobError(
            f"{run_dir.name}: written by {made_by}, whose stand-in server is no longer here. "
            "Make a new run (03_configuration)"
        )


def _submit_local(run_dir: Path, experiment: Experiment, record: dict | None, lock: int) -> dict:
    with (run_dir / SCRIPT_LOG).open("ab") as log:
        process = subprocess.Popen(
            ["bash", "job.sh"],
            cwd=run_dir,
            env=job_environment(experiment.engine),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # outlives the notebook's kernel
        )
    threading.Thread(target=process.wait, daemon=True).start()  # reaps it, should it end before we do
    created = psutil.Process(process.pid).create_time()
    return {"launcher": "local", "job_id": str(process.pid), "create_time_s": created}


def _submit_slurm(run_dir: Path, experiment: Experiment, record: dict | None, lock: int) -> dict:
    if record is None:
        # Kept before sbatch is called: should its answer be lost, this comment finds the job.
        comment = f"disagg_lib {run_dir.name} {uuid.uuid4().hex}"
        record = {"launcher": "slurm", "job_id": None, "comment": comment}
        _write_record(run_dir, record)
    elif found := find_by_comment(record["comment"]):
        return record | {"job_id": found}
    command = ["sbatch", "--parsable", f"--comment={record['comment']}"]
    if experiment.segment and knows_segment():
        command.append(f"--segment={experiment.segment}")
    try:
        environment = job_environment(experiment.engine)
        answer = slurm(*command, "job.sh", tries=1, cwd=run_dir, environment=environment, keep=(lock,))
        return record | {"job_id": answer.strip().split(";")[0]}
    except NoAnswer as silence:
        if found := find_by_comment(record["comment"]):
            return record | {"job_id": found}
        raise NoAnswer(
            f"{run_dir.name}: {silence}. No job was found; submit again (it will not be sent twice)"
        ) from None
    except JobError as refusal:
        _record_path(run_dir).unlink()
        raise JobError(
            f"{run_dir.name}: not submitted. {refusal}. `python -m disagg_lib check` says more; partition and account stand in params/site.yaml"
        ) from None


def _process(record: dict) -> psutil.Process | None:
    """The job's process, if it is still the same one: a pid alone may have gone to another program."""
    try:
        process = psutil.Process(int(record["job_id"]))
        # Whenever the clock is set right, its time of creation moves; no pid comes round again within a minute.
        same = abs(process.create_time() - record["create_time_s"]) < 60.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _from_files(run_dir: Path, record: dict | None) -> JobState:
    """The state as the run folder alone tells it; 'running' for a job without a last word."""
    phases = read_json_lines(run_dir / "job/phases.jsonl")
    progress = read_json_lines(run_dir / "job/progress.jsonl", end_bytes=4000)
    phase = phases[-1]["phase"] if phases else ""
    state = "not started" if record is None else "running"
    if ended(phases):
        state = "done" if phase == "done" else "failed"
    return JobState(
        run_dir=run_dir,
        job_id=None if record is None else record["job_id"],
        state=state,
        phase=phase,
        phase_time_s=phases[-1]["time_s"] if phases else 0.0,
        reason=phase.partition(": ")[2] if state == "failed" else "",
        progress=progress[-1] if progress else None,
    )


def job_state(run_dir: Path, ask: bool = True) -> JobState:
    """What the job is doing now.

    Parameters
    ----------
    ask : False to read files alone, without a question to the launcher.
    """
    record = read_record(run_dir)
    state = _from_files(run_dir, record)
    if state.state != "running" or not ask:
        return state
    if record["job_id"] is None:
        return replace(state, note="being submitted")
    if record["launcher"] == "local":
        return state if _process(record) else _last_word(run_dir, record, "the job script is gone")
    try:
        word, detail = job_word(record["job_id"])
        if word == "PENDING":
            return replace(state, state="queued", note=queue_note(record["job_id"], detail))
    except JobError as silence:
        return replace(
            state, note=f"Slurm does not answer ({silence}); the job goes on as far as anyone knows"
        )
    ended, meaning = SLURM_STATES.get(word, (False, "a state that this release does not know"))
    if word and not ended:
        return replace(state, note="" if word == "RUNNING" else f"{word}: {meaning}")
    what = f"{word}: {meaning}" if word else f"Slurm knows no job {record['job_id']}"
    return _last_word(run_dir, record, what, FINAL_WORD_S)


def _last_word(run_dir: Path, record: dict, what: str, patience_s: float = 0.5) -> JobState:
    """The state of a job that has ended: by its own last word, for which a shared file system may need a while."""
    deadline = time.monotonic() + patience_s
    while True:
        state = _from_files(run_dir, record)
        if state.ended:
            return state
        if time.monotonic() > deadline:
            tail = last_lines(run_dir / SCRIPT_LOG)
            phase = f" during {state.phase}" if state.phase else " before its first phase"
            return replace(state, state="lost", reason=f"{what}{phase}, without a last word: {tail}")
        time.sleep(0.5)


def cancel(run_dir: Path, grace_s: float = 20.0) -> JobState:
    """End the job: its teardown runs, and after `grace_s` whatever is left is killed.

    Raises
    ------
    JobError : the run has no job, or Slurm refused.
    """
    record = read_record(run_dir)
    if record is None or record["job_id"] is None:
        raise JobError(f"{run_dir.name} has no job to cancel")
    if (state := job_state(run_dir, ask=False)).ended:
        return state
    (run_dir / "job/cancelled").touch()  # the agent tells this end from the time limit's by it
    if record["launcher"] == "slurm":
        if job_word(record["job_id"])[0] != "PENDING":
            slurm("scancel", "--batch", "--signal=TERM", record["job_id"])
            deadline = time.monotonic() + grace_s
            while not job_state(run_dir, ask=False).ended and time.monotonic() < deadline:
                time.sleep(0.5)
        if not job_state(run_dir, ask=False).ended:
            slurm("scancel", record["job_id"])
    elif process := _process(record):
        family = process.children(recursive=True)
        process.send_signal(signal.SIGTERM)
        psutil.wait_procs([process], timeout=grace_s)
        for survivor in [process, *family]:
            if survivor.is_running():
                survivor.kill()
    return job_state(run_dir)
