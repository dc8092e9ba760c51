"""Many runs -> tidy tables: one row a run, units in the names, a word on where each figure comes from."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from .errors import DisaggError
from .figures import (
    figure_interactivity,
    figure_latency_distributions,
    figure_search,
    figure_timeline,
    figure_topology,
)
from .mlperf_logs import DETAIL, NAN, LogError, MlperfRun, read_accuracy_txt, read_run
from .validity import Claim, Verdict, judge, limits_ms, load_rules, model_of

__all__ = [
    "figure_interactivity",
    "figure_latency_distributions",
    "figure_search",
    "figure_timeline",
    "figure_topology",
]

SOURCES = ("measured", "rehearsed", "simulated", "published")
#: columns in order; a row always has all of them
COLUMNS = (
    "folder", "division", "submitter", "system", "model", "accelerator", "accelerators_total", "nodes",
    "scenario", "round", "source", "loadgen_valid", "valid", "submittable", "first_failed", "shortened",
    "samples_per_s", "completed_tokens_per_s", "completed_tokens_per_s_per_gpu", "target_qps", "scheduled_samples_per_s",
    "ttft_mean_ms", "ttft_p50_ms", "ttft_p90_ms", "ttft_p95_ms", "ttft_p99_ms", "ttft_p999_ms", "ttft_limit_ms",
    "tpot_mean_ms", "tpot_p50_ms", "tpot_p90_ms", "tpot_p95_ms", "tpot_p99_ms", "tpot_p999_ms", "tpot_limit_ms",
    "latency_mean_s", "latency_p50_s", "latency_p90_s", "latency_p99_s", "query_latency_p99_s", "duration_s", "min_duration_ms", "query_count", "error_count",
    "accuracy_rougeL", "accuracy_exact_match", "tokens_per_sample",
    "loadgen_scenario", "loadgen_version", "test_datetime", "log_path", "error",
)  # fmt: skip
_WORDS = frozenset((
    "folder", "division", "submitter", "system", "model", "accelerator", "scenario", "round", "source", "loadgen_valid",
    "first_failed", "shortened", "loadgen_scenario", "loadgen_version", "test_datetime", "log_path", "error",
))  # fmt: skip
_COUNTS = ("accelerators_total", "nodes", "min_duration_ms", "query_count", "error_count")
_WHOLE = dict.fromkeys(_COUNTS, "Int64")


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


@dataclass(frozen=True)
class RunResult:
    """One run read and judged."""

    files: RunFiles
    run: MlperfRun
    accuracy_run: MlperfRun | None
    verdict: Verdict
    scores: Mapping[str, float]
    accuracy_error: str  # "" or why the accuracy run's logs cannot be read; the performance run stands


def read_result(folder: Path | str, source: str | None = None, claim: Claim | None = None) -> RunResult:
    """Read and judge one folder.

    Parameters
    ----------
    folder : a run folder, a published folder, or LoadGen's own output folder.
    source : overrides what the folder says (`published` for logs that were downloaded without a SOURCE.txt).
    claim : judge by this instead of what the run itself claims.

    Raises
    ------
    LogError : a log is missing, cut short or contradicts itself.
    """
    files = find_logs(folder)
    if source is not None and source not in SOURCES:
        raise DisaggError(f"source: found {source!r}; needed one of {', '.join(SOURCES)}")
    accuracy_run, accuracy_error = None, ""
    if files.accuracy and (files.accuracy / DETAIL).is_file():
        try:
            accuracy_run = read_run(files.accuracy)
        except LogError as error:
            accuracy_error = str(error)
    run = read_run(files.performance) if files.performance else accuracy_run
    if run is None:
        todo = accuracy_error or "Measure again."
        raise LogError("missing_file", files.folder, "no readable run", "a performance run", todo)
    written = files.accuracy / "accuracy.txt" if files.accuracy else None
    scores = read_accuracy_txt(written) if written and written.is_file() else None
    claim = claim or claim_of(files, run, source)
    verdict = judge(run, claim, scores, accuracy_run, files.client, accuracy_error)
    return RunResult(files, run, accuracy_run, verdict, scores.scores if scores else {}, accuracy_error)


def run_row(run_dir: Path | str, source: str | None = None) -> dict:
    """One row of the table: every column of COLUMNS; figures are LoadGen's to the last digit (ns / 1e6 = ms)."""
    result = read_result(run_dir, source)
    run, verdict, files, scores = result.run, result.verdict, result.files, result.scores
    claim, system = verdict.claim, files.system
    path = files.origin.get("path", "").split("/")  # division/submitter/results/system/benchmark/scenario/...
    known = path if len(path) > 5 and path[2] == "results" else [""] * 6
    nodes = _whole(system.get("number_of_nodes", files.settings.get("node_count")))
    gpus = nodes * _whole(system.get("accelerators_per_node", files.settings.get("gpus_per_node")))
    limits = limits_ms(claim.model, claim.scenario) or (run.ttft_limit_ms, run.tpot_limit_ms)
    return {
        **empty_row(files.folder),
        **{name: getattr(run, name) for name in COLUMNS if hasattr(run, name)},
        "division": known[0] or system.get("division", ""),
        "submitter": known[1] or system.get("submitter", ""),
        "system": known[3] or system.get("system_name") or str(files.parameters.get("system_name") or ""),
        "model": known[4] or claim.model,
        "accelerator": system.get("accelerator_model_name", ""),
        "accelerators_total": gpus,
        "nodes": nodes,
        "scenario": claim.scenario,
        "round": claim.round,
        "source": claim.source,
        "valid": verdict.valid,
        "submittable": verdict.submittable,
        "first_failed": verdict.failed[0].name if verdict.failed else "",
        "shortened": ", ".join([*(check.name for check in verdict.shortened), *claim.shortened]),
        "completed_tokens_per_s_per_gpu": run.completed_tokens_per_s / gpus if gpus > 0 else NAN,
        "ttft_limit_ms": limits[0],
        "tpot_limit_ms": limits[1],
        **{name: getattr(run, f"{name[:-2]}_ms") / 1e3 for name in COLUMNS if "latency_" in name},
        "accuracy_rougeL": scores.get("rougeL", NAN),
        "accuracy_exact_match": scores.get("exact_match", NAN),
        "tokens_per_sample": scores.get("tokens_per_sample", NAN),
        "log_path": f"{files.origin['path'] if known[0] else run.log_dir}/{DETAIL}",
        "error": result.accuracy_error,
    }


