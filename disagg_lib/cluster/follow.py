"""Submit, attach, follow, cancel: the only module that starts jobs and the only one that talks to Slurm.

A job's identity is in the run folder (job/job.json), so any notebook or terminal finds it again. What a job is
doing is read from the run folder's own files first; Slurm is asked for what they cannot say: the queue, and how
a job ended that left no last word.
"""

import fcntl
import getpass
import json
import os
import re
import shutil
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

from . import job_agent
from .errors import DisaggError
from .experiment import Experiment, load_recorded
from .run_folder import GrowingLines, read_json_lines

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW(OR)?D|API_?KEY|CREDENTIAL", re.I)  # of a variable
SCRIPT_LOG = "job/disagg_405B_slurm_log.txt"
COMMAND_TIMEOUT_S = 20.0  # a Slurm command that takes longer has not answered
FINAL_WORD_S = (
    15.0  # how long a shared file system may hide the last lines of a job that Slurm says has ended
)

# Slurm's job states (squeue and sacct manuals): do they end a job, and what do they mean for it.
SLURM_STATES = {
    "PENDING": (False, "waiting in the queue"),
    "CONFIGURING": (False, "nodes are being prepared"),
    "RUNNING": (False, "running"),
    "COMPLETING": (False, "ending; nodes are being given back"),
    "STAGE_OUT": (False, "staging out files"),
    "SIGNALING": (False, "being signalled"),
    "SUSPENDED": (False, "suspended by an administrator or the scheduler"),
    "STOPPED": (False, "stopped with SIGSTOP; its nodes are still held"),
    "RESIZING": (False, "changing its size"),
    "REQUEUED": (False, "put back into the queue; a restart refuses the used folder: make a new run"),
    "REQUEUE_HOLD": (False, "put back into the queue and held: cancel it and make a new run"),
    "REQUEUE_FED": (False, "put back into the queue of a federation: cancel it and make a new run"),
    "RESV_DEL_HOLD": (False, "held: its reservation was deleted"),
    "SPECIAL_EXIT": (False, "requeued with a special exit state: cancel it and make a new run"),
    "COMPLETED": (True, "its script ended with status 0"),
    "FAILED": (True, "its script ended with a status other than 0"),
    "CANCELLED": (True, "cancelled by a user or an administrator"),
    "TIMEOUT": (True, "ended at its time limit: raise time_limit"),
    "NODE_FAIL": (True, "a node failed: submit a new run, and tell the administrators which node"),
    "PREEMPTED": (True, "preempted by a job of higher priority: use another partition or QOS"),
    "OUT_OF_MEMORY": (True, "out of host memory on a node"),
    "BOOT_FAIL": (True, "a node did not boot: submit a new run"),
    "DEADLINE": (True, "ended at its deadline"),
    "REVOKED": (True, "taken over by another cluster of the federation"),
}


class JobError(DisaggError):
    """A job cannot be submitted, found or followed."""


class NoAnswer(JobError):
    """Slurm did not answer; nothing is known of the job, least of all that it has ended."""


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


# -- Slurm's commands


def slurm(
    *command: str,
    tries: int = 3,
    cwd: Path | None = None,
    environment: dict | None = None,
    text: str | None = None,
    keep: tuple[int, ...] = (),
) -> str:
    """Standard output of a Slurm command, which may read `text` from its standard input and inherits the files `keep`.

    Raises
    ------
    NoAnswer : it did not answer within its time, `tries` times.
    JobError : it is not on PATH, or refused; the message is Slurm's.
    """
    if shutil.which(command[0]) is None:
        raise JobError(
            f"{command[0]} is not on PATH. Go to a login node of the cluster, or set launcher: local for a rehearsal here"
        )
    problem = ""
    for number in range(tries):
        if number:
            time.sleep(2.0**number)
        try:
            done = subprocess.run(
                command,
                cwd=cwd,
                env=environment,
                input=text,
                capture_output=True,
                text=True,
                timeout=COMMAND_TIMEOUT_S,
                pass_fds=keep,
            )
        except subprocess.TimeoutExpired:
            problem = f"no answer within {COMMAND_TIMEOUT_S:.0f} s"
            continue
        if done.returncode == 0:
            return done.stdout
        problem = " ".join(done.stderr.split()) or f"status {done.returncode}"
        if not _is_silence(problem):
            raise JobError(f"{command[0]}: {problem}")
    raise NoAnswer(f"{command[0]}: {problem}")


@dataclass(frozen=True)
class Partition:
    """What sinfo says of a partition."""

    name: str
    is_default: bool
    is_up: bool
    time_limit_s: float  # inf: none
    nodes: int


