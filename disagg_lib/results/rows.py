"""Many runs -> tidy tables: one row a run, units in the names, a word on where each figure comes from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..errors import DisaggError
from .accuracy_log import read_accuracy_txt
from .criteria import Claim
from .found import SOURCES, RunFiles, claim_of, find_logs
from .logs import DETAIL, NAN, LogError, MlperfRun, read_run
from .rounds import limits_ms
from .verdict import Verdict, judge

#: columns in order; a row always has all of them
COLUMNS = (
    "folder", "division", "submitter", "system", "model", "accelerator", "accelerators_total", "nodes",
    "scenario", "round", "source", "loadgen_valid", "valid", "submittable", "first_failed", "shortened",
    "samples_per_s", "completed_tokens_per_s", "completed_tokens_per_s_per_gpu", "target_qps", "scheduled_samples_per_s",
    "ttft_mean_ms", "ttft_p50_ms", "ttft_p90_ms", "ttft_p95_ms", "ttft_p99_ms", "ttft_p999_ms", "ttft_limit_ms",
    "tpot_mean_ms", "tpot_p50_ms", "tpot_p90_ms", "tpot_p95_ms", "tpot_p99_ms", "tpot_p999_ms", "tpot_limit_ms",
    "latency_mean_s", "latency_p50_s", "latency_p90_s", "latency_p99_s", "query_latency_p99_s", "duration_s", "min_duration_ms", "query_count", "error_count",
    "accuracy_rougeL", "accuracy_exact_match", "tokens_per_sample",
    "loadgen_scenario", "loadgen_version", "test_datetime", "log_path", "error",
)  # fmt: skip
WORDS = frozenset((
    "folder", "division", "submitter", "system", "model", "accelerator", "scenario", "round", "source", "loadgen_valid",
    "first_failed", "shortened", "loadgen_scenario", "loadgen_version", "test_datetime", "log_path", "error",
))  # fmt: skip
_COUNTS = ("accelerators_total", "nodes", "min_duration_ms", "query_count", "error_count")
WHOLE = dict.fromkeys(_COUNTS, "Int64")


@dataclass(frozen=True)
class RunResult:
    """One run read and judged."""

    files: RunFiles
    run: MlperfRun
    accuracy_run: MlperfRun | None
    verdict: Verdict
    scores: Mapping[str, float]
    accuracy_error: str  # "" or why the accuracy run's logs cannot be read; the performance run stands


def read_result(folder: Path | str, source: str | None = None, claim: Claim | None = None) -> RunResult:
    """Read and judge one folder.

    Parameters
    ----------
    folder : a run folder, a published folder, or LoadGen's own output folder.
    source : overrides what the folder says (`published` for logs that were downloaded without a SOURCE.txt).
    claim : judge by this instead of what the run itself claims.

    Raises
    ------
    LogError : a log is missing, cut short or contradicts itself.
    """
    files = find_logs(folder)
    if source is not None and source not in SOURCES:
        raise DisaggError(f"source: found {source!r}; needed one of {', '.join(SOURCES)}")
    accuracy_run, accuracy_error = None, ""
    if files.accuracy and (files.accuracy / DETAIL).is_file():
        try:
            accuracy_run = read_run(files.accuracy)
        except LogError as error:
            accuracy_error = str(error)
    run = read_run(files.performance) if files.performance else accuracy_run
    if run is None:
        todo = accuracy_error or "Measure again."
        raise LogError("missing_file", files.folder, "no readable run", "a performance run", todo)
    written = files.accuracy / "accuracy.txt" if files.accuracy else None
    scores = read_accuracy_txt(written) if written and written.is_file() else None
    claim = claim or claim_of(files, run, source)
    verdict = judge(run, claim, scores, accuracy_run, files.client, accuracy_error)
    return RunResult(files, run, accuracy_run, verdict, scores.scores if scores else {}, accuracy_error)


def run_row(run_dir: Path | str, source: str | None = None) -> dict:
    """One row of the table: every column of COLUMNS; figures are LoadGen's to the last digit (ns / 1e6 = ms)."""
    return result_row(read_result(run_dir, source))


