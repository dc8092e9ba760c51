"""Which topologies fit a GPU budget, and what a formula makes of them: it only decides what is simulated."""

import itertools
import math
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np

from ..errors import PlanError
from ..experiment.cuda_graphs import cuda_graph_sizes
from . import rules
from .latency import LatencyTable, read_table, server_shapes
from .lengths import built_in_lengths
from .loadgen_rules import Loads, official_load
from .simulate import INTERACTIVE_LIMITS_MS, Deployment, ServerGroup
from .stacks import NO_STACK, Stack

CONTEXT_TOKENS = (2048, 4096, 8192)
GENERATION_BATCHES = (256, 512, 1024)
GRAPHS = ("original", "powers_of_two")
MOST_GPUS = 576
OF_V5_1 = partial(official_load, "v5.1")


@dataclass(frozen=True, eq=False)
class Budget:
    """What is planned for: GPUs, and what the prediction rests on. `draws`: the data set's lengths, as drawn or (one) as known.

    `chunks_overlap`, `routing` and `gen_capacity_policy`: see `ServerGroup`.
    """

    gpus: int
    system: str = "gb200"
    gpus_per_node: int = 4
    draws: tuple[np.ndarray, ...] = field(default_factory=lambda: (built_in_lengths(),), repr=False)
    limits_ms: tuple[float, float] = INTERACTIVE_LIMITS_MS
    stack: Stack = NO_STACK
    chunks_overlap: bool = False
    routing: str = "round_robin"
    gen_capacity_policy: str = "GUARANTEED_NO_EVICT"
    loads: Loads = OF_V5_1


def shape_of(group: ServerGroup) -> str:
    """E.g. `14 x TP4` or `7 x TP4 PP2`."""
    stages = f" PP{group.pp}" if group.pp > 1 else ""
    return f"{group.count} x TP{group.tp}{stages}"


@cache
def _table(system: str, tp: int, pp: int, stack: Stack) -> LatencyTable:
    return read_table(system, tp, pp).under(stack)


@cache
def _prompt_seconds(system: str, tp: int, pp: int, stack: Stack, max_num_tokens: int):
    """Prompt lengths (a grid) and the seconds that one such prompt keeps an idle context server busy."""
    table, grid = _table(system, tp, pp, stack).context, range(200, 20_200, 200)

    def step_ms(length, done):
        return rules.context_step_ms(table, [min(length - done, max_num_tokens)], [done], 1)

    seconds = [sum(step_ms(n, done) for done in range(0, n, max_num_tokens)) / 1e3 for n in grid]
    return np.array(grid), np.array(seconds)


def prompt_seconds(d: Deployment, inputs: np.ndarray) -> np.ndarray:
    """Seconds that each of these prompts keeps an idle context server busy."""
    c = d.context
    return np.interp(inputs, *_prompt_seconds(d.system, c.tp, c.pp, d.stack, c.max_num_tokens))


def _context_qps(d: Deployment, inputs: np.ndarray, ttft_limit_s: float) -> float:
    """QPS at which the formula sees 0.75 % of first tokens over the limit (what early stopping allows of 8313)."""
    group = d.context
    whole = prompt_seconds(d, inputs)
    service = whole / group.pp
    mean, variation = service.mean(), service.var() / service.mean() ** 2
    room = np.maximum(ttft_limit_s - 0.15 - whole, 0.0)
    low, high = 0.0, 1.0
    for _ in range(24):
        rho = (low + high) / 2
        if group.router == "round_robin":  # Kingman: one in `count` arrivals comes to each server
            wait = (1 / group.count + variation) / 2 * rho / (1 - rho) * mean
        else:  # Sakasegawa: as one line for all servers
            power = math.sqrt(2 * (group.count + 1)) - 1
            wait = (1 + variation) / 2 * rho**power / (1 - rho) * mean / group.count
        late = np.mean(np.where(room > 0, rho * np.exp(-room * rho / max(wait, 1e-9)), 1.0))
        low, high = (rho, high) if late < 0.0075 else (low, rho)
    return low / mean * group.count


def _generation_ms(d: Deployment, batch: float, mean_tokens: float) -> float:
    """A generation server's step with `batch` sequences in all its stages."""
    group = d.generation
    table = _table(d.system, group.tp, group.pp, d.stack).generation
    graphs = group.cuda_graph_sizes, group.cuda_graph_padding, rules.EAGER_FLOOR_MS
    return rules.generation_step_ms(table, batch / group.pp, mean_tokens, *graphs)


def _most_sequences(d: Deployment, mean_input: float, mean_output: float) -> float:
    """Sequences that one generation server's slots and KV cache hold, on average."""
    group = d.generation
    table = read_table(d.system, group.tp, group.pp)
    capacity = table.kv_capacity_tokens(group.kv_fraction, group.max_num_tokens)
    grows = group.capacity_policy == "MAX_UTILIZATION"
    held = mean_output / 2 if grows else max(mean_output, d.reserve_output_tokens or 0)
    return min(group.max_batch_size * group.pp, capacity / (mean_input + held))


