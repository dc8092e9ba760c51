"""A run as an MLPerf submission tree."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import yaml

from ..errors import ExportError, SecretError
from ..results.accuracy_log import read_accuracy_txt
from ..results.logs import ACCURACY, DETAIL, SUMMARY
from ..results.rounds import load_rules
from ..results.rows import RunResult, read_result
from ..run.tables import repeat_command
from .redaction import Redactor
from .shared import GatheredRun, Shared, gather, put, write_into

_TREE = load_rules()["submission"]
_NAME = r"[A-Za-z0-9][\w.-]*"
_ALLOWED = {"division": "closed|open|network", "status": "available|preview|rdi"}
_ALLOWED |= {"submitter": _NAME, "system_id": _NAME}


def export_submission(run_dir: Path | str, dest: Path | str, system: Path | str) -> Shared:
    """Write a run as the tree of an MLPerf v5.1 submission; `missing` says what the checker still wants.

    Parameters
    ----------
    dest : new folder; it gets <division>/<submitter>/...
    system : YAML file of the systems JSON's fields (params/system.example.yaml), with `system_id`, the folder's name,
        and optionally `calibration` (text or a file beside it) and `measurements`.

    Raises
    ------
    ExportError : the run is rehearsed, simulated, published or INVALID, or `system` lacks fields.
    SecretError : one of LoadGen's files, which go unedited or not at all, holds a name or a token.

    Source: facts of this project on the tree, found with the official checker of v5.1.1.
    """
    run = gather(run_dir)
    result = read_result(run.folder)
    verdict = result.verdict
    if verdict.claim.source != "measured":
        raise ExportError(f"{run.folder}: its source is {verdict.claim.source}; needed: measured")
    if not verdict.valid:
        raise ExportError(f"{run.folder}: the run is INVALID; needed a VALID one. {verdict.text()}")
    fields = _system_fields(Path(system))
    public = {str(value) for value in fields.values()}  # a submission names its submitter and its system
    names = {name: mark for name, mark in run.names.items() if name not in public}
    run = replace(run, redactor=Redactor(names, own=run.redactor.own))
    missing: list[str] = []

    def write(draft: Path) -> None:
        root = draft / fields["division"] / fields["submitter"]
        missing.extend(_write_tree(root, run, result, fields, Path(system)))

    path = write_into(dest, write, run.redactor)
    return Shared(path, tuple(run.redactor.listed()), run.left_out, tuple(missing))


def _system_fields(path: Path) -> dict:
    """The fields of a system description, checked as the checker does."""
    if not path.is_file():
        raise ExportError(f"{path}: no such file. Copy params/system.example.yaml there and fill it in")
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ExportError(f"{path}: found {type(fields).__name__}; needed `field: value` lines")
    texts = {name: str(fields.get(name) or "").strip() for name in ("system_id", *_TREE["system_fields"])}
    empty = [name for name, text in texts.items() if not text]
    bad = [
        f"{name}: {fields[name]}"
        for name, pattern in _ALLOWED.items()
        if texts[name] and not re.fullmatch(pattern, str(fields[name]))
    ]
    if empty or bad:
        found = f"empty {', '.join(empty)}" if empty else f"unusable {'; '.join(bad)}"
        needed = "a word for each (division closed, open or network; names without blanks)"
        raise ExportError(f"{path}: found {found}; needed {needed}")
    return fields


def _write_tree(root: Path, run: GatheredRun, result: RunResult, fields: dict, system: Path) -> list[str]:
    """Everything below <division>/<submitter>; returns what is missing."""
    missing = []
    claim, name, clean = result.verdict.claim, str(fields["system_id"]), run.redactor.text
    bench, closed = f"{name}/{claim.model}/{claim.scenario}", fields["division"] == "closed"
    described = {key: fields.get(key, "") for key in _TREE["system_fields"] + _TREE["system_fields_empty"]}
    put(root / "systems" / f"{name}.json", clean(json.dumps(described, indent=4) + "\n", "system"))
    logs = {"performance/run_1": result.files.performance, "accuracy": result.files.accuracy}
    for (part, source), file in itertools.product(logs.items(), (SUMMARY, DETAIL)):
        if source and (source / file).is_file():
            put(root / "results" / bench / part / file, _unedited(run, source / file))
        else:
            missing.append(f"results/{bench}/{part}/{file}: make the {part.split('/')[0]} run")
    missing += _put_accuracy(root / "results" / bench / "accuracy", run, result)
    if not run.texts.get("user.conf"):
        missing.append("user.conf: the run folder has none")
    said = f"{result.verdict.text()}\n\nRepeat with:\n\n    {repeat_command(run.folder)}"
    readme = clean(f"# {claim.model}, {claim.scenario}\n\n{said}\n", "README.md")
    values = {**_TREE["measurements"], **(fields.get("measurements") or {})}
    measured, code = root / "measurements" / bench, root / "code" / claim.model
    put(measured / "user.conf", clean(run.texts.get("user.conf", ""), "user.conf"))
    put(measured / "README.md", readme)
    put(measured / f"{name}_{claim.scenario}.json", json.dumps(values, indent=4) + "\n")
    for file in _TREE["code"]:
        if file in run.texts:
            put(code / file, clean(run.texts[file], file))
    put(code / "README.md", readme)
    missing += _put_test06(root / "compliance" / bench / "TEST06", run, closed)
    text = str(fields.get("calibration") or "")
    if text:
        beside = system.parent / text[:200]
        text = beside.read_text(encoding="utf-8") if beside.is_file() else text
        put(root / "calibration.md", clean(text.rstrip() + "\n", "calibration.md"))
    elif closed:
        missing.append("calibration.md: give `calibration`, a text or a file, in the system description")
    if closed and claim.scenario != "Offline":
        missing.append(f"results/{name}/{claim.model}/Offline: closed wants it, too; open does not")
    return missing


def _unedited(run: GatheredRun, path: Path) -> bytes:
    """LoadGen's file as it is; refused if redaction would change it."""
    raw = path.read_bytes()
    text, before = raw.decode("utf-8", "replace"), run.redactor.replaced.copy()
    if run.redactor.text(text, path.name) != text:
        marks = sorted(mark for _, mark in run.redactor.replaced - before)
        raise SecretError(
            f"{path.relative_to(run.folder)}: found {', '.join(marks)} in LoadGen's own file, which must go unedited; "
            "needed none. Measure again without that name in LoadGen's settings"
        )
    return raw


