"""The pictures of 02_plan: why a topology is fast or slow, what the others would give, how sure the choice is."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
from IPython.display import Image
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..results.style import BLUE, INK, MID, ORANGE, new_figure, set_title
from . import rules
from .latency import LatencyTable, read_table, server_shapes
from .lengths import length_draws
from .loadgen_rules import Loads
from .plan import qps_over_draws
from .simulate import Deployment, SimulatedRun, queue_lengths

DASHES = {2: "-", 4: "--", 8: ":", 16: "-."}  # by TP


def as_image(figure: Figure) -> Image:
    """A static picture for a notebook, the same in every viewer."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return Image(buffer.getvalue())


def _tables(system: str) -> list[tuple[LatencyTable, dict]]:
    """The system's tables without PP, and how their lines look."""
    return [
        (read_table(system, tp), {"ls": dash, "color": BLUE if tp <= 4 else ORANGE, "label": f"TP{tp}"})
        for tp, dash in DASHES.items()
        if (tp, 1) in server_shapes(system)
    ]


def figure_context_step(system: str = "gb200") -> Figure:
    """Prompt tokens a second and GPU over the tokens in a step: why prompts are computed in large chunks."""
    figure, axis = new_figure(7, 3.6)
    for table, look in _tables(system):
        tokens = np.array(table.context_tokens)
        axis.plot(tokens, tokens / np.array(table.context_ms) * 1e3 / table.tp, **look)
    axis.set(xscale="log", xlabel="tokens in a context step", ylabel="prompt tokens/s per GPU")
    axis.legend(frameon=False)
    set_title(figure, f"Context steps, {system}", "simulated")
    return figure


def figure_generation_step(system: str = "gb200", context_tokens: int = 9700) -> Figure:
    """Time per output token over the requests in a step: what TPOT's limit of 80 ms allows."""
    figure, axis = new_figure(7, 3.6)
    for table, look in _tables(system):
        room = int(table.kv_capacity_tokens(0.95, 512) / context_tokens)
        batches = np.arange(1, min(room, 512), 3)
        step_ms = partial(rules.generation_step_ms, table.generation)
        axis.plot(batches, [step_ms(b, context_tokens, (b,), False, 0.0) for b in batches], **look)
    axis.axhline(80, color=INK, linewidth=0.8)
    axis.annotate("limit 80 ms", (5, 82), color=INK)
    requests = f"{context_tokens} tokens each, as far as the KV cache holds them"
    axis.set(xlabel=f"requests in a generation step, {requests}", ylabel="TPOT (ms)", ylim=(0, 90))
    axis.legend(frameon=False)
    set_title(figure, f"Generation steps, {system}", "simulated")
    return figure


def figure_queues(run: SimulatedRun) -> Figure:
    """Requests at the servers over one run, summed over servers, and how busy these are."""
    figure, (top, bottom) = new_figure(7, 4.4, nrows=2, sharex=True, height_ratios=[2, 1])
    inside = queue_lengths(run)
    for name, color in (("context", BLUE), ("generation_active", ORANGE), ("generation_waiting", INK)):
        top.plot(inside["time_s"], inside[name].sum(axis=0), color=color, label=name.replace("_", ", "))
    for busy, color in ((run.context_busy, BLUE), (run.generation_busy, ORANGE)):
        bottom.plot(np.arange(busy.shape[1]) * run.bin_s, 100 * busy.mean(axis=0), color=color)
    top.set_ylabel("requests")
    top.legend(frameon=False)
    bottom.set(ylabel="busy (%)", xlabel="time (s)", xlim=(0, inside["time_s"][-1]), ylim=(0, 105))
    set_title(figure, f"One run at {run.load.target_qps:g} queries/s, all servers", "simulated")
    return figure


