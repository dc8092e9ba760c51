"""Many runs -> tidy tables: one row a run, units in the names, a word on where each figure comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import DisaggError
from .accuracy_criteria import AccuracyHalf
from .accuracy_log import read_accuracy_txt, whole_log_digest
from .found import RunFiles, claim_of, find_logs
from .logs import ACCURACY, DETAIL, NAN, LogError, MlperfRun, read_run
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
    "not_judged", "source_from", "guessed", "early_stopping_latency_ms",
)  # fmt: skip
WORDS = frozenset((
    "folder", "division", "submitter", "system", "model", "accelerator", "scenario", "round", "source", "loadgen_valid",
    "submittable", "not_judged", "source_from", "guessed",
    "first_failed", "shortened", "loadgen_scenario", "loadgen_version", "test_datetime", "log_path", "error",
))  # fmt: skip
_COUNTS = ("accelerators_total", "nodes", "min_duration_ms", "query_count", "error_count")
WHOLE = dict.fromkeys(_COUNTS, "Int64")


@dataclass(frozen=True)
class RunResult:
    """One run read and judged."""

    files: RunFiles
    run: MlperfRun
    accuracy: AccuracyHalf
    verdict: Verdict


def read_result(folder: Path | str, source: str | None = None, **asserted: str | None) -> RunResult:
    """Read and judge one folder.

    Parameters
    ----------
    folder : a run folder, a published folder, or LoadGen's own output folder.
    source, asserted : what a person says of it: `measured` where nobody states the source; `round`, `division`.

    Raises
    ------
    LogError : a log is missing, cut short or contradicts itself. ClaimError : what is asserted cannot be.
    """
    files = find_logs(folder)
    accuracy = _read_accuracy(files.accuracy) if files.accuracy else AccuracyHalf()
    run = read_run(files.performance) if files.performance else accuracy.run
    if run is None:
        todo = accuracy.errors.get("accuracy_log") or "Measure again."
        raise LogError("missing_file", files.folder, "no readable run", "a performance run", todo)
    claim = claim_of(files, run, source, **asserted)
    return RunResult(files, run, accuracy, judge(run, claim, accuracy, files))


def _read_accuracy(folder: Path) -> AccuracyHalf:
    """The accuracy half; what cannot be read costs the accuracy, not the row."""
    errors = {}

    def read(name: str, there: bool, reader: Callable):
        try:
            return reader() if there else None
        except LogError as error:
            errors[name] = str(error)

    run = read("accuracy_log", (folder / DETAIL).is_file(), lambda: read_run(folder))
    written = folder / "accuracy.txt"
    scores = read("accuracy_txt", written.is_file(), lambda: read_accuracy_txt(written))
    log = folder / ACCURACY
    return AccuracyHalf(run, scores, errors, log.is_file(), whole_log_digest(log) if scores else "")


def run_row(run_dir: Path | str, source: str | None = None, **asserted: str | None) -> dict:
    """One row of the table: every column of COLUMNS; figures are LoadGen's to the last digit (ns / 1e6 = ms)."""
    return result_row(read_result(run_dir, source, **asserted))


def result_row(result: RunResult) -> dict:
    """`run_row` of a run that was read already."""
    run, verdict, files = result.run, result.verdict, result.files
    scores = result.accuracy.scores.scores if result.accuracy.scores else {}
    claim, system = verdict.claim, files.system
    path = files.origin.get("path", "").split("/")  # division/submitter/results/system/benchmark/scenario/...
    known = path if len(path) > 5 and path[2] == "results" else [""] * 6
    # Of somebody else's server the parameters do not tell.
    ours = {} if files.settings.get("engine") == "external" else files.settings
    nodes = _whole(system.get("number_of_nodes", ours.get("node_count")))
    gpus = nodes * _whole(system.get("accelerators_per_node", ours.get("gpus_per_node")))
    limits = limits_ms(claim.model, claim.scenario) or (run.ttft_limit_ms, run.tpot_limit_ms)
    return {
        **empty_row(files.folder),
        **{name: getattr(run, name) for name in COLUMNS if hasattr(run, name)},
        "division": known[0] or system.get("division", ""),
        "submitter": known[1] or system.get("submitter", ""),
        "system": known[3] or system.get("system_name") or str(files.parameters.get("system_name") or ""),
        "model": known[4] or claim.model,
        "accelerator": system.get("accelerator_model_name") or str(files.parameters.get("gpu_system") or "").upper(),
        "accelerators_total": gpus,
        "nodes": nodes,
        "scenario": claim.scenario,
        "round": claim.round,
        "source": claim.source,
        "source_from": claim.source_from,
        "guessed": claim.guessed,
        "valid": verdict.valid,
        "submittable": verdict.submittable,
        "first_failed": verdict.failed[0].name if verdict.failed else "",
        "shortened": ", ".join([*(check.name for check in verdict.shortened), *claim.shortened]),
        "not_judged": ", ".join(check.name for check in verdict.not_judged),
        "early_stopping_latency_ms": run.early_stopping_latency_ms or NAN,
        "completed_tokens_per_s_per_gpu": run.completed_tokens_per_s / gpus if gpus > 0 else NAN,
        "ttft_limit_ms": limits[0],
        "tpot_limit_ms": limits[1],
        **{name: getattr(run, f"{name[:-2]}_ms") / 1e3 for name in COLUMNS if name.endswith("_s") and "latency_" in name},
        "accuracy_rougeL": scores.get("rougeL", NAN),
        "accuracy_exact_match": scores.get("exact_match", NAN),
        "tokens_per_sample": scores.get("tokens_per_sample", NAN),
        "log_path": f"{files.origin['path'] if known[0] else run.log_dir}/{DETAIL}",
        "error": " ".join(result.accuracy.errors.values()),
    }


