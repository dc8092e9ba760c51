"""A run's tables and figures, written as files."""

from __future__ import annotations

import json
import math
from pathlib import Path

from matplotlib.figure import Figure

from ..errors import DisaggError
from .figures import figure_interactivity, figure_latency_distributions, figure_search, figure_timeline, figure_topology
from .published import beside_published
from .rows import RunResult, as_table, read_result, result_row
from .verdict import Verdict


def write_outputs(run_dir: Path | str, dest: Path | str | None = None) -> list[Path]:
    """Write a run's tables and figures from its raw logs: tables/run_<source>.csv, tables/result.json, figures/<name>_<source>.png.

    The same logs give the same bytes wherever the run folder lies, so that `recompute` can compare digests.

    Parameters
    ----------
    dest : where tables/ and figures/ go; the run folder itself if not given.

    Raises
    ------
    LogError : the run cannot be read. A figure that this run cannot have (no token latencies, no job) is left out.
    """
    run_dir = Path(run_dir)
    dest = Path(dest) if dest else run_dir
    for name in ("tables", "figures"):
        (dest / name).mkdir(parents=True, exist_ok=True)
    result = read_result(run_dir)
    row = result_row(result)
    row["folder"] = run_dir.resolve().name
    log = Path(row["log_path"])
    if log.is_file():  # else it is a published log's place in its repository
        row["log_path"] = log.resolve().relative_to(run_dir.resolve()).as_posix()
    paths = [dest / "tables" / f"run_{row['source']}.csv", dest / "tables/result.json"]
    as_table([row]).to_csv(paths[0], index=False)
    paths[1].write_text(json.dumps(result_values(result), indent=1) + "\n", encoding="utf-8")
    for name, draw in FIGURES.items():
        try:
            figure = draw(run_dir)
        except DisaggError:
            continue
        paths.append(dest / "figures" / f"{name}_{row['source']}.png")
        figure.savefig(paths[-1], dpi=120, metadata={"Software": None})
    return paths


def result_values(result: RunResult) -> dict:
    """A run's verdict, figures and checks for machines: plain JSON values, null where there is no figure.

    Returns
    -------
    dict: `format`, `verdict` (VALID | INVALID | NOT JUDGED), the words and figures of the run's row by its columns' names (units in
    them), and `checks`, each with name, status, figure, limit, unit and margin (a share of the limit, above 0 if kept).
    """
    # not what depends on where the folder lies
    row = {n: v for n, v in result_row(result).items() if n not in ("folder", "log_path", "error")}
    names = ("name", "status", "figure", "limit", "unit", "margin")
    checks = [{name: getattr(check, name) for name in names} for check in result.verdict.checks]
    values = {"format": 1, "verdict": verdict_word(result.verdict), **row}
    return _finite(values | {"checks": checks})


def verdict_word(verdict: Verdict) -> str:
    """VALID, INVALID, or NOT JUDGED where there are no rules for the model."""
    return {True: "VALID", False: "INVALID", None: "NOT JUDGED"}[verdict.valid]


def _finite(value):
    """Whole numbers as such; without NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else value


def figure_among_published(run_dir: Path | str) -> Figure:
    """Throughput against interactivity: this run, named at its mark, among the published ones of its scenario.

    Raises
    ------
    DisaggError : nothing is published for it, or its pace was changed, so that it has no place among them.
    """
    row = result_row(read_result(run_dir))
    if "pace" in row["shortened"] or not row["completed_tokens_per_s_per_gpu"] > 0 or not row["tpot_p50_ms"] > 0:
        raise DisaggError(f"{run_dir}: a run at another pace, without TPOT or GPU count, has no place in this figure")
    figure = figure_interactivity(beside_published(as_table([row]))[0])
    place = 1e3 / row["tpot_p50_ms"], row["completed_tokens_per_s_per_gpu"]
    figure.axes[0].annotate("this run", place, xytext=(6, 6), textcoords="offset points", fontsize=9, weight="bold")
    return figure


#: the figures of one run, by the name of their file
FIGURES = {
    "latency": figure_latency_distributions,
    "timeline": figure_timeline,
    "search": figure_search,
    "topology": figure_topology,
    "interactivity": figure_among_published,
}
