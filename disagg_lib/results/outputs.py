"""A run's tables and figures, written as files."""

from __future__ import annotations

from pathlib import Path

from .figures import figure_latency_distributions, figure_search, figure_timeline, figure_topology
from .logs import LogError
from .rows import as_table, run_row


def write_outputs(run_dir: Path | str, dest: Path | str | None = None) -> list[Path]:
    """Write a run's tables and figures from its raw logs: tables/run_<source>.csv, figures/<name>_<source>.png.

    The same logs give the same bytes wherever the run folder lies, so that `recompute` can compare digests.

    Parameters
    ----------
    dest : where tables/ and figures/ go; the run folder itself if not given.

    Raises
    ------
    LogError : the run cannot be read. A figure that this run cannot have (no token latencies, no job) is left out.
    """
    run_dir = Path(run_dir)
    dest = Path(dest) if dest else run_dir
    for name in ("tables", "figures"):
        (dest / name).mkdir(parents=True, exist_ok=True)
    row = run_row(run_dir)
    row["folder"] = run_dir.resolve().name
    log = Path(row["log_path"])
    if log.is_file():  # else it is a published log's place in its repository
        row["log_path"] = log.resolve().relative_to(run_dir.resolve()).as_posix()
    paths = [dest / "tables" / f"run_{row['source']}.csv"]
    as_table([row]).to_csv(paths[0], index=False)
    for name, draw in FIGURES.items():
        try:
            figure = draw(run_dir)
        except LogError:
            continue
        paths.append(dest / "figures" / f"{name}_{row['source']}.png")
        figure.savefig(paths[-1], dpi=120, metadata={"Software": None})
    return paths


#: the figures of one run, by the name of their file
FIGURES = {
    "latency": figure_latency_distributions,
    "timeline": figure_timeline,
    "search": figure_search,
    "topology": figure_topology,
}
