"""How files are read everywhere: digests, JSON lines that still grow, paths."""

import hashlib
import json
import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Where others get this package: a fork puts its own here; stands in pages, crates, submissions.
REPOSITORY_URL = ""
DATA = Path(__file__).resolve().parent / "data"


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return path if path.exists() else existing_parent(path.parent)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """The JSON object in a file; an empty one if the file is absent."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_json_lines(path: Path, end_bytes: int | None = None) -> list[dict]:
    """The complete lines of a JSON-lines file that may still be growing; of its last `end_bytes` alone, if given."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - end_bytes) if end_bytes else 0
        file.seek(start)
        lines = file.read().split(b"\n")[:-1]
    return [json.loads(line) for line in lines[bool(start) :] if line.startswith(b"{")]


class GrowingLines:
    """A JSON-lines file that grows: each reading gives the complete lines since the last one, and reads no more."""

    def __init__(self, path: Path):
        self.path, self.offset = path, 0

    def new_rows(self) -> list[dict]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole = file.read().rpartition(b"\n")[0]
        self.offset += len(whole) + 1 if whole else 0
        return [json.loads(line) for line in whole.split(b"\n") if line.startswith(b"{")]


def expand(path: str | Path) -> Path:
    """A path with ~ expanded; a user that does not exist leaves it as it is."""
    return Path(os.path.expanduser(path))
