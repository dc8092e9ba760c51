"""LoadGen's own rules for scenario Server: which samples, when, how many, and when a run is VALID."""

import math
from dataclasses import dataclass

import numpy as np

from ..results.rounds import allowed_over_limit
from .lengths import SAMPLE_COUNT


@dataclass(frozen=True)
class Load:
    """What LoadGen offers: arrival of each query in s (ascending, from 0) and its sample's index."""

    target_qps: float
    arrivals_s: np.ndarray
    samples: np.ndarray


def draw_load(
    target_qps: float,
    seed: int,
    min_duration_s: float = 600.0,
    min_query_count: int = 100,
    sample_count: int = SAMPLE_COUNT,
    equal_issue: bool = True,
) -> Load:
    """Draw one run's queries as LoadGen does; the same seed gives the same load, stretched by 1 / target_qps.

    Arrivals are Poisson, the first at 0. With equal issue (`sample_concatenate_permutation`) samples come in whole
    permutations, one more until the last arrival has passed min_duration_s; without, samples are drawn with replacement and the
    run ends with the first arrival past min_duration_s that completes min_query_count.
    """
    unit = sample_count if equal_issue else 1
    passed = count = math.ceil(min_query_count / unit) * unit
    drawn = 0
    while drawn < passed:  # a longer draw of one seed begins with the shorter one
        drawn = passed + max(unit, 1024)
        gaps = np.random.RandomState(seed).standard_exponential(drawn)
        arrivals = np.concatenate(([0.0], np.cumsum(gaps))) / target_qps
        # Whole units until the last arrival has passed the duration.
        passed = max(count, unit * math.ceil((np.searchsorted(arrivals, min_duration_s) + 1) / unit))
    samples_stream = np.random.RandomState([seed, 1])
    if equal_issue:
        samples = np.concatenate([samples_stream.permutation(sample_count) for _ in range(passed // unit)])
    else:
        samples = samples_stream.randint(0, sample_count, passed)
    return Load(target_qps, arrivals[:passed], samples)


def percentile(values: np.ndarray, p: float) -> float:
    """LoadGen's percentile: the value at index int(n x p) of the sorted values."""
    return float(np.partition(values, k := min(len(values) - 1, int(len(values) * p)))[k])


def worst_allowed(values: np.ndarray) -> float:
    """The value that must not pass the limit for early stopping to hold; inf if there are too few queries to tell."""
    allowed = allowed_over_limit(len(values))
    if allowed < 0:
        return math.inf
    k = len(values) - 1 - allowed
    return float(np.partition(values, k)[k])
