"""results/<run>: its name, a free one for a new run, and the one that is meant."""

import datetime
import os
import re
from pathlib import Path

from ..errors import RunFolderError
from ..experiment.parameters import Experiment
from ..experiment.rules import PLAIN_PATH
from ..files import REPOSITORY, existing_parent

RESULTS = REPOSITORY / "results"
EXAMPLE = "example_rehearsal"  # kept for readers on the web; never meant unless it is named


def run_name(e: Experiment, now: datetime.datetime) -> str:
    """e.g. 20261123-223015_rehearsal_20gpu: sorts by time, says what it is."""
    gpus = f"_{e.gpu_count}gpu" if e.servers else ""
    return f"{now:%Y%m%d-%H%M%S}_{e.engine}{gpus}"


def free_run_dir(e: Experiment, run_dir: str | Path | None = None) -> Path:
    """The path that a new run will have: the one given, or a new name in results/.

    Raises
    ------
    RunFolderError : the folder is there already.
    """
    if run_dir:
        path = REPOSITORY / Path(run_dir).expanduser()
        if path.exists():
            raise RunFolderError(
                f"run_dir: {path} is there already, and nothing is overwritten. Leave run_dir empty for a new one"
            )
    else:
        path = RESULTS / run_name(e, datetime.datetime.now())
    if e.container == "pyxis" and not re.fullmatch(PLAIN_PATH, str(path)):
        why = "pyxis reads , and : as separators and expands others than letters, digits and _./+@=~-"
        raise RunFolderError(f"run_dir: found {str(path)!r}; {why}. Choose another place")
    if e.engine == "trtllm" and e.trtllm_dialect == "1.x" and re.search(r"\s", str(path)):
        raise RunFolderError(
            f"run_dir: found {str(path)!r}; trtllm-llmapi-launch splits its command at blanks. Choose another place"
        )
    parent = existing_parent(path.parent)
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise RunFolderError(f"run_dir: {parent} is not a folder that you may write to. Choose another place")
    return next(
        p for n in range(1, 1000) if not (p := path.with_name(path.name + f"_{n}" * (n > 1))).exists()
    )


def newest_runs(results: Path | None = None) -> list[Path]:
    """The run folders in results/ (or in another folder of runs), newest first; the kept example last."""
    made = [path.parent for path in (results or RESULTS).glob("*/experiment.yaml")]
    made.sort(key=lambda run: ((run / "experiment.yaml").stat().st_mtime_ns, run.name), reverse=True)
    return sorted(made, key=lambda run: run.name == EXAMPLE)


def newest_names() -> str:
    """The three newest runs, for a message that must name some."""
    return ", ".join(run.name for run in newest_runs()[:3]) or "none yet: run 03_configuration to make one"


def find_run(run_dir: str | Path) -> Path:
    """The run folder of a path, of a name in results/, or of a part that one name alone begins with or holds.

    Raises
    ------
    RunFolderError : none or several; the message lists the newest.
    """
    path = REPOSITORY / Path(run_dir).expanduser()
    for folder in (path, RESULTS / path.name):
        if (folder / "experiment.yaml").is_file():
            return folder
    names = {run.name: run for run in newest_runs()} if "/" not in str(run_dir) else {}
    for fits in (str.startswith, str.__contains__):
        found = [name for name in names if fits(name, str(run_dir))]
        if len(found) == 1:
            return names[found[0]]
        if found:
            raise RunFolderError(
                f"run_dir: {run_dir}: found {len(found)} runs of that name, needed one: {', '.join(found[:5])}"
            )
    raise RunFolderError(
        f"run_dir: {run_dir} is no run folder (no experiment.yaml in it) and no name in results/. The newest: {newest_names()}"
    )
