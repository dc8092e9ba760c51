"""Where a folder's logs are, and what the files beside them say of the run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from .criteria import Claim
from .logs import DETAIL, LogError, MlperfRun, read_run
from .rounds import limits_ms, load_rules, model_of

SOURCES = ("measured", "rehearsed", "simulated", "published")


@dataclass(frozen=True)
class RunFiles:
    """Where a folder's logs are, and what the files beside them say of the run."""

    folder: Path  # as given
    base: Path  # the run folder, or the folder that holds performance/ and accuracy/
    performance: Path | None
    accuracy: Path | None
    parameters: Mapping[str, object]  # of experiment.yaml
    settings: Mapping  # of job/settings.json
    origin: Mapping[str, str]  # of SOURCE.txt
    system: Mapping  # of system.json
    client: Mapping | None  # of job/client_performance.json


def find_logs(folder: Path | str) -> RunFiles:
    """Find the logs of a run folder of ours, a published folder, or a folder that LoadGen wrote into.

    Raises
    ------
    LogError : missing_folder, empty_folder, or missing_file when none of the known layouts fits.
    """
    folder = base = Path(folder)
    given = (folder / DETAIL).is_file()
    if given:
        base = folder.resolve() if folder.name in ("", ".", "..") else folder
        while re.fullmatch(r"run_\d+|performance|accuracy|mlperf", base.name) and base.parent != base:
            base = base.parent
    accuracy = _first_folder(base, ("mlperf/accuracy", "accuracy"))
    if not given:
        performance = _first_folder(base, ("mlperf/performance", "performance/run_1", "performance"))
    else:
        performance = None if folder.name == "accuracy" else folder
    if performance is None and accuracy is None:
        if (base / "experiment.yaml").is_file():
            todo = "The job has not measured yet, or failed before it did: see job/phases.jsonl."
            needed = "mlperf/performance with LoadGen's files"
            raise LogError("missing_file", base / "mlperf", "no logs of LoadGen", needed, todo)
        read_run(folder)  # says what is wrong with a folder of logs
    return _run_files(folder, base, performance, accuracy)


def _run_files(folder: Path, base: Path, performance: Path | None, accuracy: Path | None) -> RunFiles:
    """The files beside the logs, read."""
    tree = _TREE.search(base.resolve().as_posix())
    described = base / "system.json"
    if tree and not described.is_file():
        described = base.resolve().parents[3] / "systems" / f"{tree['system']}.json"
    return RunFiles(
        folder=folder,
        base=base,
        performance=performance,
        accuracy=accuracy,
        parameters=read_parameters(base / "experiment.yaml"),
        settings=_json(base / "job/settings.json") or {},
        origin=_origin(base / "SOURCE.txt", tree),
        system=_json(described) or {},
        client=_json(base / "job/client_performance.json"),
    )


#: a scenario's folder in a results repository of MLCommons, or in a submission
_TREE = re.compile(
    r"(?:/(?P<repository>inference_results_v\d+\.\d+)[^/]*)?/"
    r"(?P<path>(?:closed|open|network)/[^/]+/results/(?P<system>[^/]+)/[^/]+/[^/]+)$"
)


def _first_folder(base: Path, names: Iterable[str]) -> Path | None:
    """The first of some folders below base that holds logs, else the first that is there at all."""
    there = [base / name for name in names if (base / name).is_dir()]
    return next((path for path in there if (path / DETAIL).is_file()), there[0] if there else None)


