"""Which topology for N GPUs: screen all of them with a formula, simulate the best, rank by the highest QPS that stays VALID.

The screening formula (Kingman's waits for the context servers, a fixed point for the generation batch) only decides what is
simulated; every figure of the ranking comes from `simulate`.
"""

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache

import numpy as np

from ..errors import PlanError
from . import rules
from .calibrate import UNCALIBRATED, Calibration
from .latency import read_table, server_shapes
from .lengths import MAX_OUTPUT_TOKENS, built_in_lengths
from .loadgen_rules import random_load
from .simulate import INTERACTIVE_LIMITS_MS, Deployment, ServerGroup, simulate, summarise

CONTEXT_TOKENS = (2048, 4096, 8192)
GENERATION_BATCHES = (256, 512)
# Captured sizes of the original up to 512: see the facts on TensorRT-LLM's config.
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 150, 180, 192, 224, 256, 288, 352, 416, 480, 512)
QPS_ERROR, QUICK_QPS_ERROR = 0.008, 0.03
# Where find_target_qps looks, as factors of the predicted range: spreads of the prompt lengths and a tenth of the step times
# move the edge by 15 to 20 % (docs/boundaries.md); the search may go below the lower one.
SEARCH_BOUNDS = (0.8, 1.3)
MOST_GPUS = 576


@dataclass(frozen=True, eq=False)
class Budget:
    """What is planned for: GPUs, and what the prediction rests on. `chunks_overlap`: see `ServerGroup`."""

    gpus: int
    system: str = "gb200"
    gpus_per_node: int = 4
    lengths: np.ndarray = field(default_factory=built_in_lengths, repr=False)
    limits_ms: tuple[float, float] = INTERACTIVE_LIMITS_MS
    calibration: Calibration = UNCALIBRATED
    chunks_overlap: bool = False


@dataclass(frozen=True)
class PlanRow:
    """One ranked topology. QPS figures are queries/s over the planning seeds; ms and rates are medians at recommended_qps.

    `recommended_qps` is the lowest highest-VALID QPS of the planning seeds; `p_valid` is the share of other seeds that are VALID
    there. `without_*` is the median highest-VALID QPS after one tray's servers of that kind are lost (0: none of that kind is left).
    """

    deployment: Deployment
    gpus: int
    gpus_idle: int
    target_qps: float
    target_qps_low: float
    target_qps_high: float
    recommended_qps: float
    p_valid: float
    completed_tokens_per_s: float
    tokens_per_s_per_gpu: float
    ttft_p99_ms: float
    tpot_p99_ms: float
    binds: str
    context_utilisation: float
    without_context_server_qps: float
    without_generation_server_qps: float
    source: str = "simulated"

    @property
    def layout(self) -> str:
        """E.g. `14 x TP4 ctx + 4 x TP4 gen`, or `18 x TP4 aggregated`."""
        return layout_of(self.deployment)

    def as_dict(self) -> dict:
        """The row for a table: layout, settings, figures."""
        row = asdict(self)
        d = row.pop("deployment")
        settings = {
            f"{prefix}_{key}": d[group][key]
            for prefix, group in (("ctx", "context"), ("gen", "generation"))
            if d[group]
            for key in ("count", "tp", "pp", "max_batch_size", "max_num_tokens")
        }
        return {"layout": self.layout, **settings, **row}

    def params(self) -> dict[str, int | float]:
        """The keys of a params file that make this topology (disaggregated ones only)."""
        context, generation = self.deployment.context, self.deployment.generation
        if context is None:
            raise PlanError(
                f"{self.layout}: an aggregated server has no params file; it answers only whether to disaggregate."
            )
        return {
            "num_ctx_servers": context.count,
            "ctx_tp_size": context.tp,
            "ctx_pp_size": context.pp,
            "ctx_batch_size": context.max_batch_size,
            "ctx_max_num_tokens": context.max_num_tokens,
            "num_gen_servers": generation.count,
            "gen_tp_size": generation.tp,
            "gen_batch_size": generation.max_batch_size,
            "gen_max_num_tokens": generation.max_num_tokens,
            "server_target_qps": math.floor(self.recommended_qps * 100) / 100,
            "target_qps_min": math.floor(SEARCH_BOUNDS[0] * self.target_qps_low * 100) / 100,
            "target_qps_max": math.ceil(SEARCH_BOUNDS[1] * self.target_qps_high * 100) / 100,
        }


