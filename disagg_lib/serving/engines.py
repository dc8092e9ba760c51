"""One run of a deployment in virtual time: TTFT and TPOT of every query, in milliseconds of computing.

The scheduling rules are those of `rules`, compiled by numba; the loops are those of the rehearsal's `engine`, with two
changes that leave the result the same: servers are visited as requests come (context servers first, since nothing flows back
from generation), and sequences that end are found in a calendar, so a step costs the same for any batch.
"""

import hashlib
import types
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numba import njit

from disagg_lib.errors import DisaggError
from disagg_lib.serving import rules
from disagg_lib.serving.latency import read_table
from disagg_lib.serving.lengths import MAX_OUTPUT_TOKENS
from disagg_lib.serving.loadgen_rules import Load, percentile, worst_allowed

INTERACTIVE_LIMITS_MS = (4500.0, 80.0)
TRACE_BINS = 256


class SimulationError(DisaggError):
    """A deployment that cannot serve a request, or parameters that make no sense."""


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


_SOURCE = hashlib.sha256(Path(__file__).read_bytes() + Path(rules.__file__).read_bytes()).hexdigest()[:10]


def _jit(function, inline="never"):
    # numba's cache looks at one file; the name carries both, so that a change in either is never served stale.
    function.__qualname__ += f"_{_SOURCE}"
    return njit(cache=True, nogil=True, inline=inline)(function)


def _compile_rules() -> types.ModuleType:
    """The functions of `rules`, each seeing the compiled ones by their names."""
    compiled = types.ModuleType("compiled_rules")
    names = vars(compiled)
    names.update(vars(rules))
    for name, function in vars(rules).items():
        if isinstance(function, types.FunctionType):
            copy = types.FunctionType(function.__code__, names, name, function.__defaults__)
            # Every step looks up tables: inlined, that makes aggregated runs a quarter faster.
            names[name] = _jit(copy, "always" if name == "cell" else "never")
    return compiled


_rules = _compile_rules()


@_jit
def _record(busy, server, start, bin_s, seconds):
    busy[server, min(int(start / bin_s), busy.shape[1] - 1)] += seconds


@_jit
def _visited(i, n, servers, balanced):
    """Which servers to bring up to query i's arrival: its own, or all if loads decide; after the last query, each to its end."""
    if i >= n:
        return i - n, i - n + 1
    return (0, servers) if balanced else (i % servers, i % servers + 1)


