"""Servers in virtual time: context servers, generation servers, and aggregated ones that are both; compiled.

The state of a group of servers is a tuple of arrays, first index the server. `wake` is when a server's next step begins, infinite
with nothing to do; between two arrivals each server runs the steps that begin before the second. Sequences that end are found
in a calendar of steps, so a step costs the same for any batch.
"""

import hashlib
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from . import rules

TRACE_BINS = 256

_SOURCE = hashlib.sha256(Path(__file__).read_bytes() + Path(rules.__file__).read_bytes()).hexdigest()[:10]


def _jit(function, inline="never"):
    # numba's cache looks at one file; the name carries both, so that a change in either is never served stale.
    function.__qualname__ += f"_{_SOURCE}"
    # Without reference counts and checks of division, which nothing here needs: twice as fast.
    return njit(cache=True, nogil=True, inline=inline, _nrt=False, error_model="numpy")(function)


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
_BLOCK = rules.KV_BLOCK_TOKENS


class Queries(NamedTuple):
    """What is asked of a group of servers, in order of arrival: s, tokens; `needs` is KV tokens as GUARANTEED_NO_EVICT reserves."""

    arrivals: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray
    needs: np.ndarray
    transfer: np.ndarray


class Limits(NamedTuple):
    """What a group's servers are allowed: see `simulate.ServerGroup`; `grows` is MAX_UTILIZATION's admission."""

    servers: int
    balanced: bool
    by_tokens: bool
    max_num_tokens: int
    max_batch: int
    pp: int
    chunks_overlap: bool
    kv_capacity: int
    grows: bool
    bin_s: float


class Served(NamedTuple):
    """What the loops fill: load over time, refusals for want of a slot and of KV room; per query its server, first token and end (s)."""

    busy: np.ndarray
    blocked: np.ndarray
    server: np.ndarray
    first: np.ndarray
    end: np.ndarray


class Router(NamedTuple):
    """What each server has to do, in queries or tokens; `out` are its queries in order of their ends, which count until then."""

    loads: np.ndarray
    weights: np.ndarray
    out: np.ndarray
    ended: np.ndarray
    settled: np.ndarray


class Prompts(NamedTuple):
    """Prompts in line, in order of arrival: head to taken are admitted, taken to tail wait for that."""

    line: np.ndarray
    left: np.ndarray
    done: np.ndarray
    busy_until: np.ndarray
    head: np.ndarray
    taken: np.ndarray
    tail: np.ndarray
    now: np.ndarray
    wake: np.ndarray
    free: np.ndarray
    chunks: np.ndarray


class Batches(NamedTuple):
    """Sequences that get a token each step, by server and pipeline batch; `crossing` counts those whose KV cache needs a further
    block at an emission with this remainder."""

    active: np.ndarray
    token_sum: np.ndarray
    emissions: np.ndarray
    calendar: np.ndarray
    following: np.ndarray
    crossing: np.ndarray
    admitted: np.ndarray
    kv_used: np.ndarray


class Arrivals(NamedTuple):
    """A generation server's side of the transfer: who waits for admission, whose KV cache is on its way and ready when."""

    line: np.ndarray
    head: np.ndarray
    tail: np.ndarray
    moving: np.ndarray
    in_move: np.ndarray
    ready: np.ndarray
    turn: np.ndarray
    now: np.ndarray
    wake: np.ndarray
    ends: np.ndarray
    free: np.ndarray


def _make_router(queries, limits):
    weights = queries.inputs if limits.by_tokens else np.ones_like(queries.inputs)
    zeros = np.zeros((3, limits.servers), np.int64)
    out = np.empty((limits.servers, len(weights) if limits.balanced else 0), np.int64)
    return Router(zeros[0], weights, out, zeros[1], zeros[2])


def _make_prompts(queries, limits):
    servers, n = limits.servers, len(queries.inputs)
    most = n if limits.balanced else n // servers + 1
    counts, times = np.zeros((3, servers), np.int64), np.zeros((2, servers))
    times[1] = np.inf
    return Prompts(
        np.empty((servers, most), np.int64), np.empty((servers, most), np.int64), np.zeros((servers, most), np.int64),
        np.zeros((servers, most)), counts[0], counts[1], counts[2], times[0], times[1], np.zeros((servers, limits.pp)),
        np.empty(most, np.int64),
    )  # fmt: skip


def _make_batches(queries, limits):
    servers, pp = limits.servers, limits.pp
    counts, totals = np.zeros((3, servers, pp), np.int64), np.zeros((2, servers), np.int64)
    calendar = np.full((servers, pp, queries.outputs.max() + 1), -1, np.int64)
    following = np.empty(len(queries.inputs), np.int64)
    crossing = np.zeros((servers, pp, _BLOCK), np.int64)
    return Batches(counts[0], counts[1], counts[2], calendar, following, crossing, totals[0], totals[1])


