"""Where a folder's logs are, and what the files beside them say of the run."""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..errors import ClaimError
from .criteria import Claim
from .logs import DETAIL, LogError, MlperfRun, read_run
from .rounds import limits_ms, load_rules, model_of

SOURCES = ("measured", "rehearsed", "simulated", "published", "unstated")


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
    clients: Mapping[str, Mapping]  # test mode -> job/client_<mode>.json
    engines: Mapping[str, str]  # file -> the engine that it names


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
    parameters = read_parameters(base / "experiment.yaml")
    settings = _json(base / "job/settings.json") or {}
    clients = {mode: _json(base / f"job/client_{mode}.json") for mode in ("performance", "accuracy")}
    clients = {mode: client for mode, client in clients.items() if client is not None}
    said = {"experiment.yaml": parameters, "job/settings.json": settings}
    said |= {f"job/client_{mode}.json": client for mode, client in clients.items()}
    said |= {"manifest.json": _json(base / "manifest.json") or {}} if parameters else {}
    return RunFiles(
        folder=folder,
        base=base,
        performance=performance,
        accuracy=accuracy,
        parameters=parameters,
        settings=settings,
        origin=_origin(base / "SOURCE.txt", tree),
        system=_json(described) or {},
        clients=clients,
        engines={name: str(values["engine"]) for name, values in said.items() if values.get("engine")},
    )


#: a scenario's folder in a results repository of MLCommons, or in a submission
_RESULTS = r"inference_results_(v\d+\.\d+)"
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


def source_of(files: RunFiles) -> tuple[str, str]:
    """(measured, rehearsed, published or unstated, the files that say so).

    One file of a run folder that says rehearsal is enough: `rehearsed` cannot be edited away in another. A folder of
    which no file names an engine is `published` if SOURCE.txt, or its place, names a results repository of MLCommons;
    else what a `source:` line of SOURCE.txt says; else nobody knows.
    """
    rehearsed = [name for name, engine in files.engines.items() if engine == "rehearsal"]
    if files.engines:
        return ("rehearsed", ", ".join(rehearsed)) if rehearsed else ("measured", ", ".join(files.engines))
    if found := re.search(_RESULTS, files.origin.get("repository", "")):
        return "published", found[0]
    said = files.origin.get("source", "")
    return (said, "SOURCE.txt") if said in ("measured", "rehearsed", "simulated") else ("unstated", "")


def asserted_source(files: RunFiles, source: str | None) -> tuple[str, str]:
    """The source that a person asserts, recorded as such; without one, what the files say.

    Raises
    ------
    ClaimError : no such source, or `measured` of what was rehearsed or simulated.
    """
    stated, by = source_of(files)
    if source is None or source == stated:
        return stated, by
    if source not in SOURCES:
        raise ClaimError(f"source: found {source!r}; needed one of {', '.join(SOURCES)}")
    if source == "measured" and stated in ("rehearsed", "simulated"):
        raise ClaimError(f"{files.folder}: found source {stated} ({by}); asserted is measured. Leave --source out")
    return source, "asserted with --source"


def network_host(settings: Mapping) -> str:
    """The host of `engine: external` that LoadGen reaches over a network; "" for one on its own machine, or none."""
    urls = settings.get("endpoint_url") or []
    hosts = [urllib.parse.urlsplit(url).hostname for url in ([urls] if isinstance(urls, str) else urls)]
    far = [host for host in hosts if host not in ("127.0.0.1", "localhost", "::1")]
    return far[0] if far and settings.get("engine") == "external" else ""


def folder_source(run_dir: Path | str) -> str:
    """Source of a run folder whose job may have left no logs yet."""
    return source_of(_run_files(Path(run_dir), Path(run_dir), None, None))[0]


def claim_of(
    files: RunFiles, run: MlperfRun, source: str | None = None, round: str | None = None, division: str | None = None
) -> Claim:
    """What a run claims: what a person asserts, its own settings, then SOURCE.txt and folder names, then LoadGen's settings.

    Raises
    ------
    ClaimError : the assertion contradicts what the folder says, or cannot be.
    """
    parts = re.split(r"[/\\]|__", f"{files.origin.get('path', '')}/{files.base}")
    model_key = str(files.settings.get("client", {}).get("model_key", ""))
    models = (found for name in (model_key, *parts) if (found := model_of(name)))
    named = next(models, "")
    model = named or _model_by_samples(run)
    served = str(files.settings.get("client", {}).get("model") or "")
    if files.settings.get("engine") == "external" and served and "405b" not in served.lower():
        model = ""  # LoadGen's model key is ours to send, the model behind the endpoint is not
    divided = parts[0] in ("closed", "open", "network")
    found = re.search(_RESULTS, files.origin.get("repository", ""))
    source, source_from = asserted_source(files, source)
    return Claim(
        model=model,
        scenario=_scenario(run, model, files.settings.get("client", {}), parts),
        round=round or str(files.parameters.get("round") or (found[1] if found else "v5.1")),
        source=source,
        source_from=source_from,
        division=division or (parts[0] if divided else str(files.system.get("division", "closed")).lower()),
        guessed="" if named or not model else f"{run.dataset_samples:g} samples",
        data_set=str(files.settings.get("client", {}).get("data_set", {}).get("kind", "")),
        shortened=_rehearsed_settings(files),
    )


def _rehearsed_settings(files: RunFiles) -> tuple[str, ...]:
    """What a rehearsal's parameters shorten that no log shows."""
    if "rehearsal" not in files.engines.values() or "rehearsal_output_tokens" not in files.parameters:
        return ()
    scale = files.parameters.get("rehearsal_time_scale", 1.0)
    pace = () if scale == 1.0 else (f"pace (times x {scale}: limits mean nothing)",)
    return (f"outputs (mean {files.parameters.get('rehearsal_output_tokens')} of 646 tokens)", *pace)


def _scenario(run: MlperfRun, model: str, client: Mapping, parts: list[str]) -> str:
    """Interactive is LoadGen's Server with other limits: only names and limits tell."""
    if "interactive" in str(client.get("model_key", "")):
        return "Interactive"
    if run.loadgen_scenario != "Server" or client.get("scenario"):
        return str(client.get("scenario", run.loadgen_scenario))
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