@_jit
def _run_prompts(
    arrivals, inputs, outputs, kv_need, servers, balanced, by_tokens, context_table, kv_table, max_num_tokens, max_batch,
    pp, chunks_overlap, kv_capacity, context_factor, generation_factor, bin_s, busy, blocked, server_of, first_of, end_of,
):  # fmt: skip
    """Serve every query on servers that compute prompts; fills busy, blocked, server_of, first_of and end_of (s).

    With outputs of 1 they are context servers: a query ends with its prompt. With longer ones they are aggregated servers, which
    mix prompt chunks and generation in one step (of one stage).
    """
    n = len(arrivals)
    ring = outputs.max() + 1
    most = n if balanced else n // servers + 1
    line = np.empty((servers, most), np.int64)
    left = np.empty((servers, most), np.int64)
    done = np.zeros((servers, most), np.int64)
    busy_until = np.zeros((servers, most))
    calendar = np.full((servers, ring), -1, np.int64)
    following = np.empty(n, np.int64)
    head, taken, tail = np.zeros(servers, np.int64), np.zeros(servers, np.int64), np.zeros(servers, np.int64)
    active, token_sum = np.zeros(servers, np.int64), np.zeros(servers, np.int64)
    emissions, kv_used = np.zeros(servers, np.int64), np.zeros(servers, np.int64)
    seen, loads = np.zeros(servers, np.int64), np.zeros(servers, np.int64)
    gone = np.zeros((servers, most), np.bool_)
    now, free = np.zeros(servers), np.zeros((servers, pp))
    chunks = np.empty(most, np.int64)
    slots = max_batch if outputs.max() > 1 else n  # a context server's batch limit is each step's
    for i in range(n + servers):
        until = arrivals[i] if i < n else np.inf
        first, last = _visited(i, n, servers, balanced)
        for s in range(first, last):
            while active[s] > 0 or head[s] < tail[s]:
                start = max(now[s], free[s, 0])
                if active[s] == 0:
                    start = _rules.context_start(left[s], busy_until[s], head[s], tail[s], start)
                if start >= until:
                    break
                if taken[s] < tail[s] and active[s] + taken[s] - head[s] == slots:
                    blocked[0] += 1
                while taken[s] < tail[s] and active[s] + taken[s] - head[s] < slots:
                    need = kv_need[line[s, taken[s]]]
                    if kv_used[s] + need > kv_capacity:
                        blocked[1] += 1
                        break
                    kv_used[s] += need
                    taken[s] += 1
                room = max(max_num_tokens - active[s], 0)
                count = _rules.context_chunks(
                    left[s], busy_until[s], head[s], taken[s], start, room, max_batch, chunks
                )
                if active[s] == 0:
                    step_ms = context_factor * _rules.context_step_ms(
                        context_table, chunks, done[s, head[s] :], count
                    )
                else:
                    step_ms = _rules.mixed_step_ms(
                        context_table, kv_table, chunks, done[s, head[s] :], count, active[s], token_sum[s] / active[s],
                        context_factor, generation_factor,
                    )  # fmt: skip
                step = 1e-3 * step_ms
                end = _rules.stage_pass(start, step, free[s])
                _record(busy, s, start, bin_s, step / pp)
                emissions[s] += 1
                token_sum[s] += active[s]
                slot = emissions[s] % ring
                q = calendar[s, slot]
                calendar[s, slot] = -1
                while q >= 0:
                    end_of[q] = end
                    active[s] -= 1
                    token_sum[s] -= inputs[q] + outputs[q]
                    kv_used[s] -= kv_need[q]
                    loads[s] -= 1
                    q = following[q]
                for k in range(head[s], head[s] + count):
                    left[s, k] -= chunks[k - head[s]]
                    done[s, k] += chunks[k - head[s]]
                    if chunks[k - head[s]] > 0 and not chunks_overlap:
                        busy_until[s, k] = end
                    if chunks[k - head[s]] > 0 and left[s, k] == 0:
                        q = line[s, k]
                        first_of[q] = end
                        if outputs[q] > 1:
                            active[s] += 1
                            token_sum[s] += inputs[q] + 1
                            slot = (emissions[s] + outputs[q] - 1) % ring
                            following[q] = calendar[s, slot]
                            calendar[s, slot] = q
                while head[s] < taken[s] and left[s, head[s]] == 0:
                    head[s] += 1
            if balanced and ring == 2:  # context servers: what has left by now is no load any more
                for k in range(seen[s], tail[s]):
                    if left[s, k] == 0 and not gone[s, k] and first_of[line[s, k]] <= until:
                        loads[s] -= inputs[line[s, k]] if by_tokens else 1
                        gone[s, k] = True
                while seen[s] < tail[s] and gone[s, seen[s]]:
                    seen[s] += 1
        if i < n:
            s = _rules.least_loaded(loads, i) if balanced else i % servers
            now[s] = until
            line[s, tail[s]] = i
            left[s, tail[s]] = inputs[i]
            tail[s] += 1
            loads[s] += inputs[i] if by_tokens else 1
            server_of[i] = s


@_jit
def _tabulate_generation(table, sizes, padding, eager_floor_ms, max_batch):
    """generation_step_ms for every batch at the table's KV lengths (between them it is linear), and the floor of each batch."""
    kv_lengths = table[3]
    step_ms = np.empty((max_batch + 1, len(kv_lengths)))
    floor_ms = np.zeros(max_batch + 1)
    for batch in range(1, max_batch + 1):
        if _rules.captured_batch(batch, sizes, padding) == 0:
            floor_ms[batch] = eager_floor_ms
        for j in range(len(kv_lengths)):
            step_ms[batch, j] = _rules.generation_step_ms(table, batch, kv_lengths[j], sizes, padding, 0.0)
    return kv_lengths, step_ms, floor_ms


