"""What a run folder tells, as tables."""

import itertools
import json
import shlex
from pathlib import Path

import pandas as pd
import yaml

from ..checks import Table
from ..experiment.loading import BY_HAND
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
    by_hand = [("-p", name, json.dumps(value)) for name, value, where in given if where in BY_HAND]
    words = [*files, *itertools.chain(*by_hand)]
    return shlex.join(["python", "-m", "disagg_lib", "run", *words])


def parameters_table(e: Experiment) -> pd.DataFrame:
    """One row a parameter that was given: its value and where it came from."""
    values = e.model_dump(mode="json")
    given = {n: source for n, source in e.provenance.items() if source != "default"}
    rows = [{"parameter": n, "value": values[n], "from": source} for n, source in given.items()]
    return Table(rows, columns=["parameter", "value", "from"])
