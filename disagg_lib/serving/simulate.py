"""One run of a deployment in virtual time: TTFT and TPOT of every query, in milliseconds of computing.

The scheduling rules are those of `rules`, compiled by numba; the loops are those of the rehearsal's `engine`, with two
changes that leave the result the same: servers are visited as requests come (context servers first, since nothing flows back
from generation), and sequences that end are found in a calendar, so a step costs the same for any batch.
"""

import hashlib
import types
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numba import njit

from disagg_lib.errors import DisaggError
from disagg_lib.serving import rules
from disagg_lib.serving.latency import read_table
from disagg_lib.serving.loadgen_rules import Load, percentile, worst_allowed

INTERACTIVE_LIMITS_MS = (4500.0, 80.0)
SERVER_LIMITS_MS = (6000.0, 175.0)
MAX_OUTPUT_TOKENS = 2000
TRACE_BINS = 256


class SimulationError(DisaggError):
    """A deployment that cannot serve a request, or parameters that make no sense."""


@dataclass(frozen=True)
class ServerGroup:
    """`count` equal servers. CUDA-graph sizes matter for generation only; none means eager steps."""

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


def _jit(function):
    # numba's cache looks at one file; the name carries both, so that a change in either is never served stale.
    function.__qualname__ += f"_{_SOURCE}"
    return njit(cache=True, nogil=True)(function)


def _compile_rules() -> types.SimpleNamespace:
    """The functions of `rules`, each seeing the compiled ones by their names."""
    names = dict(vars(rules))
    for name, function in vars(rules).items():
        if isinstance(function, types.FunctionType):
            names[name] = _jit(types.FunctionType(function.__code__, names, name, function.__defaults__))
    return types.SimpleNamespace(**names)


_rules = _compile_rules()
_context_chunks, _context_step_ms, _stage_pass = (
    _rules.context_chunks,
    _rules.context_step_ms,
    _rules.stage_pass,
)
_generation_step_ms, _aggregated_step_ms = _rules.generation_step_ms, _rules.aggregated_step_ms
_least_loaded, _interpolate, _captured_batch = _rules.least_loaded, _rules.interpolate, _rules.captured_batch


@_jit
def _record(busy, server, start, bin_s, seconds):
    busy[server, min(int(start / bin_s), busy.shape[1] - 1)] += seconds


@_jit
def _run_context(
    arrivals, inputs, servers, balanced, by_tokens, table, max_num_tokens, max_batch, pp, factor, bin_s, busy,
    server_of, end_of,
):  # fmt: skip
    """Serve every prompt; fills server_of, end_of (s) and busy."""
    n = len(arrivals)
    tokens, dense, new, past, attention = table
    most = n if balanced else n // servers + 1
    line = np.empty((servers, most), np.int64)
    left = np.empty((servers, most), np.int64)
    done = np.zeros((servers, most), np.int64)
    head = np.zeros(servers, np.int64)
    tail = np.zeros(servers, np.int64)
    seen = np.zeros(servers, np.int64)
    loads = np.zeros(servers, np.int64)
    now = np.zeros(servers)
    free = np.zeros((servers, pp))
    chunks = np.empty(max_batch, np.int64)
    for i in range(n + servers):
        # One round more than there are arrivals, to finish every server.
        until = arrivals[i] if i < n else np.inf
        first, last = (0, servers) if balanced and i < n else (i % servers, i % servers + 1)
        if i >= n:
            first, last = i - n, i - n + 1
        for s in range(first, last):
            while head[s] < tail[s]:
                start = max(now[s], free[s, 0])
                if start >= until:
                    break
                count = _context_chunks(left[s], head[s], tail[s], max_num_tokens, max_batch, chunks)
                step = factor * 1e-3 * _context_step_ms(
                    tokens, dense, new, past, attention, chunks, done[s, head[s] :], count
                )  # fmt: skip
                end = _stage_pass(start, step, free[s])
                _record(busy, s, start, bin_s, step / pp)
                for k in range(head[s], head[s] + count):
                    left[s, k] -= chunks[k - head[s]]
                    done[s, k] += chunks[k - head[s]]
                while head[s] < tail[s] and left[s, head[s]] == 0:
                    end_of[line[s, head[s]]] = end
                    head[s] += 1
            while seen[s] < head[s] and end_of[line[s, seen[s]]] <= until:
                loads[s] -= inputs[line[s, seen[s]]] if by_tokens else 1
                seen[s] += 1
        if i < n:
            s = _least_loaded(loads, i) if balanced else i % servers
            if head[s] == tail[s]:
                now[s] = until
            line[s, tail[s]] = i
            left[s, tail[s]] = inputs[i]
            tail[s] += 1
            loads[s] += inputs[i] if by_tokens else 1
            server_of[i] = s


