"""Measuring client: MLPerf LoadGen on one side, a streaming OpenAI-compatible endpoint on the other.

Copied into the run folder and started on a compute node, once per test mode (LoadGen reads its built-in
configuration only once in a process). Python 3.8+, standard library, numpy, mlperf_loadgen; uvloop where present.

    python3 job/program client --run-dir RUN --test-mode performance|accuracy|test06|warmup --url http://HOST:PORT ...

With several URLs, those of a server's front ends, queries go to them in turn.

warmup measures nothing: see warmup.py. The others read RUN/job/settings.json (its "client" mapping) and
RUN/user.conf, and write
    RUN/mlperf/<mode>/               LoadGen's own files
    RUN/job/progress.jsonl           one line a second: issued, done, failed, outstanding, tokens, total, kinds
    RUN/job/client_<mode>.json       what happened, counts by kind, and how late the client itself was
    RUN/job/queries_<mode>.csv       one row a query, in the order in which they ended

Three rules keep the client out of what it measures. While an answer streams, a read is only kept; it is looked
into until the first content is found, and once more when the answer is over. Requests are bytes before the clock
runs. Nothing else runs in this process: files are written by a thread that sleeps.

A failed request is completed towards LoadGen with 0 tokens, because the test would never end otherwise. LoadGen
logs an error for each of them, which a submission checker refuses; our own result says INVALID and why. After 50
failures in a row the servers are gone or refuse everything, and the run ends.

Accuracy and TEST06 need token ids: one completion before the run finds out how this server sends them.

Exit status: 0 every request was answered; 1 the run ended and is invalid; 2 refused to start; 128 + signal.
"""

import argparse
import asyncio
import functools
import gc
import json
import os
import platform
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

from .client_settings import ClientError, read_settings
from .http_answer import KINDS
from .loadgen import MODES, TEST06, configure, read_log
from .prompts import prepare_samples
from .recorder import Recorder, lateness_s, percentile_ms, write_queries
from .sender import IDS_MODES, Client, allow_open_files
from .target import Target
from .token_ids import WAYS, find_way
from .warmup import warm_up

MOST_FAILURES_IN_A_ROW = 50
FIRST_FAILURE_ROOM = 200  # characters


