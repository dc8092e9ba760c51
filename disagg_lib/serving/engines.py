"""Servers in virtual time: context servers, generation servers, and aggregated ones that are both; compiled.

Between two arrivals each server runs the steps that begin before the second. Sequences that end are found in a calendar of
steps, so a step costs the same for any batch. A function of one server takes the group and the server's number: `(g, s, ...)`.
"""

import hashlib
import types
from collections import namedtuple
from pathlib import Path

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


# What is asked of a group of servers, in order of arrival: s, tokens; `needs` is KV tokens as GUARANTEED_NO_EVICT reserves.
Queries = namedtuple("Queries", "arrivals inputs outputs needs transfer")

# What a group's servers are allowed: see `simulate.ServerGroup`; `grows` is MAX_UTILIZATION's admission.
_LIMITS = "servers balanced by_tokens max_num_tokens max_batch pp chunks_overlap kv_capacity grows bin_s"
Limits = namedtuple("Limits", _LIMITS)

# What the loops fill: load over time, refusals for want of a slot and of KV room; per query its server, first token and end (s).
Served = namedtuple("Served", "busy blocked server first end")

# How long steps take: tables of the rules; `steps` of `tabulate_generation`. None: the group's servers have no such steps.
Tables = namedtuple("Tables", "context generation steps", defaults=(None, None, None))

# The state of a group, first index the server (then the pipeline batch).
_STATE = (
    "queries limits served"
    # What each has to do, in queries or tokens; `out` are its queries in order of their ends, which count until then.
    " loads weights out ended settled"
    # Who waits, in order of arrival: head to taken are admitted, taken to tail wait for that. `wake` is when the next step
    # begins, infinite with nothing to do; `free` when each stage is.
    " line left done busy_until head taken tail now wake free chunks"
    # Sequences that get a token each step; `crossing` counts those whose KV cache needs a further block at an emission with this
    # remainder.
    " active token_sum emissions calendar following crossing admitted kv_used"
    # Whose KV cache is on its way to a generation server, and ready when; whose `turn` it is, and when each batch's step ends.
    " moving in_move ready turn ends"
)
Group = namedtuple("Group", _STATE)


def _new_group(queries, limits, served) -> Group:
    servers, pp, n = limits.servers, limits.pp, len(queries.inputs)
    most = n if limits.balanced else n // servers + 1  # queries of one server
    numbers = {
        "loads ended settled head taken tail admitted kv_used in_move turn": (),
        "out": (most if limits.balanced else 0,),
        "line left done": (most,),
        "active token_sum emissions": (pp,),
        "crossing": (pp, _BLOCK),
        "moving": (limits.max_batch * pp,),
    }
    times = {"now": (), "busy_until": (most,), "free ends": (pp,)}
    state = {
        name: np.zeros((servers, *shape), dtype)
        for dtype, shapes in ((np.int64, numbers), (float, times))
        for names, shape in shapes.items()
        for name in names.split()
    }
    state |= {"wake": np.full(servers, np.inf), "ready": np.empty(n), "following": np.empty(n, np.int64)}
    state["calendar"] = np.full((servers, pp, queries.outputs.max() + 1), -1)
    state["weights"] = queries.inputs if limits.by_tokens else np.ones_like(queries.inputs)
    return Group(queries, limits, served, chunks=np.empty(most, np.int64), **state)


@_jit
def _choose(g, turn, now):
    """The server for a query that comes at `now`; its load counts from here."""
    if not g.limits.balanced:
        return turn % g.limits.servers
    for s in range(g.limits.servers):
        while g.settled[s] < g.ended[s] and g.served.end[g.out[s, g.settled[s]]] <= now:
            g.loads[s] -= g.weights[g.out[s, g.settled[s]]]
            g.settled[s] += 1
    return _rules.least_loaded(g.loads, turn)


@_jit
def _end(g, s, q, when):
    g.served.end[q] = when
    if g.limits.balanced:
        g.out[s, g.ended[s]] = q
        g.ended[s] += 1


