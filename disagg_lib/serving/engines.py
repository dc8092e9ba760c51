"""Servers in virtual time: the prompts of context servers, the batches of generation servers; compiled."""

import hashlib
import types
from pathlib import Path

import numpy as np
from numba import njit

from . import rules

TRACE_BINS = 256

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
def run_prompts(
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
def tabulate_generation(table, sizes, padding, eager_floor_ms, max_batch):
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
def run_generation(
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
