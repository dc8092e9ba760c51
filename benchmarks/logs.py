"""How fast logs are read: 1,000 run folders, and accuracy logs of 8313 answers, beside plain json and a loop.

    python benchmarks/logs.py [FOLDERS]

Writes its own logs into a temporary folder, prints one line a measurement, and ends with status 1 if a limit is missed.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
LOGS = REPOSITORY / "tests" / "data" / "logs_short"
ANSWERS, TOKENS = 8313, 650
LIMITS_S = {"folders": 5.0, "accuracy": 2.0}
LIMIT_GIB = 1.0


def write_runs(folder: Path, count: int) -> list[Path]:
    """Run folders of about 80 kB, each a log that LoadGen wrote."""
    for number in range(count):
        shutil.copytree(LOGS, folder / f"run{number}")
    return sorted(folder.iterdir())


def write_accuracy_log(path: Path, dtype: str) -> None:
    """An accuracy log in LoadGen's form: 8313 answers around 650 tokens."""
    random = np.random.default_rng(1)
    lengths = np.maximum(2, random.normal(TOKENS, 200, ANSWERS).astype(int))
    with path.open("w") as file:
        file.write("[\n")
        for index, length in enumerate(lengths):
            data = random.integers(0, 128256, length).astype(dtype).tobytes().hex().upper()
            end = "" if index == ANSWERS - 1 else ","
            file.write(f'{{ "seq_id" : {index}, "qsl_idx" : {index}, "data" : "{data}", ')
            file.write(f'"token_data" : "{data[:8]}", "token_count" : {length} }}{end}\n')
        file.write("]\n")


def read_plainly(path: Path, width: int) -> int:
    """The plain version: json, and a loop over the tokens. Returns the sum of all ids."""
    total = 0
    for entry in json.loads(path.read_text()):
        raw = bytes.fromhex(entry["data"])
        for at in range(0, len(raw), width):
            total += int.from_bytes(raw[at : at + width], "little", signed=True)
    return total


def peak_gib() -> float:
    """Peak memory of this process. Not ru_maxrss: that begins with the parent's, across fork and exec."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 2**20


def child(what: str, path: str) -> None:
    """One accuracy log in a process of its own, so that its peak memory is its own; prints JSON."""
    from disagg_lib.results.accuracy_log import read_accuracy_log

    start = time.perf_counter()
    if what == "plain":
        total = read_plainly(Path(path), 8 if "int64" in path else 4)
        took = time.perf_counter() - start
    else:
        log = read_accuracy_log(path)
        took = time.perf_counter() - start
        total = int(log.ids.sum(dtype=np.int64))
        assert len(log.qsl_idx) == ANSWERS and np.array_equal(log.lengths, log.token_count)
    print(json.dumps({"took_s": took, "peak_gib": peak_gib(), "sum": total}))


def measure(what: str, path: Path) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, "child", what, str(path)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def main(count: int) -> int:
    from disagg_lib.results import rows

    missed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = write_runs(folder / "runs", count)
        size_kb = sum(p.stat().st_size for p in runs[0].rglob("*") if p.is_file()) / 1e3
        start = time.perf_counter()
        table = rows.runs_table(runs)
        took = time.perf_counter() - start
        assert len(table) == count and (table["error"] == "").all()
        limit = LIMITS_S["folders"] * count / 1000
        print(f"{count} run folders of {size_kb:.0f} kB: {took:.2f} s (limit {limit:.2f} s)")
        missed += ["folders"] * (took > limit)
        for dtype in ("int32", "int64"):
            path = folder / f"{dtype}.json"
            write_accuracy_log(path, dtype)
            ours, plain = measure("ours", path), measure("plain", path)
            assert ours["sum"] == plain["sum"]
            print(
                f"accuracy log {ANSWERS} x {TOKENS} {dtype}, {path.stat().st_size / 1e6:.0f} MB: {ours['took_s']:.2f} s, "
                f"{ours['peak_gib']:.2f} GiB (limits {LIMITS_S['accuracy']:.0f} s, {LIMIT_GIB:.0f} GiB); "
                f"json and a loop: {plain['took_s']:.2f} s, {plain['peak_gib']:.2f} GiB"
            )
            missed += [dtype] * (ours["took_s"] > LIMITS_S["accuracy"] or ours["peak_gib"] > LIMIT_GIB)
    if missed:
        print(f"over the limit: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 1000))
