"""How fast the simulation is: `python benchmarks/simulate.py [--plan]` prints one table, times and ratios of one and the same run.

The plain-Python figure is the same source with numba's compiler off, in a process of its own. Least times are the code's, medians the
machine's; on a busy machine compare CPU times and ratios.
"""

import argparse
import os
import subprocess
import sys
import time

CODE = """
import sys, time
started = time.perf_counter()
from disagg_lib.serving.lengths import built_in_lengths
from disagg_lib.serving.loadgen_rules import official_load
from disagg_lib.serving.plan import deployment_of
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.serving.simulate import simulate
params, qps, queries, repeats = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
e = load_experiment([params])
deployment, lengths = deployment_of(e), built_in_lengths()
load = official_load(e.round, qps, 1, queries)
simulate(deployment, load, lengths)
ready = time.perf_counter() - started
walls, cpus = [], []
for _ in range(repeats):
    wall, cpu = time.perf_counter(), time.process_time()
    simulate(deployment, load, lengths)
    walls.append(time.perf_counter() - wall)
    cpus.append(time.process_time() - cpu)
assert len(load.samples) == queries
print(ready, min(walls), sorted(walls)[len(walls) // 2], min(cpus))
"""
RUNS = {8313: ("params/gb200_72gpu.yaml", 13.0), 49878: ("params/gb200_72gpu_v6.0.yaml", 22.2)}


def measure(queries: int, repeats: int, **environment) -> list[float]:
    """s until the first run is done, then least and median wall and least CPU time (s) of a further run."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, (*RUNS[queries], queries, repeats))],
        env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [float(value) for value in done.stdout.split()]


def row(figure: str, value: str) -> None:
    """One line of the table."""
    print(f"| {figure:52} | {value:>10} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", action="store_true", help="also time the whole 72-GPU search")
    options = parser.parse_args()
    row("figure", "value")
    print(f"|{'-' * 54}|{'-' * 12}|")
    row("load of the machine while measuring", f"{os.getloadavg()[0]:.1f}")
    plain = measure(8313, 1, NUMBA_DISABLE_JIT="1")
    for queries in RUNS:
        measure(queries, 1)  # fills the compiler's cache
        ready, least, median, cpu = measure(queries, 15)
        row(f"72 GPUs, {queries} queries: least wall", f"{least * 1e3:.1f} ms")
        row("    median of 15", f"{median * 1e3:.1f} ms")
        row("    least CPU time", f"{cpu * 1e3:.1f} ms")
        row("    import, compile from a warm cache, first run", f"{ready:.2f} s")
        if queries == 8313:
            row("    the same loops in plain Python, CPU time", f"{plain[3]:.2f} s")
            row("    ratio plain / compiled, of CPU times", f"{plain[3] / cpu:.0f}")
    wall = time.perf_counter()
    command = [sys.executable, "-m", "disagg_lib", "simulate", "params/gb200_72gpu.yaml"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    row("simulate on the command line, with start-up", f"{time.perf_counter() - wall:.2f} s")
    if options.plan:
        from disagg_lib.experiment.loading import load_experiment
        from disagg_lib.serving.plan import plan
        from disagg_lib.serving.prediction import budget_of

        budget = budget_of(load_experiment(["params/gb200_72gpu.yaml"]))
        wall, cpu = time.perf_counter(), time.process_time()
        best = plan(budget)[0]
        row("plan(72), wall", f"{time.perf_counter() - wall:.1f} s")
        row("plan(72), CPU", f"{time.process_time() - cpu:.1f} s")
        print(f"\nbest: {best.layout}, {best.target_qps:.2f} queries/s")


if __name__ == "__main__":
    main()
