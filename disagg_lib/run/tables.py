"""What a run folder tells, as tables."""

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from ..checks import Table
from ..experiment.parameters import Experiment
from ..files import read_json_lines


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
    """One row a phase of the run's job: phase, began_s (after the first), took_s (NaN for the last), ids.

    ids : the way in which a test mode's token ids came (`job/token_ids.py`), "text" if the tokenizer made them.
    """
    rows = read_json_lines(run / "job/phases.jsonl")
    table = pd.DataFrame(rows, columns=["time_s", "phase"])
    began = table["time_s"] - table["time_s"].min()
    ids = [_ids_way(run, phase) if phase in ("accuracy", "test06") else "" for phase in table["phase"]]
    took = began.diff(-1).abs().round(1)
    return pd.DataFrame({"phase": table["phase"], "began_s": began.round(1), "took_s": took, "ids": ids})


def _ids_way(run: Path, mode: str) -> str:
    path = run / f"job/client_{mode}.json"
    return (json.loads(path.read_text()).get("ids") or "") if path.is_file() else ""


def orchestrator_table(run: Path, window_s: float = 10.0) -> pd.DataFrame:
    """One row a mode: the orchestrator's CPU, in cores, as a mean and at most over `window_s`. From /proc, once a second."""
    columns = ["mode", "cores_mean", "cores_max", "note"]
    lines = read_json_lines(run / "job/orchestrator.jsonl")
    rows = []
    for mode, samples in itertools.groupby(lines, lambda line: line["mode"]):
        times, cpu = np.array([(s["time_s"], s["cpu_s"]) for s in samples]).T
        if times[-1] - times[0] < 1:
            continue
        before = np.interp(times - window_s, times, cpu)
        most = ((cpu - before) / np.minimum(window_s, np.maximum(times - times[0], 1e-9)))[
            times > times[0] + 1
        ]
        mean = (cpu[-1] - cpu[0]) / (times[-1] - times[0])
        note = ORCHESTRATOR_BUSY if max(most) > BUSY_CORES else ""
        rows.append((mode, round(mean, 2), round(max(most), 2), note))
    return pd.DataFrame(rows, columns=columns)


BUSY_CORES = 0.8
ORCHESTRATOR_BUSY = "the limit: it is one Python process, and requests wait for it"


def search_table(run: Path) -> pd.DataFrame:
    """One row a trial of find_target_qps: qps, queries, valid, ttft_share and tpot_share of their limits, seconds."""
    columns = ["qps", "queries", "valid", "ttft_share", "tpot_share", "seconds", "failed"]
    return pd.DataFrame(read_json_lines(run / "job/find_target_qps.jsonl"), columns=columns)


def given_parameters(run: Path) -> list[tuple[str, object, str]]:
    """Parameters of experiment.yaml that are not defaults: name, value, where from."""
    recorded = yaml.safe_load((run / "experiment.yaml").read_text(encoding="utf-8"))["parameters"]
    return [(n, e["value"], str(e["from"])) for n, e in recorded.items() if e.get("from") != "default"]


def parameters_table(e: Experiment) -> pd.DataFrame:
    """One row a parameter that was given: its value and where it came from."""
    values = e.model_dump(mode="json")
    given = {n: source for n, source in e.provenance.items() if source != "default"}
    rows = [{"parameter": n, "value": values[n], "from": source} for n, source in given.items()]
    return Table(rows, columns=["parameter", "value", "from"])
