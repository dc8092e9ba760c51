"""The published results, and a run compared with them."""

from __future__ import annotations

import functools
import itertools
import math
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..errors import DisaggError
from ..files import DATA
from .logs import NAN
from .rows import COLUMNS, WHOLE, WORDS

#: figures whose difference can be judged against the published rows' own spread
COMPARED = (
    "completed_tokens_per_s", "ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms", "tpot_mean_ms", "tpot_p50_ms", "tpot_p99_ms",
    "latency_p50_s", "latency_p99_s",
)  # fmt: skip


ROUNDS = ("v5.1", "v6.0")
#: published rows that are not in the tables: kept for checks by what nobody here saw
KEPT_ASIDE = {("v5.1", "Interactive"): 1, ("v6.0", "Server"): 2}


@functools.cache
def _published() -> pd.DataFrame:
    tables = [pd.read_csv(DATA / f"published_{name}.csv", comment="#").assign(round=name) for name in ROUNDS]
    table = pd.concat(tables, ignore_index=True)
    table = table.rename(columns={"tokens_per_s": "completed_tokens_per_s", "valid": "loadgen_valid"})
    table["completed_tokens_per_s_per_gpu"] = table["completed_tokens_per_s"] / table["accelerators_total"]
    table["folder"] = table["log_path"].str.replace("/performance/run_1/mlperf_log_detail.txt", "")
    words = {name: "" for name in WORDS if name not in table}
    table = table.assign(**words).assign(source="published", submittable="no")
    table["valid"] = table["loadgen_valid"] == "VALID"  # MLCommons accepted them
    return table.reindex(columns=list(COLUMNS)).astype({"valid": "boolean", **WHOLE})


def published_table(scenario: str | None = None) -> pd.DataFrame:
    """The published rows of llama3.1-405b in ROUNDS in the columns of `runs_table`, `source` published.

    `valid` is MLCommons' acceptance: most of their logs are not here to be judged again.
    Source: mlcommons/inference_results_v5.1 and _v6.0, see the heads of data/published_*.csv.
    """
    table = _published()
    chosen = table if scenario is None else table[table["scenario"] == scenario]
    return chosen.reset_index(drop=True).copy()


def published_in(scenario: str, round_: str) -> pd.DataFrame:
    """The published rows of a scenario in a round; of v5.1 where none of that round are here."""
    table = published_table(scenario)
    chosen = table[table["round"] == round_]
    return chosen if len(chosen) else table[table["round"] == "v5.1"]


def share_of_published(run) -> tuple[float, str] | None:
    """Tokens/s of a row of `runs_table`, as a share of the best published result on as many GPUs, of the same GPU if there is one.

    Returns
    -------
    The share (1.0: equal) and `the published result on 72 GPUs (NVIDIA GB200, v6.0: 22.2 queries/s)`; None where nothing
    is published on that many.
    """
    rows = published_in(run.scenario, run.round)
    rows = _of_gpu(rows[rows["accelerators_total"] == run.accelerators_total], run.accelerator)
    if not len(rows):
        return None
    best = rows.loc[rows["completed_tokens_per_s"].idxmax()]
    load = f"{best['target_qps']:g} queries/s" if run.scenario != "Offline" else f"{best['completed_tokens_per_s']:,.0f} tokens/s"
    gpu = best["accelerator"] if best["submitter"] in best["accelerator"] else f"{best['submitter']} {best['accelerator']}"
    which = "best published" if len(rows) > 1 else "published"
    words = f"the {which} result on {run.accelerators_total} GPUs ({gpu}, {best['round']}: {load})"
    return run.completed_tokens_per_s / best["completed_tokens_per_s"], words


def best_share(table: pd.DataFrame) -> str:
    """The run of `runs_table` with the largest share of a published result on as many GPUs; "" if none may be compared."""
    ours = [run for run in table.itertuples() if run.source != "published" and not _why_not_compared(run)]
    shares = [(found, run) for run in ours if (found := share_of_published(run))]
    if not shares:
        return ""
    (share, words), run = max(shares, key=lambda pair: pair[0][0])
    return textwrap.fill(f"{Path(str(run.folder)).name}: {100 * share:.0f} % of {words}", 80, subsequent_indent="  ")


def _of_gpu(rows: pd.DataFrame, accelerator: str) -> pd.DataFrame:
    """The rows of this GPU, or all of them where it has none."""
    same = rows["accelerator"].str.contains(rf"\b{re.escape(accelerator)}\b") if accelerator else rows["valid"].isna()
    return rows[same] if same.any() else rows


@dataclass(frozen=True)
class NoiseBand:
    """How far two runs of one kind differ: 19 of 20 pairs by less than `pairs_95_percent`, none by more than `widest_percent`."""

    figure: str
    scenario: str
    runs: int
    pairs_95_percent: float
    widest_percent: float


