"""LoadGen's own rules for scenario Server: which samples, when, how many, and when a run is VALID."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from ..errors import SimulationError
from ..results.rounds import allowed_over_limit, load_rules
from .lengths import SAMPLE_COUNT


@dataclass(frozen=True)
class Load:
    """What LoadGen offers: arrival of each query in s (ascending, from 0) and its sample's index."""

    target_qps: float
    arrivals_s: np.ndarray
    samples: np.ndarray


def seeds_of(claimed: str) -> tuple[int, int, int]:
    """The round's seeds: of the loaded samples (qsl), their order (sample index) and the arrivals (schedule)."""
    rounds = load_rules()["rounds"]
    if claimed not in rounds:
        raise SimulationError(
            f"round {claimed!r} has no seeds in rounds.yaml; there are {', '.join(rounds)}."
        )
    return tuple(rounds[claimed]["seeds"])


def _words(seed: int, count: int) -> list[int]:
    """The first numbers of std::mt19937(seed), 32 bits each."""
    return np.random.RandomState(seed % 2**32).randint(0, 2**32, count, np.uint32).tolist()


def _bounded(words, size: int) -> int:
    """libstdc++'s uniform_int_distribution(0, size - 1), from GCC 11 on (Lemire's method)."""
    product = next(words) * size
    while product % 2**32 < 2**32 % size and product % 2**32 < size:
        product = next(words) * size
    return product >> 32


def _shuffle(items: list[int], words) -> None:
    """libstdc++'s std::shuffle: two swaps from one number. Holds for fewer than 2^16 items."""
    start = 1
    if len(items) % 2 == 0:
        other, start = _bounded(words, 2), 2
        items[1], items[other] = items[other], items[1]
    for i in range(start, len(items), 2):
        pair = _bounded(words, (i + 1) * (i + 2))
        for k, other in ((i, pair // (i + 2)), (i + 1, pair % (i + 2))):
            items[k], items[other] = items[other], items[k]


@cache
def _official_samples(claimed: str, permutations: int) -> tuple[np.ndarray, np.ndarray]:
    """The samples as loaded, and the order in which they are issued: `permutations` of them, each of all samples.

    LoadGen draws one order for another kind of sampling and leaves it unused. Each further order shuffles the one before.
    """
    qsl_seed, sample_seed, _ = seeds_of(claimed)
    loaded, order, issued = list(range(SAMPLE_COUNT)), list(range(SAMPLE_COUNT)), []
    _shuffle(loaded, iter(_words(qsl_seed, SAMPLE_COUNT)))
    words = iter(_words(sample_seed, SAMPLE_COUNT * (permutations + 2)))
    _shuffle(list(order), words)
    for _ in range(permutations):
        _shuffle(order, words)
        issued += order
    return np.array(loaded), np.array(loaded)[issued]


@cache
def _unit_gaps(claimed: str, count: int) -> np.ndarray:
    """Gaps between arrivals at one query a second, in s; libstdc++'s exponential_distribution, by the C library's log."""
    words = np.array(_words(seeds_of(claimed)[2], 2 * count), float)
    uniform = (words[0::2] + words[1::2] * 2.0**32) / 2.0**64
    return -np.fromiter(map(math.log, (1.0 - uniform).tolist()), float, count)


def official_load(
    claimed: str, target_qps: float, min_duration_ms: int = 600_000, min_query_count: int = 100
) -> Load:
    """The queries of a run of round `claimed`, as LoadGen issues them: to the ns, sample by sample, whoever runs it.

    Whole permutations of the data set until the last query is due at or after min_duration_ms. There are as many different ones as
    the unpadded min_query_count asks for, repeated in turn. Scenario Interactive is Server with other limits.
    Source: mlcommons/inference loadgen (loadgen.cc, libstdc++); seen equal to what 5.1.2 issues.

    Raises
    ------
    SimulationError : the round is not known.
    """
    permutations = math.ceil(min_query_count / SAMPLE_COUNT)
    order, count = _official_samples(claimed, permutations)[1], permutations * SAMPLE_COUNT
    while True:
        gaps_ns = (_unit_gaps(claimed, count) / target_qps * 1e9).astype(np.int64)
        arrivals_ns = np.concatenate(([0], np.cumsum(gaps_ns[:-1])))
        if arrivals_ns[-1] >= min_duration_ms * 1_000_000:
            return Load(target_qps, arrivals_ns / 1e9, np.resize(order, count))
        count += SAMPLE_COUNT


def random_load(
    target_qps: float,
    seed: int,
    min_duration_s: float = 600.0,
    min_query_count: int = 100,
    equal_issue: bool = True,
) -> Load:
    """A load like LoadGen's with other seeds than a round's: for rehearsals, and to see how lucky a round's seeds are.

    The same seed gives the same load, stretched by 1 / target_qps. Arrivals are Poisson, the first at 0. With equal issue
    (`sample_concatenate_permutation`) samples come in whole permutations, one more until the last arrival has passed min_duration_s;
    without, samples are drawn with replacement and the run ends with the first arrival past min_duration_s that completes
    min_query_count.
    """
    unit = SAMPLE_COUNT if equal_issue else 1
    passed = count = math.ceil(min_query_count / unit) * unit
    drawn = 0
    while drawn < passed:  # a longer draw of one seed begins with the shorter one
        drawn = passed + max(unit, 1024)
        gaps = np.random.RandomState(seed).standard_exponential(drawn)
        arrivals = np.concatenate(([0.0], np.cumsum(gaps))) / target_qps
        # Whole units until the last arrival has passed the duration.
        passed = max(count, unit * math.ceil((np.searchsorted(arrivals, min_duration_s) + 1) / unit))
    stream = np.random.RandomState([seed, 1])
    if equal_issue:
        samples = np.concatenate([stream.permutation(SAMPLE_COUNT) for _ in range(passed // unit)])
    else:
        samples = stream.randint(0, SAMPLE_COUNT, passed)
    return Load(target_qps, arrivals[:passed], samples)


Loads = Callable[[float], Load]  # at any target QPS: one sequence, stretched


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
