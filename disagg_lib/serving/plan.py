"""Which topology for N GPUs: a formula screens all of them (`screen`), the best are simulated and ranked by the highest QPS that stays VALID.

The load is the claimed round's own, to the ns; ranges are over draws of the lengths, which are not public.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from ..errors import PlanError
from ..experiment.cuda_graphs import cuda_graph_sizes
from ..experiment.parameters import Experiment
from ..results import rounds
from .latency import server_shapes
from .lengths import MAX_OUTPUT_TOKENS
from .loadgen_rules import Loads, random_load
from .screen import CONTEXT_TOKENS, OF_V5_1, Budget, screen, shape_of
from .simulate import INTERACTIVE_LIMITS_MS, Deployment, ServerGroup, simulate, summarise
from .stacks import read_stack

QPS_ERROR, QUICK_QPS_ERROR = 0.004, 0.03
# Where find_target_qps looks, as factors of the predicted range: spreads of the prompt lengths and a tenth of the step times
# move the edge by 15 to 20 % (docs/boundaries.md); the search may go below the lower one.
SEARCH_BOUNDS = (0.8, 1.3)
MODEL = "llama3.1-405b"


@dataclass(frozen=True)
class PlanRow:
    """One ranked topology. QPS figures are queries/s over the draws of lengths; ms and rates are medians at recommended_qps.

    `recommended_qps` is the lowest highest-VALID QPS of the draws; `p_valid` is the share of other seeds than the round's that are
    VALID there. `kv_refused`: whether KV room was ever refused, where pausing, which is not modelled, would begin. `without_*` is the median highest-VALID QPS after one tray's servers of that kind are lost (0: none of that kind is left).
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
    kv_refused: bool
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
        row, settings = asdict(self), {"layout": self.layout}
        d = row.pop("deployment")
        for prefix, group in (("ctx", d["context"]), ("gen", d["generation"])):
            for key in ("count", "tp", "pp", "max_batch_size", "max_num_tokens") if group else ():
                settings[f"{prefix}_{key}"] = group[key]
        return settings | row

    def params(self) -> dict[str, int | float]:
        """The keys of a params file that make this topology (disaggregated ones only)."""
        context, generation = self.deployment.context, self.deployment.generation
        if context is None:
            raise PlanError(
                f"{self.layout}: an aggregated server has no params file; it answers only whether to disaggregate."
            )
        sizes = generation.cuda_graph_sizes
        original = sizes == tuple(cuda_graph_sizes(sizes[-1]))
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
            **({} if original else {"gen_cuda_graphs": "powers_of_two"}),
            "server_target_qps": math.floor(self.recommended_qps * 100) / 100,
            "target_qps_min": math.floor(SEARCH_BOUNDS[0] * self.target_qps_low * 100) / 100,
            "target_qps_max": math.ceil(SEARCH_BOUNDS[1] * self.target_qps_high * 100) / 100,
        }


def layout_of(d: Deployment) -> str:
    """The name of a topology in tables."""
    if d.context is None:
        return f"{shape_of(d.generation)} aggregated"
    return f"{shape_of(d.context)} ctx + {shape_of(d.generation)} gen"


def limits_of(e: Experiment) -> tuple[float, float]:
    """TTFT and TPOT limit (ms) of the experiment's scenario; PlanError for Offline, which has none and is not predicted."""
    limits = rounds.limits_ms(MODEL, e.scenario)
    if limits is None:
        raise PlanError(
            f"scenario {e.scenario} has no TTFT and TPOT limits to plan for. Predicted are Interactive and Server."
        )
    return limits


def deployment_of(e: Experiment) -> Deployment:
    """The deployment that an Experiment describes, under its stack.

    Raises
    ------
    CalibrationError : no such stack, or one without constants for the system.
    """
    server_shapes(e.gpu_system)  # names the systems that there are
    stack = read_stack(e.serving_stack)
    stack.check_system(e.gpu_system)
    context = ServerGroup(
        e.num_ctx_servers, e.ctx_tp_size, e.ctx_pp_size, e.ctx_batch_size, e.ctx_max_num_tokens,
        kv_fraction=e.ctx_gpu_memory_fraction, router=e.router, chunks_overlap=e.trtllm_dialect != "v5.1",
    )  # fmt: skip
    batch = min(e.gen_batch_size, e.gen_max_num_tokens)  # each request of a step needs one token of it
    generation = ServerGroup(
        e.num_gen_servers, e.gen_tp_size, 1, batch, e.gen_max_num_tokens, tuple(cuda_graph_sizes(e.gen_batch_size, e.gen_cuda_graphs)), kv_fraction=e.gen_gpu_memory_fraction, router=e.router,
        capacity_policy=e.gen_capacity_policy,
    )  # fmt: skip
    # With the synthetic data set a request's max_tokens is its own length; with MLPerf's it is the cap.
    reserve = MAX_OUTPUT_TOKENS if e.dataset_path or e.engine != "rehearsal" else None
    return Deployment(e.gpu_system, context, generation, stack, reserve)


def highest_valid_qps(
    deployment: Deployment,
    lengths: np.ndarray,
    loads: Loads = OF_V5_1,
    limits_ms: tuple[float, float] = INTERACTIVE_LIMITS_MS,
    guess: float = 4.0,
    error: float = QPS_ERROR,
) -> float:
    """The highest target QPS at which a run is VALID, to a relative `error`; 0 if none above 0.01 is."""

    def valid(qps: float) -> bool:
        return summarise(simulate(deployment, loads(qps), lengths), limits_ms)["valid"]

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


