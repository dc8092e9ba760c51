"""results/<run>: everything a run is made of, its name, and the manifest of what was used and what came out."""

import datetime
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import yaml

from .errors import DisaggError
from .experiment import REPOSITORY, Experiment, experiment_text, load_recorded
from .find_target_qps import seconds_of
from .find_target_qps import stages as search_stages
from .job_script import make_job_script
from .serving import lengths
from .serving.lengths import SAMPLE_COUNT
from .trtllm_config import config_files

RESULTS = REPOSITORY / "results"
RECORDED_PACKAGES = (
    "disagg_lib",
    "mlcommons-loadgen",
    "numpy",
    "aiohttp",
    "papermill",
    "jupyterlab",
    "pandas",
)


class RunFolderError(DisaggError):
    """A run folder is absent, taken or not what it should be."""


def user_conf_text(e: Experiment) -> str:
    """LoadGen's user.conf; durations in ms.

    A rehearsal is shortened the second way of MLPerf's short runs: exactly `rehearsal_queries` queries,
    drawn from all samples. LoadGen's equal issue is off for that, so such a run can claim no round.
    """
    short = {"min_duration": 1, "min_query_count": e.rehearsal_queries, "sample_concatenate_permutation": 0}
    whole = {"min_duration": 1000 * MIN_DURATION_S, "performance_sample_count_override": SAMPLE_COUNT}
    settings = {"target_qps": e.server_target_qps, **(short if e.shortened else whole)}
    return "".join(f"*.{loadgen_scenario(e)}.{name} = {value}\n" for name, value in settings.items())


def loadgen_scenario(e: Experiment) -> str:
    """LoadGen's word: Interactive is its Server with the limits of another model key."""
    return "Offline" if e.scenario == "Offline" else "Server"


MIN_DURATION_S = 600  # of a performance run, by the rules
TEARDOWN_S = 120  # before the time limit, Slurm's TERM to the job
LOAD_S = 600  # a fair guess for loading 230 GB of weights on every server


def performance_run(e: Experiment) -> tuple[int, int]:
    """Queries and least seconds of the performance run, and so of the search's full-length trials."""
    return (e.rehearsal_queries, 0) if e.shortened else (SAMPLE_COUNT, MIN_DURATION_S)


def runs_of(e: Experiment) -> list[tuple[int, int]]:
    """(queries, least seconds) of each test mode."""
    samples = e.rehearsal_accuracy_samples if e.shortened else SAMPLE_COUNT
    runs = {"performance": performance_run(e), "accuracy": (samples, 0), "test06": (100, 0)}
    return [runs[mode] for mode in e.test_modes]


def job_seconds(e: Experiment) -> float:
    """How long loading and the test modes take at least: their queries at the target, and LoadGen's minimum."""
    return seconds_of(runs_of(e), e.server_target_qps) + (30 if e.engine == "rehearsal" else LOAD_S)


def search_seconds(e: Experiment) -> float:
    """How long find_target_qps mostly takes: the trials of each length at the target; 0 if it is not asked for."""
    full_queries, full_s = performance_run(e)
    runs = []
    for queries, stage in search_stages(full_queries):
        runs += [(queries, full_s if queries == full_queries else 0)] * stage.most
    return e.find_target_qps * seconds_of(runs, e.server_target_qps)


_OF_A_SERVER = ("name", "role", "ranks", "nodes", "node", "port", "gpus")


