"""What every way of sharing needs: a run gathered, redacted, written whole or not at all."""

from __future__ import annotations

import collections
import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import ExportError
from ..files import read_json, sha256
from ..results.found import read_parameters
from .redaction import Redactor, collect_names

LARGEST_MIB = 50  # the checker's bound on a file, and a crate nobody minds to download


@dataclass(frozen=True)
class Shared:
    """What was written, what was replaced in it, and what is not in it."""

    path: Path
    replaced: tuple[dict, ...]  # file, placeholder, times
    left_out: tuple[str, ...]  # file: why
    missing: tuple[str, ...] = ()  # of a submission: what the checker wants besides

    def text(self) -> str:
        """A few lines for a person."""
        counts = collections.Counter()
        for item in self.replaced:
            counts[item["placeholder"]] += item["times"]
        replaced = ", ".join(f"{mark} x {times}" for mark, times in sorted(counts.items()))
        lines = [f"Wrote {self.path}", f"Replaced: {replaced or 'nothing'}"]
        lines += [f"Left out: {item}" for item in self.left_out]
        return "\n".join(lines + [f"Still missing: {item}" for item in self.missing])


@dataclass(frozen=True)
class GatheredRun:
    """A run folder read for sharing."""

    folder: Path
    texts: Mapping[str, str]
    pictures: Mapping[str, bytes]
    left_out: tuple[str, ...]
    names: Mapping[str, str]  # what to replace -> placeholder
    redactor: Redactor


def gather(run_dir: Path | str) -> GatheredRun:
    """Read every file of a run; what is no text and no picture stays here."""
    folder = Path(run_dir)
    if not (folder / "experiment.yaml").is_file():
        raise ExportError(f"{folder}: found no experiment.yaml; needed a run folder. Give results/<run>")
    texts, pictures, left_out = {}, {}, []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            left_out.append(f"{name}: a link, which may lead out of the run")
        elif path.is_dir() or any(part.startswith(".") for part in Path(name).parts):
            continue
        elif path.stat().st_size > LARGEST_MIB * 2**20:
            left_out.append(f"{name}: larger than {LARGEST_MIB} MiB")
        elif path.suffix == ".png":
            pictures[name] = path.read_bytes()
        else:
            with contextlib.suppress(UnicodeDecodeError):
                texts[name] = path.read_bytes().decode("utf-8")
            if "\0" in texts.get(name, "\0"):
                texts.pop(name, None)
                left_out.append(f"{name}: no text, cannot be searched for names")
    # pages hold minified scripts in which anything looks like a name; their notebooks hold the same words
    searched = {
        name: re.sub(r"[A-Za-z0-9+/=]{200,}", "", text)  # without pictures
        for name, text in texts.items()
        if not name.endswith(".html")
    }
    names = collect_names(folder, searched, read_parameters(folder / "experiment.yaml"))
    redactor = Redactor(names, own={str(folder.resolve()), str(Path.cwd())})
    return GatheredRun(folder, texts, pictures, tuple(left_out), names, redactor)


def write_into(
    dest: Path | str, write: Callable[[Path], None], redactor: Redactor, merge: bool = False
) -> Path:
    """Let `write` fill a draft folder; it becomes `dest` only if no secret is in it. Nothing is overwritten.

    With `merge`, `dest` may be there: it gets the draft's files, unless one of them is there and differs.
    """
    dest = Path(dest)
    if dest.exists() and not (merge and dest.is_dir()):
        raise ExportError(f"{dest}: is already there; nothing is overwritten. Give another name")
    dest.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".export-", dir=dest.parent))
    try:
        write(draft)
        files = [path.relative_to(draft) for path in sorted(draft.rglob("*")) if path.is_file()]
        for name in files:
            redactor.refuse_rest((draft / name).read_bytes(), name.as_posix())
            redactor.refuse_rest(name.as_posix().encode(), "a file's name")
        for name in files:
            if (dest / name).exists() and (dest / name).read_bytes() != (draft / name).read_bytes():
                raise ExportError(
                    f"{dest / name}: is there and would change; nothing is overwritten. Give another folder"
                )
        draft.chmod(0o755)
        if not dest.exists():
            draft.replace(dest)
        for name in files if draft.exists() else ():
            (dest / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).replace(dest / name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return dest


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def all_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder but its manifest.json."""
    paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: sha256(path) for name, path in sorted(paths.items()) if name != "manifest.json"}


def renew_digests(draft: Path) -> None:
    """The digests that a redacted copy states are of the files as they are in it."""
    left = draft / "job/digests.json"
    if left.is_file():
        names = read_json(left)["sha256"]
        put(
            left,
            json.dumps({"sha256": {n: d for n, d in all_digests(draft).items() if n in names}}, indent=1)
            + "\n",
        )
    manifest = read_json(draft / "manifest.json") | {"sha256": all_digests(draft)}
    put(draft / "manifest.json", json.dumps(manifest, indent=1) + "\n")