@_jit
def _tabulate_generation(table, sizes, padding, eager_floor_ms, max_batch):
    """generation_step_ms for every batch at the table's KV lengths (between them it is linear), and the floor of each batch."""
    batches, dense, kv_batches, kv_lengths, kv = table
    step_ms = np.empty((max_batch + 1, len(kv_lengths)))
    floor_ms = np.zeros(max_batch + 1)
    for batch in range(1, max_batch + 1):
        if _captured_batch(batch, sizes, padding) == 0:
            floor_ms[batch] = eager_floor_ms
        for j in range(len(kv_lengths)):
            step_ms[batch, j] = _generation_step_ms(
                batches, dense, kv_batches, kv_lengths, kv, batch, kv_lengths[j], sizes, padding, 0.0
            )  # fmt: skip
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
        first, last = (0, servers) if balanced and i < n else (i % servers, i % servers + 1)
        if i >= n:
            first, last = i - n, i - n + 1
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
                    if ready[q] > start:
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
                    step = factor * 1e-3 * max(_interpolate(kv_lengths, step_ms[size], mean), floor_ms[size])
                    ends[s, g] = _stage_pass(start, step, free[s])
                    _record(busy, s, start, bin_s, step / pp)
                turn[s] = (g + 1) % pp
        if i < n:
            s = _least_loaded(loads, i) if balanced else i % servers
            if active[s].sum() == 0 and in_move[s] == 0 and head[s] == tail[s]:
                now[s] = until
            line[s, tail[s]] = order[i]
            tail[s] += 1
            loads[s] += 1
            server_of[order[i]] = s


