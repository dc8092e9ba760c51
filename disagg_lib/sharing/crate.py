"""Runs leave the site: HTML pages, an RO-Crate, a submission tree; and their tables rebuilt from raw logs alone.

What is shared is a redacted copy: the run folder itself is never changed. LoadGen's files go into a submission unedited
or not at all.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import hashlib
import html
import io
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from textwrap import indent

import pandas as pd
import yaml

from . import results
from .errors import DisaggError
from .mlperf_logs import ACCURACY, DETAIL, SUMMARY, LogError, read_accuracy_txt
from .redaction import Redactor, SecretError, collect_names
from .run_folder import given_parameters, read_json_lines, repeat_command, sha256
from .validity import load_rules

LARGEST_MIB = 50  # the checker's bound on a file, and a crate nobody minds to download


class ExportError(DisaggError):
    """A run cannot be shared in the wanted form: why, and what to do."""


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
class _Run:
    """A run folder read for sharing."""

    folder: Path
    texts: Mapping[str, str]
    pictures: Mapping[str, bytes]
    left_out: tuple[str, ...]
    names: Mapping[str, str]  # what to replace -> placeholder
    redactor: Redactor


def _gather(run_dir: Path | str) -> _Run:
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
    names = collect_names(folder, searched, results.read_parameters(folder / "experiment.yaml"))
    redactor = Redactor(names, own={str(folder.resolve()), str(Path.cwd())})
    return _Run(folder, texts, pictures, tuple(left_out), names, redactor)


def _write_into(dest: Path | str, write: Callable[[Path], None], redactor: Redactor) -> Path:
    """Let `write` fill a draft folder; it becomes `dest` only if no secret is in it. Nothing is overwritten."""
    dest = Path(dest)
    if dest.exists():
        raise ExportError(f"{dest}: is already there; nothing is overwritten. Give another name")
    dest.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".export-", dir=dest.parent))
    try:
        write(draft)
        for path in sorted(p for p in draft.rglob("*") if p.is_file()):
            redactor.refuse_rest(path.read_bytes(), path.relative_to(draft).as_posix())
            redactor.refuse_rest(path.relative_to(draft).as_posix().encode(), "a file's name")
        draft.chmod(0o755)
        draft.replace(dest)
    except BaseException:
        shutil.rmtree(draft)
        raise
    return dest


def _put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# -- HTML


def export_html(run_dir: Path | str, dest: Path | str) -> Shared:
    """One self-contained page per executed notebook, and index.html of the run, which needs none of them.

    Pages load nothing from anywhere: pictures are inside, scripts are taken out.

    Raises
    ------
    ExportError : no run folder, or `dest` exists. SecretError : a secret would be in a page.
    """
    run = _gather(run_dir)
    notebooks = {Path(name).stem: name for name in sorted(run.texts) if name.endswith(".ipynb")}

    def write(draft: Path) -> None:
        for stem, name in notebooks.items():
            _put(draft / f"{stem}.html", notebook_page(run.redactor.text(run.texts[name], name), notebooks))
        _put(draft / "index.html", _index(run, notebooks))

    path = _write_into(dest, write, run.redactor)
    return Shared(path, tuple(run.redactor.listed()), run.left_out)


def notebook_page(notebook: str, pages: Iterable[str] = ()) -> str:
    """An executed notebook as one static page that follows the reader's light or dark setting.

    Parameters
    ----------
    notebook : its JSON text. pages : notebooks that have a page beside this one; links to others are taken out.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    hide = Config({"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ["parameters"]}})
    exporter = HTMLExporter(config=hide, embed_images=True)
    body, _ = exporter.from_notebook_node(nbformat.reads(notebook, 4))
    dark = next(
        path for root in exporter.template_paths if (path := Path(root) / "static/theme-dark.css").is_file()
    )
    style = (
        # nbconvert's own rule gives code in Markdown outputs the text's font
        "<style>.jp-OutputArea-output.jp-RenderedMarkdown pre { font-family: var(--jp-code-font-family); }\n"
        f"@media (prefers-color-scheme: dark) {{ {dark.read_text()} img {{ background: white; }} }}</style>"
    )
    beside = set(pages)
    body = re.sub(r' href="([^"]+)\.ipynb"', lambda m: f' href="{m[1]}.html"' if m[1] in beside else "", body)
    return _static(body.replace("</head>", f"{style}</head>", 1))


def _static(page: str) -> str:
    """Without scripts and without anything that a browser would fetch."""
    page = re.sub(r"<script\b.*?</script\s*>", "", page, flags=re.DOTALL | re.IGNORECASE)
    return re.sub(r"<link\b[^>]*>", "", page, flags=re.IGNORECASE)


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
pre, table { font: 13px/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; }
td, th { text-align: left; padding: 0 1.2em 0 0; vertical-align: top; }
img { max-width: 100%; margin: 1rem 0; background: white; } .anchor-link { display: none; }
"""


def _index(run: _Run, notebooks: Iterable[str]) -> str:
    """The run on one page, its figures inside."""
    from nbconvert.filters import markdown2html

    pictures = []
    for title, draw in results.FIGURES.items():
        try:
            picture = io.BytesIO()
            draw(run.folder).savefig(picture, format="png", dpi=110)
            data = base64.b64encode(picture.getvalue()).decode()
            pictures.append(f"![{title}](data:image/png;base64,{data})")
        except LogError as error:
            pictures.append(f"    No figure of {title}: {error}")
    text = _summary(run, "index.html", pictures, [f"{stem}.html" for stem in notebooks])
    title = html.escape(text.split("\n", 1)[0].strip("# "))
    head = f"<meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'>{head}{_static(markdown2html(text))}"


_REHEARSED = """No GPU was there: a stand-in served at the modelled GPUs' pace; the processes, HTTP and LoadGen were real."""


def _summary(
    run: _Run, file: str, pictures: Iterable[str], notebooks: Iterable[str], left_out: Iterable[str] = ()
) -> str:
    """The run in Markdown, redacted: verdict, table, figures, what was run, how to repeat it, what was replaced."""
    source = results.folder_source(run.folder)
    try:
        verdict = results.verdict_text(run.folder)
        table = results.format_table(results.runs_table([run.folder]))
    except LogError as error:
        verdict, table = f"No verdict: {error}", ""
    rows = [
        f"| {name} | `{value}` | {where} |".replace("\n", " ")
        for name, value, where in given_parameters(run.folder)
    ]
    manifest = json.loads(run.texts.get("manifest.json", "{}"))
    versions = {**manifest.get("versions", {}), "commit": (manifest.get("git") or {}).get("commit")}
    parts = [
        f"# {run.folder.resolve().name} ({source})",
        f"**source: {source}.** {_REHEARSED if source == 'rehearsed' else ''}",
        "## The verdict", indent(verdict, "    "),
        "## The figures", indent(table, "    "), *pictures,
        "## What was run", "\n".join(["| parameter | value | from |", "|---|---|---|", *rows]),
        ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "## How to repeat it", f"    {repeat_command(run.folder)}",
        "## The notebooks, executed", "\n".join(f"- [{Path(name).stem}]({name})" for name in notebooks),
        "## What is not here" if left_out else "", "\n".join(f"- `{item}`" for item in left_out),
    ]  # fmt: skip
    text = run.redactor.text("\n\n".join(filter(None, parts)), file)
    marks = ", ".join(sorted({item["placeholder"] for item in run.redactor.listed()}))
    return f"{text}\n\nNames and paths of the site are replaced by: {marks or 'nothing'}.\n"


# -- RO-Crate


_PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": ("Process Run Crate", "0.5"),
    "https://w3id.org/ro/wfrun/workflow/0.5": ("Workflow Run Crate", "0.5"),
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": ("Workflow RO-Crate", "1.0"),
}
_BIOSCHEMAS = "https://bioschemas.org/profiles"
_FORMATS = {".json": "application/json", ".ipynb": "application/x-ipynb+json", ".yaml": "application/yaml",
            ".csv": "text/csv", ".html": "text/html", ".png": "image/png", ".py": "text/x-python",
            ".jsonl": "application/jsonl"}  # fmt: skip
_OUTPUTS = ("mlperf/", "logs/", "job/progress", "job/phases", "job/client", "job/queries")
_INPUTS = ("experiment.yaml", "config.yaml", "user.conf", "job/settings.json", "job/lengths.csv")


def export_crate(run_dir: Path | str, dest: Path | str) -> Shared:
    """A redacted copy of the run as an RO-Crate 1.1 with the Workflow Run profile: job.sh made the logs from the inputs.

    Raises
    ------
    ExportError : no run folder, no job.sh, or `dest` exists. SecretError : a secret would be in it.
    """
    run = _gather(run_dir)
    if "job.sh" not in run.texts:
        raise ExportError(f"{run.folder}: found no job.sh; needed the workflow. 03_configuration writes it")

    def write(draft: Path) -> None:
        for name, text in run.texts.items():
            if name.endswith(".html"):
                text = _static(text)
            _put(draft / run.redactor.text(name, name), run.redactor.text(text, name))
        for name, picture in run.pictures.items():
            _put(draft / run.redactor.text(name, name), picture)
        _put(draft / "README.md", _readme(run, run.texts | run.pictures))
        _put(draft / "redaction.json", json.dumps(run.redactor.listed(), indent=1) + "\n")
        _describe(run, draft)

    path = _write_into(dest, write, run.redactor)
    return Shared(path, tuple(run.redactor.listed()), run.left_out)


def _readme(run: _Run, files: Iterable[str], left_out: Iterable[str] = ()) -> str:
    """README.md of a copy of the run, with links to its pictures and notebooks."""
    pictures = [f"![{Path(name).stem}]({name})" for name in sorted(files) if name.startswith("figures/")]
    notebooks = sorted(name for name in files if name.endswith(".ipynb"))
    return _summary(run, "README.md", pictures, notebooks, left_out)


def _describe(run: _Run, draft: Path) -> None:
    """Write ro-crate-metadata.json: every file, the workflow, and the action that made the logs."""
    from rocrate.model.computerlanguage import ComputerLanguage
    from rocrate.model.contextentity import ContextEntity
    from rocrate.rocrate import ROCrate

    crate = ROCrate(version="1.1")

    def add(identifier: str, kind: str, /, **properties):
        return crate.add(ContextEntity(crate, identifier, {"@type": kind, **properties}))

    source = results.folder_source(run.folder)
    title = run.redactor.text(run.folder.resolve().name, "ro-crate-metadata.json")
    crate.name = f"MLPerf Inference run {title} ({source})"
    crate.description = (
        f"Llama-3.1-405B on disaggregated TensorRT-LLM, LoadGen's Server scenario; source: {source}. "
        "Names and paths of the site are replaced; redaction.json counts the replacements."
    )
    crate.license = add("https://spdx.org/licenses/Apache-2.0", "CreativeWork", name="Apache License 2.0")
    crate.root_dataset["conformsTo"] = [
        add(url, "CreativeWork", name=name, version=version) for url, (name, version) in _PROFILES.items()
    ]
    agent = add("#site", "Organization", name="the site that ran it (name withheld)")
    crate.root_dataset["author"] = crate.root_dataset["publisher"] = agent
    home = add("https://www.gnu.org/software/bash/", "WebSite", name="GNU Bash")
    words = {"name": "Bash", "alternateName": "bash", "url": {"@id": home.id}}
    bash = crate.add(ComputerLanguage(crate, "#bash", words))
    properties = {
        "name": "job.sh: servers, orchestrator, LoadGen",
        "encodingFormat": "application/x-sh",
        "version": sha256(draft / "job.sh")[:12],
        "conformsTo": {"@id": f"{_BIOSCHEMAS}/ComputationalWorkflow/1.0-RELEASE"},
    }
    job = crate.add_workflow(draft / "job.sh", "job.sh", main=True, lang=bash, properties=properties)
    files = {}
    for path in sorted(p for p in draft.rglob("*") if p.is_file() and p.name != "job.sh"):
        name = path.relative_to(draft).as_posix()
        properties = {"name": name, "contentSize": str(path.stat().st_size), "sha256": sha256(path),
                      "encodingFormat": _FORMATS.get(path.suffix, "text/plain")}  # fmt: skip
        about = {"about": {"@id": "./"}} if name == "README.md" else {}
        files[name] = crate.add_file(path, name, properties=properties | about)
    chosen = {
        "input": [name for name in _INPUTS if name in files],
        "output": [name for name in files if name.startswith(_OUTPUTS)],
    }
    for kind, names in chosen.items():
        for name in names:
            slot = f"#{kind}-{re.sub(r'[^A-Za-z0-9]+', '-', name)}"
            conforms = {
                "additionalType": "File",
                "conformsTo": {"@id": f"{_BIOSCHEMAS}/FormalParameter/1.0-RELEASE"},
            }
            files[name]["exampleOfWork"] = add(slot, "FormalParameter", name=name, **conforms)
        job[kind] = [files[name]["exampleOfWork"] for name in names]
    phases = read_json_lines(draft / "job/phases.jsonl")
    done = bool(phases) and phases[-1]["phase"] == "done"
    action = add("#run", "CreateAction", name="run of job.sh")
    action["instrument"], action["agent"] = job, agent
    action["object"], action["result"] = ([files[name] for name in names] for names in chosen.values())
    action["actionStatus"] = f"http://schema.org/{'Completed' if done else 'Failed'}ActionStatus"
    action["description"] = "LoadGen's runs, with the servers that job.sh started and ended."
    for key, phase in zip(("startTime", "endTime"), phases[:1] + phases[-1:], strict=False):
        action[key] = datetime.fromtimestamp(phase["time_s"], UTC).isoformat(timespec="seconds")
    if not done:
        action["error"] = phases[-1]["phase"] if phases else "the job never began"
    crate.root_dataset["mentions"] = action
    crate.metadata.write(draft)


# -- the kept example


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
    run = _gather(run_dir)
    source = results.folder_source(run.folder)
    if source != "rehearsed":
        raise ExportError(
            f"{run.folder}: its source is {source}; needed: rehearsed, which is what everyone can repeat"
        )
    files = run.pictures | {name: run.redactor.text(text, name).encode() for name, text in run.texts.items()}
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
            _put(draft / name, content)
        _put(draft / "README.md", _readme(run, files, left_out))
        manifest = json.loads(files.get("manifest.json", b"{}"))
        manifest["sha256"] = _all_digests(draft)  # of the files as they are here, redacted
        _put(draft / "manifest.json", json.dumps(manifest, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix=".example-", dir=dest.parent) as scratch:
        written = _write_into(Path(scratch) / "new", write, run.redactor)
        if dest.exists():
            dest.replace(Path(scratch) / "old")
        written.replace(dest)
    return Shared(dest, tuple(run.redactor.listed()), tuple(left_out))


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


# -- submission


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
    run = _gather(run_dir)
    result = results.read_result(run.folder)
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

    path = _write_into(dest, write, run.redactor)
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


def _write_tree(root: Path, run: _Run, result: results.RunResult, fields: dict, system: Path) -> list[str]:
    """Everything below <division>/<submitter>; returns what is missing."""
    missing = []
    claim, name, clean = result.verdict.claim, str(fields["system_id"]), run.redactor.text
    bench, closed = f"{name}/{claim.model}/{claim.scenario}", fields["division"] == "closed"
    described = {key: fields.get(key, "") for key in _TREE["system_fields"] + _TREE["system_fields_empty"]}
    _put(root / "systems" / f"{name}.json", clean(json.dumps(described, indent=4) + "\n", "system"))
    logs = {"performance/run_1": result.files.performance, "accuracy": result.files.accuracy}
    for (part, source), file in itertools.product(logs.items(), (SUMMARY, DETAIL)):
        if source and (source / file).is_file():
            _put(root / "results" / bench / part / file, _unedited(run, source / file))
        else:
            missing.append(f"results/{bench}/{part}/{file}: make the {part.split('/')[0]} run")
    missing += _put_accuracy(root / "results" / bench / "accuracy", run, result)
    if not run.texts.get("user.conf"):
        missing.append("user.conf: the run folder has none")
    said = f"{result.verdict.text()}\n\nRepeat with:\n\n    {repeat_command(run.folder)}"
    readme = clean(f"# {claim.model}, {claim.scenario}\n\n{said}\n", "README.md")
    values = {**_TREE["measurements"], **(fields.get("measurements") or {})}
    measured, code = root / "measurements" / bench, root / "code" / claim.model
    _put(measured / "user.conf", clean(run.texts.get("user.conf", ""), "user.conf"))
    _put(measured / "README.md", readme)
    _put(measured / f"{name}_{claim.scenario}.json", json.dumps(values, indent=4) + "\n")
    for file in _TREE["code"]:
        if file in run.texts:
            _put(code / file, clean(run.texts[file], file))
    _put(code / "README.md", readme)
    missing += _put_test06(root / "compliance" / bench / "TEST06", run, closed)
    text = str(fields.get("calibration") or "")
    if text:
        beside = system.parent / text[:200]
        text = beside.read_text(encoding="utf-8") if beside.is_file() else text
        _put(root / "calibration.md", clean(text.rstrip() + "\n", "calibration.md"))
    elif closed:
        missing.append("calibration.md: give `calibration`, a text or a file, in the system description")
    if closed and claim.scenario != "Offline":
        missing.append(f"results/{name}/{claim.model}/Offline: closed wants it, too; open does not")
    return missing


def _unedited(run: _Run, path: Path) -> bytes:
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


def _put_accuracy(place: Path, run: _Run, result: results.RunResult) -> list[str]:
    """Truncated accuracy log, and accuracy.txt with the hash of the whole one."""
    folder = result.files.accuracy
    if not folder or not (folder / ACCURACY).is_file():
        return [f"accuracy/{ACCURACY}: make the accuracy run"]
    raw, path = (folder / ACCURACY).read_bytes(), folder / "accuracy.txt"
    _put(place / ACCURACY, truncate_accuracy_log(raw))
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
    _put(place / "accuracy.txt", run.redactor.text(text, "accuracy.txt"))
    return []


def _put_test06(place: Path, run: _Run, closed: bool) -> list[str]:
    """The TEST06 slot: the verification's words, and the log it judged."""
    verified = "mlperf/test06/verify_accuracy.txt"
    if verified not in run.texts:
        return (
            ["compliance/.../TEST06/verify_accuracy.txt: add test06 to test_modes, then evaluate"]
            if closed
            else []
        )
    text = run.texts[verified]
    _put(place / "verify_accuracy.txt", run.redactor.text(text, verified))
    log = run.folder / "mlperf/test06" / ACCURACY
    if log.is_file():
        _put(place / "accuracy" / ACCURACY, truncate_accuracy_log(log.read_bytes()))
    lacking = [
        line for line in _TREE["test06_lines"] if not re.search(rf"(?m)^{line}: (?:True|Skipped)", text)
    ]
    return [f"TEST06 has no line `{line}: True`" for line in lacking]


# -- rebuilt


def recompute(run_dir: Path | str) -> pd.DataFrame:
    """Rebuild every table and figure of a run from its raw logs alone and compare digests. The run is not changed.

    Returns
    -------
    One row a file of tables/ and figures/: file, was, now (SHA-256, "" if absent), word: `same`, `differs`,
    `absent before`, or `not rebuilt` for what was not made from the logs (accuracy.txt).

    Raises
    ------
    LogError : the raw logs cannot be read.
    """
    run_dir = Path(run_dir)
    with tempfile.TemporaryDirectory() as name:
        built = Path(name)
        results.write_outputs(run_dir, built)
        now, was = _digests(built), _digests(run_dir)
    rows = []
    for file in sorted(now | was):
        word = "same" if now.get(file) == was.get(file) else "differs"
        word = "absent before" if file not in was else "not rebuilt" if file not in now else word
        rows.append({"file": file, "was": was.get(file, ""), "now": now.get(file, ""), "word": word})
    return pd.DataFrame(rows, columns=["file", "was", "now", "word"])


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files in tables/ and figures/."""
    files = [path for part in ("tables", "figures") for path in (folder / part).glob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}