class Run:
    """One test mode from start to result."""

    def __init__(self, run_dir, mode, urls, settings, progress, progress_mode):
        import mlperf_loadgen

        self.run_dir, self.mode, self.settings = run_dir, mode, settings
        self.loadgen = mlperf_loadgen
        self.out_dir = run_dir / "mlperf" / mode
        self.out_dir.mkdir(parents=True, exist_ok=True)
        old = ", ".join(sorted(path.name for path in self.out_dir.glob("mlperf_log_*")))
        if old:
            raise ClientError(f"{self.out_dir} already holds {old}: a run never overwrites another")
        self.test = configure(mlperf_loadgen, run_dir, settings, mode)
        # LoadGen would otherwise take an audit.config that happens to lie in the working directory.
        self.audit = run_dir / "job" / ("audit.config" if mode == "test06" else "no_audit.config")
        if mode == "test06":
            self.audit.write_text(TEST06)
        total, few = settings["total_sample_count"], settings["accuracy_sample_count"]
        self.count = min(few, total) if mode == "accuracy" else total
        self.targets = [Target(url, settings["endpoint"]) for url in urls]
        self.ids_way = find_way(self.targets[0], settings) if mode in IDS_MODES else None
        fields = WAYS.get(self.ids_way)
        self.samples = prepare_samples(run_dir, settings, self.count, fields)
        target_qps = self.test.server_target_qps if settings["scenario"] == "Server" else None
        log = self.out_dir / "mlperf_log_detail.txt"
        self.recorder = Recorder(progress, progress_mode or mode, target_qps, log)
        self.started_s = self.started_cpu_s = 0.0
        self.error = None

    async def main(self):
        """Run LoadGen to its end; return the exit status."""
        loop = asyncio.get_running_loop()
        parts = self.loadgen, self.targets, self.settings, self.samples, self.mode, self.recorder.log
        client = Client(loop, *parts)
        offline = self.settings["scenario"] == "Offline"
        most_open = min(self.settings["max_in_flight"] or self.count, self.count) if offline else 0
        allow_open_files(most_open, ", or lower max_in_flight" if offline else "")
        await client.open_connections(self.settings["connections"])
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopped, client, number)
        self.recorder.start()
        finished = asyncio.Event()
        self.started_s, self.started_cpu_s = time.perf_counter(), time.process_time()
        gc.collect()
        gc.freeze()
        gc.disable()  # no cycles are made while requests run; a collection would stop the loop for milliseconds
        sys.setswitchinterval(1e-4)  # LoadGen's thread waits at most this long for the interpreter
        client.measure_lag(self.started_s)
        report = functools.partial(loop.call_soon_threadsafe, finished.set)
        threading.Thread(target=self._run_loadgen, args=(client, report), daemon=True).start()
        while not finished.is_set():
            try:
                await asyncio.wait_for(finished.wait(), 1.0)
            except asyncio.TimeoutError:
                self.recorder.lines.put(client.sweep())
                worst = max(client.pools, key=lambda pool: pool.failures_in_a_row)
                if worst.failures_in_a_row >= MOST_FAILURES_IN_A_ROW:
                    where = f" at {worst.target.url}" if len(client.pools) > 1 else ""
                    self._leave(client, f"{worst.failures_in_a_row} requests in a row failed{where}", 1)
        self.recorder.lines.put(client.sweep())
        for connection in client.connections:
            connection.abort()
        return self._finish(client, "error" if self.error else "finished")

    def _run_loadgen(self, client, report):
        """Run the test in its own thread; LoadGen returns when every query is completed."""
        lg = self.loadgen
        try:
            qsl = lg.ConstructQSL(self.count, self.count, lambda _: None, lambda _: None)
            sut = lg.ConstructSUT(client.issue, client.flush)
            log = lg.LogSettings()
            log.enable_trace = False
            log.log_output.outdir = str(self.out_dir)
            lg.StartTestWithLogSettings(sut, qsl, self.test, log, str(self.audit))
            lg.DestroySUT(sut)
            lg.DestroyQSL(qsl)
        except Exception as error:  # reported below: this thread has nobody to raise to
            self.error = "LoadGen: %s: %s" % (type(error).__name__, error)
        report()

    def _stopped(self, client, number):
        """SIGTERM or SIGINT: LoadGen cannot be interrupted."""
        name = signal.Signals(number).name
        self.recorder.log("%s: stopping with %d requests open" % (name, len(client.active)))
        self._leave(client, "stopped by %s" % name, 128 + number)

    def _leave(self, client, status, code):
        """Write what is known and end the process, as LoadGen will not end."""
        self._finish(client, status)
        sys.stdout.flush()
        os._exit(code)

    def _finish(self, client, status):
        """Write client_<mode>.json and queries_<mode>.csv; return the exit status."""
        rows = np.array(client.rows).reshape(-1, 7)
        late_s = np.full(len(rows), np.nan)
        if status == "finished" and len(rows) and self.settings["scenario"] == "Server":
            late_s = lateness_s(rows, self.test)
        job, result = self.run_dir / "job", self.result(client, status, late_s[~np.isnan(late_s)])
        try:
            (job / ("client_%s.json" % self.mode)).write_text(json.dumps(result, indent=1) + "\n")
            write_queries(job / ("queries_%s.csv" % self.mode), rows, late_s, self.samples.input_tokens)
        except OSError as error:
            result["reasons"].append("the result could not be written: %s" % error)
            result["valid_client"] = False
        self.recorder.log(
            "{done} of {issued} requests served, {output_tokens} output tokens, {wall_s} s, client CPU {client_cpu_s} "
            "s, loop lag p99 {loop_lag_p99_ms} ms, {resent} sent twice: ".format(**result)
            + ("answered" if result["valid_client"] else "INVALID: " + "; ".join(result["reasons"]))
        )
        self.recorder.stop()
        return 0 if result["valid_client"] else 1

    def result(self, client, status, late_s):
        """Return what client_<mode>.json holds."""
        values = read_log(self.out_dir / "mlperf_log_detail.txt")
        errors = values["errors"]
        failed, limit_ms = sum(client.kinds.values()), self.test.ttft_latency / 1e6 * 0.01
        reasons = ["first failure: " + client.first_failure[:FIRST_FAILURE_ROOM]] if failed else []
        # In the order in which they first came: what follows a cause is no cause.
        reasons += ["%d requests failed: %s" % (count, kind) for kind, count in client.kinds.items()]
        shares = [pool.counts() for pool in client.pools]
        for share in shares if len(shares) > 1 else ():
            if share["failed"]:
                reasons.append("{url}: {failed} of its {issued} requests failed".format(**share))
        if status != "finished":
            reasons.append(self.error or status)
        if errors > failed:
            reasons.append("LoadGen's log holds %d errors, %d requests failed" % (errors, failed))
        late_count = int((1e3 * late_s > limit_ms).sum())
        words = {key: self.settings[key] for key in ("engine", "scenario", "model_key", "endpoint")}
        result = dict(words, mode=self.mode, status=status, valid_client=not reasons)
        result.update(reasons=reasons, urls=shares)
        result.update(issued=client.issued, done=client.done, failed=failed, generated=values["generated"])
        result.update(outstanding=client.issued - client.done - failed, output_tokens=client.tokens)
        result.update(kinds={kind: client.kinds[kind] for kind in KINDS}, resent=client.resent)
        result.update(ids=self.ids_way, first_failure=client.first_failure)
        result["wall_s"] = round(time.perf_counter() - self.started_s, 3)
        result["client_cpu_s"] = round(time.process_time() - self.started_cpu_s, 3)
        result["max_rss_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0, 1)
        for name, percent in (("p50", 50), ("p99", 99), ("max", 100)):
            result["loop_lag_%s_ms" % name] = percentile_ms(client.lags, percent)
            result["late_%s_ms" % name] = percentile_ms(late_s, percent)
        result.update(ttft_limit_ms=self.test.ttft_latency / 1e6, tpot_limit_ms=self.test.tpot_latency / 1e6)
        result.update(late_limit_ms=limit_ms, late_issues=late_count, client_was_late=late_count > 0)
        result.update(loadgen_errors=errors, loadgen_validity=values.get("result_validity"))
        result.update(loadgen_version=values.get("loadgen_version"), python=platform.python_version())
        uvloop = sys.modules.get("uvloop")
        return dict(result, numpy=np.__version__, uvloop=uvloop and uvloop.__version__)


def new_event_loop():
    """Return uvloop's event loop where installed, asyncio's otherwise."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def main(arguments=None):
    """Run one test mode; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--test-mode", choices=(*MODES, "warmup"), required=True)
    parser.add_argument(
        "--url", required=True, action="append", help="http://HOST:PORT; again for each front end"
    )
    parser.add_argument("--progress", type=Path, help="default: RUN/job/progress.jsonl")
    parser.add_argument("--progress-mode", help="the word for mode in it")
    options = parser.parse_args(arguments)
    run_dir = options.run_dir.resolve()
    progress = options.progress or run_dir / "job" / "progress.jsonl"
    loop = new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        settings = read_settings(run_dir)
        if options.test_mode == "warmup":
            return loop.run_until_complete(warm_up(run_dir, options.url, settings, progress))
        run = Run(run_dir, options.test_mode, options.url, settings, progress, options.progress_mode)
        return loop.run_until_complete(run.main())
    except (ClientError, OSError) as error:
        print("loadgen_client: refused to start: %s" % error, file=sys.stderr)
        return 2