def empty_row(folder: Path | str) -> dict:
    """A row without a figure: words are empty, figures NaN, nothing is valid."""
    row = {name: "" if name in WORDS else NAN for name in COLUMNS}
    return row | {"folder": str(folder), "valid": False, "submittable": "no"}


def _whole(value: object) -> float:
    """A count from JSON, where submitters write numbers as text too; NaN if it is none."""
    try:
        return float(int(str(value)))
    except ValueError:
        return NAN


def as_table(rows: list[dict]) -> pd.DataFrame:
    """Rows as a table with COLUMNS; counts whole, NaN where there is none."""
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"valid": "boolean", **WHOLE})


def runs_table(
    folders: Iterable[Path | str], source: str | None = None, **asserted: str | None
) -> pd.DataFrame:
    """One row a folder, in the order given; a folder that cannot be read is a row with its `error`.

    Returns
    -------
    DataFrame with COLUMNS; `valid` true, false or, for a model without whole rules, nothing; `submittable` yes, no or
    `not yet`; `loadgen_valid` LoadGen's own word.
    """
    rows = []
    for folder in folders:
        try:
            rows.append(run_row(folder, source, **asserted))
        except DisaggError as error:
            rows.append({**empty_row(folder), "error": str(error)})
    return as_table(rows)


def verdict_of(run_dir: Path | str, source: str | None = None, **asserted: str | None) -> Verdict:
    """The gate's word on a folder."""
    return read_result(run_dir, source, **asserted).verdict


def verdict_text(run_dir: Path | str, source: str | None = None) -> str:
    """The verdict in a few sentences: which limit fails and by how much, what was shortened, what to do."""
    verdict = verdict_of(run_dir, source)
    return "\n".join([verdict.text(), *unverified([verdict.claim.source], [verdict.claim.round])])


def unverified(sources: Iterable[str], rounds: Iterable[str]) -> list[str]:
    """What MLCommons asks for beside every score that it did not publish itself."""
    if set(sources) <= {"published"}:
        return []
    return [f"Unverified MLPerf {'/'.join(sorted(set(rounds)))} Inference figures. {NOT_VERIFIED}"]


#: Source: MLCommons' messaging guidelines
NOT_VERIFIED = (
    "Result not verified by MLCommons Association. The MLPerf name and logo are registered and unregistered trademarks of "
    "MLCommons Association in the United States and other countries. All rights reserved. Unauthorized use strictly "
    "prohibited. See www.mlcommons.org for more information."
)

#: what fits a terminal: column -> (heading, decimals)
TERMINAL = {
    "source": ("source", None), "scenario": ("scenario", None), "loadgen_valid": ("LoadGen", None), "valid": ("valid", None),
    "submittable": ("submittable", None), "target_qps": ("target_qps", 3), "samples_per_s": ("samples/s", 3),
    "completed_tokens_per_s": ("tokens/s", 1),
    **{f"ttft_{part}_ms": (f"TTFT {part} ms", 1) for part in ("mean", "p50", "p90", "p99")},
    "ttft_limit_ms": ("TTFT limit ms", 0),
    **{f"tpot_{part}_ms": (f"TPOT {part} ms", 2) for part in ("mean", "p50", "p90", "p99")},
    "tpot_limit_ms": ("TPOT limit ms", 0), "first_failed": ("first failed check", None),
    "shortened": ("shortened on purpose", None), "not_judged": ("not judged", None), "guessed": ("model guessed from", None),
    "early_stopping_latency_ms": ("early stopping ms", 2),
}  # fmt: skip


def table_cells(table: pd.DataFrame) -> list[list[str]]:
    """What a person reads of the table: a line a figure, a column a run, headings first; empty if none can be read."""
    good = table[table["loadgen_scenario"] != ""]  # read; an unreadable accuracy run leaves the rest standing
    if good.empty:
        return []
    cells = [["run", *map(row_name, good.to_dict("records"))]]
    for name, (heading, decimals) in TERMINAL.items():
        shown = [_cell(value, decimals) for value in good[name]]
        if set(shown) != {"-"}:
            cells.append([heading, *shown])
    return cells


def row_name(row: dict) -> str:
    """What tells a row from others: the folder's name, or of a published run who, on what, which model and scenario."""
    name = Path(str(row["folder"])).name or str(row["folder"])
    return f"{row['submitter']} {row['system']} {row['model']} {row['scenario']}" if row["submitter"] and row["source"] == "published" else name


def format_table(table: pd.DataFrame) -> str:
    """The table for a terminal: a block a run where it is narrow enough to read; errors below, in full."""
    cells, lines = table_cells(table), []
    if cells:
        rows = cells if len(cells[0]) <= 4 else list(zip(*cells, strict=True))  # few: a run is a column
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        read = table[table["loadgen_scenario"] != ""]
        lines += unverified(read["source"], read["round"])
    for row in table[table["error"] != ""].itertuples():
        lines.append(row.error if row.error.startswith(row.folder) else f"{row.folder}: {row.error}")
    return "\n".join(lines)


def _cell(value: object, decimals: int | None) -> str:
    """A figure with its decimals, `-` for what is not there."""
    if value is pd.NA:
        return "-"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if decimals is None:
        return str(value) or "-"
    return "-" if math.isnan(value) else f"{value:.{decimals}f}"
