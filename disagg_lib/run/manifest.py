"""manifest.json: versions, git commit, what 00 and 01 recorded, and the digest of every file of a run."""

import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path

from ..errors import RunFolderError
from ..experiment.loading import load_recorded
from ..files import REPOSITORY, REPOSITORY_URL, read_json, sha256
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
    """manifest.json: versions, git commit, digest of every file of the run; written anew as the run grows.

    Engine, and digests of what the job was told, are those of the first time: an edited file shows.
    """
    path = folder / "manifest.json"
    first = json.loads(path.read_text()) if path.exists() else {}
    recorded = load_recorded(folder)
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
        "engine": first.get("engine") or recorded.engine,
        "made_with": first.get("made_with") or made_with(recorded),
        "created": first.get("created") or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **versions},
        "platform": {"system": platform.system(), "machine": platform.machine()},
        "git": {
            "url": REPOSITORY_URL or None,
            "commit": _git("rev-parse", "HEAD"),
            "changed_files": None if status is None else len(status.splitlines()),
        },
        "sha256": {str(p.relative_to(folder)): sha256(p) for p in files}
        | told_digests(first.get("sha256", {}), folder),
    }
    draft = folder / ".manifest.json"
    draft.write_text(json.dumps(manifest, indent=1) + "\n")
    draft.replace(path)
    return manifest


def told_digests(recorded: dict[str, str], folder: Path) -> dict[str, str]:
    """SHA-256 of what the job was told, as first recorded; the search may have put its target into user.conf."""
    left = _left_digests(folder)
    return {n: left.get(n, digest) for n, digest in recorded.items() if n.startswith(_TOLD)}


def edited_files(folder: Path) -> list[str]:
    """Files that are not as the manifest, or the job at its end, recorded them: LoadGen's, and what the job was told.

    Raises
    ------
    RunFolderError : nothing is recorded, so nothing can be compared.
    """
    manifest = read_json(folder / "manifest.json").get("sha256", {})
    logs = {n: d for n, d in manifest.items() if re.fullmatch(r"mlperf/\w+/mlperf_log_\w+\.\w+", n)}
    recorded = logs | told_digests(manifest, folder) | _left_digests(folder)
    if not recorded:
        found = "found no digests; needed manifest.json, which 03_configuration wrote"
        raise RunFolderError(f"{folder}: {found}. Copy the run whole")
    there = {n for n, digest in recorded.items() if (folder / n).is_file() and sha256(folder / n) == digest}
    return sorted(recorded.keys() - there)


def _left_digests(folder: Path) -> dict[str, str]:
    """What the job recorded as its last act."""
    return read_json(folder / "job/digests.json").get("sha256", {})


#: how the names of files begin that tell the job what to do
_TOLD = ("experiment.yaml", "config", "user.conf", "job.sh", "job/settings.json", "job/lengths.csv", "job/program/")  # fmt: skip