def _shape(group: ServerGroup) -> str:
    stages = f" PP{group.pp}" if group.pp > 1 else ""
    return f"{group.count} x TP{group.tp}{stages}"


def layout_of(d: Deployment) -> str:
    """The name of a topology in tables."""
    if d.context is None:
        return f"{_shape(d.generation)} aggregated"
    return f"{_shape(d.context)} ctx + {_shape(d.generation)} gen"


def deployment_of(experiment) -> Deployment:
    """The deployment that an Experiment describes."""
    from ..experiment.cuda_graphs import cuda_graph_sizes

    e = experiment
    context = ServerGroup(
        e.num_ctx_servers, e.ctx_tp_size, e.ctx_pp_size, e.ctx_batch_size, e.ctx_max_num_tokens,
        kv_fraction=e.ctx_gpu_memory_fraction, chunks_overlap=e.trtllm_dialect != "v5.1",
    )  # fmt: skip
    batch = min(e.gen_batch_size, e.gen_max_num_tokens)  # each request of a step needs one token of it
    generation = ServerGroup(
        e.num_gen_servers, e.gen_tp_size, 1, batch, e.gen_max_num_tokens, tuple(cuda_graph_sizes(e.gen_batch_size)),
        kv_fraction=e.gen_gpu_memory_fraction,
    )  # fmt: skip
    # With the synthetic data set a request's max_tokens is its own length; with MLPerf's it is the cap.
    reserve = MAX_OUTPUT_TOKENS if e.dataset_path or e.engine != "rehearsal" else None
    return Deployment(e.gpu_system, context, generation, reserve_output_tokens=reserve)


