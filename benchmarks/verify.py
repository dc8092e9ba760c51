"""Whether `verify_digests` reads as fast as sha256sum does in parallel on the same files.

    python benchmarks/verify.py [--gib 4] [--files 8] [--rounds 3] [--folder .]

Interleaved rounds, once from the disk (the files' pages are dropped before each) and once from memory. The bar is 0.9
of `xargs -P <cores> sha256sum`. Some distributions build sha256sum without the processor's SHA instructions, so
`openssl dgst` stands beside it where it is installed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))
from disagg_lib.checkpoint.digests import manifest_path, verify_digests


def make_files(folder: Path, count: int, total: int) -> None:
    """Files of random bytes; they reach the disk, so that their pages can be dropped."""
    block = os.urandom(1 << 24)
    for number in range(count):
        with (folder / f"model-{number:05d}.safetensors").open("wb") as file:
            for _ in range(total // count // len(block)):
                file.write(block)
            os.fsync(file.fileno())


def drop_pages(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_parallel(folder: Path, *program: str) -> None:
    names = "\0".join(map(str, sorted(folder.iterdir())))
    command = ["xargs", "-0", "-n", "1", "-P", str(len(os.sched_getaffinity(0))), *program]
    subprocess.run(command, input=names, text=True, stdout=subprocess.DEVNULL, check=True)


def ours(folder: Path) -> None:
    manifest_path(folder).unlink(missing_ok=True)
    (check,) = verify_digests(folder)
    assert check.ok, check


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path.cwd())
    options = parser.parse_args()
    works = {"sha256sum": lambda folder: in_parallel(folder, "sha256sum"), "verify_digests": ours}
    if shutil.which("openssl"):
        works["openssl"] = lambda folder: in_parallel(folder, "openssl", "dgst", "-sha256")
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place) / "model"
        folder.mkdir()
        make_files(folder, options.files, int(options.gib * 2**30))
        size = sum(path.stat().st_size for path in folder.iterdir())
        for source in ("disk", "memory"):
            for _ in range(options.rounds):
                for name, work in works.items():
                    if source == "disk":
                        drop_pages(folder)
                    began = time.perf_counter()
                    work(folder)
                    rows.append(
                        {"from": source, "by": name, "gb_per_s": size / 1e9 / (time.perf_counter() - began)}
                    )
    table = pd.DataFrame(rows).groupby(["from", "by"]).gb_per_s.median().unstack()
    table["ratio"] = table.verify_digests / table.sha256sum
    print(
        f"{size / 1e9:.1f} GB in {options.files} files, {len(os.sched_getaffinity(0))} cores, median of {options.rounds}"
    )
    print(table.round(2).to_string())
    sys.exit(0 if (table.ratio >= 0.9).all() else 1)


if __name__ == "__main__":
    main()
