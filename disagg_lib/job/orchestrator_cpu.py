"""The orchestrator's CPU time: it is one Python process, and from some 25 requests/s on the limit of all others."""

import contextlib
import json
import os
import time
from pathlib import Path

from .phases import JOB

SAMPLE_S = 1.0


def find_orchestrator():
    """Its process on this node, the job's first, or None: a Python that serves this run's bound configuration.

    Of several it is the first: they share the load. Dynamo's front ends are not looked for.
    """
    config = str(JOB / "config.bound.yaml")
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            python = os.path.basename(words[0]).startswith("python")
            if python and "disaggregated" in words and config in words and "agent" not in words:
                return int(path.parent.name)
    return None


def cpu_s(pid):
    """User and system time of a process, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class OrchestratorCpu:
    """One line a second in job/orchestrator.jsonl: time_s, mode, cpu_s since the process began."""

    def __init__(self, mode):
        self.mode, self.pid, self.next_s = mode, find_orchestrator(), 0.0

    def sample(self):
        if self.pid is None or time.monotonic() < self.next_s:
            return
        self.next_s = time.monotonic() + SAMPLE_S
        try:
            line = {"time_s": round(time.time(), 3), "mode": self.mode, "cpu_s": cpu_s(self.pid)}
        except OSError:  # it has ended, which others say
            self.pid = None
            return
        with (JOB / "orchestrator.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
