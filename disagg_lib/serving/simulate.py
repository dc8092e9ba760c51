"""One run of a deployment in virtual time: TTFT and TPOT of every query, in milliseconds of computing; `engines` has the loops."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..errors import SimulationError
from . import rules
from .engines import TRACE_BINS, Limits, Queries, Served, Tables, serve, tabulate_generation
from .latency import read_table
from .lengths import MAX_OUTPUT_TOKENS
from .loadgen_rules import Load, percentile, worst_allowed
from .stacks import NO_STACK, Stack

INTERACTIVE_LIMITS_MS = (4500.0, 80.0)


@dataclass(frozen=True)
class ServerGroup:
    """`count` equal servers. CUDA-graph sizes matter for generation only; none means eager steps.

    `chunks_overlap` matters for context servers with PP: whether chunks of one prompt follow each other through the stages,
    as from TensorRT-LLM 1.2 on, or a prompt sits out until its last chunk is back, as in MLPerf v5.1's release. `router` is round_robin,
    load_balancing (the fewest requests) or least_tokens (the fewest prompt tokens of requests that are not done there), with one view
    for all front ends. `capacity_policy` matters where sequences generate.
    """

    count: int
    tp: int
    pp: int = 1
    max_batch_size: int = 128
    max_num_tokens: int = 4096
    cuda_graph_sizes: tuple[int, ...] = ()
    cuda_graph_padding: bool = True
    kv_fraction: float = 0.95
    router: str = "round_robin"
    chunks_overlap: bool = False
    capacity_policy: str = "GUARANTEED_NO_EVICT"

    @property
    def gpus(self) -> int:
        """GPUs of the whole group."""
        return self.count * self.tp * self.pp


@dataclass(frozen=True)
class Deployment:
    """Context and generation servers of one system; without context servers the generation servers are aggregated ones.

    `reserve_output_tokens` is the output length that admission must assume under GUARANTEED_NO_EVICT (max_tokens of the requests);
    None: each request's own.
    """

    system: str
    context: ServerGroup | None
    generation: ServerGroup
    stack: Stack = NO_STACK
    reserve_output_tokens: int | None = MAX_OUTPUT_TOKENS

    @property
    def gpus(self) -> int:
        """GPUs in use."""
        return self.generation.gpus + (self.context.gpus if self.context else 0)


@dataclass(frozen=True)
class SimulatedRun:
    """Per query, in order of arrival (shape (queries,)): times in s since the run's start; plus each server's load over time.

    `context_busy` and `generation_busy` have shape (servers, TRACE_BINS): share of each bin of `bin_s` that the server computed.
    `blocked_by_*` count the steps at which the next request was refused for want of a slot, or of KV-cache room.
    """

    load: Load
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    context_server: np.ndarray
    context_end_s: np.ndarray
    generation_server: np.ndarray
    first_token_s: np.ndarray
    end_s: np.ndarray
    bin_s: float
    context_busy: np.ndarray
    generation_busy: np.ndarray
    blocked_by_batch: int
    blocked_by_kv: int

    @property
    def ttft_ms(self) -> np.ndarray:
        """Time to first token."""
        return (self.first_token_s - self.load.arrivals_s) * 1e3

    @property
    def tpot_ms(self) -> np.ndarray:
        """Time per output token after the first, as LoadGen computes it."""
        return (self.end_s - self.first_token_s) * 1e3 / (self.output_tokens - 1)


@lru_cache(64)
def _tables(system: str, tp: int, pp: int, stack: Stack):
    table = read_table(system, tp, pp).under(stack)
    return tuple(map(np.array, table.context)), tuple(map(np.array, table.generation)), table


@lru_cache(64)
def _generation_steps(system: str, group: ServerGroup, stack: Stack):
    table = _tables(system, group.tp, group.pp, stack)[1]
    graphs = np.array(sorted(group.cuda_graph_sizes), np.int64), group.cuda_graph_padding
    return tabulate_generation(table, *graphs, rules.EAGER_FLOOR_MS, group.max_batch_size)


def _serve(
    group: ServerGroup, queries: Queries, kv_capacity: int, bin_s: float, tables: Tables, order=None
) -> Served:
    busy, blocked, count = np.zeros((group.count, TRACE_BINS)), np.zeros(2, np.int64), len(queries.inputs)
    served = Served(busy, blocked, np.empty(count, np.int64), *np.full((2, count), np.inf))
    limits = Limits(
        group.count, group.router != "round_robin", group.router == "least_tokens",
        group.max_num_tokens, group.max_batch_size, group.pp, group.chunks_overlap, kv_capacity,
        group.capacity_policy == "MAX_UTILIZATION", bin_s,
    )  # fmt: skip
    serve(queries, limits, tables, served, order)
    return served


def _kv_capacity(d: Deployment, queries: Queries) -> int:
    """KV-cache tokens of a generation server; SimulationError if a request asks for more than all of them."""
    g = d.generation
    capacity = _tables(d.system, g.tp, g.pp, d.stack)[2].kv_capacity_tokens(g.kv_fraction, g.max_num_tokens)
    grows = g.capacity_policy == "MAX_UTILIZATION"
    longest = rules.kv_asked(queries.inputs, queries.needs, grows).max()
    if longest > capacity:
        raise SimulationError(
            f"{d.system} TP{g.tp} PP{g.pp} has room for {capacity} KV-cache tokens; the longest request"
            f" needs {longest}. Give the server more GPUs, or a larger memory fraction."
        )
    return capacity


def simulate(deployment: Deployment, load: Load, lengths: np.ndarray) -> SimulatedRun:
    """Run one load on a deployment; the same arguments give the same result.

    Parameters
    ----------
    lengths : fields input_tokens and output_tokens (`lengths.LENGTHS`); load.samples index it.

    Raises
    ------
    SimulationError : a request that no server can ever admit (says what would fit), or a router that is not modelled.
    """
    d, c, g = deployment, deployment.context, deployment.generation
    for group in filter(None, (c, g)):
        if group.router not in ("round_robin", "load_balancing", "least_tokens"):
            raise SimulationError(
                f"router {group.router!r} is not modelled; round_robin, load_balancing and least_tokens are."
            )
    chosen = lengths[load.samples]
    inputs, outputs = chosen["input_tokens"].astype(np.int64), chosen["output_tokens"].astype(np.int64)
    needs = rules.kv_tokens(inputs, np.maximum(outputs, d.reserve_output_tokens or 0))
    asked = Queries(load.arrivals_s + d.stack.ttft_ms / 1e3, inputs, outputs, needs, np.zeros(len(inputs)))
    capacity = _kv_capacity(d, asked)
    bin_s = max(float(load.arrivals_s[-1]) * 1.1, 1.0) / TRACE_BINS
    if c is None:
        served = _serve(g, asked, capacity, bin_s, Tables(*_tables(d.system, g.tp, g.pp, d.stack)[:2]))
        prompts = served._replace(end=served.first)
    else:
        prompts = _serve(c, asked, 0, bin_s, Tables(_tables(d.system, c.tp, c.pp, d.stack)[0]))
        moved = 1e-3 * rules.transfer_ms(inputs, c.tp * c.pp, g.tp * g.pp)
        handed = asked._replace(arrivals=prompts.end, transfer=moved)
        tables = Tables(steps=_generation_steps(d.system, g, d.stack))
        served = _serve(g, handed, capacity, bin_s, tables, np.argsort(prompts.end, kind="stable"))
    return SimulatedRun(
        load, inputs, outputs, prompts.server, prompts.end, served.server, served.first, served.end, bin_s,
        prompts.busy / bin_s, served.busy / bin_s, *served.blocked.tolist(),
    )  # fmt: skip


def summarise(run: SimulatedRun, limits_ms: tuple[float, float] = INTERACTIVE_LIMITS_MS) -> dict:
    """One row: verdict, margin, throughput, TTFT and TPOT figures, named as in the published table.

    `valid` is LoadGen's verdict: early stopping holds for both limits. `margin` is the smaller distance to a limit, as a share
    of it, at the query that early stopping looks at (negative: INVALID); `binds` names that limit: ttft or tpot, or kv or batch
    where the slowest first tokens waited longer for admission to generation than for their context.
    """
    row, margins = {"target_qps": run.load.target_qps, "queries": len(run.end_s)}, {}
    for name, busy in (("context", run.context_busy), ("generation", run.generation_busy)):
        row[f"{name}_utilisation"] = float(busy[:, 20:200].mean())  # without ramp-up and drain
    for name, values, limit in (("ttft", run.ttft_ms, limits_ms[0]), ("tpot", run.tpot_ms, limits_ms[1])):
        row[f"{name}_mean_ms"] = float(values.mean())
        for p in (50, 90, 99):
            row[f"{name}_p{p}_ms"] = percentile(values, p / 100)
        margins[name] = 1 - worst_allowed(values) / limit
    duration, binds = float(run.end_s.max()), min(margins, key=margins.get)
    slowest = run.ttft_ms >= row["ttft_p99_ms"]
    admission, context = run.first_token_s - run.context_end_s, run.context_end_s - run.load.arrivals_s
    if binds == "ttft" and admission[slowest].mean() > context[slowest].mean():
        binds = "kv" if run.blocked_by_kv >= run.blocked_by_batch else "batch"
    return {
        **row,
        "samples_per_s": len(run.end_s) / duration,
        "completed_tokens_per_s": float(run.output_tokens.sum()) / duration,
        "margin": min(margins.values()),
        "binds": binds,
        "kv_refused": run.blocked_by_kv > 0,
        "valid": min(margins.values()) >= 0,
        "source": "simulated",
    }


def queue_lengths(run: SimulatedRun) -> dict[str, np.ndarray]:
    """Requests at each server (servers, TRACE_BINS) at `time_s`: `context` (waiting or computing), `generation_waiting`, `generation_active`."""
    time_s = np.linspace(0, run.end_s.max(), TRACE_BINS)

    def between(servers, start, end):
        def passed(times, s):
            return np.searchsorted(np.sort(times[servers == s]), time_s, "right")

        return np.array([passed(start, s) - passed(end, s) for s in range(servers.max() + 1)])

    return {
        "time_s": time_s,
        "context": between(run.context_server, run.load.arrivals_s, run.context_end_s),
        "generation_waiting": between(run.generation_server, run.context_end_s, run.first_token_s),
        "generation_active": between(run.generation_server, run.first_token_s, run.end_s),
    }
