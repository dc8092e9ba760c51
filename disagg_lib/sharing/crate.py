"""A run as an RO-Crate (Workflow Run profile)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from ..errors import ExportError
from ..files import read_json_lines, sha256
from ..results.found import folder_source
from .pages import run_summary, static_page
from .shared import GatheredRun, Shared, gather, put, write_into

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
    run = gather(run_dir)
    if "job.sh" not in run.texts:
        raise ExportError(f"{run.folder}: found no job.sh; needed the workflow. 03_configuration writes it")

    def write(draft: Path) -> None:
        for name, text in run.texts.items():
            if name.endswith(".html"):
                text = static_page(text)
            put(draft / run.redactor.text(name, name), run.redactor.text(text, name))
        for name, picture in run.pictures.items():
            put(draft / run.redactor.text(name, name), picture)
        put(draft / "README.md", readme_text(run, run.texts | run.pictures))
        put(draft / "redaction.json", json.dumps(run.redactor.listed(), indent=1) + "\n")
        _describe(run, draft)

    path = write_into(dest, write, run.redactor)
    return Shared(path, tuple(run.redactor.listed()), run.left_out)


def readme_text(run: GatheredRun, files: Iterable[str], left_out: Iterable[str] = ()) -> str:
    """README.md of a copy of the run, with links to its pictures and notebooks."""
    shown = (name for name in sorted(files) if name.startswith("figures/"))
    pictures = {Path(name).stem.rsplit("_", 1)[0]: name for name in shown}
    notebooks = sorted(name for name in files if name.endswith(".ipynb"))
    return run_summary(run, "README.md", pictures, notebooks, left_out)


def _describe(run: GatheredRun, draft: Path) -> None:
    """Write ro-crate-metadata.json: every file, the workflow, and the action that made the logs."""
    from rocrate.model.computerlanguage import ComputerLanguage
    from rocrate.model.contextentity import ContextEntity
    from rocrate.rocrate import ROCrate

    crate = ROCrate(version="1.1")

    def add(identifier: str, kind: str, /, **properties):
        return crate.add(ContextEntity(crate, identifier, {"@type": kind, **properties}))

    source = folder_source(run.folder)
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
