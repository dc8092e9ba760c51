"""The rules of the rounds: limits, seeds, durations, samples, early stopping."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import yaml

from ..files import DATA
from .logs import PERCENTILES, MlperfRun


@functools.cache
def load_rules(path: Path = DATA / "rounds.yaml") -> dict:
    """The rules file as plain values."""
    return yaml.safe_load(path.read_text())


def model_of(name: str) -> str:
    """The rules' name of a model, from any name that submitters or LoadGen use; "" if there are no rules for it."""
    models = load_rules()["models"].items()
    return next((model for model, rules in models if name.lower() in rules["names"]), "")


def limits_ms(model: str, scenario: str) -> tuple[float, float] | None:
    """TTFT and TPOT limit (ms, p99) of a model and scenario; None where there are none."""
    limits = load_rules()["models"].get(model, {}).get("limits", {}).get(scenario)
    return (float(limits[0]), float(limits[1])) if limits else None


@functools.lru_cache(maxsize=256)
def allowed_over_limit(queries: int, percentile: float = 0.99, confidence: float = 0.99) -> int:
    """How many of `queries` may be over the limit; -1 if even none is too few queries to judge.

    The largest t with P[Binomial(queries, 1 - percentile) <= t] <= 1 - confidence, exactly, in logarithms.
    Source: mlcommons/inference, loadgen/early_stopping.cc (the regularised beta function is this sum).
    """
    top = int(queries * (1 - percentile)) + 1
    k = np.arange(1, top + 1)
    steps = np.log((queries - k + 1) / k) + math.log((1 - percentile) / percentile)
    log_pmf = np.concatenate([[0.0], np.cumsum(steps)]) + queries * math.log(percentile)
    log_cdf = np.logaddexp.accumulate(log_pmf)
    return int(np.searchsorted(log_cdf, math.log(1 - confidence) + 1e-12, side="right")) - 1


def over_limit_bounds(run: MlperfRun, figure: str, limit_ms: float) -> tuple[int, int]:
    """Fewest and most queries over a limit that the log's percentiles allow; `figure` is ttft or tpot.

    LoadGen's p-th percentile of n sorted values is the one at index floor(n p).
    """
    n = int(run.query_count)
    fewest, most = 0, n
    for name, percentile in PERCENTILES.items():
        index = int(n * percentile)
        if getattr(run, f"{figure}_{name}_ms") > limit_ms:
            fewest = max(fewest, n - index)
        else:
            most = min(most, n - 1 - index)
    if getattr(run, f"{figure}_max_ms") <= limit_ms:
        most = 0
    return fewest, most
