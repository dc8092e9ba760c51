"""Digests of a checkpoint's files, taken in parallel and kept."""

import contextlib
import datetime
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub.utils import tqdm
from huggingface_hub.utils.sha import git_hash

from ..checks import Check
from ..errors import ModelError
from ..experiment.parameters import Experiment
from .hub import file_system
from .structure import LLAMA_405B, REHEARSAL, read_json, require_folder, verify_checkpoint


@dataclass(frozen=True)
class HubFile:
    """One file as the hub describes it: large ones by SHA-256, small ones by git's SHA-1 of the blob."""

    size: int  # bytes
    sha256: str | None
    git_sha1: str | None

    def fits(self, path: Path, sha256: str) -> bool:
        return sha256 == self.sha256 if self.sha256 else git_hash(path.read_bytes()) == self.git_sha1


@contextlib.contextmanager
def stoppable_bar():
    """The hub library's tqdm, whose bars end the threads that advance them once the `with` is left.

    So the first error, or Ctrl-C, ends the work at once; a pool alone would wait for files of several GB.
    """
    stop = threading.Event()

    class Bar(tqdm):
        def update(self, n=1):
            if stop.is_set():
                raise KeyboardInterrupt
            return super().update(n)

    try:
        yield Bar
    finally:
        stop.set()


def hash_file(path: Path, add: Callable[[int], object]) -> str:
    """SHA-256, with add(bytes) after each block. hashlib lets other threads run meanwhile."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            add(count)
    return digest.hexdigest()


def manifest_path(folder: Path) -> Path:
    """Where the manifest of a checkpoint's folder stands."""
    return folder.with_name(folder.name + ".manifest.json")


