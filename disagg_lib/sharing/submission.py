"""A run as an MLPerf submission tree."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from ..errors import ExportError, SecretError
from ..files import read_json
from ..results.found import folder_source, network_host
from ..results.logs import ACCURACY, DETAIL, SUMMARY
from ..results.rounds import load_rules
from ..results.rows import RunResult, read_result
from ..results.test06 import VERIFIED
from ..run.manifest import edited_files
from .pages import how_to_repeat
from .redaction import Redactor
from .shared import GatheredRun, Shared, gather, put, write_into

_TREE = load_rules()["submission"]
_NAME = r"[A-Za-z0-9][\w.-]*"
# no network: it wants fields, a LoadGen name and papers of its own, which nothing here could try
_ALLOWED = {
    "division": "closed|open",
    "status": "available|preview|rdi",
    "submitter": _NAME,
    "system_id": _NAME,
}


@dataclass(frozen=True)
class _Entry:
    """One scenario of one system, on its way into a tree."""

    run: GatheredRun
    result: RunResult
    fields: dict  # of the system description
    described: Path  # that file
    root: Path  # <division>/<submitter> of the draft
    there: Path  # the same of the tree that it goes into

    closed = property(lambda self: self.fields["division"] == "closed")
    system = property(lambda self: str(self.fields["system_id"]))
    bench = property(lambda self: f"{self.system}/{self.claim.model}/{self.claim.scenario}")
    claim = property(lambda self: self.result.verdict.claim)

    def clean(self, text: str, file: str) -> str:
        """The text without names of the site."""
        return self.run.redactor.text(text, file)

    def name(self, part: str) -> str:
        """How a part is called in this round's tree."""
        layout = _TREE["layouts"]["v6.0" if self.claim.round >= "v6.0" else "v5.1"]
        words = {"bench": self.bench, "system": self.system, "model": self.claim.model}
        return layout[part].format(scenario=self.claim.scenario, **words)


def export_submission(run_dir: Path | str, dest: Path | str, system: Path | str) -> Shared:
    """Write a run as the tree of an MLPerf submission of its round; `missing` says what the checker still wants.

    Parameters
    ----------
    dest : new folder, or an earlier tree that another scenario or system goes into; it gets <division>/<submitter>/...
    system : YAML file of the systems JSON's fields (params/system.example.yaml), with `system_id`, the folder's name,
        and optionally `calibration` (text or a file beside it) and `measurements`.

    Raises
    ------
    ExportError : the run is not measured, INVALID, edited, contradicts `system`, or `system` lacks fields; a file of
        the tree would change. SecretError : one of LoadGen's files, which go unedited or not at all, holds a name or a token.

    Source: facts of this project on the tree, found with the official checkers of v5.1.1 and of 2026.
    """
    run = gather(run_dir)
    if (source := folder_source(run.folder)) != "measured":
        raise ExportError(f"{run.folder}: its source is {source}; needed: measured")
    fields = _system_fields(Path(system))
    result = read_result(run.folder, division=fields["division"])
    _refuse(run, result, fields, Path(system))
    public = {str(value) for value in fields.values()}  # a submission names its submitter and its system
    names = {name: mark for name, mark in run.names.items() if name not in public}
    run = replace(run, redactor=Redactor(names, own=run.redactor.own))
    missing: list[str] = []

    def write(draft: Path) -> None:
        part = f"{fields['division']}/{fields['submitter']}"
        missing.extend(
            _write_tree(_Entry(run, result, fields, Path(system), draft / part, Path(dest) / part))
        )

    path = write_into(dest, write, run.redactor, merge=True)
    return Shared(path, tuple(run.redactor.listed()), run.left_out, tuple(missing))


def _refuse(run: GatheredRun, result: RunResult, fields: dict, system: Path) -> None:
    """Raise for what is no submission, or contradicts itself."""
    verdict, settings = result.verdict, result.files.settings
    if edited := edited_files(run.folder):
        raise ExportError(
            f"{run.folder / edited[0]}: differs from what manifest.json or job/digests.json recorded"
            f"{f', as do {len(edited) - 1} more' if edited[1:] else ''}; needed the files as the job left them"
        )
    if not verdict.valid:
        raise ExportError(f"{run.folder}: the run is INVALID; needed a VALID one. {verdict.text()}")
    pairs = {"number_of_nodes": "node_count", "accelerators_per_node": "gpus_per_node"}
    external = settings.get("engine") == "external"
    for field, key in pairs.items():
        if not external and key in settings and str(fields[field]) != str(settings[key]):
            raise ExportError(
                f"{system}: {field}: found {fields[field]}; the run's job/settings.json says {settings[key]}"
            )
    if (host := network_host(settings)) and fields["division"] == "closed":
        raise ExportError(
            f"{run.folder}: engine: external, LoadGen reached {host} over a network; closed wants LoadGen on the "
            "system under test. Over a network it is the network division, which is not written here, or open"
        )


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
        needed = "a word for each (division closed or open; names without blanks)"
        raise ExportError(f"{path}: found {found}; needed {needed}")
    return fields