def settings_of(e: Experiment) -> dict:
    """job/settings.json: what the job agent and the measuring client need to know, as plain values."""
    if e.dataset_path:
        data_set = {"kind": "pickle", "path": e.dataset_path, "sha256": None, "trust": e.trust_dataset}
    else:
        data_set = {"kind": "synthetic", "lengths": "job/lengths.csv"}
    full_queries, full_s = performance_run(e)
    # Servers that send text alone: the client makes ids of it after an accuracy or TEST06 run.
    has_model = e.engine == "trtllm" or (e.engine == "external" and e.model_dir)
    return {
        "engine": e.engine,
        "launcher": e.launcher,
        "node_count": e.node_count,
        "gpus_per_node": e.gpus_per_node,
        "server_port": e.server_port,
        "endpoint_url": e.endpoint_url,
        "time_limit_s": e.time_limit_s,
        "load_timeout_s": e.load_timeout_s,
        "stall_timeout_s": e.stall_timeout_s,
        "servers": [{name: getattr(server, name) for name in _OF_A_SERVER} for server in e.servers],
        "find_target_qps": {
            "low_qps": e.search_bounds_qps[0],
            "high_qps": e.search_bounds_qps[1],
            "budget_s": e.search_budget_s,
            "end_s": e.time_limit_s - TEARDOWN_S,
            "runs_after": runs_of(e),
            "full_queries": full_queries,
            "full_s": full_s,
        },
        "client": {
            "kind": e.client,
            "endpoint": e.endpoint,
            "model": e.served_model,
            "model_key": "llama3_1-405b" + "-interactive" * (e.scenario == "Interactive"),
            "scenario": loadgen_scenario(e),
            "max_in_flight": e.max_in_flight if e.scenario == "Offline" else None,
            "tokenizer": f"{e.model_path}/tokenizer.json" if has_model else None,
            "user_conf": "user.conf",
            "total_sample_count": SAMPLE_COUNT,
            "accuracy_sample_count": e.rehearsal_accuracy_samples if e.shortened else SAMPLE_COUNT,
            "data_set": data_set,
            "max_output_tokens": lengths.MAX_OUTPUT_TOKENS,
            "min_output_tokens": 1,
            "temperature": 1.0,
            "top_p": 0.001,
            "top_k": 1,
            "request_timeout_s": e.request_timeout_s,
            # Of one request; where all are silent the job's watchdog speaks first.
            "stall_timeout_s": e.stall_timeout_s + 60,
            # Opened before the run. Somebody else's server may keep a thread for each.
            "connections": 8 if e.engine == "external" else 64,
        },
    }


def run_name(e: Experiment, now: datetime.datetime) -> str:
    """e.g. 20261123-223015_rehearsal_20gpu: sorts by time, says what it is."""
    gpus = f"_{e.gpu_count}gpu" if e.servers else ""
    return f"{now:%Y%m%d-%H%M%S}_{e.engine}{gpus}"


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return path if path.exists() else existing_parent(path.parent)


def free_run_dir(e: Experiment, run_dir: str | Path | None = None) -> Path:
    """The path that a new run will have: the one given, or a new name in results/.

    Raises
    ------
    RunFolderError : the folder is there already.
    """
    if run_dir:
        path = REPOSITORY / Path(run_dir).expanduser()
        if path.exists():
            raise RunFolderError(
                f"run_dir: {path} is there already, and nothing is overwritten. Leave run_dir empty for a new one"
            )
    else:
        path = RESULTS / run_name(e, datetime.datetime.now())
    if e.container == "pyxis" and re.search("[,:]", str(path)):
        raise RunFolderError(
            f"run_dir: {path} holds ',' or ':', which pyxis reads as separators of mounts. Choose another place"
        )
    parent = existing_parent(path.parent)
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise RunFolderError(f"run_dir: {parent} is not a folder that you may write to. Choose another place")
    return next(
        p for n in range(1, 1000) if not (p := path.with_name(path.name + f"_{n}" * (n > 1))).exists()
    )


def create_run(e: Experiment, run_dir: str | Path | None = None, python: str = sys.executable) -> Path:
    """Write a new run folder, whole or not at all.

    Parameters
    ----------
    run_dir : its path (relative: below the repository); not given: a new name in results/.
    python : the interpreter that a rehearsal's job uses.

    Raises
    ------
    RunFolderError : the folder is there already.
    """
    target = free_run_dir(e, run_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=target.parent))
    try:
        _write_run(draft, e, python)
        draft.chmod(0o755)
        os.mkdir(target)  # decides between two that chose one name; os.rename replaces an empty folder only
    except FileExistsError:
        shutil.rmtree(draft)
        raise RunFolderError(
            f"{target}: another run took this name just now. Run 03_configuration again"
        ) from None
    except BaseException:
        shutil.rmtree(draft)
        raise
    os.rename(draft, target)
    return target


