"""How long the parts of a job take at least: loading, the search, the test modes."""

import math

from ..experiment.parameters import Experiment
from ..job.search import seconds_of
from ..job.search import stages as search_stages
from ..serving.lengths import SAMPLE_COUNT

MIN_DURATION_S = 600  # of a performance run, by the rules
TEARDOWN_S = 120  # before the time limit, Slurm's TERM to the job
LOAD_S = 600  # a fair guess for loading 230 GB of weights on every server


def performance_run(e: Experiment) -> tuple[int, int]:
    """Queries and least seconds of the performance run, and so of the search's full-length trials."""
    permutations = math.ceil((e.min_query_count or 1) / SAMPLE_COUNT)
    return (e.rehearsal_queries, 0) if e.shortened else (permutations * SAMPLE_COUNT, MIN_DURATION_S)


def runs_of(e: Experiment) -> list[tuple[int, int]]:
    """(queries, least seconds) of each test mode."""
    samples = e.rehearsal_accuracy_samples if e.shortened else SAMPLE_COUNT
    runs = {"performance": performance_run(e), "accuracy": (samples, 0), "test06": (100, 0)}
    return [runs[mode] for mode in e.test_modes]


def job_seconds(e: Experiment) -> float:
    """How long loading and the test modes take at least: their queries at the target, and LoadGen's minimum."""
    return seconds_of(runs_of(e), e.server_target_qps) + (30 if e.engine == "rehearsal" else LOAD_S)


def search_seconds(e: Experiment) -> float:
    """How long find_target_qps mostly takes: the trials of each length at the target; 0 if it is not asked for."""
    full_queries, full_s = performance_run(e)
    runs = []
    for queries, stage in search_stages(full_queries):
        runs += [(queries, full_s if queries == full_queries else 0)] * stage.most
    return e.find_target_qps * seconds_of(runs, e.server_target_qps)