@cache
def _prompt_seconds(system: str, tp: int, pp: int, max_num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompt lengths (a grid) and the seconds that one such prompt keeps the first stage of an idle server busy."""
    t = read_table(system, tp, pp)
    grid = np.arange(200, 20_200, 200)
    seconds = []
    for length in grid:
        done, total = 0, 0.0
        while done < length:
            chunk = min(int(length) - done, max_num_tokens)
            total += rules.context_step_ms(t.context, [chunk], [done], 1)
            done += chunk
        seconds.append(total / 1e3)
    return grid, np.array(seconds)


def _context_qps(d: Deployment, inputs: np.ndarray, ttft_limit_s: float) -> float:
    """QPS at which the formula sees 0.75 % of first tokens over the limit (what early stopping allows of 8313)."""
    group = d.context
    grid, seconds = _prompt_seconds(d.system, group.tp, group.pp, group.max_num_tokens)
    whole = np.interp(inputs, grid, seconds) * d.context_factor
    service = whole / group.pp
    mean, variation = service.mean(), service.var() / service.mean() ** 2
    room = np.maximum(ttft_limit_s - 0.15 - whole, 0.0)
    low, high = 0.0, 1.0
    for _ in range(24):
        rho = (low + high) / 2
        wait = (1 / group.count + variation) / 2 * rho / (1 - rho) * mean
        late = np.mean(np.where(room > 0, rho * np.exp(-room * rho / max(wait, 1e-9)), 1.0))
        low, high = (rho, high) if late < 0.0075 else (low, rho)
    return low / mean * group.count


def _generation_ms(d: Deployment, batch: float, mean_tokens: float) -> float:
    """A generation server's step with `batch` sequences in all its stages."""
    group = d.generation
    t = read_table(d.system, group.tp, group.pp)
    return d.generation_factor * rules.generation_step_ms(
        t.generation, batch / group.pp, mean_tokens, group.cuda_graph_sizes, group.cuda_graph_padding, rules.EAGER_FLOOR_MS
    )  # fmt: skip


def _most_sequences(d: Deployment, mean_input: float, mean_output: float) -> float:
    """Sequences that one generation server's slots and KV cache hold, on average."""
    group = d.generation
    capacity = read_table(d.system, group.tp, group.pp).kv_capacity_tokens(
        group.kv_fraction, group.max_num_tokens
    )
    return min(
        group.max_batch_size * group.pp,
        capacity / (mean_input + max(mean_output, d.reserve_output_tokens or 0)),
    )


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
            for tokens, batch in itertools.product(CONTEXT_TOKENS, GENERATION_BATCHES):
                context = ServerGroup(
                    count, ctx_tp, ctx_pp, 128, tokens, chunks_overlap=budget.chunks_overlap
                )
                sizes = tuple(n for n in GRAPH_SIZES if n <= batch)
                generation = ServerGroup(servers, gen_tp, 1, batch, batch, sizes)
                found.append(budget.calibration.apply(Deployment(system, context, generation)))
    return found


def screen(budget: Budget) -> list[tuple[float, Deployment]]:
    """All layouts within the budget with the formula's QPS, best first; of each layout the best chunk and batch.

    Raises
    ------
    PlanError : nothing fits, or too much to search; says the nearest budget that can be planned.
    """
    gpus, lengths, limits_ms = budget.gpus, budget.lengths, budget.limits_ms
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
    generation = {
        g: _generation_qps(d, mean_input, mean_output, limits_ms[1]) for g, d in by_generation.items()
    }
    scored = [(min(context[d.context], generation[d.generation]), d) for d in candidates]
    scored.sort(key=lambda pair: (-pair[0], pair[1].gpus, pair[1].generation.max_batch_size))
    best = {}
    for qps, d in scored:
        best.setdefault((_shape(d.context), _shape(d.generation)), (qps, d))
    return list(best.values())


def highest_valid_qps(
    deployment: Deployment,
    lengths: np.ndarray,
    seed: int,
    limits_ms: tuple[float, float] = INTERACTIVE_LIMITS_MS,
    guess: float = 4.0,
    error: float = QPS_ERROR,
) -> float:
    """The highest target QPS at which this seed's run is VALID, to a relative `error`; 0 if none above 0.01 is.

    The seed's arrivals are the same at every QPS, only stretched, so that the search is on one curve.
    """

    def valid(qps: float) -> bool:
        return summarise(simulate(deployment, random_load(qps, seed), lengths), limits_ms)["valid"]

    low = high = max(guess, 0.01)
    factor = 1.06  # bracket with growing steps: the guess is near, or it is nowhere near
    if valid(low):
        while valid(high := high * factor):
            low, factor = high, factor**1.7
    else:
        while not valid(low := low / factor):
            if low < 0.01:
                return 0.0
            high, factor = low, factor**1.7
    while high / low > 1 + error:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if valid(middle) else (low, middle)
    return low


def qps_over_seeds(
    deployment: Deployment,
    lengths: np.ndarray | None = None,
    seeds: Sequence[int] = range(12),
    limits_ms: tuple[float, float] = INTERACTIVE_LIMITS_MS,
    guess: float = 4.0,
    error: float = QPS_ERROR,
) -> np.ndarray:
    """Highest VALID QPS of each seed, shape (seeds,)."""
    lengths = built_in_lengths() if lengths is None else lengths
    found: list[float] = []
    for seed in seeds:
        near = found[-1] if found and found[-1] else guess
        found.append(highest_valid_qps(deployment, lengths, seed, limits_ms, near, error))
    return np.array(found)


def saturation_qps(deployment: Deployment, lengths: np.ndarray) -> tuple[float, float]:
    """QPS from which the context servers, and the generation servers, cannot keep up however long the run."""
    d, mean_input = deployment, float(lengths["input_tokens"].mean())
    mean_output = float(lengths["output_tokens"].mean())
    grid, seconds = _prompt_seconds(d.system, d.context.tp, d.context.pp, d.context.max_num_tokens)
    service = np.interp(lengths["input_tokens"], grid, seconds).mean() * d.context_factor / d.context.pp
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
            f"target_qps {target_qps:g} is beyond saturation: {_shape(group)} {name} servers are always busy from"
            f" {most:.2f} queries/s. Choose less than {0.9 * most:.2f}, or more {name} servers."
        )


def _tray_down(d: Deployment, role: str, gpus_per_node: int) -> Deployment | None:
    """The deployment without the servers of this role that one tray holds; None if nothing is left."""
    group = getattr(d, role)
    lost = math.ceil(gpus_per_node / (group.tp * group.pp)) if group else 0
    if not lost or group.count <= lost:
        return None
    return replace(d, **{role: replace(group, count=group.count - lost)})


