"""What tests of the search share: trials without chance, and a search as a job runs it."""

import subprocess
import sys


def line(edge, steepness=3.0, calls=None, floor=0.0):
    """A trial without chance: the share is a power of the QPS, or the floor that it does not fall below."""

    def trial(qps, queries):
        if calls is not None:
            calls.append((qps, queries))
        share = max(floor, (qps / edge) ** steepness)
        return {"valid": share <= 1, "ttft_share": share, "tpot_share": 0.1, "seconds": queries / qps}

    return trial


def run_search(run, url):
    command = [sys.executable, run / "job/program", "search", "--run-dir", run, "--url", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)
