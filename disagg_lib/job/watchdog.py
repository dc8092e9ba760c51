"""The watchdog of a running client: tokens must keep coming, and the servers must live."""

import json
import re
import shutil
import time

from .deaths import POLL_S, exit_status, last_lines, refuse_dead_servers
from .phases import JOB, RUN, Failed, settings

HARNESS_QUIET_S = 1200  # NVIDIA's harness loads its data set and retries for minutes before its first query


def last_progress():
    """The newest complete line of progress.jsonl, or None."""
    path = JOB / "progress.jsonl"
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1]) if lines and lines[-1].startswith(b"{") else None


def harness_progress(mode):
    """NVIDIA's harness reports nothing while it runs: that the servers' iteration log grows stands for tokens."""
    log = RUN / "logs/output_workers.log"
    size = log.stat().st_size if log.exists() else 0
    return {"mode": mode, "done": 0, "tokens": size, "outstanding": 1}


def collect(mode):
    """Copy the harness's LoadGen files, unedited, to where ours would be."""
    found = sorted((JOB / ("harness_" + mode)).rglob("mlperf_log_detail.txt"))
    if len(found) != 1:
        raise Failed(
            f"{len(found)} LoadGen logs below job/harness_{mode}, needed 1: see logs/mlperf_benchmark_{mode}.log"
        )
    target = RUN / "mlperf" / mode
    target.mkdir(parents=True)
    for path in sorted(found[0].parent.glob("mlperf_log_*")) + sorted(found[0].parent.glob("accuracy.txt")):
        shutil.copy2(path, target)


def adopt():
    """Put the target QPS that the search found where LoadGen reads it."""
    found = json.loads((JOB / "find_target_qps.json").read_text())["target_qps"]
    path = RUN / "user.conf"
    path.write_text(re.sub(r"(target_qps = ).*", lambda match: f"{match[1]}{found}", path.read_text()))
    print(f"target_qps found: {found}", flush=True)


def watch(mode):
    """Follow the client of one test mode to its end; a stall or a dead server ends the job."""
    s = settings()
    ours = s["client"]["kind"] == "loadgen"
    stall_s = s["stall_timeout_s"] if ours else max(s["stall_timeout_s"], HARNESS_QUIET_S)
    moved, seen = time.monotonic(), None
    while True:
        status = exit_status("client_" + mode)
        if status is not None:
            if status:
                log = RUN / "logs" / (mode + ".log")
                log = log if log.exists() else RUN / "logs" / f"mlperf_benchmark_{mode}.log"
                raise Failed(f"the {mode} client ended with status {status}: {last_lines(log)}")
            return
        refuse_dead_servers()
        progress = last_progress() if ours else harness_progress(mode)
        if progress is not None and progress["mode"] == mode:
            # With no query open there are no tokens to wait for, but a living client still writes a line a second.
            counts = (
                progress["done"],
                progress["tokens"],
                0 if progress["outstanding"] else progress["time_s"],
            )
            if counts != seen:
                moved, seen = time.monotonic(), counts
        still_s = time.monotonic() - moved
        # Before the first query a client prepares its requests, in a search before each trial.
        prepares = not seen or mode == "find_target_qps" and not (progress and progress["outstanding"])
        if still_s > (max(stall_s, 600) if prepares else stall_s):
            what = f"{progress['outstanding']} queries open" if seen else "the client has not begun"
            done = f"{progress['done']} done, {progress['tokens']} tokens" if seen else "no query"
            raise Failed(
                f"stalled: no token for {still_s:.0f} s (stall_timeout_s = {stall_s}) with {what}; {done} so far"
            )
        time.sleep(POLL_S)