def partitions() -> list[Partition]:
    """Every partition that this user sees.

    Raises
    ------
    JobError, NoAnswer
    """
    found = []
    for line in slurm("sinfo", "--noheader", "--summarize", "--format=%P|%a|%l|%D").splitlines():
        name, up, limit, nodes = line.strip().split("|")
        days, _, clock = limit.rpartition("-")
        seconds = float("inf")
        if clock[:1].isdigit():
            seconds = 0.0
            for part in clock.split(":"):
                seconds = seconds * 60 + int(part)
            seconds += 86400 * int(days or 0)
        found.append(Partition(name.rstrip("*"), name.endswith("*"), up == "up", seconds, int(nodes)))
    return found


def accounts() -> list[str]:
    """The accounts that this user may charge; empty if accounting does not say.

    Raises
    ------
    NoAnswer
    """
    try:
        text = slurm(
            "sacctmgr",
            "--noheader",
            "--parsable2",
            "show",
            "associations",
            f"user={getpass.getuser()}",
            "format=account",
        )
    except NoAnswer:
        raise
    except JobError:  # no accounting on this cluster
        return []
    return sorted(set(text.split()))


def knows_segment() -> bool:
    """Whether this cluster's sbatch has --segment (Slurm 23.11 and newer)."""
    return "--segment" in slurm("sbatch", "--help")


def test_submission(script: str) -> None:
    """Ask the controller whether it would take this job script.

    Raises
    ------
    JobError : it would not; the message is sbatch's.
    """
    slurm("sbatch", "--test-only", environment=_environment(), text=script)


def _is_silence(message: str) -> bool:
    """Whether an error says that the controller did not answer, rather than that it said no."""
    signs = (
        "contact slurm controller",
        "Socket timed out",
        "Connection refused",
        "Zero Bytes",
        "Connection timed out",
    )
    return any(sign.lower() in message.lower() for sign in signs)


def _find_by_comment(comment: str) -> str | None:
    """Id of the job with this comment, also if it has ended lately."""
    for line in slurm("squeue", "--noheader", "--states=all", "--format=%i|%k").splitlines():
        job_id, _, text = line.strip().partition("|")
        if text == comment:
            return job_id
    return None


def _slurm_state(job_id: str) -> tuple[str, str]:
    """(state, detail) of a job, from the queue, then accounting, then the controller's memory; ('', '') if unknown.

    Raises
    ------
    NoAnswer
    """
    try:
        lines = slurm(
            "squeue", "--noheader", f"--jobs={job_id}", "--states=all", "--format=%T|%r"
        ).splitlines()
    except NoAnswer:
        raise
    except JobError:  # 'Invalid job id': the controller has forgotten it
        lines = []
    if lines:
        state, _, why = lines[0].strip().partition("|")
        return state, "" if why == "None" else why
    for command in (
        ("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", "--format=State,Reason"),
        ("scontrol", "--oneliner", "show", "job", job_id),
    ):
        try:
            text = slurm(*command, tries=1).strip()
        except JobError:
            continue
        if command[0] == "sacct" and text:
            state, _, why = text.splitlines()[-1].partition("|")
            return state.split()[0], "" if why == "None" else why  # 'CANCELLED by 1000'
        if "JobState=" in text:
            fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
            return fields["JobState"], fields.get("Reason", "").replace("None", "")
    return "", ""


def _queue_note(job_id: str, why: str) -> str:
    """'place 3 of 7 in the queue (Priority)'."""
    pending = slurm("squeue", "--noheader", "--states=PENDING", "--sort=-p,i", "--format=%i").split()
    place = (
        f"place {pending.index(job_id) + 1} of {len(pending)} in the queue"
        if job_id in pending
        else "in the queue"
    )
    return f"{place} ({why})" if why else place


# -- submit


def _record_path(run_dir: Path) -> Path:
    return run_dir / "job/job.json"


