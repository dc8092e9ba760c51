"""Why a job ends: its own failure, a signal, or what Slurm says of it."""

import os
import subprocess
import time

from .digests import write_digests
from .phases import JOB, RUN, give_reason, phase, phases, reason, settings

TEARDOWN_S = 120  # how long before the time limit Slurm sends TERM: job.sh's --signal=B:TERM@120
EARLY_S = 60  # as much earlier it may send it (man sbatch, --signal)


def slurm_says(*command):
    """Words of a Slurm command, or none: in an ending job it has little time to answer."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, universal_newlines=True, timeout=3)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split()


def outside_cause(when):
    """What Slurm did to the job, if anything: a node failed, it was requeued, preempted or cancelled."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    words = slurm_says("scontrol", "--oneliner", "show", "job", job)
    state = next((word[9:] for word in words if word.startswith("JobState=")), "")
    nodes = "--nodes=" + os.environ.get("SLURM_JOB_NODELIST", "")
    down = slurm_says("sinfo", "--noheader", "--Node", nodes, "--states=down", "--format=%N")
    if state == "NODE_FAIL" or down:
        return (
            f"node failure {when}: {', '.join(sorted(set(down))) or 'node unknown'} is down. Submit a new run"
        )
    restarts = next((word[9:] for word in words if word.startswith("Restarts=")), "0")
    if state in ("PENDING", "REQUEUED") or restarts != os.environ.get("SLURM_RESTART_COUNT", "0"):
        return f"requeued {when}. Jobs are not restarted in a used folder: make a new run"
    if state == "PREEMPTED":
        return f"preempted {when} by a job of higher priority"
    return f"cancelled {when}" if state == "CANCELLED" else None


def moment():
    """('during <phase>, after <n> s', seconds since the first phase)."""
    seen = phases()
    elapsed_s = time.time() - seen[0]["time_s"] if seen else 0.0
    names = [line["phase"] for line in seen if line["phase"] != "teardown"]
    return f"during {names[-1] if names else 'start'}, after {elapsed_s:.0f} s", elapsed_s


def signal_reason(name):
    """Why a signal came: what Slurm did, the time limit, or somebody's scancel."""
    when, elapsed_s = moment()
    limit_s = settings()["time_limit_s"]
    cause = outside_cause(when)
    if (
        cause is None
        and "SLURM_JOB_ID" in os.environ
        and elapsed_s > limit_s - TEARDOWN_S - EARLY_S
        and not (JOB / "cancelled").exists()
    ):
        begins = f"teardown begins {TEARDOWN_S} s before"
        return f"time limit {when}: time_limit is {limit_s} s, and {begins}. Raise time_limit"
    return cause or f"cancelled (signal {name}) {when}"


def finish(status):
    """The last line of phases.jsonl, and the job's exit status."""
    if (JOB / "reserve").exists():
        (JOB / "reserve").unlink()
    if status in (129, 130, 143):  # a signal reached our own process before the script's trap
        give_reason(signal_reason("TERM"))
    text = reason() or (
        outside_cause(moment()[0]) or f"the job script ended with status {status}" if status else ""
    )
    write_digests(RUN)
    phase("failed: " + text if text else "done")
    return status or int(bool(text))