def _row(budget: Budget, d: Deployment, seeds: Sequence[int], qps: np.ndarray) -> PlanRow:
    lengths, limits_ms = budget.lengths, budget.limits_ms
    recommended = max(float(qps.min()), 0.01)  # 0: never VALID
    others = range(1000, 1000 + len(seeds))
    rows = [summarise(simulate(d, random_load(recommended, seed), lengths), limits_ms) for seed in others]
    names = "completed_tokens_per_s", "ttft_p99_ms", "tpot_p99_ms", "context_utilisation"
    median = {name: float(np.median([row[name] for row in rows])) for name in names}
    guess = 0.9 * float(np.median(qps))
    less = {"context": 0.0, "generation": 0.0}
    for role in less:
        if smaller := _tray_down(d, role, budget.gpus_per_node):
            found = qps_over_seeds(smaller, lengths, seeds[:2], limits_ms, guess, QUICK_QPS_ERROR)
            less[role] = float(np.median(found))
    binding = [row["binds"] for row in rows]
    return PlanRow(
        deployment=d,
        gpus=d.gpus,
        gpus_idle=budget.gpus - d.gpus,
        target_qps=float(np.median(qps)),
        target_qps_low=recommended,
        target_qps_high=float(qps.max()),
        recommended_qps=recommended,
        p_valid=float(np.mean([row["valid"] for row in rows])),
        tokens_per_s_per_gpu=median["completed_tokens_per_s"] / budget.gpus,
        binds=max(set(binding), key=binding.count),
        without_context_server_qps=less["context"],
        without_generation_server_qps=less["generation"],
        **median,
    )


def _first(scored: list[tuple[float, Deployment]], count: int) -> list[tuple[float, Deployment]]:
    """The first `count`, and the first one without PP if it is not among them."""
    one_stage = next((k for k, (_, d) in enumerate(scored) if d.context.pp == 1), 0)
    return scored[:count] + ([scored[one_stage]] if one_stage >= count else [])


def plan(
    budget: Budget, seeds: Sequence[int] = range(8), simulated: int = 16, ranked: int = 6
) -> list[PlanRow]:
    """Rank topologies for a GPU budget by the median highest VALID QPS.

    The formula picks `simulated` layouts out of all; two seeds each pick `ranked` of those, and the chunk size of the first three; these
    get all seeds. The best layout whose context servers have one stage is always among them: PP is the least proven part.

    Raises
    ------
    PlanError : nothing fits the budget, or nothing that fits can meet the limits at any QPS.
    """
    lengths, limits_ms = budget.lengths, budget.limits_ms
    scored = _first(screen(budget), simulated)
    with ThreadPoolExecutor(2) as pool:  # the simulation's loops hold no lock

        def quick(pairs):
            """(median QPS over two seeds, deployment) of each, best first; those that are never VALID are left out."""

            def one(pair):
                guess, d = max(pair[0], 0.05), pair[1]
                qps = qps_over_seeds(d, lengths, seeds[:2], limits_ms, guess, QUICK_QPS_ERROR)
                return float(np.median(qps)) if qps.min() > 0 else 0.0, d

            return sorted((p for p in pool.map(one, pairs) if p[0] > 0), key=lambda p: (-p[0], p[1].gpus))

        best = _first(quick(scored), ranked)
        if not best:
            raise PlanError(
                f"no topology of {budget.gpus} GPUs of {budget.system} meets {limits_ms[0]:g} ms TTFT and {limits_ms[1]:g} ms TPOT at any"
                " QPS; the slowest prompts alone are over the limit. Give more GPUs to one server, or other limits."
            )
        other_chunks = [
            (qps, replace(d, context=replace(d.context, max_num_tokens=tokens)))
            for qps, d in best[:3]
            for tokens in CONTEXT_TOKENS
            if tokens != d.context.max_num_tokens
        ]
        layouts = {}
        for qps, d in sorted(best + quick(other_chunks), key=lambda p: -p[0]):
            layouts.setdefault((_shape(d.context), _shape(d.generation)), (qps, d))

        def full(pair):
            qps = qps_over_seeds(pair[1], lengths, seeds, limits_ms, pair[0])
            return _row(budget, pair[1], seeds, qps)

        rows = list(pool.map(full, layouts.values()))
    return sorted(rows, key=lambda row: -row.target_qps)


def aggregated_alternative(budget: Budget, seeds: Sequence[int] = range(8), tp: int = 4) -> PlanRow:
    """The same budget with aggregated servers (256 sequences, 2048 tokens a step): does disaggregation pay?"""
    if budget.gpus < tp:
        raise PlanError(f"{budget.gpus} GPUs hold no TP{tp} server; {tp} are needed.")
    group = ServerGroup(budget.gpus // tp, tp, max_batch_size=256, max_num_tokens=2048)
    d = budget.calibration.apply(Deployment(budget.system, None, group, reserve_output_tokens=None))
    qps = qps_over_seeds(d, budget.lengths, seeds, budget.limits_ms, 0.15 * group.count)
    return _row(budget, d, seeds, qps)
