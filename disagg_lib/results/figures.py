"""Figures of runs: units on every axis, the source in the title, an own white ground so that dark pages read them too.

Lines differ in dash and lightness, never in hue alone: they print in grey.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..files import read_json_lines
from .logs import PERCENTILES, LogError
from .style import BLUE, INK, LIGHT, MID, ORANGE, new_figure, server_mark, set_title

_CENTRED = {"ha": "center", "va": "center"}


def read_queries(path: Path) -> dict[str, np.ndarray]:
    """TTFT, TPOT (ms) and outcome per query of job/queries_<mode>.csv, as LoadGen counts them.

    LoadGen's clock starts at the scheduled time: `late_ms`, where the client knows it, belongs to TTFT.
    """
    rows = pd.read_csv(path, dtype={"status": str}).dropna(subset=["ttft_ms"])
    rows = rows[rows["status"].isna() | rows["status"].isin(["ok", "200"])]
    late = rows["late_ms"].fillna(0) if "late_ms" in rows else 0
    many = rows[rows["output_tokens"] > 1]
    tpot = (many["latency_ms"] - many["ttft_ms"]) / (many["output_tokens"] - 1)
    return {"ttft": (rows["ttft_ms"] + late).to_numpy(), "tpot": tpot.to_numpy()}


def figure_latency_distributions(run_dir: Path | str) -> Figure:
    """TTFT and TPOT over all queries of a run as cumulative shares, with their limits.

    Per-query values are the client's (job/queries_performance.csv); without them, the percentiles that LoadGen kept.

    Raises
    ------
    LogError : the run cannot be read, or it has no token latencies (Offline).
    """
    from .rows import read_result

    result = read_result(run_dir)
    run, claim = result.run, result.verdict.claim
    if np.isnan(run.ttft_p99_ms):
        found = f"a {run.loadgen_scenario} run ({run.missing['ttft_p99_ms']})"
        raise LogError("no_token_latencies", run.log_dir, found)
    queries = result.files.base / "job/queries_performance.csv"
    values = read_queries(queries) if queries.is_file() else {}
    figure, axes = new_figure(9.5, 3.9, ncols=2, sharey=True)
    limits = {check.name: check.limit for check in result.verdict.checks if check.name.endswith("_p99")}
    for axis, name in zip(axes, ("ttft", "tpot"), strict=True):
        _draw_distribution(axis, name, run, values.get(name), limits.get(f"{name}_p99"))
    axes[0].set_ylabel("queries at or below (%)")
    for axis in axes:  # below the axes: on them it would cover the curve of one run or the other
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False, fontsize=7.5)
    kept = "per query, by the client" if values else "LoadGen's percentiles"
    load = f"{run.query_count:.0f} queries at {run.target_qps:g} queries/s"
    set_title(figure, f"{claim.model or 'run'} {claim.scenario}, {load}", claim.source, kept)
    return figure


def _draw_distribution(axis, name: str, run, values: np.ndarray | None, limit_ms: float | None) -> None:
    """One cumulative curve with p50 and p99 marked and the limit as a dashed line."""
    if values is not None and len(values):
        x = np.sort(values)
        axis.step(x, 100 * np.arange(1, len(x) + 1) / len(x), where="post", color=BLUE, linewidth=1.6)
    else:
        shares = {"min": 0, **{key: 100 * share for key, share in PERCENTILES.items()}, "max": 100}
        x = [getattr(run, f"{name}_{key}_ms") for key in shares]
        axis.plot(x, list(shares.values()), color=BLUE, linewidth=1.2, marker="o", markersize=3.5)
    for key, marker in (("p50", "s"), ("p99", "D")):
        value = getattr(run, f"{name}_{key}_ms")
        label = f"{key} {value:.4g} ms"
        axis.plot(value, 100 * PERCENTILES[key], marker, color=INK, markersize=5, label=label, linestyle="")
    if limit_ms is not None:
        label = f"p99 limit {limit_ms:g} ms"
        axis.axvline(limit_ms, color=ORANGE, linestyle="--", linewidth=1.8, label=label)
    axis.set_xlim(0, 1.06 * max(x[-1], getattr(run, f"{name}_p99_ms"), limit_ms or 0))
    axis.set_ylim(0, 103)
    words = {"ttft": "TTFT, time to first token (ms)", "tpot": "TPOT, time per output token (ms)"}
    axis.set_xlabel(words[name])


def figure_interactivity(table) -> Figure:
    """Output tokens/s/GPU against interactivity (1000 / TPOT p50, tokens/s/user), one mark a run, one shape a source.

    Parameters
    ----------
    table : of `results.runs_table`, with published rows from `results.published_table` appended if wanted. Rows
        without a GPU count or a TPOT (Offline) cannot be placed and are left out; the title counts them.
    """
    placed = table[(table["tpot_p50_ms"] > 0) & (table["completed_tokens_per_s_per_gpu"] > 0)]
    figure, axis = new_figure(7.5, 4.6)
    marks = {
        "measured": ("o", BLUE),
        "rehearsed": ("s", ORANGE),
        "simulated": ("^", MID),
        "published": ("x", INK),
        "unstated": ("D", LIGHT),
    }
    for (source, scenario), rows in placed.groupby(["source", "scenario"], sort=True):
        (marker, colour), solid = marks[source], scenario == "Interactive"
        if marker == "x":  # has no ground to fill
            style = {"marker": "x" if solid else "+", "color": colour}
        else:
            style = {"marker": marker, "edgecolors": colour, "facecolors": colour if solid else "none"}
        x, y = 1e3 / rows["tpot_p50_ms"], rows["completed_tokens_per_s_per_gpu"]
        axis.scatter(x, y, s=46, linewidths=1.4, label=f"{source}, {scenario} ({len(rows)})", **style)
    for label, limit_ms in (("Interactive", 80), ("Server", 175)):
        axis.axvline(1e3 / limit_ms, color=MID, linestyle=":" if label == "Server" else "--", linewidth=1)
        axis.annotate(f"TPOT {limit_ms} ms ({label})", (1e3 / limit_ms, 0.99), xycoords=("data", "axes fraction"), rotation=90,
                      va="top", ha="right", fontsize=7, color=MID)  # fmt: skip
    axis.set_xlim(left=0)
    axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    axis.set_xlabel("interactivity: 1000 / TPOT p50 (tokens/s/user)")
    axis.set_ylabel("completed output tokens/s/GPU")
    if len(placed):
        axis.legend(frameon=False, fontsize=8)
    left_out = len(table) - len(placed)
    set_title(figure, "Throughput against interactivity", ", ".join(sorted(set(placed["source"]))) or "none",
           f"{left_out} rows without TPOT or GPU count left out" if left_out else "")  # fmt: skip
    return figure


def figure_timeline(run_dir: Path | str) -> Figure:
    """A job's phases, its output tokens/s and its outstanding queries over time.

    Reads job/phases.jsonl and job/progress.jsonl alone: it can be drawn while the job runs, and of a failed one.

    Raises
    ------
    LogError : the folder has neither.
    """
    from .found import folder_source

    job = Path(run_dir) / "job"
    phases, progress = read_json_lines(job / "phases.jsonl"), read_json_lines(job / "progress.jsonl")
    times = [row["time_s"] for row in phases + progress]
    if not times:
        raise LogError("missing_file", job, "no phases.jsonl", todo="Launch the job first.")
    start = min(times)
    end = max(times) - start
    figure, axes = new_figure(9.5, 5.4, nrows=3, sharex=True, height_ratios=[1, 2, 2])
    _draw_phases(axes[0], phases, start, end)
    for mode, dash in (("performance", "-"), ("accuracy", ":")):
        rows = [row for row in progress if row["mode"] == mode]
        if len(rows) < 2:
            continue
        t = np.array([row["time_s"] for row in rows]) - start
        rate = np.diff([float(row["tokens"]) for row in rows]) / np.maximum(np.diff(t), 1e-9)
        line = {"linestyle": dash, "linewidth": 1.3, "label": mode}
        axes[1].step(t[1:], rate, where="pre", color=BLUE, **line)
        axes[2].plot(t, [row["outstanding"] for row in rows], color=INK, **line)
    axes[1].set_ylabel("output tokens/s")
    axes[2].set_ylabel("outstanding\nqueries")
    axes[2].set_xlabel("time since the job began (s)")
    for axis in axes[1:]:
        axis.set_ylim(0, max(axis.get_ylim()[1], 1) * 1.25)  # room for the legend
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    axes[0].set_xlim(0, max(end, 1))
    more = "tokens/s between two lines of progress.jsonl"
    set_title(figure, "Timeline of the job", folder_source(run_dir), more)
    return figure


def _draw_phases(axis, phases: list[dict], start: float, end: float) -> None:
    """Bars from each phase to the next, light and dark by turns; neighbours too narrow for a name share a label.

    Of `failed: <reason>` only the first word: a reason names nodes, and a picture cannot be redacted.
    """
    names = [row["phase"].partition(":")[0] for row in phases]
    begins = [row["time_s"] - start for row in phases] + [end]
    narrow: list[int] = []
    for place, name in enumerate(names):
        left, width = begins[place], begins[place + 1] - begins[place]
        style = {"color": (LIGHT, "#8f8f8f")[place % 2], "edgecolor": INK, "linewidth": 0.6}
        axis.barh(0, width, left=left, height=0.6, **style)
        wide = width > 0.09 * end
        if wide:
            axis.text(left + width / 2, 0, name, fontsize=8, color=INK, **_CENTRED)
        else:
            narrow.append(place)
        if narrow and (wide or place == len(names) - 1):
            # one label above the group, growing towards the middle of the figure
            late = begins[narrow[0]] > end / 2
            x, side = begins[narrow[-1 if late else 0]], "right" if late else "left"
            text = ", ".join(names[i] for i in narrow)
            axis.text(x, 0.42, text, ha=side, fontsize=7.5, color=INK)
            narrow = []
    axis.set_ylim(-0.4, 0.9)
    axis.set_yticks([])
    axis.grid(False)
    axis.set_ylabel("phase", color=INK)


def figure_search(run_dir: Path | str) -> Figure:
    """The trials of find_target_qps: worst allowed TTFT and TPOT as shares of their limits against the offered QPS.

    Filled marks are VALID trials, hollow ones INVALID; larger marks are longer trials, and a line joins those of one length. A
    share above 4 is drawn at 4. A trial in which requests failed has a cross on the upper edge, and no shares if they were many.

    Raises
    ------
    LogError : the run has no trials.
    """
    from .found import folder_source

    job = Path(run_dir) / "job"
    trials = sorted(read_json_lines(job / "find_target_qps.jsonl"), key=lambda row: row["qps"])
    if not trials:
        needed, todo = "the rows of a search", "Set find_target_qps: true in 03_configuration."
        raise LogError("missing_file", job / "find_target_qps.jsonl", "no trials", needed, todo)
    figure, axis = new_figure(8.0, 4.4)
    shares = [row[f"{name}_share"] or 0 for row in trials for name in ("ttft", "tpot")]
    top = min(max(1.2, *shares), 4)  # far above the limit the size says nothing
    _draw_trials(axis, trials, "ttft", top, BLUE, "o", "-")
    _draw_trials(axis, trials, "tpot", top, ORANGE, "s", "--")
    failed = [row["qps"] for row in trials if row.get("failed")]
    if failed:
        axis.scatter(
            failed, [top] * len(failed), marker="x", color=INK, label=f"requests failed ({len(failed)})"
        )
    axis.axhline(1, color=INK, linestyle=":", linewidth=1.6, label="limit")
    found = job / "find_target_qps.json"
    result = json.loads(found.read_text()) if found.is_file() else {}
    if result:
        label = f"target {result['target_qps']:g} queries/s"
        axis.axvline(result["target_qps"], color=MID, linestyle="-.", linewidth=1.2, label=label)
    axis.set_xlabel("offered load (queries/s)")
    axis.set_ylabel("worst allowed value / limit")
    axis.set_ylim(0, 1.08 * top)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=7.5)
    queries = sum(row.get("issued", row["queries"]) for row in trials)
    ended = result.get("ended", "not ended").partition(";")[0]
    set_title(
        figure,
        f"Search for the target QPS: {len(trials)} trials, {queries} queries, {ended}",
        folder_source(run_dir),
    )
    return figure


def _draw_trials(axis, trials: list[dict], name: str, top: float, colour: str, marker: str, dash: str) -> None:
    """The shares of one latency: a line a length of trial, a mark a trial."""
    rows = [row for row in trials if row[f"{name}_share"] is not None]
    lengths = sorted({row["queries"] for row in trials})

    def points(chosen: list[dict]) -> tuple[list[float], list[float]]:
        return [row["qps"] for row in chosen], [min(row[f"{name}_share"], top) for row in chosen]

    for length in lengths:
        width = 0.6 + 0.9 * length / lengths[-1]
        line = points([row for row in rows if row["queries"] == length])
        axis.plot(*line, color=colour, linestyle=dash, linewidth=width, zorder=2)
    for valid, word in ((True, "VALID"), (False, "INVALID")):
        shown = [row for row in rows if row["valid"] == valid]
        axis.scatter(
            *points(shown),
            s=[30 + 60 * row["queries"] / lengths[-1] for row in shown],
            marker=marker,
            facecolors=colour if valid else "white",
            edgecolors=colour,
            linewidths=1.4,
            zorder=3,
            label=f"{name.upper()}, {word} ({len(shown)})",
        )


def figure_topology(run_dir: Path | str) -> Figure:
    """Which server holds which GPU: nodes are rows, GPUs boxes with their rank, from job/settings.json.

    Raises
    ------
    LogError : no settings.json, or no `servers` in it.
    """
    from .found import folder_source

    path = Path(run_dir) / "job/settings.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    servers = settings.get("servers") or []
    if not servers:
        raise LogError("missing_file", path, "no `servers`", todo="Write the run with 03_configuration.")
    nodes, per_node = settings["node_count"], settings["gpus_per_node"]
    figure, axis = new_figure(1.6 + 1.5 * per_node, 1.5 + 0.62 * nodes)
    axis.grid(False)
    for server in servers:
        _draw_server(axis, server, per_node)
    taken = {place for server in servers for place in _places(server, per_node)}
    for node, gpu in np.ndindex(nodes, per_node):
        if (node, gpu) not in taken:
            axis.bar(
                gpu + 0.5, 0.86, width=0.92, bottom=node + 0.07, color="white", edgecolor=LIGHT, hatch="//"
            )
            axis.text(gpu + 0.5, node + 0.5, "idle", fontsize=8, color=INK, **_CENTRED)
    axis.set_xlim(0, per_node)
    axis.set_ylim(nodes, 0)
    axis.set_xticks(np.arange(per_node) + 0.5, [f"GPU {gpu}" for gpu in range(per_node)])
    axis.set_yticks(np.arange(nodes) + 0.5, [f"node {node}" for node in range(nodes)])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    roles = [server["role"] for server in servers]
    count = f"{roles.count('context')} context and {roles.count('generation')} generation servers"
    what = f"{count} on {nodes} x {per_node} GPUs"
    marks = "C: context server, G: generation server, bold: leads it"
    set_title(figure, what, folder_source(run_dir), marks)
    return figure


def _places(server: dict, per_node: int) -> list[tuple[int, int]]:
    """(node, GPU) of each rank, in rank order: as written, else the rank counted through the nodes."""
    if "gpus" in server:
        return [(node, gpu) for node, gpu in server["gpus"]]
    return [divmod(rank, per_node) for rank in server["ranks"]]


def _draw_server(axis, server: dict, per_node: int) -> None:
    """The boxes of one server."""
    mark, colour = server_mark(server["role"], server["name"])
    for rank, (node, gpu) in zip(server["ranks"], _places(server, per_node), strict=True):
        axis.bar(gpu + 0.5, 0.86, width=0.92, bottom=node + 0.07, color=colour, edgecolor=INK, linewidth=0.8)
        leads = rank == server["ranks"][0]
        text = f"{mark}\nrank {rank}" + (f", port {server['port']}" if leads else "")
        weight = "bold" if leads else "normal"
        axis.text(gpu + 0.5, node + 0.5, text, fontsize=7.5, color=INK, fontweight=weight, **_CENTRED)