def _write_run(folder: Path, e: Experiment, python: str) -> None:
    for name in ("job", "logs", "mlperf", "tables", "figures", "notebooks"):
        (folder / name).mkdir()
    (folder / "experiment.yaml").write_text(experiment_text(e))
    for name, text in config_files(e).items():
        (folder / name).write_text(text)
    (folder / "user.conf").write_text(user_conf_text(e))
    (folder / "job.sh").write_text(make_job_script(e, python))
    (folder / "job.sh").chmod(0o755)
    (folder / "job/settings.json").write_text(json.dumps(settings_of(e), indent=1, default=list) + "\n")
    for module in ["job_agent", "loadgen_client"] + ["find_target_qps"] * e.find_target_qps:
        shutil.copy(Path(__file__).with_name(f"{module}.py"), folder / "job")
    if not e.dataset_path:
        sample_lengths = lengths.data_set_lengths(e.lengths_file)
        if e.shortened:
            sample_lengths = lengths.shorten_outputs(sample_lengths, e.rehearsal_output_tokens)
        lengths.write_lengths_csv(sample_lengths, folder / "job/lengths.csv")
    if e.search_rows_from:
        take_search_rows(folder, e)
    write_manifest(folder)


# Parameters, with blanks between, on which the verdict of a search's trial does not depend.
_NOT_OF_A_TRIAL = (
    "find_target_qps target_qps_min target_qps_max search_budget_s search_rows_from server_target_qps test_modes "
    "time_limit partition account load_timeout_s nodes ntasks plan_gpus setup_jobs system_name harness_dir "
    "trust_dataset rehearsal_accuracy_samples"
)


def take_search_rows(folder: Path, e: Experiment) -> None:
    """Put the trials of an earlier run's search where this one's goes on from them.

    Raises
    ------
    RunFolderError : it has none, or had other servers, another load or limits, so that they tell nothing here.
    """
    earlier = REPOSITORY / Path(e.search_rows_from).expanduser()
    rows = earlier / "job/find_target_qps.jsonl"
    if not rows.is_file():
        raise RunFolderError(
            f"search_rows_from: {rows} is not there: no trial of that search ended. Leave it out"
        )
    theirs, ours = (x.model_dump(exclude=set(_NOT_OF_A_TRIAL.split())) for x in (load_recorded(earlier), e))
    differs = [
        f"{name} was {theirs[name]!r}, is {ours[name]!r}" for name in ours if theirs[name] != ours[name]
    ]
    files = [*sorted(folder.glob("config*.yaml")), folder / "job/lengths.csv"]
    for path in (path.relative_to(folder) for path in files if path.exists()):
        if not (earlier / path).is_file() or (earlier / path).read_bytes() != (folder / path).read_bytes():
            differs.append(f"{earlier / path} differs from this run's")
    if differs:
        raise RunFolderError(
            f"search_rows_from: {'; '.join(differs)}: its trials tell nothing here. "
            "Repeat that run's parameters, or leave search_rows_from out"
        )
    shutil.copy(rows, folder / "job")


def find_run(run_dir: str | Path | None = None) -> Path:
    """The run folder that a notebook means: the one given, or the newest in results/.

    Raises
    ------
    RunFolderError
    """
    if run_dir:
        path = REPOSITORY / Path(run_dir).expanduser()
        if not (path / "experiment.yaml").is_file():
            raise RunFolderError(
                f"run_dir: {path} is no run folder (no experiment.yaml in it). Run 03_configuration to make one"
            )
        return path
    made = [p.parent for p in RESULTS.glob("*/experiment.yaml") if p.parent.name != "example_rehearsal"]
    if not made:
        raise RunFolderError(f"{RESULTS} holds no run yet. Run 03_configuration to make one")
    return max(made, key=lambda path: ((path / "experiment.yaml").stat().st_mtime_ns, path.name))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def write_manifest(folder: Path) -> dict:
    """manifest.json: versions, git commit, digest of every file of the run; written anew as the run grows."""
    path = folder / "manifest.json"
    first = json.loads(path.read_text()) if path.exists() else {}
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    status = _git("status", "--porcelain")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != path)
    manifest = {
        "format": 1,
        "made_with": first.get("made_with") or _made_with(load_recorded(folder)),
        "created": first.get("created") or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **versions},
        "platform": {"system": platform.system(), "machine": platform.machine()},
        "git": {
            "commit": _git("rev-parse", "HEAD"),
            "changed_files": None if status is None else len(status.splitlines()),
        },
        "sha256": {str(p.relative_to(folder)): sha256(p) for p in files},
    }
    draft = folder / ".manifest.json"
    draft.write_text(json.dumps(manifest, indent=1) + "\n")
    draft.replace(path)
    return manifest