def _record(run_dir: Path) -> dict | None:
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
def _only_one(run_dir: Path) -> Iterator[int]:
    """Two notebooks that press the button at once take turns; yields the lock's descriptor.

    sbatch inherits it: a kernel that is killed while sbatch is under way leaves the lock to sbatch, so that nobody
    looks for the job before it can be found.
    """
    with (run_dir / "job/submit.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _environment(engine: str = "") -> dict[str, str]:
    """Ours, without secrets, and without the variables of an allocation that we ourselves may run in.

    An external endpoint's key is the one secret that the measuring client needs.
    """
    return {
        n: v
        for n, v in os.environ.items()
        if (not SECRET_NAME.search(n) or (n == "OPENAI_API_KEY" and engine == "external"))
        and (n == "SLURM_CONF" or not n.startswith("SLURM_"))
    }


def submit(run_dir: Path) -> JobState:
    """Start the run's job, once: a folder that has one is attached to instead.

    Raises
    ------
    JobError : the launcher is absent or refused the job; nothing was started.
    NoAnswer : Slurm does not answer; run it again, and a job that did get through is found, not sent twice.
    """
    experiment = load_recorded(run_dir)
    with _only_one(run_dir) as lock:
        record = _record(run_dir)
        if record is None or record["job_id"] is None:
            if job_agent.ended(read_json_lines(run_dir / "job/phases.jsonl")):
                raise JobError(
                    f"{run_dir.name}: its job was run by hand and has ended. Make a new run (03_configuration)"
                )
            start = _submit_local if experiment.launcher == "local" else _submit_slurm
            _write_record(run_dir, start(run_dir, experiment, record, lock))
    return job_state(run_dir)


def _submit_local(run_dir: Path, experiment: Experiment, record: dict | None, lock: int) -> dict:
    with (run_dir / SCRIPT_LOG).open("ab") as log:
        process = subprocess.Popen(
            ["bash", "job.sh"],
            cwd=run_dir,
            env=_environment(experiment.engine),
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
        record = {
            "launcher": "slurm",
            "job_id": None,
            "comment": f"disagg_lib {run_dir.name} {uuid.uuid4().hex}",
        }
        _write_record(run_dir, record)
    else:
        found = _find_by_comment(record["comment"])
        if found:
            return record | {"job_id": found}
    command = ["sbatch", "--parsable", f"--comment={record['comment']}"]
    if experiment.segment and knows_segment():
        command.append(f"--segment={experiment.segment}")
    try:
        answer = slurm(
            *command,
            "job.sh",
            tries=1,
            cwd=run_dir,
            environment=_environment(experiment.engine),
            keep=(lock,),
        )
        return record | {"job_id": answer.strip().split(";")[0]}
    except NoAnswer as silence:
        found = _find_by_comment(record["comment"])
        if found:
            return record | {"job_id": found}
        raise NoAnswer(
            f"{run_dir.name}: {silence}. No job was found; submit again (it will not be sent twice)"
        ) from None
    except JobError as refusal:
        _record_path(run_dir).unlink()
        raise JobError(
            f"{run_dir.name}: not submitted. {refusal}. `python -m disagg_lib check` says more; partition and account stand in params/site.yaml"
        ) from None


# -- follow


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
    if job_agent.ended(phases):
        state = "done" if phase == "done" else "failed"
    else:
        state = "not started" if record is None else "running"
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
    record = _record(run_dir)
    state = _from_files(run_dir, record)
    if state.state != "running" or not ask:
        return state
    if record["job_id"] is None:
        return replace(state, note="being submitted")
    if record["launcher"] == "local":
        if _process(record) is not None:
            return state
        return _last_word(run_dir, record, "the job script is gone")
    try:
        word, detail = _slurm_state(record["job_id"])
        if word == "PENDING":
            return replace(state, state="queued", note=_queue_note(record["job_id"], detail))
    except JobError as silence:
        return replace(
            state, note=f"Slurm does not answer ({silence}); the job goes on as far as anyone knows"
        )
    ended, meaning = SLURM_STATES.get(word, (False, "a state that this release does not know"))
    if word and not ended:
        return replace(state, note="" if word == "RUNNING" else f"{word}: {meaning}")
    return _last_word(
        run_dir,
        record,
        f"{word}: {meaning}" if word else f"Slurm knows no job {record['job_id']}",
        FINAL_WORD_S,
    )


def _last_word(run_dir: Path, record: dict, what: str, patience_s: float = 0.5) -> JobState:
    """The state of a job that has ended: by its own last word, for which a shared file system may need a while."""
    deadline = time.monotonic() + patience_s
    while True:
        state = _from_files(run_dir, record)
        if state.ended:
            return state
        if time.monotonic() > deadline:
            tail = job_agent.last_lines(run_dir / SCRIPT_LOG)
            phase = f" during {state.phase}" if state.phase else " before its first phase"
            return replace(state, state="lost", reason=f"{what}{phase}, without a last word: {tail}")
        time.sleep(0.5)


def follow(run_dir: Path, poll_s: float = 0.5, ask_every_s: float = 10.0) -> Iterator[JobState]:
    """Yield the job's state until it has ended; the last one yielded has `ended`.

    Parameters
    ----------
    poll_s : how often the run folder is read.
    ask_every_s : how often Slurm is asked; a local job's process is looked at each time.

    Raises
    ------
    JobError : the run has no job.
    """
    asked, note, word = -1e9, "", "running"
    while True:
        local = (_record(run_dir) or {}).get("launcher") != "slurm"
        ask = local or time.monotonic() - asked >= ask_every_s
        state = job_state(run_dir, ask=ask)
        if state.state == "not started":
            raise JobError(f"{run_dir.name} has no job yet: submit it first (04_launch)")
        if ask:
            asked, note, word = time.monotonic(), state.note, state.state
        elif state.state == "running":
            state = replace(state, note=note, state=word if not state.phase else "running")
        yield state
        if state.ended:
            return
        time.sleep(poll_s)


def progress_line(state: JobState, tokens_per_s: float | None = None) -> str:
    """One line for people: phase, queries done, tokens/s, outstanding."""
    p = state.progress
    note = f" [{state.note}]" if state.note else ""
    if state.state == "lost":
        return f"lost: {state.reason}"
    if state.ended:
        return state.phase
    if p is None or p["mode"] != state.phase:
        return (state.phase or state.state) + note
    speed = "" if tokens_per_s is None else f", {tokens_per_s:,.0f} tokens/s"
    kinds = ", ".join(f"{count} {kind}" for kind, count in p.get("kinds", {}).items())
    failed = f", {p['failed']} FAILED ({kinds})" if p["failed"] else ""
    total = p["total"] if p["total"] is not None else "?"
    trial = f" at {p['target_qps']:g} queries/s" if state.phase == "find_target_qps" else ""
    return f"{state.phase}{trial}: {p['done']}/{total} queries done, {p['outstanding']} outstanding{speed}{failed}{note}"


def trial_line(row: dict) -> str:
    """One line for people: what a trial of find_target_qps found."""
    words = ["VALID" if row["valid"] else "INVALID"]
    if None not in (row["ttft_share"], row["tpot_share"]):
        words.append(f"TTFT {row['ttft_share']:.2f} and TPOT {row['tpot_share']:.2f} of the limit")
    if row.get("failed"):
        words.append(f"{row['failed']} requests failed")
    return f"trial: {row['queries']} queries at {row['qps']:g} queries/s: {', '.join(words)}"


def watch(run_dir: Path, every_s: float = 5.0, out=print) -> JobState:
    """Follow the job to its end, with a line at each new phase and every `every_s` seconds.

    Raises
    ------
    JobError : the job failed or was lost; the message has the reason and where to look.
    """
    said_at, said, before = 0.0, None, None
    trials = GrowingLines(run_dir / "job/find_target_qps.jsonl")
    for state in follow(run_dir):
        now = time.monotonic()
        for row in trials.new_rows():
            out(f"{time.strftime('%H:%M:%S')}  {trial_line(row)}")
        words = (state.phase, state.note, state.state)
        if words == said and now - said_at < every_s and not state.ended:
            continue
        p, speed = state.progress, None
        if (
            p is not None
            and before is not None
            and p["mode"] == before["mode"]
            and p["time_s"] > before["time_s"]
            and p["tokens"] >= before["tokens"]
        ):
            speed = (p["tokens"] - before["tokens"]) / (p["time_s"] - before["time_s"])
        out(f"{time.strftime('%H:%M:%S')}  {progress_line(state, speed)}")
        said_at, said, before = now, words, p
    if state.state != "done":
        raise JobError(
            f"{run_dir.name}: {state.state}: {state.reason}. Logs: {run_dir / 'logs'}, {run_dir / SCRIPT_LOG}"
        )
    return state


# -- cancel


def cancel(run_dir: Path, grace_s: float = 20.0) -> JobState:
    """End the job: its teardown runs, and after `grace_s` whatever is left is killed.

    Raises
    ------
    JobError : the run has no job, or Slurm refused.
    """
    record = _record(run_dir)
    if record is None or record["job_id"] is None:
        raise JobError(f"{run_dir.name} has no job to cancel")
    if job_state(run_dir, ask=False).ended:
        return job_state(run_dir, ask=False)
    (run_dir / "job/cancelled").touch()  # the agent tells this end from the time limit's by it
    if record["launcher"] == "slurm":
        if _slurm_state(record["job_id"])[0] == "PENDING":
            slurm("scancel", record["job_id"])
            return job_state(run_dir)
        slurm("scancel", "--batch", "--signal=TERM", record["job_id"])
        deadline = time.monotonic() + grace_s
        while not job_state(run_dir, ask=False).ended and time.monotonic() < deadline:
            time.sleep(0.5)
        if not job_state(run_dir, ask=False).ended:
            slurm("scancel", record["job_id"])
        return job_state(run_dir)
    process = _process(record)
    if process is not None:
        family = process.children(recursive=True)
        process.send_signal(signal.SIGTERM)
        psutil.wait_procs([process], timeout=grace_s)
        for survivor in [process, *family]:
            if survivor.is_running():
                survivor.kill()
    return job_state(run_dir)
