"""Files that are written while LoadGen measures, by a thread that sleeps; and the queries' times afterwards."""

import contextlib
import csv
import json
import queue
import sys
import threading

import numpy as np

from .http_answer import STATUSES
from .loadgen import read_log, scheduled_s


class Recorder(threading.Thread):
    """Writes messages and progress; a shared file system may take its time without holding up the event loop."""

    def __init__(self, progress, mode, target_qps, detail_log):
        super().__init__(daemon=True)
        self.lines, self.total, self.detail_log = queue.Queue(), None, detail_log
        self.progress, self.words = progress, {"mode": mode, "target_qps": target_qps}
        self.prefix = "loadgen_client %s: " % mode

    def log(self, text):
        self.lines.put(text)

    def run(self):
        for line in iter(self.lines.get, None):
            try:
                self._write(line)
            except OSError as error:  # a full disk, say: the run goes on, and so does this thread
                with contextlib.suppress(OSError):
                    print("%sreport not written: %s" % (self.prefix, error), file=sys.stderr, flush=True)

    def _write(self, line):
        if isinstance(line, str):
            print(self.prefix + line, flush=True)
            return
        if line["total"] is None and self.total is None and self.detail_log:
            self.total = read_log(self.detail_log)["generated"]
        with open(self.progress, "a") as file:
            file.write(json.dumps(dict(line, total=line["total"] or self.total, **self.words)) + "\n")

    def stop(self):
        self.lines.put(None)
        self.join(10)


def percentile_ms(values_s, percent):
    """Return a percentile of seconds in ms, None of nothing."""
    return round(float(np.percentile(values_s, percent)) * 1e3, 4) if len(values_s) else None


COLUMNS = ("sample_index", "issue_s", "late_ms", "ttft_ms", "latency_ms", "input_tokens", "output_tokens")


def write_queries(path, rows, late_s, input_tokens):
    """Write one row a query. ttft_ms and latency_ms count from the issue; LoadGen's add the schedule's lateness."""
    begin_s = rows[:, 1].min() if len(rows) else 0.0
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(COLUMNS + ("status",))
        for (index, issue_s, _, first_s, end_s, count, status), late in zip(rows.tolist(), late_s.tolist()):
            late_ms = "" if late != late else f"{1e3 * late:.4f}"
            ttft_ms = f"{1e3 * (first_s - issue_s):.4f}" if first_s else ""
            times = [f"{issue_s - begin_s:.6f}", late_ms, ttft_ms, f"{1e3 * (end_s - issue_s):.4f}"]
            out.writerow([int(index), *times, input_tokens[int(index)], int(count), STATUSES[int(status)]])


def lateness_s(rows, test):
    """Return how late each request was written after LoadGen's schedule; rows are all queries of a Server run.

    Sorted issue times meet the schedule one to one; the test began when the promptest query was issued.
    """
    order = np.argsort(rows[:, 1], kind="stable")
    issue_s, sent_s = rows[order, 1], np.maximum(rows[order, 2], rows[order, 1])
    behind_s = issue_s - scheduled_s(test, len(rows))
    late_s = np.empty(len(rows))
    late_s[order] = behind_s - behind_s.min() + (sent_s - issue_s)
    return late_s