def _json(path: Path) -> dict | None:
    """A JSON object, None if the file is absent."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        raise LogError("cut_log", path, f"no JSON ({error})") from error
    return found if isinstance(found, dict) else {}


def read_parameters(path: Path) -> dict[str, object]:
    """`parameters.<name>.value` of an experiment.yaml; empty if the file is absent."""
    if not path.is_file():
        return {}
    # the C loader reads a thousand of them in a second, the Python one in ten
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        recorded = yaml.load(path.read_text(encoding="utf-8", errors="replace"), Loader=loader)["parameters"]
        return {name: entry["value"] for name, entry in recorded.items()}
    except (KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise LogError("bad_experiment", path, f"{type(error).__name__}: {error}") from error


def _origin(path: Path, tree: re.Match | None) -> dict[str, str]:
    """`key: value` lines of a SOURCE.txt, keys in lower case; without one, what the folder's place in a tree says."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        pairs = (line.partition(":") for line in lines)
        return {key.strip().lower(): value.strip() for key, colon, value in pairs if colon}
    if not tree:
        return {}
    origin = {"path": f"{tree['path']}/performance/run_1"}
    return origin | ({"repository": tree["repository"]} if tree["repository"] else {})


def source_of(files: RunFiles) -> str:
    """measured, rehearsed or published.

    Our own run folders say it themselves (`engine: rehearsal`). For other folders speaks a SOURCE.txt that names a
    results repository, a `source:` line in it, or a place in a copy of that repository. Anything else LoadGen measured
    on something: `measured`.
    """
    engine = files.parameters.get("engine", files.settings.get("engine"))
    if engine:
        return "rehearsed" if engine == "rehearsal" else "measured"
    if files.origin.get("source") in SOURCES:
        return files.origin["source"]
    return "published" if "repository" in files.origin else "measured"


def folder_source(run_dir: Path | str) -> str:
    """Source of a run folder whose job may have left no logs yet."""
    return source_of(_run_files(Path(run_dir), Path(run_dir), None, None))


def claim_of(files: RunFiles, run: MlperfRun, source: str | None = None) -> Claim:
    """What a run claims: its own settings first, then SOURCE.txt and folder names, then LoadGen's settings."""
    parts = re.split(r"[/\\]|__", f"{files.origin.get('path', '')}/{files.base}")
    model_key = str(files.settings.get("client", {}).get("model_key", ""))
    models = (found for name in (model_key, *parts) if (found := model_of(name)))
    model = next(models, "") or _model_by_samples(run)
    named = parts[0] in ("closed", "open", "network")
    found = re.search(r"inference_results_(v\d+\.\d+)", files.origin.get("repository", ""))
    return Claim(
        model=model,
        scenario=_scenario(run, model, model_key, parts),
        round=str(files.parameters.get("round") or (found[1] if found else "v5.1")),
        source=source or source_of(files),
        division=parts[0] if named else str(files.system.get("division", "closed")),
        data_set=str(files.settings.get("client", {}).get("data_set", {}).get("kind", "")),
        shortened=_rehearsed_settings(files),
    )


def _rehearsed_settings(files: RunFiles) -> tuple[str, ...]:
    """What a rehearsal's parameters shorten that no log shows."""
    if files.parameters.get("engine") != "rehearsal":
        return ()
    scale = files.parameters.get("rehearsal_time_scale", 1.0)
    pace = () if scale == 1.0 else (f"pace (times x {scale}: limits mean nothing)",)
    return (f"outputs (mean {files.parameters.get('rehearsal_output_tokens')} of 646 tokens)", *pace)


def _scenario(run: MlperfRun, model: str, model_key: str, parts: list[str]) -> str:
    """Interactive is LoadGen's Server with other limits: only names and limits tell."""
    if run.loadgen_scenario != "Server":
        return run.loadgen_scenario
    if "interactive" in model_key:
        return "Interactive"
    named = [part.capitalize() for part in parts if part.lower() in ("server", "interactive")]
    if named:
        return named[0]
    limits = limits_ms(model, "Interactive")
    strict = limits is not None and run.ttft_limit_ms <= limits[0] and run.tpot_limit_ms <= limits[1]
    return "Interactive" if strict else "Server"


def _model_by_samples(run: MlperfRun) -> str:
    """The language model whose data set has this many samples, if it is one alone."""
    models = load_rules()["models"].items()
    same = [m for m, rules in models if rules.get("limits") and rules["samples"] == run.dataset_samples]
    return same[0] if len(same) == 1 else ""
