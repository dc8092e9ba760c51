"""The measuring client against a real server on loopback, under real LoadGen.

LoadGen reads its built-in configuration once in a process, so every run is a process of its own.
"""

import csv
import hashlib
import json
import os
import pickle
import subprocess

import pytest
from client_runs import LENGTHS, command, error_lines, make_run, run_client, value
from endpoint import Server


@pytest.fixture(scope="module")
def clean_run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("a run") / "with $(x) ;'q'")
    with Server() as server:
        done, result = run_client(run, server.url)
    return run, done, result, server


def test_fault_free_run_ends_with_status_0_and_no_error_in_loadgens_log(clean_run):
    run, done, result, _ = clean_run
    assert (done.returncode, done.stderr) == (0, "")
    assert error_lines(run) == []
    assert result["valid_client"] and result["failed"] == 0 and result["done"] == result["issued"] == 100


def test_loadgen_gets_the_true_number_of_tokens(clean_run):
    run, _, result, server = clean_run
    assert result["output_tokens"] == sum(body["max_tokens"] for body in server.bodies)
    seconds = result["output_tokens"] / value(run, "result_completed_tokens_per_second")
    assert 0.3 < seconds < 5


def test_interactive_limits_stand_in_the_log(clean_run):
    run = clean_run[0]
    assert value(run, "requested_server_ttft_latency") == 4_500_000_000
    assert value(run, "requested_server_tpot_latency") == 80_000_000


def test_a_claimed_rounds_seeds_stand_in_the_log(tmp_path):
    with Server() as server:
        done, _ = run_client(make_run(tmp_path / "run", 200, 20, seeds=[2**63 + 11, 12, 13]), server.url)
    assert done.returncode == 0, done.stderr
    names = [f"effective_{kind}_rng_seed" for kind in ("qsl", "sample_index", "schedule")]
    assert [value(tmp_path / "run", name) for name in names] == [2**63 + 11, 12, 13]


def test_request_is_what_the_benchmark_sends(clean_run):
    body = clean_run[3].bodies[0]
    expected = {"model": "m", "temperature": 1.0, "top_p": 0.001, "top_k": 1, "stream": True}
    assert {key: body[key] for key in expected} == expected
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": False}
    assert (len(body["prompt"]), body["max_tokens"]) in LENGTHS
    assert body["min_tokens"] == body["max_tokens"]
    assert all(0 <= token < 128256 for token in body["prompt"])


def test_prompts_differ_and_repeat_from_run_to_run(clean_run, tmp_path):
    first = {json.dumps(body["prompt"]) for body in clean_run[3].bodies}
    assert len(first) > 80  # 100 draws from 500 samples, each sample its own prompt
    with Server() as server:
        run_client(make_run(tmp_path / "run"), server.url)
    assert {json.dumps(body["prompt"]) for body in server.bodies} == first


def test_progress_is_cumulative_and_knows_the_total(clean_run):
    lines = [json.loads(line) for line in (clean_run[0] / "job/progress.jsonl").read_text().splitlines()]
    assert lines[-1]["done"] == lines[-1]["total"] == 100
    assert [line["tokens"] for line in lines] == sorted(line["tokens"] for line in lines)
    counts = {"issued", "done", "failed", "outstanding", "tokens", "total", "kinds", "resent"}
    assert set(lines[0]) == counts | {"time_s", "mode", "target_qps"}


def test_queries_table_has_a_row_for_each_query(clean_run):
    with open(clean_run[0] / "job/queries_performance.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100 and {row["status"] for row in rows} == {"ok"}
    for row in rows:
        lengths = LENGTHS[int(row["sample_index"])]
        assert (int(row["input_tokens"]), int(row["output_tokens"])) == lengths
        assert 0 < float(row["ttft_ms"]) < float(row["latency_ms"])
        assert float(row["late_ms"]) >= 0


def test_rows_agree_with_loadgens_ttft(clean_run):
    with open(clean_run[0] / "job/queries_performance.csv", newline="") as file:
        seen = [float(row["ttft_ms"]) + float(row["late_ms"]) for row in csv.DictReader(file)]
    loadgen_ms = value(clean_run[0], "result_first_token_mean_latency_ns") / 1e6
    assert sum(seen) / len(seen) == pytest.approx(loadgen_ms, abs=1.5)


def test_issue_times_follow_loadgens_schedule(clean_run):
    # The client computes LoadGen's arrivals from its seed; were they wrong, lateness would be tens of ms.
    assert clean_run[2]["late_p99_ms"] < 25


def test_second_run_in_the_same_folder_is_refused(clean_run):
    run = clean_run[0]
    before = (run / "mlperf/performance/mlperf_log_detail.txt").read_bytes()
    done, _ = run_client(run, "http://127.0.0.1:9")
    assert done.returncode == 2 and "already holds mlperf_log_accuracy.json" in done.stderr
    assert (run / "mlperf/performance/mlperf_log_detail.txt").read_bytes() == before


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickle_is_not_opened_unless_known_or_trusted(tmp_path):
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    data_set = {"kind": "pickle", "path": str(path), "sha256": None, "trust": False}
    done, _ = run_client(make_run(tmp_path / "a", data_set=data_set), "http://127.0.0.1:9")
    assert done.returncode == 2 and digest in done.stderr and "runs code" in done.stderr
    data_set.update(sha256="0" * 64, trust=True)
    done, _ = run_client(make_run(tmp_path / "b", data_set=data_set), "http://127.0.0.1:9")
    assert done.returncode == 2 and "another or a damaged file" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_pickle_prompts_are_sent_as_they_are(tmp_path):
    import pandas as pd

    frame = pd.DataFrame({"tok_input": [[5, 6, 7 + n] for n in range(16)], "gt_output": ["x"] * 16})
    frame.to_pickle(tmp_path / "data.pkl")
    digest = hashlib.sha256((tmp_path / "data.pkl").read_bytes()).hexdigest()
    data_set = {"kind": "pickle", "path": str(tmp_path / "data.pkl"), "sha256": digest, "trust": False}
    run = make_run(tmp_path / "run", data_set=data_set, total_sample_count=16, max_output_tokens=9)
    with Server() as server:
        done, _ = run_client(run, server.url, "accuracy")
    assert done.returncode == 0, done.stderr
    asked = server.bodies[1:]  # the first one found out how ids come
    assert sorted(body["prompt"] for body in asked) == [[5, 6, 7 + n] for n in range(16)]
    assert {(body["min_tokens"], body["max_tokens"]) for body in asked} == {(1, 9)}


def test_client_runs_on_plain_asyncio(tmp_path):
    (tmp_path / "uvloop.py").write_text("raise ImportError('not here')\n")
    run = make_run(tmp_path / "run", count=20)
    with Server() as server:
        done = subprocess.run(
            command(run, server.url),
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            timeout=60,
        )
    result = json.loads((run / "job/client_performance.json").read_text())
    assert done.returncode == 0 and result["uvloop"] is None


def test_audit_config_of_the_working_directory_is_not_taken(tmp_path):
    run = make_run(tmp_path / "run", count=20)
    (tmp_path / "audit.config").write_text("*.*.min_query_count = 30\n")
    with Server() as server:
        subprocess.run(command(run, server.url), cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert value(run, "generated_query_count") == 20