def _made_with(e: Experiment) -> dict:
    """Checkpoint, image and client environment as 00 and 01 recorded them; None where nothing is recorded."""
    from .model_store import ModelError, cite_model  # these import this module
    from .setup_jobs import cite_client, cite_image

    try:
        checkpoint = cite_model(Path(e.model_path)) if e.servers else None
    except ModelError as error:
        checkpoint = {"problem": str(error)}
    return {
        "checkpoint": checkpoint,
        "container_image": cite_image(e) if e.container == "pyxis" else None,
        "client_env": cite_client(e.client_dir) if e.client_dir else None,
    }


# -- what a run folder tells, as tables


class Table(pd.DataFrame):
    """A table of sentences: in a notebook every cell is shown whole, to the left; an empty one says so."""

    @property
    def _constructor(self):
        return Table

    def _repr_html_(self) -> str:
        if self.empty:
            return f"<p>No {self.columns[0]} to show.</p>"
        with pd.option_context("display.max_colwidth", None):
            html = self.to_html(index=False, border=0)
        return re.sub(
            "<t([dh])>",
            r'<t\1 style="text-align: left; white-space: normal; overflow-wrap: break-word">',
            html,
        )


def topology_table(e: Experiment) -> pd.DataFrame:
    """One row a server: name, role, GPUs, ranks, nodes, leading node, port."""
    names = ["server", "role", "TP x PP", "ranks", "nodes", "leads on node", "port"]
    rows = [
        (s.name, s.role, f"{s.tp_size} x {s.pp_size}", f"{s.ranks[0]}-{s.ranks[-1]}", ", ".join(map(str, s.nodes)),
         s.node, s.port)
        for s in e.servers
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=names)


def phases_table(run: Path) -> pd.DataFrame:
    """One row a phase of the run's job: phase, began_s (after the first), took_s (NaN for the last)."""
    rows = read_json_lines(run / "job/phases.jsonl")
    table = pd.DataFrame(rows, columns=["time_s", "phase"])
    began = table["time_s"] - table["time_s"].min()
    return pd.DataFrame(
        {"phase": table["phase"], "began_s": began.round(1), "took_s": began.diff(-1).abs().round(1)}
    )


def search_table(run: Path) -> pd.DataFrame:
    """One row a trial of find_target_qps: qps, queries, valid, ttft_share and tpot_share of their limits, seconds."""
    columns = ["qps", "queries", "valid", "ttft_share", "tpot_share", "seconds", "failed"]
    return pd.DataFrame(read_json_lines(run / "job/find_target_qps.jsonl"), columns=columns)


def given_parameters(run: Path) -> list[tuple[str, object, str]]:
    """Parameters of experiment.yaml that are not defaults: name, value, where from."""
    recorded = yaml.safe_load((run / "experiment.yaml").read_text(encoding="utf-8"))["parameters"]
    return [(n, e["value"], str(e["from"])) for n, e in recorded.items() if e.get("from") != "default"]


def repeat_command(run: Path) -> str:
    """The command that makes such a run again: its params files, then what was given by hand."""
    given = given_parameters(run)
    files = list(dict.fromkeys(where for _, _, where in given if where.endswith((".yaml", ".yml"))))
    by_hand = [("-p", name, json.dumps(value)) for name, value, where in given if where == "given"]
    words = [*(files or ["params/rehearsal.yaml"]), *itertools.chain(*by_hand)]
    return shlex.join(["python", "-m", "disagg_lib", "run", *words])


def parameters_table(e: Experiment) -> pd.DataFrame:
    """One row a parameter that was given: its value and where it came from."""
    values = e.model_dump(mode="json")
    given = {n: source for n, source in e.provenance.items() if source != "default"}
    rows = [{"parameter": n, "value": values[n], "from": source} for n, source in given.items()]
    return Table(rows, columns=["parameter", "value", "from"])
