"""05 executed for a run whose notebooks were run by hand."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ..files import REPOSITORY


def executed_analysis(run: Path) -> tuple[dict[str, str], str]:
    """05_analysis of a run, executed headless: its stem and JSON text, and why there is none, if so.

    A copy of the run is analysed: the folder itself is not changed.
    """
    import papermill
    from traitlets.config import Config

    source = REPOSITORY / "notebooks/05_analysis.ipynb"
    # sockets in a folder of our own, not TCP ports that any user of this machine could reach; a socket's path must be short
    with tempfile.TemporaryDirectory(prefix="k", dir="/tmp") as scratch:
        copy = Path(shutil.copytree(run, Path(scratch) / run.resolve().name, symlinks=True))
        written = Path(scratch) / "05.ipynb"
        try:
            papermill.execute_notebook(source, written, parameters={"run_dir": str(copy)}, cwd=source.parent, progress_bar=False,
                                       config=Config({"KernelManager": {"transport": "ipc", "ip": f"{scratch}/k"}}))  # fmt: skip
        except papermill.PapermillExecutionError as error:
            return {}, f"05 could not be executed: {error.ename}: {error.evalue}"
        return {source.stem: written.read_text(encoding="utf-8").replace(str(copy), str(run))}, ""