def _write_tree(entry: _Entry) -> list[str]:
    """Everything below <division>/<submitter>; returns what is missing."""
    missing, result, root = [], entry.result, entry.root
    described = {
        key: entry.fields.get(key, "") for key in _TREE["system_fields"] + _TREE["system_fields_empty"]
    }
    put(
        root / "systems" / f"{entry.system}.json",
        entry.clean(json.dumps(described, indent=4) + "\n", "system"),
    )
    logs = {"performance/run_1": result.files.performance, "accuracy": result.files.accuracy}
    for (part, source), file in itertools.product(logs.items(), (SUMMARY, DETAIL)):
        if source and (source / file).is_file():
            put(root / "results" / entry.bench / part / file, _unedited(entry.run, source / file))
        else:
            missing.append(f"results/{entry.bench}/{part}/{file}: make the {part.split('/')[0]} run")
    missing += _put_accuracy(root / "results" / entry.bench / "accuracy", entry.run, result)
    missing += _put_measurements(entry) + _put_test06(entry) + _put_calibration(entry)
    rest = [check for check in result.verdict.not_judged if not check.name.startswith(("accuracy", "test06"))]
    return missing + [f"{check.name} is not judged: {check.advice}" for check in rest] + _scenarios(entry)


def _put_measurements(entry: _Entry) -> list[str]:
    """user.conf, README and the measurements JSON, of which the weights are those that 01 verified."""
    place, text = entry.root / entry.name("measurements"), entry.run.texts.get("user.conf", "")
    said = f"{entry.result.verdict.text()}\n\nRepeat with:\n\n{how_to_repeat(entry.run, 'experiment.yaml')}"
    readme = entry.clean(f"# {entry.claim.model}, {entry.claim.scenario}\n\n{said}\n", "README.md")
    made_with = read_json(entry.run.folder / "manifest.json").get("made_with") or {}
    weights, given = (made_with.get("checkpoint") or {}).get("repo"), entry.fields.get("measurements") or {}
    named = str(given.get("starting_weights_filename") or "")
    if weights and named and named != weights:
        raise ExportError(
            f"{entry.described}: measurements name {named}; the run was made with {weights}, which 01 verified"
        )
    known = {"starting_weights_filename": weights} | _TREE["checkpoints"].get(weights, {}) if weights else {}
    values = {**_TREE["measurements"], **known, **given}
    put(place / entry.name("described"), entry.clean(json.dumps(values, indent=4) + "\n", "measurements"))
    put(place / "README.md", readme)
    put(place / "user.conf", entry.clean(text, "user.conf"))
    lacking = ", ".join(name for name, value in values.items() if not value)
    ask = f"{lacking}: 01 verified no known checkpoint; give `measurements` in {entry.described.name}"
    _put_code(entry, entry.root / entry.name("code"), readme)
    return [ask] * bool(lacking) + ["user.conf: the run folder has none"] * (not text)


def _put_code(entry: _Entry, place: Path, readme: str) -> None:
    """What ran, a folder a scenario, so that two of one tree keep their configurations."""
    for file, text in entry.run.texts.items():
        if file.startswith(tuple(_TREE["code"])):
            put(place / file, entry.clean(text, file))
    put(place / "README.md", readme)


def _put_calibration(entry: _Entry) -> list[str]:
    text = str(entry.fields.get("calibration") or "")
    if text:
        beside = entry.described.parent / text[:200]
        text = beside.read_text(encoding="utf-8") if beside.is_file() else text
        put(entry.root / "calibration.md", entry.clean(text.rstrip() + "\n", "calibration.md"))
    elif entry.closed:
        return ["calibration.md: give `calibration`, a text or a file, in the system description"]
    return []


def _scenarios(entry: _Entry) -> list[str]:
    """What closed wants besides, of this system and model: Offline, and Server or Interactive."""
    parent = Path("results") / entry.bench
    there = {path.name for path in (entry.there / parent.parent).glob("*")} | {entry.claim.scenario}
    wanted = {"Offline": {"Offline"}, "Server or Interactive": {"Server", "Interactive"}}
    lacking = [name for name, any_of in wanted.items() if not any_of & there] if entry.closed else []
    return [
        f"{parent.parent}/{name}: closed wants it, too; open does not. Export that run into this tree"
        for name in lacking
    ]


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
    text = path.read_text(encoding="utf-8")
    if not result.accuracy.scores.sha256:
        text = f"{text.rstrip()}\n\nhash={hashlib.sha256(raw).hexdigest()}\n"
    put(place / "accuracy.txt", run.redactor.text(text, "accuracy.txt"))
    return []


def _put_test06(entry: _Entry) -> list[str]:
    """The TEST06 slot: the verification's words, and the log it judged."""
    place, run = entry.root / entry.name("compliance") / "TEST06", entry.run
    if VERIFIED not in run.texts:
        todo = "add test06 to test_modes, then evaluate"
        return [f"{place.relative_to(entry.root)}/verify_accuracy.txt: {todo}"] if entry.closed else []
    put(place / "verify_accuracy.txt", run.redactor.text(run.texts[VERIFIED], VERIFIED))
    log = run.folder / "mlperf/test06" / ACCURACY
    if log.is_file():
        put(place / "accuracy" / ACCURACY, truncate_accuracy_log(log.read_bytes()))
    return []