def _generation_qps(d: Deployment, mean_input: float, mean_output: float, tpot_limit_ms: float) -> float:
    """QPS of the largest batch that KV cache, slots and the limit allow, with room for its fluctuation."""
    most = _most_sequences(d, mean_input, mean_output)
    mean_tokens = mean_input + mean_output / 2
    best = 0.0
    for batch in range(1, int(most) + 1, 1 + int(most) // 64):
        peak = batch + 2.5 * math.sqrt(batch)
        if peak > most or _generation_ms(d, peak, mean_tokens) > tpot_limit_ms:
            break
        best = max(best, batch / (mean_output * _generation_ms(d, batch, mean_tokens) / 1e3))
    return best * d.generation.count


def _candidates(budget: Budget) -> list[Deployment]:
    """Every topology within the budget that no further context server would fit into, in rank order on whole nodes."""
    gpus, system = budget.gpus, budget.system
    found = []
    for (ctx_tp, ctx_pp), (gen_tp, gen_pp) in itertools.product(server_shapes(system), repeat=2):
        if gen_pp > 1:
            continue  # params files have no PP for generation servers
        ctx_gpus = ctx_tp * ctx_pp
        for servers in range(1, (gpus - ctx_gpus) // gen_tp + 1):
            count = (gpus - servers * gen_tp) // ctx_gpus
            # A generation server begins where the context servers end: it must not straddle a node for that.
            if (count * ctx_gpus) % min(budget.gpus_per_node, gen_tp):
                count -= 1
            if count < 1:
                continue
            for tokens, batch, graphs in itertools.product(CONTEXT_TOKENS, GENERATION_BATCHES, GRAPHS):
                shape = count, ctx_tp, ctx_pp, 128, tokens
                context = ServerGroup(*shape, router=budget.routing, chunks_overlap=budget.chunks_overlap)
                generation = ServerGroup(
                    servers, gen_tp, 1, batch, batch, tuple(cuda_graph_sizes(batch, graphs)), router=budget.routing,
                    capacity_policy=budget.gen_capacity_policy,
                )  # fmt: skip
                found.append(Deployment(system, context, generation, budget.stack))
    return found


def screen(budget: Budget) -> list[tuple[float, Deployment]]:
    """All layouts within the budget with the formula's QPS, best first; of each layout the best chunk and batch.

    Raises
    ------
    PlanError : nothing fits, or too much to search; says the nearest budget that can be planned.
    """
    gpus, lengths, limits_ms = budget.gpus, budget.draws[0], budget.limits_ms
    budget.stack.check_system(budget.system)
    if gpus > MOST_GPUS:
        raise PlanError(
            f"{gpus} GPUs would take hours to search. Plan {MOST_GPUS} or fewer: a larger system is several of them."
        )
    candidates = _candidates(budget)
    if not candidates:
        least = sum(2 * [min(tp * pp for tp, pp in server_shapes(budget.system))])
        raise PlanError(
            f"no topology fits {gpus} GPUs of {budget.system}: one context and one generation server need at least {least}"
            " (the weights do not fit on fewer GPUs). Plan for that many."
        )
    inputs = lengths["input_tokens"][::10].astype(float)
    mean_input, mean_output = float(lengths["input_tokens"].mean()), float(lengths["output_tokens"].mean())
    by_context = {d.context: d for d in candidates}
    by_generation = {d.generation: d for d in candidates}
    context = {g: _context_qps(d, inputs, limits_ms[0] / 1e3) for g, d in by_context.items()}
    means = mean_input, mean_output
    generation = {g: _generation_qps(d, *means, limits_ms[1]) for g, d in by_generation.items()}
    scored = [(min(context[d.context], generation[d.generation]), d) for d in candidates]
    # Of equals the smaller batch, and the original's graphs, which stand first.
    scored.sort(key=lambda pair: (-pair[0], pair[1].gpus, pair[1].generation.max_batch_size))
    best = {}
    for qps, d in scored:
        best.setdefault((shape_of(d.context), shape_of(d.generation)), (qps, d))
    return list(best.values())


def saturation_qps(deployment: Deployment, lengths: np.ndarray) -> tuple[float, float]:
    """QPS from which the context servers, and the generation servers, cannot keep up however long the run."""
    d, mean_input = deployment, float(lengths["input_tokens"].mean())
    mean_output = float(lengths["output_tokens"].mean())
    service = prompt_seconds(d, lengths["input_tokens"]).mean() / d.context.pp
    batch = _most_sequences(d, mean_input, mean_output)
    step = _generation_ms(d, batch, mean_input + mean_output / 2)
    return d.context.count / service, d.generation.count * batch / (mean_output * step / 1e3)


def check_saturation(deployment: Deployment, target_qps: float, lengths: np.ndarray | None = None) -> None:
    """Refuse a QPS that a disaggregated deployment cannot keep up with.

    Raises
    ------
    PlanError : names the servers that saturate, the QPS from which they do, and the nearest feasible choice.
    """
    if deployment.context is None:
        return
    context, generation = saturation_qps(deployment, built_in_lengths() if lengths is None else lengths)
    most = min(context, generation)
    if target_qps > most:
        name = "context" if context < generation else "generation"
        group = getattr(deployment, name)
        raise PlanError(
            f"target_qps {target_qps:g} is beyond saturation: {shape_of(group)} {name} servers are always busy from"
            f" {most:.2f} queries/s. Choose less than {0.9 * most:.2f}, or more {name} servers."
        )
