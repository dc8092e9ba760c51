"""A run's tables and figures, rebuilt from its raw logs and compared."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pandas as pd

from ..files import sha256
from ..results.outputs import write_outputs


def recompute(run_dir: Path | str) -> pd.DataFrame:
    """Rebuild every table and figure of a run from its raw logs alone and compare digests. The run is not changed.

    Returns
    -------
    One row a file of tables/ and figures/: file, was, now (SHA-256, "" if absent), word: `same`, `differs`,
    `absent before`, or `not rebuilt` for what was not made from the logs (accuracy.txt).

    Raises
    ------
    LogError : the raw logs cannot be read.
    """
    run_dir = Path(run_dir)
    with tempfile.TemporaryDirectory() as name:
        built = Path(name)
        write_outputs(run_dir, built)
        now, was = _digests(built), _digests(run_dir)
    rows = []
    for file in sorted(now | was):
        word = "same" if now.get(file) == was.get(file) else "differs"
        word = "absent before" if file not in was else "not rebuilt" if file not in now else word
        rows.append({"file": file, "was": was.get(file, ""), "now": now.get(file, ""), "word": word})
    return pd.DataFrame(rows, columns=["file", "was", "now", "word"])


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files in tables/ and figures/."""
    files = [path for part in ("tables", "figures") for path in (folder / part).glob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}
