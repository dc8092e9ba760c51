"""A run folder, written whole or not at all."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from .. import job
from ..errors import RunFolderError
from ..experiment.loading import experiment_text, load_recorded
from ..experiment.parameters import Experiment
from ..files import REPOSITORY
from ..serving import lengths
from .config import config_files
from .folder import free_run_dir
from .job_script import make_job_script
from .manifest import write_manifest
from .settings import settings_of, user_conf_text

PROGRAM = Path(job.__file__).parent  # what runs inside the job


def create_run(e: Experiment, run_dir: str | Path | None = None, python: str = sys.executable) -> Path:
    """Write a new run folder, whole or not at all.

    Parameters
    ----------
    run_dir : its path (relative: below the repository); not given: a new name in results/.
    python : the interpreter that a rehearsal's job uses.

    Raises
    ------
    RunFolderError : the folder is there already.
    """
    target = free_run_dir(e, run_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=target.parent))
    try:
        _write_run(draft, e, python)
        draft.chmod(0o755)
        os.mkdir(target)  # decides between two that chose one name; os.rename replaces an empty folder only
    except FileExistsError:
        shutil.rmtree(draft)
        raise RunFolderError(
            f"{target}: another run took this name just now. Run 03_configuration again"
        ) from None
    except BaseException:
        shutil.rmtree(draft)
        raise
    os.rename(draft, target)
    return target


def _write_run(folder: Path, e: Experiment, python: str) -> None:
    for name in ("job", "logs", "mlperf", "tables", "figures", "notebooks"):
        (folder / name).mkdir()
    (folder / "experiment.yaml").write_text(experiment_text(e))
    for name, text in config_files(e).items():
        (folder / name).write_text(text)
    (folder / "user.conf").write_text(user_conf_text(e))
    (folder / "job.sh").write_text(make_job_script(e, python))
    (folder / "job.sh").chmod(0o755)
    (folder / "job/settings.json").write_text(json.dumps(settings_of(e), indent=1, default=list) + "\n")
    shutil.copytree(PROGRAM, folder / "job/program", ignore=shutil.ignore_patterns("__pycache__"))
    if not e.dataset_path:
        sample_lengths = lengths.data_set_lengths(e.lengths_file, mean=e.prompt_mean_tokens)
        if e.shortened:
            sample_lengths = lengths.scale_outputs(sample_lengths, e.rehearsal_output_tokens)
        lengths.write_lengths_csv(sample_lengths, folder / "job/lengths.csv")
    if e.search_rows_from:
        take_search_rows(folder, e)
    write_manifest(folder)


# Parameters, with blanks between, on which the verdict of a search's trial does not depend.
_NOT_OF_A_TRIAL = (
    "find_target_qps target_qps_min target_qps_max search_budget_s search_rows_from server_target_qps test_modes "
    "time_limit partition account load_timeout_s nodes ntasks plan_gpus setup_jobs system_name harness_dir "
    "trust_dataset rehearsal_accuracy_samples"
)


def take_search_rows(folder: Path, e: Experiment) -> None:
    """Put the trials of an earlier run's search where this one's goes on from them.

    Raises
    ------
    RunFolderError : it has none, or had other servers, another load or limits, so that they tell nothing here.
    """
    earlier = REPOSITORY / Path(e.search_rows_from).expanduser()
    rows = earlier / "job/find_target_qps.jsonl"
    if not rows.is_file():
        raise RunFolderError(
            f"search_rows_from: {rows} is not there: no trial of that search ended. Leave it out"
        )
    theirs, ours = (x.model_dump(exclude=set(_NOT_OF_A_TRIAL.split())) for x in (load_recorded(earlier), e))
    differs = [
        f"{name} was {theirs[name]!r}, is {ours[name]!r}" for name in ours if theirs[name] != ours[name]
    ]
    files = [*sorted(folder.glob("config*.yaml")), folder / "job/lengths.csv"]
    for path in (path.relative_to(folder) for path in files if path.exists()):
        if not (earlier / path).is_file() or (earlier / path).read_bytes() != (folder / path).read_bytes():
            differs.append(f"{earlier / path} differs from this run's")
    if differs:
        raise RunFolderError(
            f"search_rows_from: {'; '.join(differs)}: its trials tell nothing here. "
            "Repeat that run's parameters, or leave search_rows_from out"
        )
    shutil.copy(rows, folder / "job")