class Manifest:
    """The manifest as it grows: with it a first verification can be resumed, and a second reads only what changed."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, manifest_path(folder)
        self.lock, self.saved_at = threading.Lock(), 0.0
        fix = "Move it away and run 01_model_download again"
        value = read_json(self.path, fix) if self.path.exists() else {}
        self.repo, self.revision, self.digest = (value.get(key) for key in ("repo", "revision", "digest"))
        self.files: dict[str, dict] = value.get("files", {})
        try:
            self.expected = {name: HubFile(**file) for name, file in value.get("expected", {}).items()}
        except (AttributeError, TypeError):
            raise ModelError(f"{self.path}: not as this release writes it. {fix}") from None

    def unchanged(self, name: str) -> bool:
        """Whether the file has the size and time that it had when it was hashed."""
        path, entry = self.folder / name, self.files.get(name)
        return bool(entry) and path.exists() and _size_and_time(path) == (entry["size"], entry["mtime_ns"])

    def record(self, name: str, sha256: str, ok: bool) -> None:
        size, mtime_ns = _size_and_time(self.folder / name)
        with self.lock:
            self.files[name] = {"size": size, "mtime_ns": mtime_ns, "sha256": sha256, "ok": ok}
            if time.monotonic() - self.saved_at > 1.0:
                self.save()

    def save(self, complete: bool = False) -> None:
        lines = "".join(f"{entry['sha256']}  {name}\n" for name, entry in sorted(self.files.items()))
        self.digest = hashlib.sha256(lines.encode()).hexdigest() if complete else None
        value = {key: getattr(self, key) for key in ("repo", "revision", "digest")} | {
            "format": 1,
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "expected": {name: asdict(file) for name, file in self.expected.items()},
            "files": dict(sorted(self.files.items())),
        }
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with file_system(self.path):
            draft.write_text(json.dumps(value, indent=1) + "\n")
            draft.replace(self.path)
        self.saved_at = time.monotonic()

    def absent(self) -> list[str]:
        return [name for name in self.expected if not (self.folder / name).is_file()]

    def hash_files(self, names: Iterable[str]) -> list[str]:
        """Hash those of the files that are there and have changed; returns the names that differ from the hub's."""
        names = [name for name in names if (self.folder / name).is_file()]
        sizes = {name: (self.folder / name).stat().st_size for name in names if not self.unchanged(name)}

        def one(name: str) -> None:
            sha256, expected = hash_file(self.folder / name, bar.update), self.expected.get(name)
            self.record(name, sha256, expected is None or expected.fits(self.folder / name, sha256))

        if sizes:
            try:  # the largest first, so that all threads end together
                # SHA-256 is what limits, so one thread a core; 32 are enough for any file system.
                cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
                look = {"desc": "verify", "unit": "B", "unit_scale": True, "delay": 1}
                with (
                    ThreadPoolExecutor(min(32, len(cores))) as pool,
                    stoppable_bar() as new_bar,
                    new_bar(total=sum(sizes.values()), **look) as bar,
                ):
                    list(pool.map(one, sorted(sizes, key=sizes.get, reverse=True)))
            finally:
                self.save()
        return [name for name in names if not self.files[name]["ok"]]

    def difference(self, name: str) -> str:
        """How a file differs from what the hub has."""
        expected, entry = self.expected[name], self.files.get(name)
        if not (self.folder / name).exists():
            return f"{name}: absent"
        if entry["size"] != expected.size:
            return f"{name}: {entry['size']} bytes, the hub has {expected.size}"
        hub = f"SHA-256 {expected.sha256[:12]}" if expected.sha256 else f"git SHA-1 {expected.git_sha1[:12]}"
        return f"{name}: SHA-256 {entry['sha256'][:12]}, the hub has {hub}"


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def verify_digests(folder: Path) -> list[Check]:
    """Hash every file, compare with the hub's metadata where the manifest has it, and write the manifest.

    A file whose size and time have not changed is not read again; a verification that was killed goes on.

    Raises
    ------
    ModelError : the folder is not there, or the manifest cannot be read or written.
    """
    require_folder(folder)
    manifest = Manifest(folder)
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    there = {str(PurePosixPath(p)) for p in paths if not any(part.startswith(".") for part in p.parts)}
    names = sorted(manifest.expected or there)
    bad = manifest.hash_files(names)
    bad += [name for name in names if name not in there]
    strays = sorted(name for name in there.difference(names) if name.endswith(".safetensors"))
    manifest.files = {name: manifest.files[name] for name in names if name in there}
    whole = bool(names) and not bad and not strays
    manifest.save(complete=whole)
    size_gb = sum(entry["size"] for entry in manifest.files.values()) / 1e9
    requirement, source = "every file has the hub's digest", f"{manifest.repo} at {manifest.revision}"
    if not manifest.expected:
        requirement, source = "every file's digest is recorded", "not from a hub: nothing to compare with"
    wrong = [*map(manifest.difference, bad), *(f"{name}: not one of the hub's" for name in strays)]
    found = "; ".join(wrong) or f"{len(names)} files, {size_gb:.2f} GB ({source})"
    fix = "run 01_model_download again: it fetches the named files anew"
    fix += ". Move away what is not the hub's: servers load all shards" if strays else ""
    return [Check(requirement, found, whole, fix)]


def cite_model(folder: Path) -> dict | None:
    """What a run's manifest says of the checkpoint; None if it has no manifest yet. Reads no file's content.

    Raises
    ------
    ModelError : the checkpoint was not verified whole, or has changed since.
    """
    if not manifest_path(folder).exists():
        return None
    manifest = Manifest(folder)
    changed = [name for name in manifest.files if not manifest.unchanged(name)]
    if changed or not manifest.digest:
        what = f"{changed[0]} has changed since it was verified" if changed else "not verified whole"
        raise ModelError(f"{folder}: {what}. Run 01_model_download again")
    cited = {"repo": manifest.repo, "revision": manifest.revision, "digest": manifest.digest}
    return {"manifest": str(manifest.path), **cited, "files": len(manifest.files)}


def checkpoint_checks(e: Experiment) -> list[Check]:
    """Everything that the experiment assumes of its checkpoint: structure first, then every digest."""
    if e.engine == "external":
        return []
    folder, shape = Path(e.model_path), REHEARSAL if e.engine == "rehearsal" else LLAMA_405B
    return verify_checkpoint(folder, shape, e.max_seq_len) + verify_digests(folder)