def qps_over_draws(
    deployment: Deployment,
    draws: Sequence[np.ndarray],
    loads: Loads = OF_V5_1,
    limits_ms: tuple[float, float] = INTERACTIVE_LIMITS_MS,
    guess: float = 4.0,
    error: float = QPS_ERROR,
) -> np.ndarray:
    """Highest VALID QPS with each draw of the lengths, shape (draws,)."""
    found: list[float] = []
    for lengths in draws:
        near = found[-1] if found and found[-1] else guess
        found.append(highest_valid_qps(deployment, lengths, loads, limits_ms, near, error))
    return np.array(found)


def _row(budget: Budget, d: Deployment, qps: np.ndarray) -> PlanRow:
    limits_ms, median_qps = budget.limits_ms, float(np.median(qps))
    recommended = max(float(qps.min()), 0.01)  # 0: never VALID

    def at(load, lengths):
        return summarise(simulate(d, load, lengths), limits_ms)

    rows = pd.DataFrame([at(budget.loads(recommended), lengths) for lengths in budget.draws])
    eight = (budget.draws * 8)[:8]
    others = [at(random_load(recommended, 1000 + k), lengths)["valid"] for k, lengths in enumerate(eight)]
    names = ["completed_tokens_per_s", "ttft_p99_ms", "tpot_p99_ms", "context_utilisation"]
    median = rows[names].median().to_dict()
    return PlanRow(
        deployment=d,
        gpus=d.gpus,
        gpus_idle=budget.gpus - d.gpus,
        target_qps=median_qps,
        target_qps_low=recommended,
        target_qps_high=float(qps.max()),
        recommended_qps=recommended,
        p_valid=float(np.mean(others)),
        tokens_per_s_per_gpu=median["completed_tokens_per_s"] / budget.gpus,
        binds=rows["binds"].mode()[0],
        kv_refused=bool(rows["kv_refused"].any()),
        without_context_server_qps=_without(budget, d, "context", median_qps),
        without_generation_server_qps=_without(budget, d, "generation", median_qps),
        **median,
    )


def _quick_qps(budget: Budget, d: Deployment, guess: float) -> np.ndarray:
    return qps_over_draws(d, budget.draws[:2], budget.loads, budget.limits_ms, guess, QUICK_QPS_ERROR)


def _without(budget: Budget, d: Deployment, role: str, qps: float) -> float:
    """Highest VALID QPS without the servers of this role that one tray holds; 0 if none is left."""
    group = getattr(d, role)
    left = group.count - math.ceil(budget.gpus_per_node / (group.tp * group.pp)) if group else 0
    if left < 1:
        return 0.0
    return float(np.median(_quick_qps(budget, replace(d, **{role: replace(group, count=left)}), 0.9 * qps)))


def _first(scored: list[tuple[float, Deployment]], count: int) -> list[tuple[float, Deployment]]:
    """The first `count`, and the first one without PP if it is not among them."""
    one_stage = next((k for k, (_, d) in enumerate(scored) if d.context.pp == 1), 0)
    return scored[:count] + ([scored[one_stage]] if one_stage >= count else [])


def _quick(budget: Budget, pool, pairs) -> list[tuple[float, Deployment]]:
    """(median QPS over two draws, deployment) of each, best first; those that are never VALID are left out."""

    def one(pair):
        qps = _quick_qps(budget, pair[1], max(pair[0], 0.05))
        return float(np.median(qps)) if qps.min() > 0 else 0.0, pair[1]

    return sorted((p for p in pool.map(one, pairs) if p[0] > 0), key=lambda p: (-p[0], p[1].gpus))


def plan(budget: Budget, simulated: int = 16, ranked: int = 6) -> list[PlanRow]:
    """Rank topologies for a GPU budget by the median highest VALID QPS.

    The formula picks `simulated` layouts out of all; two draws each pick `ranked` of those, and the chunk size of the first three; these
    get all draws. The best layout whose context servers have one stage is always among them: PP is the least proven part.

    Raises
    ------
    PlanError : nothing fits the budget, or nothing that fits can meet the limits at any QPS.
    """
    limits_ms = budget.limits_ms
    with ThreadPoolExecutor(2) as pool:  # the simulation's loops hold no lock
        best = _first(_quick(budget, pool, _first(screen(budget), simulated)), ranked)
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
        for qps, d in sorted(best + _quick(budget, pool, other_chunks), key=lambda p: -p[0]):
            layouts.setdefault((shape_of(d.context), shape_of(d.generation)), (qps, d))

        def full(pair):
            guess, d = pair
            return _row(budget, d, qps_over_draws(d, budget.draws, budget.loads, limits_ms, guess))

        rows = list(pool.map(full, layouts.values()))
    return sorted(rows, key=lambda row: -row.target_qps)


def aggregated_alternative(budget: Budget, tp: int = 4) -> PlanRow:
    """The same budget with aggregated servers (256 sequences, 2048 tokens a step): does disaggregation pay?"""
    if budget.gpus < tp:
        raise PlanError(f"{budget.gpus} GPUs hold no TP{tp} server; {tp} are needed.")
    group = ServerGroup(budget.gpus // tp, tp, max_batch_size=256, max_num_tokens=2048)
    d = Deployment(budget.system, None, group, budget.stack, reserve_output_tokens=None)
    qps = qps_over_draws(d, budget.draws, budget.loads, budget.limits_ms, 0.15 * group.count)
    return _row(budget, d, qps)