def truncate_accuracy_log(raw: bytes) -> bytes:
    """First and last 4096 bytes, as MLCommons' truncation script leaves them; a log of 10 kB or less stays whole."""
    return raw if len(raw) <= 10 * 1024 else raw[:4096] + b"\n\n...\n\n" + raw[-4096:]


def _put_accuracy(place: Path, run: GatheredRun, result: RunResult) -> list[str]:
    """Truncated accuracy log, and accuracy.txt with the hash of the whole one."""
    folder = result.files.accuracy
    if not folder or not (folder / ACCURACY).is_file():
        return [f"accuracy/{ACCURACY}: make the accuracy run"]
    raw, path = (folder / ACCURACY).read_bytes(), folder / "accuracy.txt"
    put(place / ACCURACY, truncate_accuracy_log(raw))
    if not path.is_file():
        return ["accuracy/accuracy.txt: evaluate the accuracy run (python -m disagg_lib evaluate RUN)"]
    text, digest = path.read_text(encoding="utf-8"), hashlib.sha256(raw).hexdigest()
    named = read_accuracy_txt(path).sha256
    if named not in ("", digest):
        raise ExportError(
            f"{path}: found hash={named[:12]}..., but {ACCURACY} has {digest[:12]}...; needed the scores of this log. "
            "Evaluate again"
        )
    text = text if named else f"{text.rstrip()}\n\nhash={digest}\n"
    put(place / "accuracy.txt", run.redactor.text(text, "accuracy.txt"))
    return []


def _put_test06(place: Path, run: GatheredRun, closed: bool) -> list[str]:
    """The TEST06 slot: the verification's words, and the log it judged."""
    verified = "mlperf/test06/verify_accuracy.txt"
    if verified not in run.texts:
        return (
            ["compliance/.../TEST06/verify_accuracy.txt: add test06 to test_modes, then evaluate"]
            if closed
            else []
        )
    text = run.texts[verified]
    put(place / "verify_accuracy.txt", run.redactor.text(text, verified))
    log = run.folder / "mlperf/test06" / ACCURACY
    if log.is_file():
        put(place / "accuracy" / ACCURACY, truncate_accuracy_log(log.read_bytes()))
    lacking = [
        line for line in _TREE["test06_lines"] if not re.search(rf"(?m)^{line}: (?:True|Skipped)", text)
    ]
    return [f"TEST06 has no line `{line}: True`" for line in lacking]
