"""Slurm's commands and what they say: states, partitions, accounts, the queue."""

import getpass
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import JobError, NoAnswer

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW(OR)?D|API_?KEY|CREDENTIAL", re.I)  # of a variable

SILENCE = re.compile(
    "contact slurm controller|Socket timed out|Connection refused|Zero Bytes|Connection timed out", re.I
)  # the controller did not answer, rather than said no
COMMAND_TIMEOUT_S = 20.0  # a Slurm command that takes longer has not answered

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
        problem = _reason(done.stderr) or f"status {done.returncode}"
        if not SILENCE.search(done.stderr):
            raise JobError(f"{command[0]}: {problem}")
    raise NoAnswer(f"{command[0]}: {problem}")


def _reason(said: str) -> str:
    """What a Slurm command said, as one line: of a fatal end the last words alone, as those before only lead there."""
    lines = [re.sub(r"^\w+: (error|fatal): ", "", line.strip()) for line in said.splitlines() if line.strip()]
    return lines[-1] if ": fatal: " in said else "; ".join(lines)


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
        whose = f"user={getpass.getuser()}"
        text = slurm("sacctmgr", "--noheader", "--parsable2", "show", "associations", whose, "format=account")
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
    slurm("sbatch", "--test-only", environment=job_environment(), text=script)


def find_by_comment(comment: str) -> str | None:
    """Id of the job with this comment, also if it has ended lately."""
    for line in slurm("squeue", "--noheader", "--states=all", "--format=%i|%k").splitlines():
        job_id, _, text = line.strip().partition("|")
        if text == comment:
            return job_id
    return None


def job_word(job_id: str) -> tuple[str, str]:
    """(state, detail) of a job, from the queue, then accounting, then the controller's memory; ('', '') if unknown.

    Raises
    ------
    NoAnswer
    """
    try:
        text = slurm("squeue", "--noheader", f"--jobs={job_id}", "--states=all", "--format=%T|%r")
    except NoAnswer:
        raise
    except JobError:  # 'Invalid job id': the controller has forgotten it
        text = ""
    if text:
        state, _, why = text.splitlines()[0].strip().partition("|")
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


def queue_note(job_id: str, why: str) -> str:
    """'place 3 of 7 in the queue (Priority)'."""
    pending = slurm("squeue", "--noheader", "--states=PENDING", "--sort=-p,i", "--format=%i").split()
    place = f"place {pending.index(job_id) + 1} of {len(pending)} " if job_id in pending else ""
    return f"{place}in the queue" + (f" ({why})" if why else "")


def job_environment(engine: str = "") -> dict[str, str]:
    """Ours, without secrets, and without the variables of an allocation that we ourselves may run in.

    An external endpoint's key is the one secret that the measuring client needs.
    """
    return {
        n: v
        for n, v in os.environ.items()
        if (not SECRET_NAME.search(n) or (n == "OPENAI_API_KEY" and engine == "external"))
        and (n == "SLURM_CONF" or not n.startswith("SLURM_"))
    }
