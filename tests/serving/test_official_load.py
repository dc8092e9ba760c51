"""The load of a claimed round, against the real LoadGen and against published logs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from disagg_lib.errors import SimulationError
from disagg_lib.serving import loadgen_rules
from disagg_lib.serving.lengths import SAMPLE_COUNT
from disagg_lib.serving.loadgen_rules import official_load, seeds_of

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
PUBLISHED = [
    (claimed, folder)
    for claimed, name in (("v5.1", "mlperf_logs"), ("v6.0", "mlperf_logs_v6.0"))
    for folder in sorted((SHARED / name).glob("*__Server")) + sorted((SHARED / name).glob("*__Interactive"))
]

# A system under test that answers at once; prints sample indices, and each query's scheduled time in us from LoadGen's trace.
NULL_SUT = """
import json, re, sys, mlperf_loadgen as lg
folder, scenario, qps, duration_ms, queries, seeds = json.loads(sys.argv[1])
indices = []
def issue(samples):
    indices.extend(s.index for s in samples)
    lg.QuerySamplesComplete([lg.QuerySampleResponse(s.id, 0, 0) for s in samples])
test = lg.TestSettings()
test.scenario, test.mode = getattr(lg.TestScenario, scenario), lg.TestMode.PerformanceOnly
with open(folder + "/user.conf", "w") as file:
    for name, value in (("target_qps", qps), ("min_duration", duration_ms), ("min_query_count", queries)):
        print(f"*.{scenario}.{name} = {value}", file=file)
assert test.FromConfig(folder + "/user.conf", "llama3_1-405b", scenario) == 0
test.use_token_latencies, test.performance_sample_count_override = False, 8313
test.qsl_rng_seed, test.sample_index_rng_seed, test.schedule_rng_seed = seeds
log = lg.LogSettings()
log.log_output.outdir, log.enable_trace = folder, True
lg.StartTestWithLogSettings(lg.ConstructSUT(issue, lambda: None), lg.ConstructQSL(8313, 8313, id, id), test, log, "")
trace = re.findall(r'"ph":"b".*?"id":(\\d+),"ts":([\\d.]+)', open(folder + "/mlperf_log_trace.json").read())
json.dump([indices, [ts for _, ts in sorted(trace, key=lambda q: int(q[0]))]], sys.stdout)
"""


def arrivals_ns(load):
    return np.rint(load.arrivals_s * 1e9).astype(np.int64)


def real_queries(folder, *settings):
    """Sample indices in order of issue, and scheduled times in ns after the first, of a run of LoadGen 5.1.2."""
    arguments = json.dumps([str(folder), "Server", *settings])
    command = [sys.executable, "-c", NULL_SUT, arguments]
    indices, us = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    scheduled_ns = np.array([int(t.replace(".", "")) for t in us])  # three places: whole ns
    return indices, (scheduled_ns - scheduled_ns[0]).tolist()


@pytest.mark.parametrize(
    ("claimed", "qps", "duration_ms", "queries"),
    [("v5.1", 4000.0, 1, 100), ("v6.0", 5000.0, 3000, 100), ("v6.1", 5000.0, 1, 16626)],
)
def test_the_real_loadgen_issues_these_samples_at_these_times(tmp_path, claimed, qps, duration_ms, queries):
    indices, scheduled_ns = real_queries(tmp_path, qps, duration_ms, queries, seeds_of(claimed))
    load = official_load(claimed, qps, duration_ms, queries)
    assert load.samples.tolist() == indices and arrivals_ns(load).tolist() == scheduled_ns


@pytest.mark.skipif(not PUBLISHED, reason="no published logs in ../shared")
@pytest.mark.parametrize(("claimed", "folder"), PUBLISHED, ids=lambda value: getattr(value, "name", value))
def test_published_runs_had_this_load(claimed, folder):
    lines = (folder / "performance/run_1/mlperf_log_detail.txt").read_text().splitlines()
    entries = [json.loads(line[line.index("{") :]) for line in lines if line.startswith(":::MLLOG")]
    log = {entry["key"]: entry["value"] for entry in entries}
    qps, least = log["effective_target_qps"], log["effective_min_query_count"]
    load = official_load(claimed, qps, log["effective_min_duration_ms"], least)
    assert len(load.samples) == log["generated_query_count"]
    # LoadGen's duration goes on to the query that it would issue next.
    last_gap_ns = int(loadgen_rules._unit_gaps(claimed, len(load.samples))[-1] / qps * 1e9)
    assert int(arrivals_ns(load)[-1]) + last_gap_ns == log["generated_query_duration"]
    assert loadgen_rules._official_samples(claimed, 1)[0].tolist() == log["loaded_qsl_set"]


def test_the_published_v5_1_disaggregated_run_lasted_as_long_as_its_log_says():
    """15.2 queries/s, 900 s: its log says 16,626 queries in 1,093,204,369,003 ns."""
    load = official_load("v5.1", 15.2, 900_000)
    last_gap_ns = int(loadgen_rules._unit_gaps("v5.1", 16626)[-1] / 15.2 * 1e9)
    assert len(load.samples) == 16626 and arrivals_ns(load)[-1] + last_gap_ns == 1093204369003


@pytest.mark.parametrize(
    ("qps", "least", "count"), [(0.05, 100, 8313), (13.0, 100, 8313), (14.5, 100, 16626), (22.2, 49878, 49878), (1.0, 8314, 16626)]
)  # fmt: skip
def test_queries_come_in_whole_permutations(qps, least, count):
    load = official_load("v6.0", qps, min_query_count=least)
    assert len(load.samples) == count and load.arrivals_s[-1] >= 600
    assert (np.bincount(load.samples) == count // SAMPLE_COUNT).all()


def test_a_permutation_is_repeated_unless_min_query_count_asks_for_more():
    repeated, fresh = official_load("v5.1", 14.5), official_load("v5.1", 14.5, min_query_count=16626)
    assert (repeated.samples[:SAMPLE_COUNT] == repeated.samples[SAMPLE_COUNT:]).all()
    assert (fresh.samples[:SAMPLE_COUNT] == repeated.samples[:SAMPLE_COUNT]).all()
    assert (fresh.samples[:SAMPLE_COUNT] != fresh.samples[SAMPLE_COUNT:]).mean() > 0.99


def test_shuffles_of_even_and_odd_length_keep_every_item():
    for count in (1, 2, 7, 8):
        items = list(range(count))
        loadgen_rules._shuffle(items, iter(loadgen_rules._words(1, 50)))
        assert sorted(items) == list(range(count))


def test_a_round_without_seeds_is_refused_by_name():
    with pytest.raises(SimulationError, match=r"round 'v9.9' has no seeds.*v5.1"):
        official_load("v9.9", 1.0)