@_jit
def _run_aggregated(
    arrivals, inputs, outputs, kv_need, servers, balanced, context_table, kv_table, max_num_tokens, max_batch, kv_capacity,
    context_factor, generation_factor, bin_s, busy, blocked, server_of, first_of, end_of,
):  # fmt: skip
    """Serve every query on servers that mix prompt chunks and generation in one step; fills server_of, first_of, end_of (s)."""
    n = len(arrivals)
    tokens, dense, new, past, attention = context_table
    kv_batches, kv_lengths, kv = kv_table
    ring = outputs.max() + 1
    most = n if balanced else n // servers + 1
    line = np.empty((servers, most), np.int64)
    left = np.empty((servers, most), np.int64)
    done = np.zeros((servers, most), np.int64)
    calendar = np.full((servers, ring), -1, np.int64)
    following = np.empty(n, np.int64)
    head, taken, tail = np.zeros(servers, np.int64), np.zeros(servers, np.int64), np.zeros(servers, np.int64)
    active, token_sum = np.zeros(servers, np.int64), np.zeros(servers, np.int64)
    emissions, kv_used = np.zeros(servers, np.int64), np.zeros(servers, np.int64)
    now = np.zeros(servers)
    loads = np.zeros(servers, np.int64)
    chunks = np.empty(max_batch, np.int64)
    for i in range(n + servers):
        until = arrivals[i] if i < n else np.inf
        first, last = (0, servers) if balanced and i < n else (i % servers, i % servers + 1)
        if i >= n:
            first, last = i - n, i - n + 1
        for s in range(first, last):
            while (active[s] > 0 or head[s] < tail[s]) and now[s] < until:
                if taken[s] < tail[s] and active[s] + taken[s] - head[s] == max_batch:
                    blocked[0] += 1
                while taken[s] < tail[s] and active[s] + taken[s] - head[s] < max_batch:
                    need = kv_need[line[s, taken[s]]]
                    if kv_used[s] + need > kv_capacity:
                        blocked[1] += 1
                        break
                    kv_used[s] += need
                    taken[s] += 1
                room = max(max_num_tokens - active[s], 0)
                count = _context_chunks(left[s], head[s], taken[s], room, max_batch, chunks)
                mean = token_sum[s] / active[s] if active[s] > 0 else 0.0
                step = 1e-3 * _aggregated_step_ms(
                    tokens, dense, new, past, attention, kv_batches, kv_lengths, kv,
                    chunks, done[s, head[s] :], count, active[s], mean, context_factor, generation_factor,
                )  # fmt: skip
                _record(busy, s, now[s], bin_s, step)
                now[s] += step
                emissions[s] += 1
                token_sum[s] += active[s]
                slot = emissions[s] % ring
                q = calendar[s, slot]
                calendar[s, slot] = -1
                while q >= 0:
                    end_of[q] = now[s]
                    active[s] -= 1
                    token_sum[s] -= inputs[q] + outputs[q]
                    kv_used[s] -= kv_need[q]
                    loads[s] -= 1
                    q = following[q]
                for k in range(head[s], head[s] + count):
                    left[s, k] -= chunks[k - head[s]]
                    done[s, k] += chunks[k - head[s]]
                while head[s] < taken[s] and left[s, head[s]] == 0:
                    q = line[s, head[s]]
                    head[s] += 1
                    first_of[q] = now[s]
                    active[s] += 1
                    token_sum[s] += inputs[q] + 1
                    slot = (emissions[s] + outputs[q] - 1) % ring
                    following[q] = calendar[s, slot]
                    calendar[s, slot] = q
        if i < n:
            s = _least_loaded(loads, i) if balanced else i % servers
            if active[s] == 0 and head[s] == tail[s]:
                now[s] = max(now[s], until)
            line[s, tail[s]] = i
            left[s, tail[s]] = inputs[i]
            tail[s] += 1
            loads[s] += 1
            server_of[i] = s


@cache
def _tables(system: str, tp: int, pp: int):
    t = read_table(system, tp, pp)
    context = (t.context_tokens, t.context_ms, t.attention_new, t.attention_past, t.attention_ms)
    generation = (t.generation_batch, t.generation_ms, t.kv_batch, t.kv_length, t.kv_ms)
    return tuple(map(np.array, context)), tuple(map(np.array, generation)), t


@cache
def _generation_steps(system: str, tp: int, pp: int, sizes: tuple[int, ...], padding: bool, max_batch: int):
    table = _tables(system, tp, pp)[1]
    return _tabulate_generation(
        table, np.array(sorted(sizes), np.int64), padding, rules.EAGER_FLOOR_MS, max_batch
    )


