"""Figures of runs: units on every axis, the source in the title, an own white ground so that dark pages read them too.

Lines differ in dash and lightness, never in hue alone: they print in grey.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

INK, MID, LIGHT = "#1a1a1a", "#6b6b6b", "#c9c9c9"
BLUE, ORANGE = "#1f4e9c", "#e08a1e"  # dark and light when printed in grey


def _figure(width: float, height: float, **grid) -> tuple[Figure, object]:
    """A white figure and its axes; made without pyplot, so that nothing is drawn twice or kept."""
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    axes = figure.subplots(**grid)
    for axis in np.atleast_1d(axes).flat:
        axis.set_facecolor("white")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK)
        axis.grid(True, color=LIGHT, linewidth=0.5)
        axis.set_axisbelow(True)
    return figure, axes


def read_queries(path: Path) -> dict[str, np.ndarray]:
    """TTFT, TPOT (ms) and outcome per query of job/queries_<mode>.csv, as LoadGen counts them.

    LoadGen's clock starts at the scheduled time: `late_ms`, where the client knows it, belongs to TTFT.
    """
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["ttft_ms"] and row["status"] in ("ok", "200", "")]
    late = np.array([float(row.get("late_ms") or 0) for row in rows])
    ttft = np.array([float(row["ttft_ms"]) for row in rows])
    latency = np.array([float(row["latency_ms"]) for row in rows])
    tokens = np.array([float(row["output_tokens"]) for row in rows])
    many = tokens > 1
    return {"ttft": ttft + late, "tpot": (latency - ttft)[many] / (tokens[many] - 1)}


def read_json_lines(path: Path) -> list[dict]:
    """The whole lines of a JSON-lines file; empty if it is absent."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line.startswith("{")]


def figure_latency_distributions(run_dir: Path | str) -> Figure:
    """TTFT and TPOT over all queries of a run as cumulative shares, with their limits.

    Per-query values are the client's (job/queries_performance.csv); without them, the percentiles that LoadGen kept.

    Raises
    ------
    LogError : the run cannot be read, or it has no token latencies (Offline).
    """
    from .mlperf_logs import LogError
    from .results import read_result

    result = read_result(run_dir)
    run, claim = result.run, result.verdict.claim
    if np.isnan(run.ttft_p99_ms):
        raise LogError(
            "no_token_latencies",
            run.log_dir,
            f"a {run.loadgen_scenario} run ({run.missing['ttft_p99_ms']})",
            "a Server or Interactive run with token latencies",
            "Draw another run.",
        )
    queries = result.files.base / "job" / "queries_performance.csv"
    values = read_queries(queries) if queries.is_file() else None
    figure, axes = _figure(9.5, 3.9, ncols=2, sharey=True)
    limits = {check.name: check.limit for check in result.verdict.checks if check.name.endswith("_p99")}
    for axis, name in zip(axes, ("ttft", "tpot"), strict=True):
        _draw_distribution(
            axis, name, run, None if values is None else values[name], limits.get(f"{name}_p99")
        )
    axes[0].set_ylabel("queries at or below (%)")
    for axis in axes:  # below the axes: on them it would cover the curve of one run or the other
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False, fontsize=7.5)
    kept = "per query, by the client" if values is not None else "LoadGen's percentiles"
    _title(
        figure,
        f"{claim.model or 'run'} {claim.scenario}, {run.query_count:.0f} queries at {run.target_qps:g} queries/s",
        claim.source,
        kept,
    )
    return figure


def _title(figure: Figure, what: str, source: str, more: str = "") -> None:
    """Title with the source, so that no figure goes about without it."""
    figure.suptitle(f"{what}\nsource: {source}" + (f" ({more})" if more else ""), fontsize=10, color=INK)


