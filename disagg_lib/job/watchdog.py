"""The watchdog of a running client: tokens must keep coming, and the servers must live."""

import json
import re
import shutil
import time

from .deaths import POLL_S, exit_status, refuse_dead_servers, told
from .health import Pulse, refuse_silent
from .orchestrator_cpu import OrchestratorCpu
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


class Movement:
    """Whether the newest line of progress differs from the one before, and since when it does not."""

    def __init__(self, mode):
        self.mode, self.ours = mode, settings()["client"]["kind"] == "loadgen"
        stall_s = settings()["stall_timeout_s"]
        self.stall_s = stall_s if self.ours else max(stall_s, HARNESS_QUIET_S)
        self.moved, self.seen, self.line = time.monotonic(), None, None

    def look(self):
        line = last_progress() if self.ours else harness_progress(self.mode)
        if line is None or line["mode"] != self.mode:
            return
        self.line = line
        # With no query open there are no tokens to wait for, but a living client still writes a line a second.
        counts = line["done"], line["tokens"], 0 if line["outstanding"] else line["time_s"]
        if counts != self.seen:
            self.moved, self.seen = time.monotonic(), counts

    def refuse(self):
        """Failed: nothing moves any more."""
        line, still_s = self.line, time.monotonic() - self.moved
        # Before the first query a client prepares its requests, in a search before each trial.
        prepares = not line or self.mode == "find_target_qps" and not line["outstanding"]
        if still_s > (max(self.stall_s, 600) if prepares else self.stall_s):
            what = f"{line['outstanding']} queries open" if line else "the client has not begun"
            done = f"{line['done']} done, {line['tokens']} tokens" if line else "no query"
            raise Failed(
                f"stalled: no token for {still_s:.0f} s (stall_timeout_s = {self.stall_s}) with {what}; {done} so far"
            )


def client_log(mode):
    log = RUN / "logs" / (mode + ".log")
    return log if log.exists() else RUN / "logs" / f"mlperf_benchmark_{mode}.log"


def watch(mode):
    """Follow the client of one test mode to its end; a stall or a dead server end the job."""
    movement = Movement(mode)
    pulse, orchestrator = (Pulse(), OrchestratorCpu(mode)) if settings()["servers"] else (None, None)
    while exit_status("client_" + mode) is None:
        refuse_dead_servers()
        if pulse:
            pulse.refuse()
            orchestrator.sample()
        movement.look()
        movement.refuse()
        time.sleep(POLL_S)
    status = exit_status("client_" + mode)
    if status:
        if pulse:
            refuse_silent()
        raise Failed(f"the {mode} client ended with status {status}: {told(client_log(mode))}")
