"""One trial: a run of the measuring client in a folder of its own, and what it says."""

import csv
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from .margins import SearchError, share_of_limit
from .target import Target

MOST_FAILED = 0.01  # share of a trial's requests: if more failed, the others' latencies tell of another load


def write_trial(run_dir, folder, client, qps, queries, full_s):
    """Make the run folder of one trial: the job's client settings, its own user.conf."""
    (folder / "job").mkdir(parents=True)
    data_set = dict(client["data_set"])
    if "lengths" in data_set:
        data_set["lengths"] = str(run_dir / data_set["lengths"])
    settings = {"client": dict(client, data_set=data_set, user_conf="user.conf")}
    (folder / "job" / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    # A full-length trial lasts as long as the run that it speaks for, and issues every sample equally often.
    is_full = queries == client["total_sample_count"]
    values = {"target_qps": f"{qps:.10g}", "min_duration": max(1, round(1000 * full_s)) if is_full else 1}
    values.update(min_query_count=queries, sample_concatenate_permutation=int(is_full))
    lines = [f"*.Server.{key} = {value}\n" for key, value in values.items()]
    (folder / "user.conf").write_text("".join(lines))


def accepts_connections(url):
    """Return whether something listens at a URL."""
    target = Target(url, "")
    try:
        socket.create_connection((target.host, target.port), timeout=10).close()
    except OSError:
        return False
    return True


def read_trial(folder, urls):
    """Return the row of a finished trial; SearchError if the servers are gone, which says nothing about the QPS."""
    result = json.loads((folder / "job" / "client_performance.json").read_text())
    gone = result["kinds"]["refused"] and not all(map(accepts_connections, urls))
    if result["status"] != "finished" or gone or not result["done"]:
        raise SearchError(f"{folder}: {'; '.join(result['reasons'])}: are the servers up and well?")
    with open(folder / "job" / "queries_performance.csv", newline="") as file:
        served = [row for row in csv.DictReader(file) if row["status"] == "ok"]
    ttft_ms = np.array([float(row["ttft_ms"]) + float(row["late_ms"]) for row in served])
    streamed_ms = np.array([float(row["latency_ms"]) - float(row["ttft_ms"]) for row in served])
    tpot_ms = streamed_ms / (np.array([int(row["output_tokens"]) for row in served]) - 1)
    issued = result["issued"]
    many_failed = result["failed"] > MOST_FAILED * issued
    return {
        "valid": result["valid_client"] and result["loadgen_validity"] == "VALID",
        "ttft_share": None if many_failed else share_of_limit(ttft_ms, result["ttft_limit_ms"], issued),
        "tpot_share": None if many_failed else share_of_limit(tpot_ms, result["tpot_limit_ms"], issued),
        "seconds": result["wall_s"],
        "issued": issued,
        "failed": result["failed"],
        "client_was_late": result["client_was_late"],
        "folder": folder.name,
    }


def run_trial(run_dir, client, urls, qps, queries, full_s=0.0):
    """Run the measuring client once, in a folder of its own below job/trials, and return its row."""
    trials = run_dir / "job" / "trials"
    numbers = [int(path.name) for path in trials.glob("*") if path.name.isdecimal()]
    kept = run_dir / "job" / "find_target_qps.jsonl"  # an earlier job's rows tell of folders of its own
    numbers.append(kept.read_text().count("\n") if kept.exists() else 0)
    folder = trials / f"{1 + max(numbers):02d}"
    write_trial(run_dir, folder, client, qps, queries, full_s)
    command = [sys.executable, str(Path(__file__).parent), "client", "--run-dir", str(folder)]
    command += ["--test-mode", "performance", "--progress-mode", "find_target_qps"]
    for url in urls:
        command += ["--url", url]
    command += ["--progress", str(run_dir / "job" / "progress.jsonl")]
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if code not in (0, 1):
        raise SearchError(f"{folder}: the client ended with status {code}; its message is above")
    return read_trial(folder, urls)