def _draw_distribution(axis, name: str, run, values: np.ndarray | None, limit_ms: float | None) -> None:
    """One cumulative curve with p50 and p99 marked and the limit as a dashed line."""
    if values is not None and len(values):
        x = np.sort(values)
        axis.step(x, 100 * np.arange(1, len(x) + 1) / len(x), where="post", color=BLUE, linewidth=1.6)
    else:
        shares = {"min": 0, "p50": 50, "p90": 90, "p95": 95, "p97": 97, "p99": 99, "p999": 99.9, "max": 100}
        x = [getattr(run, f"{name}_{key}_ms") for key in shares]
        axis.plot(x, list(shares.values()), color=BLUE, linewidth=1.2, marker="o", markersize=3.5)
    for key, marker in (("p50", "s"), ("p99", "D")):
        value = getattr(run, f"{name}_{key}_ms")
        share = 50 if key == "p50" else 99
        axis.plot(
            [value], [share], marker, color=INK, markersize=5, label=f"{key} {value:.4g} ms", linestyle=""
        )
    if limit_ms is not None:
        axis.axvline(
            limit_ms, color=ORANGE, linestyle="--", linewidth=1.8, label=f"p99 limit {limit_ms:g} ms"
        )
    axis.set_xlim(left=0)
    axis.set_ylim(0, 101)
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
    figure, axis = _figure(7.5, 4.6)
    marks = {
        "measured": ("o", BLUE),
        "rehearsed": ("s", ORANGE),
        "simulated": ("^", MID),
        "published": ("x", INK),
    }
    for (source, scenario), rows in placed.groupby(["source", "scenario"], sort=True):
        marker, colour = marks[source]
        hollow = {} if marker == "x" else {"facecolors": colour if scenario == "Interactive" else "none"}
        axis.scatter(
            1e3 / rows["tpot_p50_ms"],
            rows["completed_tokens_per_s_per_gpu"],
            marker="+" if marker == "x" and scenario != "Interactive" else marker,
            s=46,
            linewidths=1.4,
            label=f"{source}, {scenario} ({len(rows)})",
            **({"color": colour} if marker == "x" else {"edgecolors": colour, **hollow}),
        )
    for label, limit_ms in (("Interactive", 80), ("Server", 175)):
        axis.axvline(1e3 / limit_ms, color=MID, linestyle=":" if label == "Server" else "--", linewidth=1)
        axis.annotate(f"TPOT {limit_ms} ms ({label})", (1e3 / limit_ms, 0.99), xycoords=("data", "axes fraction"), rotation=90,
                      va="top", ha="right", fontsize=7, color=MID)  # fmt: skip
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("interactivity: 1000 / TPOT p50 (tokens/s/user)")
    axis.set_ylabel("completed output tokens/s/GPU")
    if len(placed):
        axis.legend(frameon=False, fontsize=8)
    left_out = len(table) - len(placed)
    _title(figure, "Throughput against interactivity", ", ".join(sorted(set(placed["source"]))) or "none",
           f"{left_out} rows without TPOT or GPU count left out" if left_out else "")  # fmt: skip
    return figure


def figure_timeline(run_dir: Path | str) -> Figure:
    """A job's phases, its output tokens/s and its outstanding queries over time.

    Reads job/phases.jsonl and job/progress.jsonl alone: it can be drawn while the job runs, and of a failed one.

    Raises
    ------
    LogError : the folder has neither.
    """
    from .mlperf_logs import LogError
    from .results import folder_source

    run_dir = Path(run_dir)
    phases = read_json_lines(run_dir / "job/phases.jsonl")
    progress = read_json_lines(run_dir / "job/progress.jsonl")
    if not phases and not progress:
        raise LogError(
            "missing_file",
            run_dir / "job",
            "no phases.jsonl",
            "the files of a job that has begun",
            "Launch the job first.",
        )
    start = min(row["time_s"] for row in phases + progress)
    end = max(row["time_s"] for row in phases + progress) - start
    figure, axes = _figure(9.5, 5.4, nrows=3, sharex=True, height_ratios=[1, 2, 2])
    _draw_phases(axes[0], phases, start, end)
    for mode, dash in (("performance", "-"), ("accuracy", ":")):
        rows = [row for row in progress if row["mode"] == mode]
        if len(rows) < 2:
            continue
        t = np.array([row["time_s"] for row in rows]) - start
        tokens = np.array([row["tokens"] for row in rows], dtype=float)
        rate = np.diff(tokens) / np.maximum(np.diff(t), 1e-9)
        axes[1].step(t[1:], rate, where="pre", color=BLUE, linestyle=dash, linewidth=1.3, label=mode)
        axes[2].plot(
            t, [row["outstanding"] for row in rows], color=INK, linestyle=dash, linewidth=1.3, label=mode
        )
    axes[1].set_ylabel("output tokens/s")
    axes[2].set_ylabel("outstanding\nqueries")
    axes[2].set_xlabel("time since the job began (s)")
    for axis in axes[1:]:
        axis.set_ylim(0, max(axis.get_ylim()[1], 1) * 1.25)  # room for the legend
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    axes[0].set_xlim(0, max(end, 1))
    _title(
        figure,
        "Timeline of the job",
        folder_source(run_dir),
        "tokens/s between two lines of progress.jsonl",
    )
    return figure