@_jit
def _pass(g, s, start, step):
    """Send a step through the stages, note it as load, and return its end."""
    busy = g.served.busy
    busy[s, min(int(start / g.limits.bin_s), busy.shape[1] - 1)] += step / g.limits.pp
    return _rules.stage_pass(start, step, g.free[s])


@_jit
def _emit(g, s, b, when):
    """Give each sequence of a batch its next token; end those whose last one it is."""
    queries, ring = g.queries, g.calendar.shape[2]
    g.emissions[s, b] += 1
    g.token_sum[s, b] += g.active[s, b]
    turn = g.emissions[s, b]
    if g.limits.grows:
        g.kv_used[s] += _BLOCK * g.crossing[s, b, turn % _BLOCK]
    q = g.calendar[s, b, turn % ring]
    g.calendar[s, b, turn % ring] = -1
    while q >= 0:
        inputs, outputs, needs = queries.inputs[q], queries.outputs[q], queries.needs[q]
        tokens = inputs + outputs
        g.active[s, b] -= 1
        g.token_sum[s, b] -= tokens
        g.admitted[s] -= 1
        g.kv_used[s] -= _rules.kv_held(inputs, outputs, needs, g.limits.grows)
        g.crossing[s, b, (turn + 1 - tokens) % _BLOCK] -= 1
        _end(g, s, q, when)
        q = g.following[q]


@_jit
def _join(g, s, b, q, when):
    """Give a sequence its first token and a place in the batch."""
    inputs, needs, grows = g.queries.inputs[q], g.queries.needs[q], g.limits.grows
    g.served.first[q] = when
    g.active[s, b] += 1
    g.token_sum[s, b] += inputs + 1
    slot = (g.emissions[s, b] + g.queries.outputs[q] - 1) % g.calendar.shape[2]
    g.following[q] = g.calendar[s, b, slot]
    g.calendar[s, b, slot] = q
    g.crossing[s, b, (g.emissions[s, b] - inputs) % _BLOCK] += 1
    g.kv_used[s] += _rules.kv_held(inputs, 1, needs, grows) - _rules.kv_held(inputs, 0, needs, grows)


@_jit
def _admits(g, s, q):
    """Whether there is a slot and KV room for a query; if so, it takes them."""
    inputs, needs, limits = g.queries.inputs[q], g.queries.needs[q], g.limits
    if g.admitted[s] >= limits.max_batch * limits.pp:
        g.served.blocked[0] += 1
        return False
    if g.kv_used[s] + _rules.kv_asked(inputs, needs, limits.grows) > limits.kv_capacity:
        g.served.blocked[1] += 1
        return False
    g.admitted[s] += 1
    g.kv_used[s] += _rules.kv_held(inputs, 0, needs, limits.grows)
    return True


@_jit
def _prompt_step(g, s, context, generation):
    """Run the step that begins at the server's wake: a context server's (no generation table), or an aggregated one's, which also
    admits prompts and has one token for each sequence."""
    start, first, active, limits = g.wake[s], g.head[s], g.active[s, 0], g.limits
    if generation is None:
        g.taken[s] = g.tail[s]
    else:
        while g.taken[s] < g.tail[s] and _admits(g, s, g.line[s, g.taken[s]]):
            g.taken[s] += 1
    last, room = g.taken[s], max(limits.max_num_tokens - active, 0)
    prompts = g.left[s], g.busy_until[s], first, last
    count = _rules.context_chunks(*prompts, start, room, limits.max_batch, g.chunks)
    if generation is None:
        step = 1e-3 * _rules.context_step_ms(context, g.chunks, g.done[s, first:], count)
        end = _pass(g, s, start, step)
    else:
        mean_tokens = g.token_sum[s, 0] / max(active, 1)
        chunks = g.chunks, g.done[s, first:], count
        step = 1e-3 * _rules.mixed_step_ms(context, generation, *chunks, active, mean_tokens)
        end = _pass(g, s, start, step)
        _emit(g, s, 0, end)
    for k in range(first, first + count):
        g.left[s, k] -= g.chunks[k - first]
        g.done[s, k] += g.chunks[k - first]
        if g.chunks[k - first] > 0 and not limits.chunks_overlap:
            g.busy_until[s, k] = end
        if g.chunks[k - first] > 0 and g.left[s, k] == 0:
            if generation is None:
                _end(g, s, g.line[s, k], end)
            else:
                _join(g, s, 0, g.line[s, k], end)
    while g.head[s] < g.taken[s] and g.left[s, g.head[s]] == 0:
        g.head[s] += 1


