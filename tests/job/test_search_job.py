"""The search as a job runs it: the real client and LoadGen for its plumbing, its rows, files and figure."""

import csv
import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from client_runs import make_run
from endpoint import Server
from processes import v51_job
from search_runs import line, run_search

from disagg_lib.cluster import follow
from disagg_lib.errors import RunFolderError
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.job import margins, trials
from disagg_lib.job.search import find_target_qps
from disagg_lib.results import figures
from disagg_lib.results.logs import LogError
from disagg_lib.run.writing import PROGRAM, create_run


def test_figure_of_a_search_shows_its_trials_and_its_end(tmp_path):
    (tmp_path / "job").mkdir()
    with pytest.raises(LogError, match="no trials"):
        figures.figure_search(tmp_path)
    rows = tmp_path / "job/find_target_qps.jsonl"
    found = find_target_qps(line(3.85), 1.0, 10.0, rows_path=rows)
    failed = {
        "qps": 9.0,
        "queries": 459,
        "valid": False,
        "ttft_share": None,
        "tpot_share": None,
        "seconds": 1,
        "failed": 7,
    }
    rows.write_text(rows.read_text() + json.dumps(failed) + "\n")
    (tmp_path / "job/find_target_qps.json").write_text(json.dumps(found))
    figure = figures.figure_search(tmp_path)
    (axis,) = figure.axes
    labels = axis.get_legend_handles_labels()[1]
    passed = sum(json.loads(row)["valid"] for row in rows.read_text().splitlines())
    assert f"TTFT, VALID ({passed})" in labels and f"TTFT, INVALID ({found['trials'] - passed})" in labels
    assert {"requests failed (1)", "limit", f"target {found['target_qps']:g} queries/s"} <= set(labels)
    (crosses,) = (c for c in axis.collections if c.get_label() == "requests failed (1)")
    assert crosses.get_offsets()[0][1] < axis.get_ylim()[1]
    assert "source: unstated" in figure.get_suptitle() and figure.get_facecolor()[3] == 1.0
    grounds = [mark.get_facecolor()[0].tolist() for mark in axis.collections[:2]]
    assert grounds[0] != grounds[1]  # valid and invalid differ without their hue, too
    assert follow.trial_line(failed) == "trial: 459 queries at 9 queries/s: INVALID, 7 requests failed"
    few = {**failed, "ttft_share": 0.5, "tpot_share": 0.25}
    said = "INVALID, TTFT 0.50 and TPOT 0.25 of the limit, 7 requests failed"
    assert follow.trial_line(few) == f"trial: 459 queries at 9 queries/s: {said}"


def test_interrupted_search_goes_on_in_a_new_job_of_the_same_configuration(tmp_path):
    given = {"find_target_qps": True, "rehearsal_queries": 459}
    first = create_run(load_experiment(given=given), tmp_path / "first")
    given["search_rows_from"] = str(first)
    with pytest.raises(RunFolderError, match=r"no trial of that search ended"):
        create_run(load_experiment(given=given), tmp_path / "second")
    (first / "job/find_target_qps.jsonl").write_text('{"qps": 1.0}\n')
    second = create_run(load_experiment(given=given), tmp_path / "second")
    assert (second / "job/find_target_qps.jsonl").read_text() == '{"qps": 1.0}\n'
    shape = tmp_path / "shape.csv"
    shape.write_text("up_to_tokens,samples\n100,0\n200,5\n")
    for name, value in {
        "scenario": "Server",  # other limits
        "trtllm_dialect": "1.x",
        "ctx_batch_size": 64,
        "rehearsal_output_tokens": 8,
        "fault": "slow_tokens",
        "container_image": "another.sqsh",
        "lengths_file": str(shape),
    }.items():
        with pytest.raises(RunFolderError, match=f"search_rows_from: .*{name} was .*, is .*its trials tell"):
            create_run(load_experiment(given=given | {name: value}), tmp_path / "third")
    (first / "job/lengths.csv").write_text("input_tokens,output_tokens\n100,10\n")
    with pytest.raises(RunFolderError, match=r"first/job/lengths\.csv differs from this run's"):
        create_run(load_experiment(given=given), tmp_path / "third")
    shape.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


@pytest.fixture
def job(tmp_path):
    """A run folder with the room copied into it, as a job has them; nothing of the package beside them."""
    run = make_run(tmp_path / "a run", total_sample_count=500)
    shutil.copytree(PROGRAM, run / "job/program")
    settings = json.loads((run / "job/settings.json").read_text())
    settings["find_target_qps"] = {"low_qps": 200, "high_qps": 300}
    (run / "job/settings.json").write_text(json.dumps(settings))
    return run