def noise_band(figure: str, scenario: str) -> NoiseBand:
    """Spread of a figure over the published v5.1 runs on eight B200 GPUs that offered the same load.

    These are runs of one kind by different submitters: different machines, the same GPUs, software and target_qps
    (Offline, which offers all at once, needs no equal target_qps). The band is of pairs of single runs, so that a
    difference of two runs can be held against it directly. It holds machines' differences too: for two runs on one
    machine it is wide, so what is beyond it is real.

    Raises
    ------
    DisaggError : fewer than four such runs are published for this scenario, or the figure is not compared.
    """
    rows = published_table(scenario)
    rows = rows[(rows["round"] == "v5.1") & rows["accelerator"].str.contains("B200-SXM") & (rows["accelerators_total"] == 8)]
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


#: sources whose figures no machine has shown
MODELLED = ("rehearsed", "simulated")

#: what a person compares, from COLUMNS, and what `figure_interactivity` draws
BESIDE = ("source", "round", "scenario", "submitter", "system", "accelerators_total", "target_qps", "completed_tokens_per_s",
          "completed_tokens_per_s_per_gpu", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "valid")  # fmt: skip


def beside_published(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The runs of a table above the published rows of their scenario, and in words what may be concluded.

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
    said = [_spread(published[published["round"] == name], name, scenario) for name in ROUNDS]
    rate = published["completed_tokens_per_s_per_gpu"]
    for run in ours.itertuples():
        own, obstacles = run.completed_tokens_per_s_per_gpu, _why_not_compared(run)
        figure = f"{own:.1f} tokens/s/GPU" if own > 0 else "tokens/s/GPU unknown"
        share = None if obstacles else share_of_published(run)
        place = f"not compared: {'; '.join(obstacles)}" if obstacles else f"above {(rate < own).sum()} of {len(rate)}"
        place += f"; tokens/s are {100 * share[0]:.0f} % of {share[1]}" if share else ""
        closest = "" if run.source in MODELLED else _closest(run, published)
        said.append(f"{Path(str(run.folder)).name}: {run.source}, {figure}, {place}.{closest}")
    bands = {name: noise_band(name, scenario) for name in COMPARED if _has_band(name, scenario)}
    widths = ", ".join(
        f"{name} {band.pairs_95_percent:.1f} %" for name, band in bands.items() if "p50" not in name
    )
    count = next(iter(bands.values())).runs
    said.append(
        f"Noise: {count} of v5.1's ran on eight B200 at one load; 19 of 20 pairs of these differ by less than: {widths}. "
        "A smaller difference between two runs of yours says nothing."
    )
    published = published.sort_values("completed_tokens_per_s_per_gpu", ascending=False)
    names = ours["folder"].map(lambda folder: Path(str(folder)).name)
    ours = ours.assign(system=ours["system"].where(ours["system"] != "", names))
    rows = pd.concat([ours, published], ignore_index=True)
    return rows[list(BESIDE)], "\n".join(said)


def _spread(rows: pd.DataFrame, name: str, scenario: str) -> str:
    """How many of a round's runs are here, and their tokens/s/GPU."""
    rate, aside = rows["completed_tokens_per_s_per_gpu"], KEPT_ASIDE.get((name, scenario), 0)
    why = f" ({aside} kept aside for checks)" if aside else ""
    return (
        f"Published in {name}: {len(rows)} of {len(rows) + aside} {scenario} runs of llama3.1-405b{why}, {rate.min():.1f} to "
        f"{rate.max():.1f} tokens/s/GPU, median {rate.median():.1f}."
    )


def _closest(run, published: pd.DataFrame) -> str:
    """The official score that MLCommons wants stated beside an unverified one: of the same GPU, the nearest in their number."""
    if not run.accelerators_total > 0:
        return ""
    published = _of_gpu(published, run.accelerator)
    apart = (published["accelerators_total"].astype(float) / run.accelerators_total).map(math.log).abs()
    near = published[apart == apart.min()].sort_values("completed_tokens_per_s_per_gpu").iloc[-1]
    return (
        f" Closest official score: {near['submitter']} {near['system']}, {near['round']}: {near['completed_tokens_per_s']:,.1f} "
        f"tokens/s on {near['accelerators_total']} GPUs."
    )


def _why_not_compared(run) -> list[str]:
    """Why a run has no place among the published ones; empty if it has."""
    reasons = ["a model's word"] if run.source in MODELLED else []
    reasons += [f"shortened ({run.shortened})"] if run.shortened else []
    reasons += ["nobody states its source"] if run.source == "unstated" else []
    reasons += ["not valid"] if pd.isna(run.valid) or not run.valid else []
    reasons += [] if run.completed_tokens_per_s_per_gpu > 0 else ["its GPUs are unknown"]
    return reasons


def _has_band(figure: str, scenario: str) -> bool:
    return scenario != "Offline" or figure == "completed_tokens_per_s"
