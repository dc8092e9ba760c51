"""Runs as a table that fits 80 columns: eight figures a run, its verdict as a sign; more is in `--wide` and `--json`."""

import json
import math
from pathlib import Path

import pandas as pd

#: heading -> width; two blanks between
COLUMNS = {"run": 20, "source": 9, " ": 1, "GPUs": 4, "QPS": 5, "tok/s/GPU": 9, "TTFT p99": 9, "TPOT p99": 8}
NOTE = "✓ VALID, ✗ INVALID. TTFT: s of the limit in s. TPOT: ms of the limit in ms."


def _figure(value: float, decimals: int) -> str:
    return "-" if pd.isna(value) else f"{value:.{decimals}f}"


def _against(value: float, limit: float, decimals: int) -> str:
    """A figure and its limit; marked where it is over."""
    if pd.isna(value):
        return "-"
    over = "" if pd.isna(limit) or value <= limit else "!"
    return f"{over}{value:.{decimals}f}" + ("" if pd.isna(limit) else f"/{limit:g}")


def _cells(row) -> list[str]:
    name = Path(str(row.folder)).name or str(row.folder)
    published = f"{row.submitter} {row.system}".strip() if row.source == "published" else ""
    return [
        published or name,
        row.source,
        "✓" if row.valid else "✗",
        "-" if pd.isna(row.accelerators_total) else str(row.accelerators_total),
        f"{row.target_qps:.4g}" if not math.isnan(row.target_qps) else "-",
        _figure(row.completed_tokens_per_s_per_gpu, 1),
        _against(row.ttft_p99_ms / 1e3, row.ttft_limit_ms / 1e3, 2),
        _against(row.tpot_p99_ms, row.tpot_limit_ms, 1),
    ]


def list_runs(table: pd.DataFrame) -> str:
    """One line a run, at most 80 columns wide."""
    rows = [list(COLUMNS), *(_cells(row) for row in table.itertuples())]
    lines = []
    for row in rows:
        cut = [
            (text if len(text) <= width else text[: width - 1] + "…")
            for text, width in zip(row, COLUMNS.values(), strict=True)
        ]
        placed = [
            text.ljust(width) if place < 3 else text.rjust(width)
            for place, (text, width) in enumerate(zip(cut, COLUMNS.values(), strict=True))
        ]
        lines.append("  ".join(placed).rstrip())
    return "\n".join([*lines, NOTE])


def json_rows(table: pd.DataFrame) -> str:
    """All columns of all rows, for machines; null for what is not there."""
    return json.dumps(json.loads(table.to_json(orient="records")), indent=1)
