"""How TensorRT-LLM schedules: the rules that the rehearsal server and the simulation both run.

Plain Python on numbers and indexable sequences: the rehearsal calls them as they are, `simulate` compiles these same
functions with numba. Times are in whatever unit the caller uses, step times in ms; tables are `LatencyTable.context` and
`.generation`. Source: facts of TensorRT-LLM's PyTorch executor (first-come-first-served chunks, in-flight batching, admission by
GUARANTEED_NO_EVICT or MAX_UTILIZATION, whose pausing is not modelled).
"""

import math

KV_BLOCK_TOKENS = 32
KV_BYTES_PER_TOKEN = 258_048  # of the whole model in FP8: 2 x 126 layers x 8 heads x 128
# Assumptions of the model; docs/boundaries.md says what they stand on.
TRANSFER_GB_PER_S_PER_GPU = 50.0  # one 400 Gbit/s port for each GPU; NVLink would be faster
TRANSFER_FIXED_MS = 5.0
EAGER_FLOOR_MS = 25.0  # a step without CUDA graph: 126 layers at about 200 us of host work each


def cell(xs, x):
    """The neighbours low and high of x in xs (ascending), and how far it is from low to high; outside, the end cell's."""
    low, high = 0, len(xs) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if xs[middle] <= x:
            low = middle
        else:
            high = middle
    return low, high, (x - xs[low]) / (xs[high] - xs[low])


def interpolate(xs, ys, x):
    """Piecewise linear through (xs, ys), xs ascending; beyond the ends the last slope goes on."""
    low, high, u = cell(xs, x)
    return ys[low] + (ys[high] - ys[low]) * u


def interpolate_grid(xs, ys, grid, x, y):
    """Bilinear in grid[i * len(ys) + j] = value at (xs[i], ys[j]); beyond the ends the last slope goes on."""
    low, high, u = cell(xs, x)
    left, right, v = cell(ys, y)
    near, far = low * len(ys), high * len(ys)
    at_low = grid[near + left] * (1 - v) + grid[near + right] * v
    at_high = grid[far + left] * (1 - v) + grid[far + right] * v
    return at_low * (1 - u) + at_high * u


def context_start(left, busy_until, first, last, start):
    """When the next context step can begin: at `start`, or later, when the first of the prompts in flight is back."""
    soonest = math.inf
    for k in range(first, last):
        if left[k] > 0:
            if busy_until[k] <= start:
                return start
            soonest = min(soonest, busy_until[k])
    return soonest


def context_chunks(left, busy_until, first, last, start, max_num_tokens, max_batch_size, chunks):
    """Fill chunks[0:k] for the context step at `start` and return k: chunks[i] tokens of request first + i, 0 if it sits out.

    left[first:last] are the prompt tokens not yet computed, in order of arrival. First come, first served: each request
    gets all it still needs until the step is full, so at most the last one is cut. A prompt whose last chunk is still in
    the pipeline (busy_until) sits out: with PP, releases before 1.2 do not let chunks of one prompt follow each other.
    """
    room, requests, count = max_num_tokens, 0, 0
    while first + count < last and requests < max_batch_size and room > 0:
        chunks[count] = min(left[first + count], room) if busy_until[first + count] <= start else 0
        room -= chunks[count]
        requests += chunks[count] > 0
        count += 1
    return count


def context_step_ms(table, chunks, done, count, batch=0):
    """Time of a context step: the dense part of all its tokens, plus attention of each request (new x past).

    With a batch, what the chunks add to a step that has one token for each of so many sequences.
    """
    tokens, dense_ms, new, past, attention_ms = table
    total = batch
    attention = 0.0
    for i in range(count):
        if chunks[i] > 0:
            total += chunks[i]
            attention += interpolate_grid(new, past, attention_ms, chunks[i], done[i])
    dense = interpolate(tokens, dense_ms, total)
    if batch > 0:
        dense -= interpolate(tokens, dense_ms, batch)
    return dense + attention


def captured_batch(batch, sizes, padding):
    """The CUDA-graph size that runs this batch (sizes ascending), or 0: no graph fits and the step is launched eagerly."""
    for size in sizes:
        if size == batch or (padding and size > batch):
            return size
    return 0


def generation_step_ms(table, batch, mean_tokens, sizes, padding, eager_floor_ms):
    """Time of a generation step: dense part of the padded batch, attention of the real one; without a graph eager_floor_ms at least."""
    batches, dense_ms, kv_batches, kv_lengths, kv_ms = table
    graph = captured_batch(batch, sizes, padding)
    attention = interpolate_grid(kv_batches, kv_lengths, kv_ms, batch, mean_tokens)
    if graph == 0:
        return max(interpolate(batches, dense_ms, batch) + attention, eager_floor_ms)
    return interpolate(batches, dense_ms, graph) + attention


def mixed_step_ms(context, generation, chunks, done, count, batch, mean_tokens):
    """Time of a step with `count` prompt chunks and one token for each of `batch` sequences (aggregated servers, no graphs)."""
    added = context_step_ms(context, chunks, done, count, batch)
    if batch == 0:
        return added
    batches, batch_ms, kv_batches, kv_lengths, kv_ms = generation
    alone = interpolate(batches, batch_ms, batch)
    alone += interpolate_grid(kv_batches, kv_lengths, kv_ms, batch, mean_tokens)
    return alone + added


def stage_pass(start, step, stage_free):
    """Send a step through the stages, each an equal share of it, and return its end; stage_free, when each is free again, moves on."""
    share = step / len(stage_free)
    for stage in range(len(stage_free)):
        start = max(start, stage_free[stage]) + share
        stage_free[stage] = start
    return start


def kv_tokens(input_tokens, new_tokens):
    """KV-cache tokens of a prompt with so many new ones, in whole blocks; with all that may come, what GUARANTEED_NO_EVICT reserves."""
    return -(-(input_tokens + new_tokens) // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS


def kv_held(input_tokens, emitted, reserved, grows):
    """KV-cache tokens that an admitted request holds: what it has so far (`grows`: MAX_UTILIZATION), or what was reserved for it."""
    return kv_tokens(input_tokens, emitted) if grows else reserved


def kv_asked(input_tokens, reserved, grows):
    """KV-cache tokens that must be free to admit a request: with MAX_UTILIZATION its prompt's and one block more."""
    return kv_tokens(input_tokens, 0) + KV_BLOCK_TOKENS if grows else reserved


def transfer_ms(input_tokens, context_gpus, generation_gpus):
    """Time to move a prompt's KV cache from a context to a generation server, over as many ports as both have GPUs for."""
    gb_per_s = TRANSFER_GB_PER_S_PER_GPU * min(context_gpus, generation_gpus)
    return TRANSFER_FIXED_MS + input_tokens * KV_BYTES_PER_TOKEN / (gb_per_s * 1e6)


def least_loaded(loads, turn):
    """Index of the smallest load; ties are taken in turn (routers `load_balancing`, `least_tokens`)."""
    lowest, ties = loads[0], 0
    for load in loads:
        if load < lowest:
            lowest, ties = load, 0
        ties += load == lowest
    passed, chosen = turn % ties, 0
    for i in range(len(loads)):
        if loads[i] == lowest:
            chosen = i
            if passed == 0:
                break
            passed -= 1
    return chosen
