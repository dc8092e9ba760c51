"""Runs of the measuring client, each a process of its own: LoadGen reads its built-in configuration once in a process."""

import csv
import json
import subprocess
import sys
from pathlib import Path

from disagg_lib.run.writing import PROGRAM

LENGTHS = [(20 + index % 7, 5 + index % 4) for index in range(600)]
OFFLINE_CONF = "*.Offline.target_qps = 1\n*.Offline.min_duration = 1000\n*.Offline.min_query_count = 200\n"


def make_run(folder: Path, qps=150, count=100, **client) -> Path:
    (folder / "job").mkdir(parents=True)
    settings = {
        "endpoint": "/v1/completions",
        "model": "m",
        "model_key": "llama3_1-405b-interactive",
        "scenario": "Server",
        "user_conf": "user.conf",
        "total_sample_count": 500,
        "accuracy_sample_count": 16,
        "data_set": {"kind": "synthetic", "lengths": "job/lengths.csv"},
        "max_output_tokens": 2000,
        "min_output_tokens": 1,
        "temperature": 1.0,
        "top_p": 0.001,
        "top_k": 1,
        "request_timeout_s": 20,
        "connections": 8,
    }
    (folder / "job/settings.json").write_text(json.dumps({"client": {**settings, **client}}))
    with open(folder / "job/lengths.csv", "w", newline="") as file:
        csv.writer(file).writerows([("input_tokens", "output_tokens"), *LENGTHS])
    (folder / "user.conf").write_text(
        f"*.Server.target_qps = {qps}\n*.Server.min_duration = 100\n*.Server.min_query_count = {count}\n"
        "*.Server.sample_concatenate_permutation = 0\n"
    )
    return folder


def command(run, url, mode="performance"):
    return [sys.executable, str(PROGRAM), "client", "--run-dir", str(run), "--test-mode", mode, "--url", url]


def run_client(run, url, mode="performance", *more):
    done = subprocess.run(
        [*command(run, url, mode), *more], capture_output=True, text=True, timeout=60, cwd="/"
    )
    path = run / "job" / f"client_{mode}.json"
    return done, json.loads(path.read_text()) if path.exists() else None


def detail(run, mode="performance"):
    lines = (run / "mlperf" / mode / "mlperf_log_detail.txt").read_text().splitlines()
    return [json.loads(line[line.index("{") :]) for line in lines]


def value(run, key, mode="performance"):
    return next(entry["value"] for entry in detail(run, mode) if entry["key"] == key)


def error_lines(run, mode="performance"):
    return [entry["value"] for entry in detail(run, mode) if entry["metadata"]["is_error"]]
