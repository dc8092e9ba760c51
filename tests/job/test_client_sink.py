"""What LoadGen measures through the client is what the server sent: real LoadGen at 120 queries/s, a server in C."""

import csv
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from client_runs import error_lines, make_run, run_client, value

SOURCE = Path(__file__).parents[2] / "benchmarks" / "sse_sink.c"
ATTEMPTS = 3


@pytest.fixture(scope="module")
def sink(tmp_path_factory):
    """The benchmark's sink, TTFT 200 ms, TPOT 20 ms, as (url, function that returns its log)."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("no C compiler: apt install gcc")
    program = tmp_path_factory.mktemp("sink") / "sse_sink"
    subprocess.run([compiler, "-O2", "-o", program, SOURCE], check=True)
    process = subprocess.Popen([program, "200000", "20000"], stdout=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{int(process.stdout.readline())}"

    def log():
        with urllib.request.urlopen(url) as answer:
            return np.array([line.split() for line in answer.read().splitlines()], dtype=np.int64)

    yield url, log
    process.kill()
    process.communicate()


def test_loadgens_times_are_what_the_server_sent(tmp_path, sink):
    """Other processes may take the machine's cores for a while; what the client itself adds is there in every attempt."""
    url, log = sink
    for attempt in range(ATTEMPTS):
        run = make_run(tmp_path / f"run {attempt}", qps=120, count=600, connections=64)
        with open(run / "job/lengths.csv", "w", newline="") as file:
            csv.writer(file).writerows([("input_tokens", "output_tokens"), *[(9400, 100)] * 500])
        done, result = run_client(run, url)
        assert done.returncode == 0, done.stdout
        assert error_lines(run) == []
        _, received, first, last, events, _ = log()[-600:].T
        assert result["output_tokens"] == events.sum() == 60000
        # LoadGen's end of an answer is its last byte, which the server sends with the last event.
        added_ms = np.array(
            [
                value(run, "result_first_token_50.00_percentile_latency_ns") / 1e6
                - np.median(first - received) / 1e6,
                value(run, "result_time_to_output_token_mean") / 1e6
                - np.mean((last - first) / (events - 1)) / 1e6,
            ]
        )
        print(
            f"added: TTFT p50 {added_ms[0]:.3f} ms, TPOT mean {added_ms[1]:.4f} ms; late p99 {result['late_p99_ms']} ms"
        )
        if (np.abs(added_ms) < [1.0, 0.1]).all():
            return
    pytest.fail(f"TTFT p50, TPOT mean differ by {added_ms} ms in the last of {ATTEMPTS} attempts")


def test_the_benchmark_still_runs_the_client():
    """`make bench` alone calls it, and so it once lay broken unseen."""
    if not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        pytest.skip("no C compiler: apt install gcc")
    command = [sys.executable, SOURCE.with_name("client.py"), "--only", "ours", "--only", "ours, two URLs"]
    short = ["--rounds", "1", "--seconds", "0.5", "--events-per-s", "4000", "--tokens", "40"]
    done = subprocess.run([*command, *short], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| ours, two URLs | " in done.stdout