def heat_map(best: Deployment, gpus: int, lengths: np.ndarray, loads: Loads) -> pd.DataFrame:
    """Highest VALID queries/s over (context servers, generation servers) of the best topology's server sizes; NaN: too many GPUs.

    Half the choice's context servers and more; up to twice its generation servers and two.
    """
    context, generation = best.context, best.generation
    size, gen_size = context.tp * context.pp, generation.tp
    cells = [
        (c, g)
        for c in range(max(1, context.count // 2), gpus // size + 1)
        for g in range(1, (gpus - c * size) // gen_size + 1)
        if g <= 2 * generation.count + 2
    ]

    def one(cell):
        d = replace(best, context=replace(context, count=cell[0]))
        d = replace(d, generation=replace(generation, count=cell[1]))
        return float(qps_over_draws(d, [lengths], loads, guess=1.2 * cell[0], error=0.01)[0])

    with ThreadPoolExecutor(2) as pool:
        values = pool.map(one, cells)
    table = pd.Series(dict(zip(cells, values, strict=True))).unstack()
    return table.rename_axis(index="context servers", columns="generation servers")


def figure_heat_map(table: pd.DataFrame, best: Deployment) -> Figure:
    """The heat map, its cells written out, the choice framed."""
    rows, columns = table.shape
    figure, axis = new_figure(2.2 + 0.75 * columns, 1.6 + 0.32 * rows)
    axis.grid(False)
    axis.imshow(table.to_numpy(), cmap="cividis", aspect="auto", origin="lower")
    for i, count in enumerate(table.index):
        for j, other in enumerate(table.columns):
            value = table.iloc[i, j]
            if np.isnan(value):
                continue
            color = "white" if value < np.nanmax(table.to_numpy()) * 0.6 else INK
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", color=color, fontsize=8)
            if (count, other) == (best.context.count, best.generation.count):
                frame = {"fill": False, "edgecolor": ORANGE, "linewidth": 2.5}
                axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, **frame))
    axis.set(xticks=range(columns), xticklabels=table.columns, yticks=range(rows), yticklabels=table.index)
    axis.set(xlabel="generation servers", ylabel="context servers")
    set_title(figure, "Highest VALID queries/s", "simulated")
    return figure


def sensitivity(
    best: Deployment, spreads: Sequence[tuple[str, Sequence[np.ndarray]]], loads: Loads
) -> pd.DataFrame:
    """Highest VALID queries/s of a topology if prompts spread otherwise or are longer or shorter, or steps take 10 % more or less."""
    assumed, stack = spreads[0][1][:4], best.stack
    cases = [("as assumed", assumed, 1.0, 1.0)]
    cases += [(f"prompt {name}", lengths[:4], 1.0, 1.0) for name, lengths in spreads[1:]]
    if len(spreads) > 1:  # no lengths file
        outputs = float(assumed[0]["output_tokens"].mean())
        for mean in (9000, 9800):
            cases += [(f"prompts of {mean} on average", length_draws(4, outputs, mean=mean), 1.0, 1.0)]
    for sign, factor in (("+10 %", 1.1), ("-10 %", 0.9)):
        cases += [(f"context steps {sign}", assumed, factor, 1.0)]
        cases += [(f"generation steps {sign}", assumed, 1.0, factor)]

    def one(case):
        name, lengths, context, generation = case
        factors = {"context_factor": stack.context_factor * context}
        factors["generation_factor"] = stack.generation_factor * generation
        d = replace(best, stack=replace(stack, **factors))
        qps = qps_over_draws(d, lengths, loads, guess=1.2 * best.context.count)
        return {"case": name, "target_qps": np.median(qps), "lowest": qps.min(), "highest": qps.max()}

    with ThreadPoolExecutor(2) as pool:
        table = pd.DataFrame(pool.map(one, cases))
    table["change"] = (table["target_qps"] / table["target_qps"][0] - 1).map("{:+.1%}".format)
    return table.assign(source="simulated").round(2)


def figure_sensitivity(table: pd.DataFrame) -> Figure:
    """The sensitivity table as bars with the range over draws of the lengths."""
    figure, axis = new_figure(7, 3.2)
    middle = table["target_qps"]
    spread = [middle - table["lowest"], table["highest"] - middle]
    colors = [MID] + [BLUE] * (len(table) - 1)
    axis.barh(table["case"], middle, xerr=spread, color=colors, ecolor=INK, height=0.6)
    axis.axvline(middle[0], color=INK, linewidth=0.8, linestyle="--")
    axis.invert_yaxis()
    axis.set(xlabel="highest VALID queries/s (bar: median, line: range over draws of the lengths)")
    set_title(figure, "What the choice depends on", "simulated")
    return figure
