"""What the client says of requests that fail, of settings that make no sense, and of its own end."""

import csv
import json
import signal
import subprocess
import time

import pytest
from client_runs import command, error_lines, make_run, run_client
from endpoint import Server

from disagg_lib.results import rows

FAULTS = {
    "429": "http_429",
    "400": "http_4xx",
    "500": "http_5xx",
    "cut": "cut",
    "cut_politely": "cut",
    "error_event": "server_error",
    "empty": "empty",
    "claims_tokens": "empty",
    "short": "short",
    "not_http": "protocol",
    "silent": "timeout",
    "stalled": "stalled",
    "pings": "stalled",
}


def test_counts_by_kind_equal_what_was_injected(tmp_path):
    faults = list(FAULTS)
    plan = lambda n: faults[n // 5 % len(faults)] if n % 5 == 4 else "ok"  # noqa: E731
    run = make_run(tmp_path / "run", count=130, request_timeout_s=3, stall_timeout_s=1.0)
    with Server(plan) as server:
        done, result = run_client(run, server.url)
    assert done.returncode == 1
    assert {kind: count for kind, count in result["kinds"].items() if count} == {
        **{kind: 2 for kind in FAULTS.values()},
        "cut": 4,
        "empty": 4,
        "stalled": 4,
    }
    assert result["done"] == 104 and result["failed"] == 26 and result["outstanding"] == 0
    assert not result["valid_client"] and "4 requests failed: stalled" in result["reasons"]
    live = json.loads((run / "job/progress.jsonl").read_text().splitlines()[-1])
    assert live["kinds"] == {kind: count for kind, count in result["kinds"].items() if count}
    assert (
        len(error_lines(run)) == 26
    )  # one in LoadGen's log for each failed request: a checker refuses the run
    assert result["loadgen_errors"] == 26
    with open(run / "job/queries_performance.csv", newline="") as file:
        statuses = [row["status"] for row in csv.DictReader(file)]
    assert statuses.count("ok") == 104 and statuses.count("http_429") == 2


def test_server_that_goes_away_mid_run_fails_requests_and_not_the_client(tmp_path):
    def plan(n):
        return "stop_listening" if n == 60 else "cut" if n > 60 else "ok"

    run = make_run(tmp_path / "run")
    with Server(plan) as server:
        done, result = run_client(run, server.url)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert result["kinds"]["refused"] > 10
    assert result["done"] + result["failed"] == result["issued"] == 100


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_key": "llama3.1-405b"}, "known are llama3_1-405b-interactive"),
        ({"scenario": "Interactive"}, "known are Server, Offline"),
        ({"user_conf": "absent.conf"}, "FromConfig returned -2"),
        ({"total_sample_count": 601}, "600 rows, needed are 601"),
        ({"data_set": {"kind": "other"}}, "known are synthetic, pickle"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(tmp_path, change, message):
    run = make_run(tmp_path / "run", **change)
    done, result = run_client(run, "http://127.0.0.1:9")
    assert done.returncode == 2 and message in done.stderr and result is None


def test_missing_settings_name_the_key(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "job/settings.json").write_text('{"client": {"model": "m"}}')
    done, _ = run_client(run, "http://127.0.0.1:9")
    assert done.returncode == 2 and "client lacks endpoint, model_key" in done.stderr


def test_endpoint_that_refuses_connections_is_named_before_the_run(tmp_path):
    done, _ = run_client(make_run(tmp_path / "run"), "http://127.0.0.1:9")
    assert done.returncode == 2 and "127.0.0.1:9 does not accept connections" in done.stderr


@pytest.mark.parametrize("url", ["127.0.0.1:80", "http://127.0.0.1:65536", "http://127.0.0.1:x", "ftp://h:1"])
def test_url_that_names_no_endpoint_is_refused_with_a_sentence(tmp_path, url):
    done, _ = run_client(make_run(tmp_path / "run"), url)
    assert done.returncode == 2 and "needed is http://HOST:PORT" in done.stderr


def test_full_disk_ends_reports_and_not_the_run(tmp_path):
    run = make_run(tmp_path / "run", count=30)
    with Server() as server:
        done, result = run_client(run, server.url, "performance", "--progress", "/dev/full")
    assert done.returncode == 0 and result["done"] == 30 and "30 of 30 requests served" in done.stdout
    assert "report not written: [Errno 28] No space left on device" in done.stderr


def test_sigterm_stops_with_a_message_and_what_is_known(tmp_path):
    run = make_run(tmp_path / "run", qps=20, count=400)
    with Server() as server:
        process = subprocess.Popen(command(run, server.url), stdout=subprocess.PIPE, text=True)
        while server.asked < 10:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=10)
    result = json.loads((run / "job/client_performance.json").read_text())
    assert process.returncode == 128 + signal.SIGTERM and "SIGTERM: stopping" in out
    assert result["status"] == "stopped by SIGTERM" and not result["valid_client"]
    assert result["done"] >= 5


def test_client_that_was_late_says_so_in_the_result_and_in_the_verdict(tmp_path):
    run = make_run(tmp_path / "run", count=300)
    with Server() as server:
        process = subprocess.Popen(command(run, server.url), stdout=subprocess.DEVNULL)
        while server.asked < 50:
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)  # as a machine with too few cores would
        time.sleep(0.5)
        process.send_signal(signal.SIGCONT)
        assert process.wait(20) == 0
    result = json.loads((run / "job/client_performance.json").read_text())
    assert result["client_was_late"] and result["late_limit_ms"] == 45 and result["late_issues"] > 30
    words = f"The client itself was late: {result['late_issues']} of 300 requests left more than 45 ms"
    assert words in rows.verdict_text(run) and "twice" not in rows.verdict_text(run)
    (run / "job/client_performance.json").write_text(json.dumps({**result, "resent": 2}))
    assert "The client sent 2 requests twice" in rows.verdict_text(run)
