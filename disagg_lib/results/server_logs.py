"""The workers' log: one file for all ranks, `rank: text` a line, as `srun --label` writes it.

Split by rank, searched for the error that came first, and read for TensorRT-LLM's iteration lines.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pandas as pd

from ..experiment.parameters import Experiment
from .found import folder_source
from .logs import NAN, LogError

WORKERS_LOG = "logs/output_workers.log"

_LABEL = re.compile(r"^\s*(\d+): ?(.*)$")  # srun pads the rank with blanks
_STAMP = re.compile(r"\[(\d\d/\d\d/\d{4}-\d\d:\d\d:\d\d)\]|(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)")
#: what a rank says when it fails. `[E]` is TensorRT-LLM's level; the rest is Python, CUDA, NCCL, MPI, the kernel, Slurm
_ERROR = re.compile(
    r"\[E\]|Traceback \(most recent call last\)|^[\w.]*(?:Error|Exception)(?::|$)|\[(?:ERROR|FATAL|CRITICAL)\]"
    r"|\b(?:ERROR|FATAL|CRITICAL):|CUDA (?:runtime )?error|out of memory|NCCL (?:error|failure)|terminate called"
    r"|Segmentation fault|Aborted|MPI_ABORT|srun: error|slurmstepd: error|oom.kill|\bKilled\b|\bSignal: "
)
_TASK = re.compile(r"\btasks? (\d+)")
_EXCEPTION = re.compile(r"^[\w.]+(?:Error|Exception|Interrupt|Exit)\b")


@dataclass(frozen=True)
class LogLine:
    """One line: its number in the file (from 1), the rank that wrote it (None: Slurm itself), its text."""

    number: int
    rank: int | None
    text: str


@dataclass(frozen=True)
class FirstError:
    """The first error in time over all ranks."""

    rank: int | None
    number: int  # line of the file, from 1
    time: datetime | None  # of the line, or the newest that the file showed until then
    text: str  # the line
    message: str  # the exception's own line where it is a traceback, else the line
    context: tuple[str, ...]  # the rank's lines around it

    def __str__(self) -> str:
        who = "Slurm" if self.rank is None else f"rank {self.rank}"
        return f"{who}, line {self.number}{f', {self.time}' if self.time else ''}: {self.message}"


def read_lines(path: Path | str) -> Iterator[LogLine]:
    """Lines of a labelled log, one at a time: such a log grows to GB with iteration lines on."""
    path = Path(path)
    if not path.is_file():
        raise LogError("missing_file", path, "no such file", todo="See logs/ of the run folder.")
    with path.open(encoding="utf-8", errors="replace", newline=None) as file:
        for number, line in enumerate(file, 1):
            text = line.rstrip("\n")
            label = _LABEL.match(text)
            yield LogLine(number, int(label[1]), label[2]) if label else LogLine(number, None, text)


def split_ranks(path: Path | str) -> dict[int | None, list[str]]:
    """Lines by rank, in order; None holds what carries no label."""
    ranks: dict[int | None, list[str]] = {}
    for line in read_lines(path):
        ranks.setdefault(line.rank, []).append(line.text)
    return dict(sorted(ranks.items(), key=lambda item: (item[0] is None, item[0])))


def first_error(path: Path | str, around: int = 12) -> FirstError | None:
    """The first error in time over all ranks; None if there is none.

    Lines reach the file late and out of order, so a line's own stamp decides; a line without one (a traceback) counts
    at the newest stamp that the file had shown, which is when it arrived at the earliest.
    """
    newest = best = None
    for line in read_lines(path):
        stamp = _time_of(line.text)
        newest = max(filter(None, (newest, stamp)), default=None)
        if not _ERROR.search(line.text):
            continue
        when = stamp or newest
        key = (when or datetime.min, line.number)
        if best is None or key < best[0]:
            best = (key, line, when)
    if best is None:
        return None
    _, line, when = best
    rank, message = line.rank, line.text
    named = _TASK.search(line.text)
    if rank is None and named:
        rank = int(named[1])  # `srun: error: node3: task 7: Killed`
    before, after = _around(path, line, around)
    if "Traceback (most recent call last)" in message:  # the exception's own line is at its foot
        message = next((text.strip() for text in after if _EXCEPTION.match(text.strip())), message)
    return FirstError(rank, line.number, when, line.text, message, (*before, line.text, *after))


def _around(path: Path | str, wanted: LogLine, around: int) -> tuple[list[str], list[str]]:
    """The same rank's lines before and after a line; after it as far as its traceback goes."""
    before, after = collections.deque(maxlen=around), []
    for line in read_lines(path):
        if line.rank != wanted.rank or line.number == wanted.number:
            continue
        if line.number < wanted.number:
            before.append(line.text)
        elif len(after) < 4 * around:
            after.append(line.text)
        else:
            break
    return list(before), after