def empty_row(folder: Path | str) -> dict:
    """A row without a figure: words are empty, figures NaN, nothing is valid."""
    row = {name: "" if name in _WORDS else NAN for name in COLUMNS}
    return row | {"folder": str(folder), "valid": False, "submittable": False}


def _whole(value: object) -> float:
    """A count from JSON, where submitters write numbers as text too; NaN if it is none."""
    try:
        return float(int(str(value)))
    except ValueError:
        return NAN


def write_outputs(run_dir: Path | str, dest: Path | str | None = None) -> list[Path]:
    """Write a run's tables and figures from its raw logs: tables/run_<source>.csv, figures/<name>_<source>.png.

    The same logs give the same bytes wherever the run folder lies, so that `recompute` can compare digests.

    Parameters
    ----------
    dest : where tables/ and figures/ go; the run folder itself if not given.

    Raises
    ------
    LogError : the run cannot be read. A figure that this run cannot have (no token latencies, no job) is left out.
    """
    run_dir = Path(run_dir)
    dest = Path(dest) if dest else run_dir
    for name in ("tables", "figures"):
        (dest / name).mkdir(parents=True, exist_ok=True)
    row = run_row(run_dir)
    row["folder"] = run_dir.resolve().name
    log = Path(row["log_path"])
    if log.is_file():  # else it is a published log's place in its repository
        row["log_path"] = log.resolve().relative_to(run_dir.resolve()).as_posix()
    paths = [dest / "tables" / f"run_{row['source']}.csv"]
    as_table([row]).to_csv(paths[0], index=False)
    for name, draw in FIGURES.items():
        try:
            figure = draw(run_dir)
        except LogError:
            continue
        paths.append(dest / "figures" / f"{name}_{row['source']}.png")
        figure.savefig(paths[-1], dpi=120, metadata={"Software": None})
    return paths


#: the figures of one run, by the name of their file
FIGURES = {
    "latency": figure_latency_distributions,
    "timeline": figure_timeline,
    "search": figure_search,
    "topology": figure_topology,
}


