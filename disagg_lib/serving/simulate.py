"""One run of a deployment in virtual time: TTFT and TPOT of every query, in milliseconds of computing.

The scheduling rules are those of `rules`, compiled by numba; the loops are those of the rehearsal's `engine`, with two
changes that leave the result the same: servers are visited as requests come (context servers first, since nothing flows back
from generation), and sequences that end are found in a calendar, so a step costs the same for any batch.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from ..errors import SimulationError
from . import rules
from .engines import TRACE_BINS, run_generation, run_prompts, tabulate_generation
from .latency import read_table
from .lengths import MAX_OUTPUT_TOKENS
from .loadgen_rules import Load, percentile, worst_allowed

INTERACTIVE_LIMITS_MS = (4500.0, 80.0)


@dataclass(frozen=True)
class ServerGroup:
    """`count` equal servers. CUDA-graph sizes matter for generation only; none means eager steps.

    `chunks_overlap` matters for context servers with PP: whether chunks of one prompt follow each other through the stages,
    as from TensorRT-LLM 1.2 on, or a prompt sits out until its last chunk is back, as in MLPerf v5.1's release.
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
    router_tokens: bool = False
    chunks_overlap: bool = False

    @property
    def gpus(self) -> int:
        """GPUs of the whole group."""
        return self.count * self.tp * self.pp


@dataclass(frozen=True)
class Deployment:
    """Context and generation servers of one system; without context servers the generation servers are aggregated ones.

    The two factors are the calibration: 1 means the latency table as it is. `reserve_output_tokens` is the output length that
    admission must assume (max_tokens of the requests); None: each request's own.
    """

    system: str
    context: ServerGroup | None
    generation: ServerGroup
    context_factor: float = 1.0
    generation_factor: float = 1.0
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


@cache
def _tables(system: str, tp: int, pp: int):
    table = read_table(system, tp, pp)
    return tuple(map(np.array, table.context)), tuple(map(np.array, table.generation)), table


@cache
def _generation_steps(system: str, tp: int, pp: int, sizes: tuple[int, ...], padding: bool, max_batch: int):
    table, sizes = _tables(system, tp, pp)[1], np.array(sorted(sizes), np.int64)
    return tabulate_generation(table, sizes, padding, rules.EAGER_FLOOR_MS, max_batch)


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
        if group.router not in ("round_robin", "load_balancing"):
            raise SimulationError(
                f"router {group.router!r} is not modelled; round_robin and load_balancing are."
            )
    chosen = lengths[load.samples]
    inputs, outputs = chosen["input_tokens"].astype(np.int64), chosen["output_tokens"].astype(np.int64)
    context_table, generation_table, table = _tables(d.system, g.tp, g.pp)
    capacity = table.kv_capacity_tokens(g.kv_fraction, g.max_num_tokens)
    kv_need = rules.kv_tokens(inputs, np.maximum(outputs, d.reserve_output_tokens or 0))
    if kv_need.max() > capacity:
        raise SimulationError(
            f"{d.system} TP{g.tp} PP{g.pp} has room for {capacity} KV-cache tokens; the longest request"
            f" needs {kv_need.max()}. Give the server more GPUs, or a larger memory fraction."
        )
    bin_s = max(float(load.arrivals_s[-1]) * 1.1, 1.0) / TRACE_BINS

    def unfilled(group):
        """busy, blocked, server, first token and end, for a loop to fill."""
        server = np.empty(len(inputs), np.int64)
        return np.zeros((group.count, TRACE_BINS)), np.zeros(2, np.int64), server, *np.empty((2, len(inputs)))

    busy, blocked, server, first, end = served = unfilled(g)
    balanced = g.router == "load_balancing"
    if c is None:
        context_busy, context_server, context_end = busy, server, first
        run_prompts(
            load.arrivals_s, inputs, outputs, kv_need, g.count, balanced, False, context_table, generation_table[2:],
            g.max_num_tokens, g.max_batch_size, 1, False, capacity, d.context_factor, d.generation_factor, bin_s, *served,
        )  # fmt: skip
    else:
        context_table, _, _ = _tables(d.system, c.tp, c.pp)
        context_busy, _, context_server, context_end, _ = prompts = unfilled(c)
        run_prompts(
            load.arrivals_s, inputs, np.ones_like(inputs), np.zeros_like(inputs), c.count, c.router == "load_balancing",
            c.router_tokens, context_table, generation_table[2:], c.max_num_tokens, c.max_batch_size, c.pp, c.chunks_overlap, 0,
            d.context_factor, 1.0, bin_s, *prompts,
        )  # fmt: skip
        transfer = 1e-3 * rules.transfer_ms(inputs, c.tp * c.pp, g.tp * g.pp)
        steps = _generation_steps(
            d.system, g.tp, g.pp, g.cuda_graph_sizes, g.cuda_graph_padding, g.max_batch_size
        )
        run_generation(
            np.argsort(context_end, kind="stable"), context_end, inputs, outputs, kv_need, transfer, g.count, balanced, steps,
            g.max_batch_size, g.pp, capacity, d.generation_factor, bin_s, *served,
        )  # fmt: skip
    return SimulatedRun(
        load, inputs, outputs, context_server, context_end, server, first, end, bin_s, context_busy / bin_s, busy / bin_s,
        *blocked.tolist(),
    )  # fmt: skip


def summarise(run: SimulatedRun, limits_ms: tuple[float, float] = INTERACTIVE_LIMITS_MS) -> dict:
    """One row: verdict, margin, throughput, TTFT and TPOT figures, named as in the published table.

    `valid` is LoadGen's verdict: early stopping holds for both limits. `margin` is the smaller distance to a limit, as a share
    of it, at the query that early stopping looks at (negative: INVALID); `binds` names that limit: ttft or tpot, or kv or batch
    where the slowest first tokens waited longer for admission to generation than for their context.
    """
    row = {"target_qps": run.load.target_qps, "queries": len(run.end_s)}
    # Without ramp-up and drain.
    row["context_utilisation"] = float(run.context_busy[:, 20:200].mean())
    row["generation_utilisation"] = float(run.generation_busy[:, 20:200].mean())
    margins = {}
    for name, values, limit in (("ttft", run.ttft_ms, limits_ms[0]), ("tpot", run.tpot_ms, limits_ms[1])):
        row[f"{name}_mean_ms"] = float(values.mean())
        for p in (50, 90, 99):
            row[f"{name}_p{p}_ms"] = percentile(values, p / 100)
        margins[name] = 1 - worst_allowed(values) / limit
    duration = float(run.end_s.max())
    margin = min(margins.values())
    binds = min(margins, key=margins.get)
    slowest = run.ttft_ms >= row["ttft_p99_ms"]
    admission, context = run.first_token_s - run.context_end_s, run.context_end_s - run.load.arrivals_s
    if binds == "ttft" and admission[slowest].mean() > context[slowest].mean():
        binds = "kv" if run.blocked_by_kv >= run.blocked_by_batch else "batch"
    return {
        **row,
        "samples_per_s": len(run.end_s) / duration,
        "completed_tokens_per_s": float(run.output_tokens.sum()) / duration,
        "margin": margin,
        "binds": binds,
        "valid": margin >= 0,
        "source": "simulated",
    }


def queue_lengths(run: SimulatedRun, points: int = TRACE_BINS) -> dict[str, np.ndarray]:
    """Requests over time at each server: `time_s` (points,); `context` (servers, points): waiting or computing;
    `generation_waiting` and `generation_active` (servers, points)."""
    time_s = np.linspace(0, run.end_s.max(), points)

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
