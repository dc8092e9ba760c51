"""What this machine, and with `launcher: slurm` its cluster, has against what a run needs."""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from pathlib import Path

import psutil

from ..checks import Check
from ..errors import JobError
from ..experiment.parameters import Experiment
from ..files import existing_parent
from ..run.job_script import make_job_script
from ..run.made_with import pinned_versions
from . import slurm
from .preflight import cluster_checks

REHEARSAL_GB, CHECKPOINT_GB = 1, 250  # free space; the real checkpoint is about 230 GB


def _package(name: str, pin: str) -> Check:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = "absent"
    fix = "run `make demo` once: it installs requirements.lock into .venv"
    return Check(f"{name} {pin}", found, found == pin, fix)


def machine_checks(e: Experiment) -> list[Check]:
    """What this machine, and with `launcher: slurm` the cluster, has against what the run needs (not the compute nodes)."""
    python, pins = platform.python_version(), pinned_versions()
    known = (3, 11) <= sys.version_info[:2] <= (3, 13)
    checks = [Check("Python 3.11 to 3.13", python, known, "install one of these")]
    packages = ("mlcommons-loadgen", "jupyterlab", "papermill", "ipywidgets", "pandas", "huggingface-hub")
    checks += [_package(name, pins[name]) for name in packages]
    checks.append(room_check(e))
    if e.launcher == "slurm":
        checks += [*_slurm_tools(e), *cluster_checks(e, make_job_script(e))]
    if e.engine == "rehearsal":
        cores, memory_gb = os.cpu_count() or 1, psutil.virtual_memory().total / 1e9
        fix = "raise rehearsal_time_scale to slow the rehearsal down"
        checks.append(Check("2 CPU cores", str(cores), cores >= 2, fix))
        checks.append(Check("4 GB of memory", f"{memory_gb:.0f} GB", memory_gb >= 4, "close other programs"))
    return checks


def room_check(e: Experiment) -> Check:
    """Free space where the checkpoint belongs, less what of it has come."""
    model, needed_gb = Path(e.model_path), REHEARSAL_GB
    if e.engine == "trtllm":
        come = [*model.glob("*.safetensors"), *model.with_name(f".{model.name}.parts").glob("*")]
        needed_gb = max(needed_gb, round(CHECKPOINT_GB - sum(path.stat().st_size for path in come) / 1e9))
    free_gb = shutil.disk_usage(existing_parent(model)).free / 1e9
    where = "in model_dir" if e.model_dir else "below scratch_dir"
    fix = f"free some, or set {where.split()[1]}"
    return Check(f"{needed_gb} GB free {where}", f"{free_gb:.0f} GB", free_gb >= needed_gb, fix)


def _slurm_tools(e: Experiment) -> list[Check]:
    """Versions of Slurm and, for pyxis, whether its plugin and enroot are on this login node."""
    checks = []
    with contextlib.suppress(JobError):  # cluster_checks says that Slurm does not answer, and why
        if shutil.which("sinfo"):
            version = slurm.slurm("sinfo", "--version").strip().removeprefix("slurm ")
            release = re.search(r"(\d+)\.\d", version)  # Debian says slurm-wlm 22.05.8
            new, fix = bool(release) and int(release[1]) >= 22, "untried with older ones"
            checks.append(Check("Slurm 22 or newer", version, new, fix, level="warning"))
        if e.container == "pyxis":
            pyxis = bool(shutil.which("srun")) and "--container-image" in slurm.slurm("srun", "--help")
            found = "yes" if pyxis else "no"
            fix = "ask for pyxis and enroot, or set container: none"
            checks.append(Check("srun knows --container-image (pyxis)", found, pyxis, fix))
    return checks