@_jit
def _run_generation(
    order, arrivals, inputs, outputs, kv_need, transfer, servers, balanced, steps, max_batch, pp, kv_capacity, factor, bin_s,
    busy, blocked, server_of, first_of, end_of,
):  # fmt: skip
    """Serve every sequence, in the order that the context servers hand them over; fills server_of, first_of, end_of (s)."""
    n = len(order)
    kv_lengths, step_ms, floor_ms = steps
    ring = outputs.max() + 1
    line = np.empty((servers, n if balanced else n // servers + 1), np.int64)
    ready = np.empty(n)
    moving = np.empty((servers, max_batch * pp), np.int64)
    calendar = np.full((servers, pp, ring), -1, np.int64)
    following = np.empty(n, np.int64)
    head, tail = np.zeros(servers, np.int64), np.zeros(servers, np.int64)
    admitted, kv_used = np.zeros(servers, np.int64), np.zeros(servers, np.int64)
    in_move, turn = np.zeros(servers, np.int64), np.zeros(servers, np.int64)
    active = np.zeros((servers, pp), np.int64)
    token_sum = np.zeros((servers, pp), np.int64)
    emissions = np.zeros((servers, pp), np.int64)
    free, ends = np.zeros((servers, pp)), np.zeros((servers, pp))
    now = np.zeros(servers)
    loads = np.zeros(servers, np.int64)
    for i in range(n + servers):
        until = arrivals[order[i]] if i < n else np.inf
        first, last = _visited(i, n, servers, balanced)
        for s in range(first, last):
            while True:
                if active[s].sum() == 0:
                    if in_move[s] > 0:
                        soonest = np.inf
                        for k in range(in_move[s]):
                            soonest = min(soonest, ready[moving[s, k]])
                        now[s] = max(now[s], soonest)
                    elif head[s] == tail[s]:
                        break
                g = turn[s]
                start = max(now[s], free[s, 0], ends[s, g])
                if start >= until:
                    break
                # Every sequence of this batch gets the token of its last step; the calendar knows which of them end.
                if active[s, g] > 0:
                    emissions[s, g] += 1
                    token_sum[s, g] += active[s, g]
                    slot = emissions[s, g] % ring
                    q = calendar[s, g, slot]
                    calendar[s, g, slot] = -1
                    while q >= 0:
                        end_of[q] = start
                        active[s, g] -= 1
                        token_sum[s, g] -= inputs[q] + outputs[q]
                        admitted[s] -= 1
                        kv_used[s] -= kv_need[q]
                        loads[s] -= 1
                        q = following[q]
                if head[s] < tail[s] and admitted[s] == max_batch * pp:
                    blocked[0] += 1
                while head[s] < tail[s] and admitted[s] < max_batch * pp:
                    q = line[s, head[s]]
                    if kv_used[s] + kv_need[q] > kv_capacity:
                        blocked[1] += 1
                        break
                    head[s] += 1
                    kv_used[s] += kv_need[q]
                    admitted[s] += 1
                    ready[q] = start + transfer[q]
                    moving[s, in_move[s]] = q
                    in_move[s] += 1
                kept = 0
                for k in range(in_move[s]):
                    q = moving[s, k]
                    if ready[q] > start or active[s, g] == max_batch:
                        moving[s, kept] = q
                        kept += 1
                        continue
                    first_of[q] = start
                    active[s, g] += 1
                    token_sum[s, g] += inputs[q] + 1
                    slot = (emissions[s, g] + outputs[q] - 1) % ring
                    following[q] = calendar[s, g, slot]
                    calendar[s, g, slot] = q
                in_move[s] = kept
                if active[s, g] > 0:
                    size = active[s, g]
                    mean = token_sum[s, g] / size
                    step = (
                        factor
                        * 1e-3
                        * max(_rules.interpolate(kv_lengths, step_ms[size], mean), floor_ms[size])
                    )
                    ends[s, g] = _rules.stage_pass(start, step, free[s])
                    _record(busy, s, start, bin_s, step / pp)
                turn[s] = (g + 1) % pp
        if i < n:
            s = _rules.least_loaded(loads, i) if balanced else i % servers
            if active[s].sum() == 0 and in_move[s] == 0 and head[s] == tail[s]:
                now[s] = until
            line[s, tail[s]] = order[i]
            tail[s] += 1
            loads[s] += 1
            server_of[order[i]] = s


@cache
def _tables(system: str, tp: int, pp: int):
    table = read_table(system, tp, pp)
    return tuple(map(np.array, table.context)), tuple(map(np.array, table.generation)), table


@cache
def _generation_steps(system: str, tp: int, pp: int, sizes: tuple[int, ...], padding: bool, max_batch: int):
    table, sizes = _tables(system, tp, pp)[1], np.array(sorted(sizes), np.int64)
    return _tabulate_generation(table, sizes, padding, rules.EAGER_FLOOR_MS, max_batch)


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
        _run_prompts(
            load.arrivals_s, inputs, outputs, kv_need, g.count, balanced, False, context_table, generation_table[2:],
            g.max_num_tokens, g.max_batch_size, 1, False, capacity, d.context_factor, d.generation_factor, bin_s, *served,
        )  # fmt: skip
    else:
        context_table, _, _ = _tables(d.system, c.tp, c.pp)
        context_busy, _, context_server, context_end, _ = prompts = unfilled(c)
        _run_prompts(
            load.arrivals_s, inputs, np.ones_like(inputs), np.zeros_like(inputs), c.count, c.router == "load_balancing",
            c.router_tokens, context_table, generation_table[2:], c.max_num_tokens, c.max_batch_size, c.pp, c.chunks_overlap, 0,
            d.context_factor, 1.0, bin_s, *prompts,
        )  # fmt: skip
        transfer = 1e-3 * rules.transfer_ms(inputs, c.tp * c.pp, g.tp * g.pp)
        steps = _generation_steps(
            d.system, g.tp, g.pp, g.cuda_graph_sizes, g.cuda_graph_padding, g.max_batch_size
        )
        _run_generation(
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