@_jit
def _next_boundary(g, s):
    if g.admitted[s] == g.in_move[s]:  # nobody generates
        if g.in_move[s] > 0:
            soonest = np.inf
            for k in range(g.in_move[s]):
                soonest = min(soonest, g.ready[g.moving[s, k]])
            g.now[s] = max(g.now[s], soonest)
        elif g.head[s] == g.tail[s]:
            return np.inf
    return max(g.now[s], g.free[s, 0], g.ends[s, g.turn[s]])


@_jit
def _generation_step(g, s, steps):
    """Run the boundary at the server's wake: tokens of the step before go out, requests are admitted and join, the next step begins."""
    b, start = g.turn[s], g.wake[s]
    if g.active[s, b] > 0:
        _emit(g, s, b, start)
    while g.head[s] < g.tail[s] and _admits(g, s, g.line[s, g.head[s]]):
        q = g.line[s, g.head[s]]
        g.head[s] += 1
        g.ready[q] = start + g.queries.transfer[q]
        g.moving[s, g.in_move[s]] = q
        g.in_move[s] += 1
    kept = 0
    for k in range(g.in_move[s]):
        q = g.moving[s, k]
        if g.ready[q] > start or g.active[s, b] == g.limits.max_batch:
            g.moving[s, kept] = q
            kept += 1
        else:
            _join(g, s, b, q, start)
    g.in_move[s] = kept
    size = g.active[s, b]
    if size > 0:
        kv_lengths, step_ms, floor_ms = steps
        by_length = _rules.interpolate(kv_lengths, step_ms[size], g.token_sum[s, b] / size)
        g.ends[s, b] = _pass(g, s, start, 1e-3 * max(by_length, floor_ms[size]))
    g.turn[s] = (b + 1) % g.limits.pp


@_jit
def _next_step(g, s, steps):
    if steps is not None:
        g.wake[s] = _next_boundary(g, s)
        return
    start = max(g.now[s], g.free[s, 0])
    if g.active[s, 0] == 0:
        start = _rules.context_start(g.left[s], g.busy_until[s], g.head[s], g.tail[s], start)
    g.wake[s] = start


@_jit
def _run_until(g, when, context, generation, steps):
    for s in range(g.limits.servers):
        while g.wake[s] < when:
            if context is not None:  # one `if` a table, since numba leaves out what is under a None's
                _prompt_step(g, s, context, generation)
            if steps is not None:
                _generation_step(g, s, steps)
            _next_step(g, s, steps)


@_jit
def _serve(g, order, context, generation, steps):
    for i in range(len(order)):
        q = order[i]
        now = g.queries.arrivals[q]
        _run_until(g, now, context, generation, steps)
        s = _choose(g, i, now)
        g.served.server[q] = s
        g.now[s] = now
        g.line[s, g.tail[s]] = q
        g.left[s, g.tail[s]] = g.queries.inputs[q]
        g.tail[s] += 1
        g.loads[s] += g.weights[q]
        _next_step(g, s, steps)
    _run_until(g, np.inf, context, generation, steps)


def serve(queries, limits, tables, served, order=None):
    """Serve every query, in `order` of their arrivals if that is not their own; fills served.

    Which tables there are says what the servers do: `context` compute prompts; `context` and `generation` (of one stage) both compute
    prompts and generate; `steps` generate.
    """
    order = np.arange(len(queries.inputs)) if order is None else order
    _serve(_new_group(queries, limits, served), order, *tables)


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