def as_table(rows: list[dict]) -> pd.DataFrame:
    """Rows as a table with COLUMNS; counts whole, NaN where there is none."""
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"valid": bool, "submittable": bool, **_WHOLE})


def runs_table(folders: Iterable[Path | str], source: str | None = None) -> pd.DataFrame:
    """One row a folder, in the order given; a folder that cannot be read is a row with its `error`.

    Returns
    -------
    DataFrame with COLUMNS; `valid`, `submittable` bool, `loadgen_valid` LoadGen's own word.
    """
    rows = []
    for folder in folders:
        try:
            rows.append(run_row(folder, source))
        except DisaggError as error:
            rows.append({**empty_row(folder), "error": str(error)})
    return as_table(rows)


def verdict_of(run_dir: Path | str, source: str | None = None) -> Verdict:
    """The gate's word on a folder."""
    return read_result(run_dir, source).verdict


def verdict_text(run_dir: Path | str, source: str | None = None) -> str:
    """The verdict in a few sentences: which limit fails and by how much, what was shortened, what to do."""
    return verdict_of(run_dir, source).text()


#: what fits a terminal: column -> (heading, decimals)
TERMINAL = {
    "source": ("source", None), "scenario": ("scenario", None), "loadgen_valid": ("LoadGen", None), "valid": ("valid", None),
    "submittable": ("submittable", None), "target_qps": ("target_qps", 3), "samples_per_s": ("samples/s", 3),
    "completed_tokens_per_s": ("tokens/s", 1),
    **{f"ttft_{part}_ms": (f"TTFT {part} ms", 1) for part in ("mean", "p50", "p90", "p99")},
    "ttft_limit_ms": ("TTFT limit ms", 0),
    **{f"tpot_{part}_ms": (f"TPOT {part} ms", 2) for part in ("mean", "p50", "p90", "p99")},
    "tpot_limit_ms": ("TPOT limit ms", 0), "first_failed": ("first failed check", None),
    "shortened": ("shortened on purpose", None),
}  # fmt: skip


def table_cells(table: pd.DataFrame) -> list[list[str]]:
    """What a person reads of the table: a line a figure, a column a run, headings first; empty if none can be read."""
    good = table[table["loadgen_scenario"] != ""]  # read; an unreadable accuracy run leaves the rest standing
    if good.empty:
        return []
    cells = [["run", *(Path(str(folder)).name or str(folder) for folder in good["folder"])]]
    for name, (heading, decimals) in TERMINAL.items():
        shown = [_cell(value, decimals) for value in good[name]]
        if set(shown) != {"-"}:
            cells.append([heading, *shown])
    return cells


def format_table(table: pd.DataFrame) -> str:
    """The table for a terminal: a block a run where it is narrow enough to read; errors below, in full."""
    cells, lines = table_cells(table), []
    if cells:
        rows = cells if len(cells[0]) <= 4 else list(zip(*cells, strict=True))  # few: a run is a column
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for row in table[table["error"] != ""].itertuples():
        lines.append(row.error if row.error.startswith(row.folder) else f"{row.folder}: {row.error}")
    return "\n".join(lines)