def test_search_runs_real_trials_keeps_their_rows_and_resumes(job):
    with Server(step_s=0.001) as server:
        done = run_search(job, server.url)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(row) for row in (job / "job/find_target_qps.jsonl").read_text().splitlines()]
        asked = server.asked
        again = run_search(job, server.url)
    result = json.loads((job / "job/find_target_qps.json").read_text())
    assert result["trials"] == len(rows) >= 2 and asked == sum(row["queries"] for row in rows) == server.asked
    assert result["ended"] == "high_qps is VALID" and again.returncode == 0
    assert all(0 < row["ttft_share"] < 0.5 and row["valid"] for row in rows)
    assert (job / "job/trials/01/mlperf/performance/mlperf_log_summary.txt").exists()
    live = [json.loads(row) for row in (job / "job/progress.jsonl").read_text().splitlines()]
    assert {row["mode"] for row in live} == {"find_target_qps"}
    assert {row["target_qps"] for row in live} == {row["qps"] for row in rows}


def test_failed_requests_make_a_trial_invalid(job):
    with Server(lambda n: "500" if n % 50 == 0 else "ok", step_s=0.001) as server:
        row = trials.run_trial(
            job, json.loads((job / "job/settings.json").read_text())["client"], [server.url], 300, 459
        )
    assert not row["valid"] and row["ttft_share"] is None and row["failed"] == 10


def test_one_failed_request_leaves_the_shares_of_the_others(job):
    client = json.loads((job / "job/settings.json").read_text())["client"]
    with Server(lambda n: "500" if n == 7 else "ok", step_s=0.001) as server:
        row = trials.run_trial(job, client, [server.url], 300, 459)
    assert (row["failed"], row["valid"]) == (1, False) and 0 < row["ttft_share"] < 1


def test_refused_connections_make_a_trial_invalid_and_end_the_search_if_the_server_is_gone(job):
    client = json.loads((job / "job/settings.json").read_text())["client"]
    with Server(step_s=0.001) as server:
        trials.run_trial(job, client, [server.url], 300, 459)
    folder = job / "job/trials/01"
    result = json.loads((folder / "job/client_performance.json").read_text())
    result["kinds"]["refused"], result["failed"], result["valid_client"] = 1, 1, False
    (folder / "job/client_performance.json").write_text(json.dumps(result))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = "http://{}:{}".format(*listening.getsockname())
        row = trials.read_trial(folder, [url])
    assert not row["valid"] and 0 < row["ttft_share"] < 1 and row["failed"] == 1
    with pytest.raises(margins.SearchError, match="are the servers up"):
        trials.read_trial(folder, [url])


def test_server_that_serves_nothing_ends_the_search_and_leaves_no_row(job):
    with Server(lambda n: "500") as server:
        done = run_search(job, server.url)
    assert done.returncode == 1 and "are the servers up and well?" in done.stderr
    assert " requests failed: http_5xx" in done.stderr
    assert not (job / "job/find_target_qps.jsonl").exists()


def test_trials_that_go_on_with_an_earlier_jobs_rows_have_numbers_of_their_own(job):
    rows = [
        {"qps": q, "queries": 459, "valid": True, "ttft_share": 0.1, "tpot_share": 0.1, "seconds": 1.0}
        for q in (1.0, 2.0)
    ]
    (job / "job/find_target_qps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    client = json.loads((job / "job/settings.json").read_text())["client"]
    with Server(step_s=0.001) as server:
        assert trials.run_trial(job, client, [server.url], 300, 459)["folder"] == "03"


def test_servers_that_are_gone_end_the_search_and_leave_no_row(job):
    done = run_search(job, "http://127.0.0.1:9")
    assert done.returncode == 1 and "the client ended with status 2" in done.stderr
    assert not (job / "job/find_target_qps.jsonl").exists()


def test_short_search_on_the_rehearsal_server(job):
    """One search against real rehearsal processes at a tenth of their time; interrupted, it goes on from its rows."""
    with open(job / "job/lengths.csv", "w", newline="") as file:
        csv.writer(file).writerows([("input_tokens", "output_tokens"), *[(4000, 8)] * 500])
    settings = json.loads((job / "job/settings.json").read_text())
    settings["find_target_qps"] = {"low_qps": 40, "high_qps": 240, "resolution": 0.2}
    (job / "job/settings.json").write_text(json.dumps(settings))
    (job / "servers").mkdir()
    with v51_job(job / "servers", environment={"REHEARSAL_TIME_SCALE": "0.1"}) as servers:
        url = f"http://127.0.0.1:{servers.port}"
        command = [sys.executable, job / "job/program", "search", "--run-dir", job, "--url", url]
        first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        rows = job / "job/find_target_qps.jsonl"
        deadline = time.monotonic() + 90
        while not rows.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        first.terminate()
        assert first.wait(20) == 128 + signal.SIGTERM
        kept = rows.read_text()
        done = run_search(job, url)
    assert done.returncode == 0, done.stderr
    assert rows.read_text().startswith(kept)
    result = json.loads((job / "job/find_target_qps.json").read_text())
    kept = [json.loads(row) for row in rows.read_text().splitlines()]
    assert result["trials"] == len(kept) >= 2
    assert 4 < result["target_qps"] < 240
