"""manifest.json: versions, git commit, what 00 and 01 recorded, and the digest of every file of a run."""

import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

from ..experiment.loading import load_recorded
from ..files import REPOSITORY, sha256
from .made_with import made_with

RECORDED_PACKAGES = (
    "disagg_lib",
    "mlcommons-loadgen",
    "numpy",
    "aiohttp",
    "papermill",
    "jupyterlab",
    "pandas",
)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write_manifest(folder: Path) -> dict:
    """manifest.json: versions, git commit, digest of every file of the run; written anew as the run grows."""
    path = folder / "manifest.json"
    first = json.loads(path.read_text()) if path.exists() else {}
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    status = _git("status", "--porcelain")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != path)
    manifest = {
        "format": 1,
        "made_with": first.get("made_with") or made_with(load_recorded(folder)),
        "created": first.get("created") or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **versions},
        "platform": {"system": platform.system(), "machine": platform.machine()},
        "git": {
            "commit": _git("rev-parse", "HEAD"),
            "changed_files": None if status is None else len(status.splitlines()),
        },
        "sha256": {str(p.relative_to(folder)): sha256(p) for p in files},
    }
    draft = folder / ".manifest.json"
    draft.write_text(json.dumps(manifest, indent=1) + "\n")
    draft.replace(path)
    return manifest