def _cell(value: object, decimals: int | None) -> str:
    """A figure with its decimals, `-` for what is not there."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if decimals is None:
        return str(value) or "-"
    return "-" if math.isnan(value) else f"{value:.{decimals}f}"


# -- the published results, and how far runs of one kind differ

#: figures whose difference can be judged against the published rows' own spread
COMPARED = (
    "completed_tokens_per_s", "ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms", "tpot_mean_ms", "tpot_p50_ms", "tpot_p99_ms",
    "latency_p50_s", "latency_p99_s",
)  # fmt: skip


@functools.cache
def _published() -> pd.DataFrame:
    table = pd.read_csv(Path(__file__).parent / "data/published_v5.1.csv", comment="#")
    table = table.rename(columns={"tokens_per_s": "completed_tokens_per_s", "valid": "loadgen_valid"})
    table["completed_tokens_per_s_per_gpu"] = table["completed_tokens_per_s"] / table["accelerators_total"]
    table["folder"] = table["log_path"].str.replace("/performance/run_1/mlperf_log_detail.txt", "")
    words = {name: "" for name in _WORDS if name not in table}
    table = table.assign(**words).assign(source="published", round="v5.1", submittable=False)
    table["valid"] = table["loadgen_valid"] == "VALID"  # MLCommons accepted them
    return table.reindex(columns=list(COLUMNS)).astype(_WHOLE)


def published_table(scenario: str | None = None) -> pd.DataFrame:
    """The published v5.1 rows of llama3.1-405b in the columns of `runs_table`, `source` published.

    `valid` is MLCommons' acceptance: most of their logs are not here to be judged again.
    Source: mlcommons/inference_results_v5.1, see the head of data/published_v5.1.csv.
    """
    table = _published()
    chosen = table if scenario is None else table[table["scenario"] == scenario]
    return chosen.reset_index(drop=True).copy()


@dataclass(frozen=True)
class NoiseBand:
    """How far two runs of one kind differ: 19 of 20 pairs by less than `pairs_95_percent`, none by more than `widest_percent`."""

    figure: str
    scenario: str
    runs: int
    pairs_95_percent: float
    widest_percent: float


def noise_band(figure: str, scenario: str) -> NoiseBand:
    """Spread of a figure over the published runs on eight B200 GPUs that offered the same load.

    These are runs of one kind by different submitters: different machines, the same GPUs, software and target_qps
    (Offline, which offers all at once, needs no equal target_qps). The band is of pairs of single runs, so that a
    difference of two runs can be held against it directly. It holds machines' differences too: for two runs on one
    machine it is wide, so what is beyond it is real.

    Raises
    ------
    DisaggError : fewer than four such runs are published for this scenario, or the figure is not compared.
    """
    rows = published_table(scenario)
    rows = rows[rows["accelerator"].str.contains("B200-SXM") & (rows["accelerators_total"] == 8)]
    if scenario != "Offline" and len(rows):
        rows = rows[rows["target_qps"] == rows["target_qps"].mode().iloc[0]]
    # an Offline run's latencies follow from how many samples it was given: no spread of equal runs
    known = figure in COMPARED and not (scenario == "Offline" and figure.startswith("latency"))
    values = rows[figure].dropna().tolist() if known else []
    if len(values) < 4:
        raise DisaggError(
            f"noise band of {figure} in {scenario}: found {len(values)} published eight-GPU B200 runs; needed 4 or more. "
            f"Figures: {', '.join(COMPARED)}; scenarios: Server, Interactive, Offline (tokens/s alone)"
        )
    ratios = sorted(100 * (max(a, b) / min(a, b) - 1) for a, b in itertools.combinations(values, 2))
    return NoiseBand(figure, scenario, len(values), ratios[math.ceil(0.95 * len(ratios)) - 1], ratios[-1])


def compare(table: pd.DataFrame, baseline: str | Path) -> pd.DataFrame:
    """Differences of each run from a baseline, each held against the noise band.

    Parameters
    ----------
    table : of `runs_table`, with the baseline in it.
    baseline : `folder` of the run to compare with.

    Returns
    -------
    One row a run and figure: folder, figure, baseline, value, difference_percent, noise_percent, word. `word` is
    `inside the noise`, `beyond the noise`, or `not comparable: ...` (another source, scenario or load).

    Raises
    ------
    DisaggError : the baseline is not in the table, or could not be read.
    """
    readable = table[table["error"] == ""]
    chosen = readable[readable["folder"] == str(baseline)]
    if len(chosen) != 1:
        folders = ", ".join(table["folder"])
        raise DisaggError(f"baseline {baseline}: found {len(chosen)} such runs; needed one of: {folders}")
    base = chosen.iloc[0]
    rows = []
    for _, run in readable[readable["folder"] != str(baseline)].iterrows():
        obstacle = _obstacle(base, run)
        for figure in COMPARED:
            if pd.isna(base[figure]) or pd.isna(run[figure]):
                continue
            difference = 100 * (run[figure] / base[figure] - 1)
            noise = _noise(figure, base["scenario"], difference, obstacle)
            rows.append([run["folder"], figure, base[figure], run[figure], difference, *noise])
    names = ["folder", "figure", "baseline", "value", "difference_percent", "noise_percent", "word"]
    return pd.DataFrame(rows, columns=names)


def _obstacle(base: pd.Series, run: pd.Series) -> str:
    """Why two runs cannot be compared; "" if they can."""
    for name in ("source", "model", "scenario"):
        if base[name] != run[name]:
            return f"not comparable: {name} {base[name]} and {run[name]}"
    loads = base["target_qps"], run["target_qps"]
    if base["scenario"] != "Offline" and not math.isclose(*loads, rel_tol=1e-6):
        return "not comparable: target_qps {:g} and {:g}".format(*loads)
    return ""


def _noise(figure: str, scenario: str, difference: float, obstacle: str) -> tuple[float, str]:
    """The band in percent, and the word."""
    if scenario not in ("Server", "Interactive", "Offline"):
        return NAN, "not comparable: no published runs of this scenario"
    if not _has_band(figure, scenario):
        return NAN, "not comparable: follows from the number of samples"
    band = noise_band(figure, scenario).pairs_95_percent
    # a fall is as large as the rise that undoes it
    size = 100 * (math.exp(abs(math.log1p(difference / 100))) - 1)
    return band, obstacle or ("beyond the noise" if size > band else "inside the noise")


#: what a person compares, from COLUMNS, and what `figure_interactivity` draws
BESIDE = ("source", "scenario", "submitter", "system", "accelerators_total", "target_qps", "completed_tokens_per_s",
          "completed_tokens_per_s_per_gpu", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "valid")  # fmt: skip


def beside_published(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The runs of a table above the published v5.1 rows of their scenario, and in words what may be concluded.

    Returns
    -------
    DataFrame with the columns of BESIDE, ours first, then by tokens/s/GPU; and a few sentences: each of our runs among the
    published figures per GPU, whether it may be compared at all, and how far runs of one kind differ.

    Raises
    ------
    DisaggError : no run of the table could be read, or nothing is published for its scenario.
    """
    ours = table[table["loadgen_scenario"] != ""]
    scenario = ours["scenario"].iloc[0] if len(ours) else ""
    published = published_table(scenario)
    if not len(published):
        raise DisaggError(
            f"beside the published results: found {scenario or 'no run that could be read'}; needed a run of "
            f"{', '.join(sorted(set(_published()['scenario'])))}"
        )
    rate = published["completed_tokens_per_s_per_gpu"]
    said = [
        f"Published: {len(rate)} {scenario} runs of llama3.1-405b, {rate.min():.1f} to {rate.max():.1f} tokens/s/GPU, "
        f"median {rate.median():.1f}."
    ]
    for run in ours.itertuples():
        own = run.completed_tokens_per_s_per_gpu
        place = f"{own:.1f} tokens/s/GPU, above {(rate < own).sum()} of them" if own > 0 else "GPUs unknown"
        said.append(f"{Path(str(run.folder)).name}: {run.source}, {place}.{_caution(run)}")
    bands = {name: noise_band(name, scenario) for name in COMPARED if _has_band(name, scenario)}
    widths = ", ".join(
        f"{name} {band.pairs_95_percent:.1f} %" for name, band in bands.items() if "p50" not in name
    )
    count = next(iter(bands.values())).runs
    said.append(
        f"Noise: {count} of them ran on eight B200 at one load; 19 of 20 pairs of these differ by less than: {widths}. "
        "A smaller difference between two runs of yours says nothing."
    )
    published = published.sort_values("completed_tokens_per_s_per_gpu", ascending=False)
    names = ours["folder"].map(lambda folder: Path(str(folder)).name)
    ours = ours.assign(system=ours["system"].where(ours["system"] != "", names))
    rows = pd.concat([ours, published], ignore_index=True)
    return rows[list(BESIDE)], "\n".join(said)


def _caution(run) -> str:
    """Why a run's place among the published ones is not a comparison; "" if it is one."""
    modelled = run.source in ("rehearsed", "simulated")
    reasons = [f"it is {run.source}, so a model's word"] if modelled else []
    reasons += [f"it is shortened ({run.shortened})"] if run.shortened else []
    reasons += ["it is not valid"] if not run.valid else []
    return f" No comparison: {'; '.join(reasons)}." if reasons else ""


def _has_band(figure: str, scenario: str) -> bool:
    return scenario != "Offline" or figure == "completed_tokens_per_s"
