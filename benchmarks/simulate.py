"""How fast the simulation is: `python benchmarks/simulate.py [--plan]` prints one table, times and ratios of one and the same run.

The plain-Python figure is the same source with numba's compiler off, in a process of its own.
"""

import argparse
import os
import subprocess
import sys
import time

QUERIES = 8313
CODE = """
import time
started = time.perf_counter()
from disagg_lib.serving.lengths import built_in_lengths
from disagg_lib.serving.loadgen_rules import random_load
from disagg_lib.serving.plan import GRAPH_SIZES
from disagg_lib.serving.simulate import Deployment, ServerGroup, simulate
deployment = Deployment("gb200", ServerGroup(14, 4), ServerGroup(4, 4, 1, 512, 512, GRAPH_SIZES))
lengths, load = built_in_lengths(), random_load(13.0, 1)
simulate(deployment, load, lengths)
ready = time.perf_counter() - started
walls, cpus = [], []
for _ in range({repeats}):
    wall, cpu = time.perf_counter(), time.process_time()
    simulate(deployment, load, lengths)
    walls.append(time.perf_counter() - wall)
    cpus.append(time.process_time() - cpu)
print(len(load.samples), ready, min(walls), sorted(walls)[len(walls) // 2], min(cpus))
"""


def measure(repeats: int, **environment) -> list[float]:
    """Queries, s until the first run is done, then least and median wall and least CPU time (s) of a further run."""
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(repeats=repeats)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [float(value) for value in done.stdout.split()]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", action="store_true", help="also time the whole 72-GPU search")
    options = parser.parse_args()
    measure(1)  # fills the compiler's cache
    queries, ready, least, median, cpu = measure(15)
    plain = measure(1, NUMBA_DISABLE_JIT="1")
    assert queries == QUERIES
    load = os.getloadavg()[0]
    print(f"| {'figure':46} | {'value':>9} |\n|{'-' * 48}|{'-' * 11}|")
    print(f"| {'load of the machine while measuring':46} | {load:9.1f} |")
    print(f"| {'import, compile from a warm cache, first run':46} | {ready:7.2f} s |")
    print(f"| {'one run, 72 GPUs, 8313 queries, least':46} | {least * 1e3:6.1f} ms |")
    print(f"| {'the same, median of 15':46} | {median * 1e3:6.1f} ms |")
    print(f"| {'the same, least CPU time':46} | {cpu * 1e3:6.1f} ms |")
    print(f"| {'plain Python, the same run':46} | {plain[2]:7.2f} s |")
    print(f"| {'ratio plain / compiled':46} | {plain[2] / least:9.0f} |")
    if options.plan:
        from disagg_lib.serving.plan import Budget, plan

        wall, cpu = time.perf_counter(), time.process_time()
        best = plan(Budget(72))[0]
        print(f"| {'plan(72), wall':46} | {time.perf_counter() - wall:7.1f} s |")
        print(f"| {'plan(72), CPU':46} | {time.process_time() - cpu:7.1f} s |")
        print(f"\nbest: {best.layout}, {best.target_qps:.2f} queries/s")


if __name__ == "__main__":
    main()
