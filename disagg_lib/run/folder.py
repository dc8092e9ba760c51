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


def newest_runs() -> list[Path]:
    """The run folders in results/, newest first."""
    made = [path.parent for path in RESULTS.glob("*/experiment.yaml")]
    return sorted(
        made, key=lambda run: ((run / "experiment.yaml").stat().st_mtime_ns, run.name), reverse=True
    )


def find_run(run_dir: str | Path | None = None) -> Path:
    """The run folder that a notebook means: the one given, or the newest in results/.

    Raises
    ------
    RunFolderError
    """
    if run_dir:
        path = REPOSITORY / Path(run_dir).expanduser()
        if not (path / "experiment.yaml").is_file():
            raise RunFolderError(
                f"run_dir: {path} is no run folder (no experiment.yaml in it). Run 03_configuration to make one"
            )
        return path
    newest = next((run for run in newest_runs() if run.name != "example_rehearsal"), None)
    if newest is None:
        raise RunFolderError(f"{RESULTS} holds no run yet. Run 03_configuration to make one")
    return newest