def simulate(deployment: Deployment, load: Load, lengths: np.ndarray) -> SimulatedRun:
    """Run one load on a deployment; the same arguments give the same result.

    Parameters
    ----------
    lengths : fields input_tokens and output_tokens (`lengths.LENGTHS`); load.samples index it.

    Raises
    ------
    SimulationError : a request that no server can ever admit (says what would fit), or a router that is not modelled.
    """
    d, generation = deployment, deployment.generation
    chosen = lengths[load.samples]
    inputs, outputs = chosen["input_tokens"].astype(np.int64), chosen["output_tokens"].astype(np.int64)
    n = len(inputs)
    _, generation_table, table = _tables(d.system, generation.tp, generation.pp)
    capacity = table.kv_capacity_tokens(generation.kv_fraction, generation.max_num_tokens)
    reserved = outputs if d.reserve_output_tokens is None else np.maximum(outputs, d.reserve_output_tokens)
    kv_need = rules.kv_tokens(inputs, reserved, rules.KV_BLOCK_TOKENS)
    if kv_need.max() > capacity:
        raise SimulationError(
            f"{d.system} TP{generation.tp} PP{generation.pp} has room for {capacity} KV-cache tokens; the longest request"
            f" needs {kv_need.max()}. Give the server more GPUs, or a larger memory fraction."
        )
    for group in (d.context, generation):
        if group is not None and group.router not in ("round_robin", "load_balancing"):
            raise SimulationError(
                f"router {group.router!r} is not modelled; round_robin and load_balancing are."
            )
    bin_s = max(float(load.arrivals_s[-1]) * 1.1, 1.0) / TRACE_BINS
    first, end = np.empty(n), np.empty(n)
    server = np.empty(n, np.int64)
    busy = np.zeros((generation.count, TRACE_BINS))
    blocked = np.zeros(2, np.int64)
    balanced = generation.router == "load_balancing"
    if d.context is None:
        context_table, _, _ = _tables(d.system, generation.tp, generation.pp)
        _run_aggregated(
            load.arrivals_s, inputs, outputs, kv_need, generation.count, balanced, context_table, generation_table[2:],
            generation.max_num_tokens, generation.max_batch_size, capacity, d.context_factor, d.generation_factor, bin_s, busy,
            blocked, server, first, end,
        )  # fmt: skip
        busy /= bin_s
        return SimulatedRun(
            load, inputs, outputs, server, first, server, first, end, bin_s, busy, busy, *blocked.tolist()
        )
    context = d.context
    context_table, _, context_latency = _tables(d.system, context.tp, context.pp)
    context_server, context_end = np.empty(n, np.int64), np.empty(n)
    context_busy = np.zeros((context.count, TRACE_BINS))
    _run_context(
        load.arrivals_s, inputs, context.count, context.router == "load_balancing", context.router_tokens, context_table,
        context.max_num_tokens, context.max_batch_size, context.pp, d.context_factor, bin_s, context_busy, context_server,
        context_end,
    )  # fmt: skip
    steps = _generation_steps(
        d.system, generation.tp, generation.pp, generation.cuda_graph_sizes, generation.cuda_graph_padding,
        generation.max_batch_size,
    )  # fmt: skip
    gpu_pairs = min(context.tp * context.pp, generation.tp * generation.pp)
    transfer = 1e-3 * rules.transfer_ms(
        inputs, context_latency.kv_bytes_per_token * context.tp * context.pp,
        rules.TRANSFER_GB_PER_S_PER_GPU * gpu_pairs, rules.TRANSFER_FIXED_MS,
    )  # fmt: skip
    _run_generation(
        np.argsort(context_end, kind="stable"), context_end, inputs, outputs, kv_need, transfer, generation.count, balanced,
        steps, generation.max_batch_size, generation.pp, capacity, d.generation_factor, bin_s, busy, blocked,
        server, first, end,
    )  # fmt: skip
    context_busy /= bin_s
    busy /= bin_s
    return SimulatedRun(
        load, inputs, outputs, context_server, context_end, server, first, end, bin_s, context_busy, busy, *blocked.tolist()
    )  # fmt: skip


def summarise(run: SimulatedRun, limits_ms: tuple[float, float] = INTERACTIVE_LIMITS_MS) -> dict:
    """One row: verdict, margin, throughput, TTFT and TPOT figures, named as in the published table.

    `valid` is LoadGen's verdict: early stopping holds for both limits. `margin` is the smaller distance to a limit, as a share
    of it, at the query that early stopping looks at (negative: INVALID); `binds` names that limit: ttft or tpot, or kv or batch
    where the slowest first tokens waited longer for admission to generation than for their context.
    """
    row = {"target_qps": run.load.target_qps, "queries": len(run.end_s)}
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
        count = int(servers.max()) + 1
        inside = np.empty((count, points), np.int64)
        for s in range(count):
            mine = servers == s
            inside[s] = np.searchsorted(np.sort(start[mine]), time_s, "right") - np.searchsorted(
                np.sort(end[mine]), time_s, "right"
            )
        return inside

    return {
        "time_s": time_s,
        "context": between(run.context_server, run.load.arrivals_s, run.context_end_s),
        "generation_waiting": between(run.generation_server, run.context_end_s, run.first_token_s),
        "generation_active": between(run.generation_server, run.first_token_s, run.end_s),
    }


def with_factors(deployment: Deployment, context_factor: float, generation_factor: float) -> Deployment:
    """The same deployment, calibrated."""
    return replace(deployment, context_factor=context_factor, generation_factor=generation_factor)
