"""Write the small LoadGen logs of this folder with the installed LoadGen and a stand-in system that answers on a timer.

    python tests/data/logs_make.py FOLDER KIND [KIND ...]

One process per kind: LoadGen loads its compiled-in mlperf.conf only once in a process.
Kinds: see KINDS. The answers carry 30 to 60 invented token ids, so these logs measure LoadGen's files and nothing else.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from heapq import heappop, heappush
from pathlib import Path

import mlperf_loadgen as lg
import numpy as np

SAMPLES = 8313  # of llama3.1-405b's data set
MODEL = "llama3_1-405b-interactive"

#: kind -> (LoadGen model key, scenario, mode, samples, user.conf lines, TTFT of an answer in s, TPOT in s)
KINDS = {
    # a full run by the rules of v5.1: 8313 queries, equal issue, 600 s
    "full/performance": (MODEL, "Server", "PerformanceOnly", SAMPLES, ["*.Server.target_qps = 13.0"], 0.02, 0.001),
    "full/accuracy": (MODEL, "Server", "AccuracyOnly", 64, ["*.Server.target_qps = 200"], 0.02, 0.001),
    # short, as a rehearsal is: 459 queries drawn from all 8313
    "short/performance": (
        MODEL, "Server", "PerformanceOnly", SAMPLES,
        ["*.Server.target_qps = 100", "*.Server.min_duration = 1000", "*.Server.min_query_count = 459",
         "*.Server.sample_concatenate_permutation = 0"], 0.02, 0.001,
    ),
    # too slow for its limits
    "slow/performance": (
        MODEL, "Server", "PerformanceOnly", SAMPLES,
        ["*.Server.target_qps = 100", "*.Server.min_duration = 1000", "*.Server.min_query_count = 459",
         "*.Server.sample_concatenate_permutation = 0"], 0.02, 0.09,
    ),
    "offline/performance": (
        "llama3_1-405b", "Offline", "PerformanceOnly", 64,
        ["*.Offline.target_qps = 40", "*.Offline.min_duration = 1000", "*.Offline.min_query_count = 64"], 0.02, 0.001,
    ),
    "resnet50_single_stream/performance": (
        "resnet50", "SingleStream", "PerformanceOnly", 64,
        ["*.SingleStream.min_duration = 200", "*.SingleStream.min_query_count = 64"], 0.001, 0.0,
    ),
    "resnet50_multi_stream/performance": (
        "resnet50", "MultiStream", "PerformanceOnly", 64,
        ["*.MultiStream.min_duration = 200", "*.MultiStream.min_query_count = 64"], 0.001, 0.0,
    ),
}  # fmt: skip


class TimedSystem:
    """Answers each query at its time: one thread, one heap of (time, what to do)."""

    def __init__(self, ttft_s: float, tpot_s: float, tokens: bool) -> None:
        self.ttft_s, self.tpot_s, self.tokens = ttft_s, tpot_s, tokens
        self.due: list = []
        self.wake = threading.Condition()
        self.stopped = False
        self.order = 0
        self.thread = threading.Thread(target=self.answer_for_ever, daemon=True)
        self.thread.start()

    def issue(self, queries) -> None:
        now = time.perf_counter()
        with self.wake:
            for query in queries:
                count = 30 + query.index % 31 if self.tokens else 1
                first = now + self.ttft_s * (1 + query.index % 7 / 10)
                self.push(first, query, None)
                self.push(first + self.tpot_s * (count - 1), query, count)
            self.wake.notify()

    def push(self, when, query, count) -> None:
        self.order += 1
        heappush(self.due, (when, self.order, query, count))

    def answer_for_ever(self) -> None:
        while True:
            with self.wake:
                while not self.stopped and (not self.due or self.due[0][0] > time.perf_counter()):
                    self.wake.wait(max(0.0, self.due[0][0] - time.perf_counter()) if self.due else None)
                if self.stopped:
                    return
                _, _, query, count = heappop(self.due)
            self.answer(query, count)

    def answer(self, query, count) -> None:
        ids = (np.arange(count or 1, dtype=np.int32) * 7 + query.index) % 128000
        if count is None:
            if self.tokens:
                lg.FirstTokenComplete([lg.QuerySampleResponse(query.id, ids.ctypes.data, 4)])
        else:
            lg.QuerySamplesComplete([lg.QuerySampleResponse(query.id, ids.ctypes.data, ids.nbytes, count)])


def write(folder: Path, kind: str) -> None:
    """Run LoadGen once and leave its files in FOLDER/KIND."""
    model, scenario, mode, samples, conf, ttft_s, tpot_s = KINDS[kind]
    out = folder / kind
    out.mkdir(parents=True, exist_ok=True)
    user_conf = out / "user.conf"
    user_conf.write_text("\n".join(conf) + "\n")
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, scenario)
    settings.mode = getattr(lg.TestMode, mode)
    if settings.FromConfig(str(user_conf), model, scenario) != 0:
        raise SystemExit(f"{user_conf}: LoadGen cannot read it")
    log_settings = lg.LogSettings()
    log_settings.log_output.outdir = str(out)
    log_settings.log_output.copy_summary_to_stdout = False
    log_settings.enable_trace = False
    system = TimedSystem(ttft_s, tpot_s, tokens="llama" in model)
    qsl = lg.ConstructQSL(samples, samples, lambda _: None, lambda _: None)
    sut = lg.ConstructSUT(system.issue, lambda: None)
    lg.StartTestWithLogSettings(sut, qsl, settings, log_settings, str(out / "no_audit.config"))
    lg.DestroySUT(sut)
    lg.DestroyQSL(qsl)
    with system.wake:
        system.stopped = True
        system.wake.notify()
    system.thread.join()


if __name__ == "__main__":
    folder, *kinds = sys.argv[1:]
    for kind in kinds or KINDS:
        if len(kinds) == 1:
            write(Path(folder), kind)
        else:
            subprocess.run([sys.executable, __file__, folder, kind], check=True)