def _make_arrivals(queries, limits):
    servers, n = limits.servers, len(queries.inputs)
    line = np.empty((servers, n if limits.balanced else n // servers + 1), np.int64)
    moving = np.empty((servers, limits.max_batch * limits.pp), np.int64)
    counts, times = np.zeros((4, servers), np.int64), np.zeros((2, servers))
    times[1] = np.inf
    stages = np.zeros((2, servers, limits.pp))
    return Arrivals(
        line, counts[0], counts[1], moving, counts[2], np.empty(n), counts[3], times[0], times[1], stages[0], stages[1]
    )  # fmt: skip


@_jit
def _choose(router, limits, turn, now, ends):
    """The server for a query that comes at `now`; its load counts from here."""
    if not limits.balanced:
        return turn % limits.servers
    for s in range(limits.servers):
        while router.settled[s] < router.ended[s] and ends[router.out[s, router.settled[s]]] <= now:
            router.loads[s] -= router.weights[router.out[s, router.settled[s]]]
            router.settled[s] += 1
    return _rules.least_loaded(router.loads, turn)


@_jit
def _leave(router, limits, s, q):
    if limits.balanced:
        router.out[s, router.ended[s]] = q
        router.ended[s] += 1


@_jit
def _record(busy, server, start, bin_s, seconds):
    busy[server, min(int(start / bin_s), busy.shape[1] - 1)] += seconds


@_jit
def _emit(batches, queries, limits, router, s, g, when, ends):
    """Give each sequence of a batch its next token; end those whose last one it is."""
    b, ring = batches, batches.calendar.shape[2]
    b.emissions[s, g] += 1
    b.token_sum[s, g] += b.active[s, g]
    turn = b.emissions[s, g]
    if limits.grows:
        b.kv_used[s] += _BLOCK * b.crossing[s, g, turn % _BLOCK]
    q = b.calendar[s, g, turn % ring]
    b.calendar[s, g, turn % ring] = -1
    while q >= 0:
        tokens = queries.inputs[q] + queries.outputs[q]
        ends[q] = when
        b.active[s, g] -= 1
        b.token_sum[s, g] -= tokens
        b.admitted[s] -= 1
        b.kv_used[s] -= _rules.kv_held(queries.inputs[q], queries.outputs[q], queries.needs[q], limits.grows)
        b.crossing[s, g, (turn + 1 - tokens) % _BLOCK] -= 1
        _leave(router, limits, s, q)
        q = b.following[q]


@_jit
def _join(batches, queries, limits, s, g, q, when, firsts):
    """Give a sequence its first token and a place in the batch."""
    b, inputs, needs = batches, queries.inputs[q], queries.needs[q]
    firsts[q] = when
    b.active[s, g] += 1
    b.token_sum[s, g] += inputs + 1
    slot = (b.emissions[s, g] + queries.outputs[q] - 1) % b.calendar.shape[2]
    b.following[q] = b.calendar[s, g, slot]
    b.calendar[s, g, slot] = q
    b.crossing[s, g, (b.emissions[s, g] - inputs) % _BLOCK] += 1
    grown = _rules.kv_held(inputs, 1, needs, limits.grows) - _rules.kv_held(inputs, 0, needs, limits.grows)
    b.kv_used[s] += grown


@_jit
def _admits(batches, queries, limits, s, q, blocked):
    """Whether there is a slot and KV room for a query; if so, it takes them."""
    b, inputs, needs = batches, queries.inputs[q], queries.needs[q]
    if b.admitted[s] >= limits.max_batch * limits.pp:
        blocked[0] += 1
        return False
    if b.kv_used[s] + _rules.kv_asked(inputs, needs, limits.grows) > limits.kv_capacity:
        blocked[1] += 1
        return False
    b.admitted[s] += 1
    b.kv_used[s] += _rules.kv_held(inputs, 0, needs, limits.grows)
    return True


@_jit
def _next_prompt_step(prompts, s):
    p = prompts
    start = max(p.now[s], p.free[s, 0])
    return _rules.context_start(p.left[s], p.busy_until[s], p.head[s], p.tail[s], start)


@_jit
def _queue_prompt(prompts, router, s, q, now, tokens):
    p = prompts
    p.now[s] = now
    p.line[s, p.tail[s]] = q
    p.left[s, p.tail[s]] = tokens
    p.tail[s] += 1
    router.loads[s] += router.weights[q]


@_jit
def _advance(prompts, limits, s, count, end):
    """Book the chunks of a step that ends at `end`; return how many of the prompts before the first unfinished one to pass."""
    p, first = prompts, prompts.head[s]
    for k in range(first, first + count):
        p.left[s, k] -= p.chunks[k - first]
        p.done[s, k] += p.chunks[k - first]
        if p.chunks[k - first] > 0 and not limits.chunks_overlap:
            p.busy_until[s, k] = end
    while p.head[s] < p.taken[s] and p.left[s, p.head[s]] == 0:
        p.head[s] += 1


@_jit
def _context_step(prompts, limits, router, table, served, s):
    """Run the step that begins at the server's wake; prompts that it completes end with it."""
    p, start, first = prompts, prompts.wake[s], prompts.head[s]
    p.taken[s] = p.tail[s]
    count = _rules.context_chunks(
        p.left[s], p.busy_until[s], first, p.tail[s], start, limits.max_num_tokens, limits.max_batch, p.chunks
    )
    step = 1e-3 * _rules.context_step_ms(table, p.chunks, p.done[s, first:], count)
    end = _rules.stage_pass(start, step, p.free[s])
    _record(served.busy, s, start, limits.bin_s, step / limits.pp)
    _advance(p, limits, s, count, end)
    for k in range(first, first + count):
        if p.chunks[k - first] > 0 and p.left[s, k] == 0:
            served.end[p.line[s, k]] = end
            _leave(router, limits, s, p.line[s, k])
    p.wake[s] = _next_prompt_step(p, s)


@_jit
def _serve_prompts(p, router, queries, limits, table, served):
    for i in range(len(queries.inputs)):
        now = queries.arrivals[i]
        for s in range(limits.servers):
            while p.wake[s] < now:
                _context_step(p, limits, router, table, served, s)
        s = _choose(router, limits, i, now, served.end)
        served.server[i] = s
        _queue_prompt(p, router, s, i, now, queries.inputs[i])
        p.wake[s] = _next_prompt_step(p, s)
    for s in range(limits.servers):
        while p.wake[s] < np.inf:
            _context_step(p, limits, router, table, served, s)


@_jit
def _next_mixed_step(prompts, batches, s):
    if batches.active[s, 0] > 0:
        return max(prompts.now[s], prompts.free[s, 0])
    return _next_prompt_step(prompts, s)


@_jit
def _mixed_step(prompts, batches, queries, limits, router, tables, served, s):
    """Run an aggregated server's step: chunks of admitted prompts, and one token for each sequence."""
    p, start, first, active = prompts, prompts.wake[s], prompts.head[s], batches.active[s, 0]
    while p.taken[s] < p.tail[s] and _admits(
        batches, queries, limits, s, p.line[s, p.taken[s]], served.blocked
    ):
        p.taken[s] += 1
    room = max(limits.max_num_tokens - active, 0)
    count = _rules.context_chunks(
        p.left[s], p.busy_until[s], first, p.taken[s], start, room, limits.max_batch, p.chunks
    )
    mean_tokens = batches.token_sum[s, 0] / max(active, 1)
    step = 1e-3 * _rules.mixed_step_ms(
        tables[0], tables[1], p.chunks, p.done[s, first:], count, active, mean_tokens
    )
    end = _rules.stage_pass(start, step, p.free[s])
    _record(served.busy, s, start, limits.bin_s, step)
    _emit(batches, queries, limits, router, s, 0, end, served.end)
    _advance(p, limits, s, count, end)
    for k in range(first, first + count):
        if p.chunks[k - first] > 0 and p.left[s, k] == 0:
            _join(batches, queries, limits, s, 0, p.line[s, k], end, served.first)
    p.wake[s] = _next_mixed_step(p, batches, s)


@_jit
def _serve_both(p, b, router, queries, limits, tables, served):
    for i in range(len(queries.inputs)):
        now = queries.arrivals[i]
        for s in range(limits.servers):
            while p.wake[s] < now:
                _mixed_step(p, b, queries, limits, router, tables, served, s)
        s = _choose(router, limits, i, now, served.end)
        served.server[i] = s
        _queue_prompt(p, router, s, i, now, queries.inputs[i])
        p.wake[s] = _next_mixed_step(p, b, s)
    for s in range(limits.servers):
        while p.wake[s] < np.inf:
            _mixed_step(p, b, queries, limits, router, tables, served, s)


@_jit
def _next_boundary(arrivals, batches, s):
    a = arrivals
    if batches.admitted[s] == a.in_move[s]:  # nobody generates
        if a.in_move[s] > 0:
            soonest = np.inf
            for k in range(a.in_move[s]):
                soonest = min(soonest, a.ready[a.moving[s, k]])
            a.now[s] = max(a.now[s], soonest)
        elif a.head[s] == a.tail[s]:
            return np.inf
    return max(a.now[s], a.free[s, 0], a.ends[s, a.turn[s]])


@_jit
def _join_ready(arrivals, batches, queries, limits, s, g, start, firsts):
    """Let those join whose KV cache has come, as far as the batch has room."""
    a, kept = arrivals, 0
    for k in range(a.in_move[s]):
        q = a.moving[s, k]
        if a.ready[q] > start or batches.active[s, g] == limits.max_batch:
            a.moving[s, kept] = q
            kept += 1
        else:
            _join(batches, queries, limits, s, g, q, start, firsts)
    a.in_move[s] = kept


@_jit
def _generation_step(arrivals, batches, queries, limits, router, steps, served, s):
    """Run the boundary at the server's wake: tokens of the step before go out, requests are admitted and join, the next step begins."""
    a, b, g, start = arrivals, batches, arrivals.turn[s], arrivals.wake[s]
    if b.active[s, g] > 0:
        _emit(b, queries, limits, router, s, g, start, served.end)
    while a.head[s] < a.tail[s] and _admits(b, queries, limits, s, a.line[s, a.head[s]], served.blocked):
        q = a.line[s, a.head[s]]
        a.head[s] += 1
        a.ready[q] = start + queries.transfer[q]
        a.moving[s, a.in_move[s]] = q
        a.in_move[s] += 1
    _join_ready(a, b, queries, limits, s, g, start, served.first)
    size = b.active[s, g]
    if size > 0:
        kv_lengths, step_ms, floor_ms = steps
        by_length = _rules.interpolate(kv_lengths, step_ms[size], b.token_sum[s, g] / size)
        step = 1e-3 * max(by_length, floor_ms[size])
        a.ends[s, g] = _rules.stage_pass(start, step, a.free[s])
        _record(served.busy, s, start, limits.bin_s, step / limits.pp)
    a.turn[s] = (g + 1) % limits.pp
    a.wake[s] = _next_boundary(a, b, s)


@_jit
def _serve_sequences(a, b, router, order, queries, limits, steps, served):
    for i in range(len(order)):
        q = order[i]
        now = queries.arrivals[q]
        for s in range(limits.servers):
            while a.wake[s] < now:
                _generation_step(a, b, queries, limits, router, steps, served, s)
        s = _choose(router, limits, i, now, served.end)
        served.server[q] = s
        router.loads[s] += router.weights[q]
        if a.wake[s] == np.inf:
            a.now[s] = now
        a.line[s, a.tail[s]] = q
        a.tail[s] += 1
        a.wake[s] = _next_boundary(a, b, s)
    for s in range(limits.servers):
        while a.wake[s] < np.inf:
            _generation_step(a, b, queries, limits, router, steps, served, s)


def run_context(queries, limits, table, served):
    """Serve every prompt; fills served.busy, server and end."""
    _serve_prompts(
        _make_prompts(queries, limits), _make_router(queries, limits), queries, limits, table, served
    )


def run_generation(order, queries, limits, steps, served):
    """Serve every sequence, in the order that the context servers hand them over; fills served."""
    arrivals, batches = _make_arrivals(queries, limits), _make_batches(queries, limits)
    _serve_sequences(arrivals, batches, _make_router(queries, limits), order, queries, limits, steps, served)


def run_aggregated(queries, limits, tables, served):
    """Serve every query on servers (of one stage) that compute prompts and generate; tables are a context and a generation one."""
    prompts, batches = _make_prompts(queries, limits), _make_batches(queries, limits)
    _serve_both(prompts, batches, _make_router(queries, limits), queries, limits, tables, served)


@_jit
def _fill_steps(table, sizes, padding, step_ms, eager):
    for batch in range(1, len(step_ms)):
        eager[batch] = _rules.captured_batch(batch, sizes, padding) == 0
        for j in range(len(table[3])):
            step_ms[batch, j] = _rules.generation_step_ms(table, batch, table[3][j], sizes, padding, 0.0)


def tabulate_generation(table, sizes, padding, eager_floor_ms, max_batch):
    """generation_step_ms for every batch at the table's KV lengths (between them it is linear), and the floor of each batch."""
    step_ms, eager = np.zeros((max_batch + 1, len(table[3]))), np.zeros(max_batch + 1, bool)
    _fill_steps(table, sizes, padding, step_ms, eager)
    return table[3], step_ms, np.where(eager, eager_floor_ms, 0.0)