def result_row(result: RunResult) -> dict:
    """`run_row` of a run that was read already."""
    run, verdict, files, scores = result.run, result.verdict, result.files, result.scores
    claim, system = verdict.claim, files.system
    path = files.origin.get("path", "").split("/")  # division/submitter/results/system/benchmark/scenario/...
    known = path if len(path) > 5 and path[2] == "results" else [""] * 6
    nodes = _whole(system.get("number_of_nodes", files.settings.get("node_count")))
    gpus = nodes * _whole(system.get("accelerators_per_node", files.settings.get("gpus_per_node")))
    limits = limits_ms(claim.model, claim.scenario) or (run.ttft_limit_ms, run.tpot_limit_ms)
    return {
        **empty_row(files.folder),
        **{name: getattr(run, name) for name in COLUMNS if hasattr(run, name)},
        "division": known[0] or system.get("division", ""),
        "submitter": known[1] or system.get("submitter", ""),
        "system": known[3] or system.get("system_name") or str(files.parameters.get("system_name") or ""),
        "model": known[4] or claim.model,
        "accelerator": system.get("accelerator_model_name", ""),
        "accelerators_total": gpus,
        "nodes": nodes,
        "scenario": claim.scenario,
        "round": claim.round,
        "source": claim.source,
        "valid": verdict.valid,
        "submittable": verdict.submittable,
        "first_failed": verdict.failed[0].name if verdict.failed else "",
        "shortened": ", ".join([*(check.name for check in verdict.shortened), *claim.shortened]),
        "completed_tokens_per_s_per_gpu": run.completed_tokens_per_s / gpus if gpus > 0 else NAN,
        "ttft_limit_ms": limits[0],
        "tpot_limit_ms": limits[1],
        **{name: getattr(run, f"{name[:-2]}_ms") / 1e3 for name in COLUMNS if "latency_" in name},
        "accuracy_rougeL": scores.get("rougeL", NAN),
        "accuracy_exact_match": scores.get("exact_match", NAN),
        "tokens_per_sample": scores.get("tokens_per_sample", NAN),
        "log_path": f"{files.origin['path'] if known[0] else run.log_dir}/{DETAIL}",
        "error": result.accuracy_error,
    }


def empty_row(folder: Path | str) -> dict:
    """A row without a figure: words are empty, figures NaN, nothing is valid."""
    row = {name: "" if name in WORDS else NAN for name in COLUMNS}
    return row | {"folder": str(folder), "valid": False, "submittable": False}


def _whole(value: object) -> float:
    """A count from JSON, where submitters write numbers as text too; NaN if it is none."""
    try:
        return float(int(str(value)))
    except ValueError:
        return NAN


def as_table(rows: list[dict]) -> pd.DataFrame:
    """Rows as a table with COLUMNS; counts whole, NaN where there is none."""
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"valid": bool, "submittable": bool, **WHOLE})


def runs_table(folders: Iterable[Path | str], source: str | None = None) -> pd.DataFrame:
    """One row a folder, in the order given; a folder that cannot be read is a row with its `error`.

    Returns
    -------
    DataFrame with COLUMNS; `valid`, `submittable` bool, `loadgen_valid` LoadGen's own word.
    """
    rows = []
    for folder in folders:
        try:
            rows.append(run_row(folder, source))
        except DisaggError as error:
            rows.append({**empty_row(folder), "error": str(error)})
    return as_table(rows)


def verdict_of(run_dir: Path | str, source: str | None = None) -> Verdict:
    """The gate's word on a folder."""
    return read_result(run_dir, source).verdict


def verdict_text(run_dir: Path | str, source: str | None = None) -> str:
    """The verdict in a few sentences: which limit fails and by how much, what was shortened, what to do."""
    return verdict_of(run_dir, source).text()


#: what fits a terminal: column -> (heading, decimals)
TERMINAL = {
    "source": ("source", None), "scenario": ("scenario", None), "loadgen_valid": ("LoadGen", None), "valid": ("valid", None),
    "submittable": ("submittable", None), "target_qps": ("target_qps", 3), "samples_per_s": ("samples/s", 3),
    "completed_tokens_per_s": ("tokens/s", 1),
    **{f"ttft_{part}_ms": (f"TTFT {part} ms", 1) for part in ("mean", "p50", "p90", "p99")},
    "ttft_limit_ms": ("TTFT limit ms", 0),
    **{f"tpot_{part}_ms": (f"TPOT {part} ms", 2) for part in ("mean", "p50", "p90", "p99")},
    "tpot_limit_ms": ("TPOT limit ms", 0), "first_failed": ("first failed check", None),
    "shortened": ("shortened on purpose", None),
}  # fmt: skip


def table_cells(table: pd.DataFrame) -> list[list[str]]:
    """What a person reads of the table: a line a figure, a column a run, headings first; empty if none can be read."""
    good = table[table["loadgen_scenario"] != ""]  # read; an unreadable accuracy run leaves the rest standing
    if good.empty:
        return []
    cells = [["run", *(Path(str(folder)).name or str(folder) for folder in good["folder"])]]
    for name, (heading, decimals) in TERMINAL.items():
        shown = [_cell(value, decimals) for value in good[name]]
        if set(shown) != {"-"}:
            cells.append([heading, *shown])
    return cells


def format_table(table: pd.DataFrame) -> str:
    """The table for a terminal: a block a run where it is narrow enough to read; errors below, in full."""
    cells, lines = table_cells(table), []
    if cells:
        rows = cells if len(cells[0]) <= 4 else list(zip(*cells, strict=True))  # few: a run is a column
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for row in table[table["error"] != ""].itertuples():
        lines.append(row.error if row.error.startswith(row.folder) else f"{row.folder}: {row.error}")
    return "\n".join(lines)


def _cell(value: object, decimals: int | None) -> str:
    """A figure with its decimals, `-` for what is not there."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if decimals is None:
        return str(value) or "-"
    return "-" if math.isnan(value) else f"{value:.{decimals}f}"
