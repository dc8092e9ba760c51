"""A job's phases and the reason of its failure, as lines of job/phases.jsonl."""

import functools
import json
import os
import time
from pathlib import Path

JOB = Path(__file__).resolve().parents[1]  # of the run folder, where this room is job/program
RUN = JOB.parent

REASON_ROOM = 4096  # bytes


class Failed(Exception):
    """The job cannot go on; the message is the reason."""


@functools.lru_cache(maxsize=None)
def settings():
    """job/settings.json, which nothing changes while the job runs."""
    return json.loads((JOB / "settings.json").read_text())


def phases():
    path = JOB / "phases.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def phase(name):
    line = json.dumps({"time_s": round(time.time(), 3), "phase": name})
    with (JOB / "phases.jsonl").open("a") as file:
        file.write(line + "\n")
    print(f"phase {name}", flush=True)


def admit():
    """Refuse a folder that was used before; a job that Slurm started again says so in its phases."""
    seen = phases()
    if not seen:
        try:
            (JOB / "phases.jsonl").open("x").close()
        except FileExistsError:
            raise Failed("refused: another job has just taken this run folder. Make a new run") from None
        # Room for the reason and the last word, should the disk be full by then.
        for name, size in (("reason.txt", REASON_ROOM), ("reserve", 65536)):
            (JOB / name).write_bytes(b" " * size)
        return
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    reason = f"refused: this run folder was used before (phase {seen[-1]['phase']}; restart {restarts}). Make a new run"
    if not ended(seen) and restarts != "0":
        phase("failed: " + reason)
    raise Failed(reason)


def ended(seen):
    return bool(seen) and (seen[-1]["phase"] == "done" or seen[-1]["phase"].startswith("failed"))


def reason():
    path = JOB / "reason.txt"
    return path.read_text().strip() if path.exists() else ""


def give_reason(text):
    """Keep the first reason: later ones are its consequences."""
    if not reason():
        with (JOB / "reason.txt").open("r+") as file:
            file.write(text[:REASON_ROOM] + "\n")
