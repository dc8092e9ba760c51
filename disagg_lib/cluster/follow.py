"""A job followed to its end, told in lines."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..errors import JobError
from ..files import GrowingLines
from .launch import SCRIPT_LOG, JobState, job_state, read_record

ASK_EVERY_S, SAY_EVERY_S = 10.0, 5.0


def follow(run_dir: Path, poll_s: float = 0.5) -> Iterator[JobState]:
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
        local = (read_record(run_dir) or {}).get("launcher") != "slurm"
        ask = local or time.monotonic() - asked >= ASK_EVERY_S
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


def watch(run_dir: Path, out=print) -> JobState:
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
        if words == said and now - said_at < SAY_EVERY_S and not state.ended:
            continue
        p, speed = state.progress, None
        if p is not None and before is not None and p["mode"] == before["mode"]:
            tokens, seconds = p["tokens"] - before["tokens"], p["time_s"] - before["time_s"]
            speed = tokens / seconds if seconds > 0 and tokens >= 0 else None
        out(f"{time.strftime('%H:%M:%S')}  {progress_line(state, speed)}")
        said_at, said, before = now, words, p
    if state.state != "done":
        raise JobError(
            f"{run_dir.name}: {state.state}: {state.reason}. Logs: {run_dir / 'logs'}, {run_dir / SCRIPT_LOG}"
        )
    return state