def _time_of(text: str) -> datetime | None:
    found = _STAMP.search(text)
    if not found:
        return None
    try:
        return (
            datetime.strptime(found[1], "%m/%d/%Y-%H:%M:%S") if found[1] else datetime.fromisoformat(found[2])
        )
    except ValueError:  # digits in the shape of a time, such as 99/99/2025
        return None


#: our column -> TensorRT-LLM's key. 0.2x: elapsed_time; 1.0: host_step_time and prev_device_step_time; 1.2: also
#: kv_cache_util, and `=` instead of `:` after num_scheduled_requests. Source: tensorrt_llm/_torch/pyexecutor/py_executor.py
ITERATION_KEYS = {
    "iteration": "iter",
    "rank": "global_rank",
    "scheduled_requests": "num_scheduled_requests",
    "context_requests": "num_ctx_requests",
    "context_tokens": "num_ctx_tokens",
    "generation_tokens": "num_generation_tokens",
    "kv_cache_use": "kv_cache_util",
    "elapsed_ms": "elapsed_time",
    "host_step_ms": "host_step_time",
    "device_step_ms": "prev_device_step_time",
}
_ITERATION = re.compile(r"\biter = \d+, global_rank = ")
# a figure is whole only with the comma, or brace, behind it: without one it may be cut
_PAIR = re.compile(r"(\w+)\s*[=:] (\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)(ms|s)?(?=,)")
_STATES = re.compile(r"states = \{(.*)")
_STATE = re.compile(r"'(\w+)': ([\d.]+)(?=[,}])")
STEPS_COLUMNS = ["server", "steps", "step_ms", "context_tokens", "generation_batch"]
STEPS_COLUMNS += ["generation_batch_max", "kv_cache_use_max", "source"]


def iteration_table(path: Path | str) -> pd.DataFrame:
    """TensorRT-LLM's iteration lines (`print_iter_log: true`), one row a step.

    Returns
    -------
    DataFrame: log_rank (label of the line), time, and the columns of ITERATION_KEYS; requests and tokens of the step,
    kv_cache_use a share (0 to 1), steps in ms. NaN where the release does not print it; no rows if the log has none.
    """
    rows = [
        _iteration(line.rank, line.text)
        for line in read_lines(path)
        if "iter = " in line.text and _ITERATION.search(line.text)
    ]
    return pd.DataFrame(rows, columns=["log_rank", "time", *ITERATION_KEYS])


def steps_table(run_dir: Path, experiment: Experiment) -> pd.DataFrame:
    """What the servers' steps carried, one row a server that logged any; no rows without servers of the run's own.

    Returns
    -------
    DataFrame: server, steps, step_ms (median; the device's where the release prints it), context_tokens and
    generation_batch (requests that got a token; means of the steps that had any), generation_batch_max,
    kv_cache_use_max (share; TensorRT-LLM 1.2 on), source.
    """
    table = iteration_table(run_dir / WORKERS_LOG) if experiment.servers else pd.DataFrame()
    source, rows = folder_source(run_dir), []
    for server in experiment.servers:
        steps = table[table["log_rank"] == server.first_rank]
        ms = steps["device_step_ms"].fillna(steps["elapsed_ms"]).fillna(steps["host_step_ms"])
        tokens, batch = (steps[name][steps[name] > 0] for name in ("context_tokens", "generation_tokens"))
        most = batch.max(), steps["kv_cache_use"].max()
        if len(steps):
            rows.append((server.name, len(steps), ms.median(), tokens.mean(), batch.mean(), *most, source))
    return pd.DataFrame(rows, columns=STEPS_COLUMNS).round(2)


def _iteration(rank: int | None, text: str) -> dict:
    """One step. `N/A` (the first device time) and absent keys are NaN."""
    text = text[text.index("iter = ") :]
    pairs = {key: float(value) * (1e3 if unit == "s" else 1) for key, value, unit in _PAIR.findall(text)}
    states = _STATES.search(text)
    if states:
        pairs.update({key: float(value) for key, value in _STATE.findall(states[1])})
    row = {ours: pairs.get(theirs, NAN) for ours, theirs in ITERATION_KEYS.items()}
    return {"log_rank": rank, "time": _time_of(text), **row}
