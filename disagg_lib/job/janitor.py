"""Containers that pyxis keeps on a node beyond their job: tens of GB each, on some sites in memory.

One janitor a node, outside of the container. It begins with the job, because after scancel no step may begin; the job
script's teardown sends another one. The name depends on pyxis's container_scope, global or job.
"""

import os
import re
import signal
import subprocess
import time

from .causes import slurm_says

NAME = re.compile(r"pyxis_(?:\d+_)?disagg_405B_(\d+)$")
UNPACKED_S = 3.0  # what was being unpacked when the job ended is there this much later, at the latest


def containers():
    """Name -> job id of every container of such a job on this node."""
    done = subprocess.run(["enroot", "list"], stdout=subprocess.PIPE, universal_newlines=True, timeout=60)
    return {match[0]: match[1] for match in map(NAME.match, done.stdout.split()) if match}


def remove(belongs):
    for name, job in containers().items():
        if belongs(job):
            subprocess.run(["enroot", "remove", "--force", name], timeout=60)


def has_ended(job):
    """Whether Slurm, if it answers, knows no such job any more."""
    return bool(slurm_says("sinfo", "--noheader")) and not slurm_says("squeue", "--noheader", "--jobs=" + job)


def janitor(when="begin"):
    """Remove what earlier jobs left and wait for this job's end; then, or when called at its `end`, its own."""
    own = os.environ["SLURM_JOB_ID"]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        if when == "begin":
            remove(lambda job: job != own and has_ended(job))
            signal.sigwait({signal.SIGTERM})
        deadline = time.monotonic() + (UNPACKED_S if when == "begin" else 0)
        remove(lambda job: job == own)
        while time.monotonic() < deadline:
            time.sleep(0.5)
            remove(lambda job: job == own)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"janitor on {os.uname().nodename}: {error}", flush=True)
