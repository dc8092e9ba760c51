"""This run beside others and the published ones: what one row of the report's table says."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from ..errors import DisaggError
from ..results.published import compare, published_in
from ..results.rows import as_table, read_result, result_row
from .findings import short

MOST_BESIDE = 3  # other runs in the card


def beside_rows(row: dict, others: Iterable[Path]) -> Iterable[dict]:
    """This run, others that can be read, and the published ones of its scenario: what one row of the table says."""
    yield {**_cells(row), "name": "this run", "this": True}
    for other, theirs in itertools.islice(_readable(others), MOST_BESIDE):
        yield {**_cells(theirs), **_same(row, theirs), "name": Path(other).resolve().name}
    published = published_in(row["scenario"], row["round"])
    if row["model"] == "llama3.1-405b" and len(published):
        rate = "completed_tokens_per_s_per_gpu"
        best = published.sort_values(rate, ascending=False).iloc[0]
        eight = published[
            published["accelerator"].str.contains("B200-SXM") & (published["accelerators_total"] == 8)
        ]
        gpu = best["accelerator"].removeprefix("NVIDIA ").split("-")[0]
        name = f"best per GPU of {best['round']}: {best['submitter']}, {best['accelerators_total']} x {gpu}"
        yield {**_cells(best.to_dict()), "name": name, "published": True}
        if len(eight) > 1:
            middle = eight.median(numeric_only=True).to_dict() | {"source": "published", "valid": True}
            name = f"8 x B200 of {best['round']}, median of {len(eight)}"
            yield {**_cells(middle), "name": name, "published": True}


def _readable(runs: Iterable[Path]) -> Iterable[tuple[Path, dict]]:
    for run in runs:
        with contextlib.suppress(DisaggError):  # not launched, failed or cut: it has no figures to set beside
            yield run, result_row(read_result(run))


def _same(row: dict, theirs: dict) -> dict:
    """`same` in place of a figure of theirs whose difference from this run's the noise covers."""
    names = {"completed_tokens_per_s": "rate", "ttft_p99_ms": "ttft", "tpot_p99_ms": "tpot"}
    found = compare(as_table([row | {"folder": "this"}, theirs]), "this")
    found = found[(found["word"] == "inside the noise") & found["figure"].isin(names)]
    same = {names[one.figure]: _same_words(one.difference_percent) for one in found.itertuples()}
    if row["accelerators_total"] != theirs["accelerators_total"]:
        same.pop("rate", None)
    return same | {"noise": True} if same else {}


def _same_words(percent: float) -> str:
    return f"same ({percent:+.1f} %)".replace("-", "−") if abs(percent) >= 0.05 else "same"


def _cells(row: dict) -> dict:
    """The figures of a row of the table as text, and which are over their limits."""
    limits = {name: row.get(f"{name}_limit_ms") or math.nan for name in ("ttft", "tpot")}
    return {
        **dict.fromkeys(("this", "published", "noise"), False),
        "source": row["source"],
        "sign": "–" if pd.isna(row["valid"]) else "✓" if row["valid"] else "✗",
        "gpus": f"{row['accelerators_total']:.0f}" if row["accelerators_total"] > 0 else "-",
        "qps": f"{row['target_qps']:g}" if row["target_qps"] > 0 else "-",
        "rate": short(row["completed_tokens_per_s_per_gpu"]),
        **{name: short(row[f"{name}_p99_ms"]) for name in limits},
        "over": [name for name, limit in limits.items() if limit > 0 and row[f"{name}_p99_ms"] >= limit],
    }