def _draw_phases(axis, phases: list[dict], start: float, end: float) -> None:
    """Bars from each phase to the next, light and dark by turns; neighbours too narrow for a name share a label."""
    begins = [row["time_s"] - start for row in phases] + [end]
    narrow: list[int] = []
    for place, row in enumerate(phases):
        left, width = begins[place], begins[place + 1] - begins[place]
        axis.barh(
            0, width, left=left, height=0.6, color=(LIGHT, "#8f8f8f")[place % 2], edgecolor=INK, linewidth=0.6
        )
        if width > 0.09 * end:
            _name_phases(axis, [phases[i]["phase"] for i in narrow], [begins[i] for i in narrow], end)
            narrow = []
            axis.text(
                left + width / 2, 0, str(row["phase"])[:40], ha="center", va="center", fontsize=8, color=INK
            )
        else:
            narrow.append(place)
    _name_phases(axis, [phases[i]["phase"] for i in narrow], [begins[i] for i in narrow], end)
    axis.set_ylim(-0.4, 0.9)
    axis.set_yticks([])
    axis.grid(False)
    axis.set_ylabel("phase", color=INK)


def _name_phases(axis, names: list[str], begins: list[float], end: float) -> None:
    """One label above a group of narrow phases, growing towards the middle of the figure."""
    if names:
        late = begins[0] > end / 2
        text = ", ".join(names)
        text = text if len(text) < 90 else text[:89] + "…"
        axis.text(
            begins[-1] if late else begins[0],
            0.42,
            text,
            ha="right" if late else "left",
            fontsize=7.5,
            color=INK,
        )


def figure_topology(run_dir: Path | str) -> Figure:
    """Which server holds which GPU: nodes are rows, GPUs boxes with their rank, from job/settings.json.

    Raises
    ------
    LogError : no settings.json, or no `servers` in it.
    """
    from .mlperf_logs import LogError
    from .results import folder_source

    run_dir = Path(run_dir)
    path = run_dir / "job/settings.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    servers = settings.get("servers") or []
    if not servers:
        raise LogError(
            "missing_file",
            path,
            "no `servers`",
            "the layout of a run",
            "Write the run with 03_configuration.",
        )
    nodes, per_node = settings["node_count"], settings["gpus_per_node"]
    figure, axis = _figure(1.6 + 1.5 * per_node, 1.5 + 0.62 * nodes)
    axis.grid(False)
    for server in servers:
        _draw_server(axis, server, per_node)
    taken = {place for server in servers for place in _places(server, per_node)}
    for place in ((node, gpu) for node in range(nodes) for gpu in range(per_node)):
        if place not in taken:
            axis.text(place[1] + 0.5, place[0] + 0.5, "idle", ha="center", va="center", fontsize=8, color=MID)
    axis.set_xlim(0, per_node)
    axis.set_ylim(nodes, 0)
    axis.set_xticks(np.arange(per_node) + 0.5, [f"GPU {gpu}" for gpu in range(per_node)])
    axis.set_yticks(np.arange(nodes) + 0.5, [f"node {node}" for node in range(nodes)])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    count = {role: sum(server["role"] == role for server in servers) for role in ("context", "generation")}
    _title(
        figure,
        f"{count['context']} context and {count['generation']} generation servers on {nodes} x {per_node} GPUs",
        folder_source(run_dir),
        "bold rank: leads its server",
    )
    return figure


def _places(server: dict, per_node: int) -> list[tuple[int, int]]:
    """(node, GPU) of each rank, in rank order: as written, else the rank counted through the nodes."""
    if "gpus" in server:
        return [(node, gpu) for node, gpu in server["gpus"]]
    return [divmod(rank, per_node) for rank in server["ranks"]]


def _draw_server(axis, server: dict, per_node: int) -> None:
    """The boxes of one server: context light and plain, generation dark and hatched."""
    generation = server["role"] == "generation"
    for rank, (node, gpu) in zip(server["ranks"], _places(server, per_node), strict=True):
        axis.bar(
            gpu + 0.5,
            0.86,
            width=0.92,
            bottom=node + 0.07,
            color=BLUE if generation else "#dfe7f5",
            edgecolor="white" if generation else BLUE,
            hatch="//" if generation else None,
            linewidth=0.8,
        )
        leads = rank == server["ranks"][0]
        axis.text(
            gpu + 0.5,
            node + 0.5,
            f"{server['name']}\nrank {rank}" + (f", port {server['port']}" if leads else ""),
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if generation else INK,
            fontweight="bold" if leads else "normal",
            bbox={"facecolor": BLUE, "edgecolor": "none", "pad": 1} if generation else None,
        )
