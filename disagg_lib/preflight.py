"""Rules that are checked before the queue, each with what was found and what to do."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import psutil

from .errors import DisaggError
from .experiment import REPOSITORY, Experiment

REHEARSAL_GB, CHECKPOINT_GB = 1, 250  # free space; the real checkpoint is about 230 GB


@dataclass(frozen=True)
class Check:
    """One requirement: what was found, whether it will do, and what to do if not."""

    requirement: str
    found: str
    ok: bool
    fix: str = ""


class PreflightError(DisaggError):
    """A requirement is not met."""


def require(checks: Iterable[Check]) -> None:
    """Raise PreflightError with every requirement that is not met, what was found and what to do."""
    unmet = [check for check in checks if not check.ok]
    if unmet:
        raise PreflightError("\n".join(f"{c.requirement}: found {c.found}. To do: {c.fix}" for c in unmet))


def checks_table(checks: Iterable[Check]) -> pd.DataFrame:
    """One row a check: requirement, found, ok, fix (empty where nothing is to be done)."""
    rows = [asdict(check) | {"fix": "" if check.ok else check.fix} for check in checks]
    return pd.DataFrame(rows, columns=["requirement", "found", "ok", "fix"])


def _pinned_versions() -> dict[str, str]:
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    pins = (line.split(";")[0].strip().split("==") for line in lines if "==" in line)
    return {name: version for name, version in pins}


def _package(name: str, pin: str) -> Check:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = "absent"
    return Check(
        f"{name} {pin}", found, found == pin, "run `make demo` once: it installs requirements.lock into .venv"
    )


def _existing_parent(path: Path) -> Path:
    return path if path.exists() else _existing_parent(path.parent)


def machine_checks(e: Experiment) -> list[Check]:
    """What this machine has against what the run needs on it (not on the compute nodes)."""
    python = platform.python_version()
    checks = [
        Check(
            "Python 3.11 to 3.13", python, (3, 11) <= sys.version_info[:2] <= (3, 13), "install one of these"
        )
    ]
    pins = _pinned_versions()
    checks += [
        _package(name, pins[name])
        for name in (
            "mlcommons-loadgen",
            "jupyterlab",
            "papermill",
            "ipywidgets",
            "pandas",
            "huggingface-hub",
        )
    ]
    needed_gb = REHEARSAL_GB if e.engine == "rehearsal" else CHECKPOINT_GB
    free_gb = shutil.disk_usage(_existing_parent(Path(e.scratch_dir))).free / 1e9
    checks.append(
        Check(
            f"{needed_gb} GB free below scratch_dir",
            f"{free_gb:.0f} GB",
            free_gb >= needed_gb,
            "free some, or set scratch_dir",
        )
    )
    commands = ["bash"] if e.launcher == "local" else ["sbatch", "srun", "squeue", "scontrol"]
    for command in commands:
        path = shutil.which(command)
        checks.append(
            Check(
                f"{command} on PATH",
                path or "absent",
                path is not None,
                "go to a login node, or set launcher: local for a rehearsal",
            )
        )
    if e.engine == "rehearsal":
        cores = os.cpu_count() or 1
        memory_gb = psutil.virtual_memory().total / 1e9
        checks.append(
            Check(
                "2 CPU cores", str(cores), cores >= 2, "raise rehearsal_time_scale to slow the rehearsal down"
            )
        )
        checks.append(Check("4 GB of memory", f"{memory_gb:.0f} GB", memory_gb >= 4, "close other programs"))
    return checks
