"""The example that is kept in results/, made from a rehearsal."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

from ..errors import ExportError
from ..files import sha256
from ..results.found import folder_source
from .crate import readme_text
from .shared import Shared, gather, put, write_into

LARGEST_KEPT_KB = 150  # of a file of the example; a notebook or a picture may have 1000
#: pages hold what notebooks hold; the modules are the repository's
_NOT_KEPT = re.compile(r".*\.html|job/.*\.py")


def export_example(run_dir: Path | str, dest: Path | str) -> Shared:
    """The small files of a rehearsal, redacted, below a README.md that a git host renders.

    An earlier example in `dest` is replaced, if nothing but it is there.

    Raises
    ------
    ExportError : no rehearsal, or `dest` holds a file that is not of an earlier example as it was written.
    SecretError : a secret would be in it.
    """
    dest = Path(dest)
    refuse_foreign(dest)
    run = gather(run_dir)
    source = folder_source(run.folder)
    if source != "rehearsed":
        raise ExportError(
            f"{run.folder}: its source is {source}; needed: rehearsed, which is what everyone can repeat"
        )
    texts = {n: _for_readers(text) if n.endswith(".ipynb") else text for n, text in run.texts.items()}
    files = run.pictures | {name: run.redactor.text(text, name).encode() for name, text in texts.items()}
    left_out = list(run.left_out)
    for name, content in sorted(files.items()):
        largest_kb = 1000 if name.endswith((".ipynb", ".png")) else LARGEST_KEPT_KB
        if _NOT_KEPT.fullmatch(name) or len(content) > 1000 * largest_kb:
            left_out.append(f"{name}: {len(content) / 1000:.0f} kB")
            del files[name]
        elif not content.strip():  # what the job keeps ready to write into
            del files[name]

    def write(draft: Path) -> None:
        for name, content in files.items():
            put(draft / name, content)
        put(draft / "README.md", readme_text(run, files, left_out))
        manifest = json.loads(files.get("manifest.json", b"{}"))
        manifest["sha256"] = _all_digests(draft)  # of the files as they are here, redacted
        put(draft / "manifest.json", json.dumps(manifest, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix=".example-", dir=dest.parent) as scratch:
        written = write_into(Path(scratch) / "new", write, run.redactor)
        if dest.exists():
            dest.replace(Path(scratch) / "old")
        written.replace(dest)
    return Shared(dest, tuple(run.redactor.listed()), tuple(left_out))


def _for_readers(notebook: str) -> str:
    """A notebook's JSON without its 66 parameters, which nobody reads on the web, and without the state of widgets."""
    content = json.loads(notebook)
    content.get("metadata", {}).pop("widgets", None)
    cells = content["cells"]
    content["cells"] = [c for c in cells if "parameters" not in c.get("metadata", {}).get("tags", [])]
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def refuse_foreign(example: Path) -> None:
    """Raise if a folder is there and is not an example exactly as `export_example` wrote it."""
    if not example.exists():
        return
    manifest = example / "manifest.json"
    named = json.loads(manifest.read_text())["sha256"] if manifest.is_file() else {}
    found = _all_digests(example)
    other = sorted(name for name in found | named if found.get(name) != named.get(name))
    if other or not named:
        raise ExportError(
            f"{example}: found {other[0] if other else 'no manifest.json'}, not as an earlier example left it; "
            "needed nothing but that example. Move the folder away"
        )


def _all_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder but its manifest.json."""
    paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: sha256(path) for name, path in sorted(paths.items()) if name != "manifest.json"}
