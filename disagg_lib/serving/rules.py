"""How TensorRT-LLM schedules: the rules that the rehearsal server and the simulation both run.

Plain Python on numbers and indexable sequences: the rehearsal calls them as they are, `simulate` compiles these same
functions with numba. Times are in whatever unit the caller uses, step times in ms. Source: facts of TensorRT-LLM's
PyTorch executor (first-come-first-served chunks, in-flight batching, GUARANTEED_NO_EVICT admission).
"""

KV_BLOCK_TOKENS = 32
# Assumptions of the model; docs/boundaries.md says what they stand on.
TRANSFER_GB_PER_S_PER_GPU = 50.0  # one 400 Gbit/s port for each GPU; NVLink would be faster
TRANSFER_FIXED_MS = 5.0
EAGER_FLOOR_MS = 25.0  # a step without CUDA graph: 126 layers at about 200 us of host work each


def interpolate(xs, ys, x):
    """Piecewise linear through (xs, ys), xs ascending; beyond the ends the last slope goes on."""
    low, high = 0, len(xs) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if xs[middle] <= x:
            low = middle
        else:
            high = middle
    return ys[low] + (ys[high] - ys[low]) * ((x - xs[low]) / (xs[high] - xs[low]))


def interpolate_grid(xs, ys, grid, x, y):
    """Bilinear in grid[i * len(ys) + j] = value at (xs[i], ys[j]); beyond the ends the last slope goes on."""
    low, high = 0, len(xs) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if xs[middle] <= x:
            low = middle
        else:
            high = middle
    left, right = 0, len(ys) - 1
    while right - left > 1:
        middle = (left + right) // 2
        if ys[middle] <= y:
            left = middle
        else:
            right = middle
    u = (x - xs[low]) / (xs[high] - xs[low])
    v = (y - ys[left]) / (ys[right] - ys[left])
    row, next_row, n = low * len(ys), high * len(ys), left
    near = grid[row + n] * (1 - v) + grid[row + right] * v
    far = grid[next_row + n] * (1 - v) + grid[next_row + right] * v
    return near * (1 - u) + far * u


def context_chunks(left, first, last, max_num_tokens, max_batch_size, chunks):
    """Fill chunks[0:k] for one context step and return k, the number of requests in it.

    left[first:last] are the prompt tokens not yet computed, in order of arrival. First come, first served: each request
    gets all it still needs until the step is full, so at most the last one is cut.
    """
    room = max_num_tokens
    count = 0
    while first + count < last and count < max_batch_size and room > 0:
        chunk = min(left[first + count], room)
        chunks[count] = chunk
        room -= chunk
        count += 1
    return count


def context_step_ms(tokens, dense_ms, new, past, attention_ms, chunks, done, count):
    """Time of a context step: the dense part of all its tokens, plus attention of each request (new x past)."""
    total = 0
    attention = 0.0
    for i in range(count):
        total += chunks[i]
        attention += interpolate_grid(new, past, attention_ms, chunks[i], done[i])
    return interpolate(tokens, dense_ms, total) + attention


def captured_batch(batch, sizes, padding):
    """The CUDA-graph size that runs this batch (sizes ascending), or 0: no graph fits and the step is launched eagerly."""
    for size in sizes:
        if size == batch or (padding and size > batch):
            return size
    return 0


def generation_step_ms(
    batches, dense_ms, kv_batches, kv_lengths, kv_ms, batch, mean_tokens, sizes, padding, eager_floor_ms
):
    """Time of a generation step: dense part of the padded batch, attention of the real one.

    Without a captured graph no step is shorter than eager_floor_ms, the time the host needs to launch it.
    """
    graph = captured_batch(batch, sizes, padding)
    attention = interpolate_grid(kv_batches, kv_lengths, kv_ms, batch, mean_tokens)
    if graph == 0:
        return max(interpolate(batches, dense_ms, batch) + attention, eager_floor_ms)
    return interpolate(batches, dense_ms, graph) + attention


def stage_pass(start, step, stage_free):
    """Send one step through the pipeline stages, each an equal share of it; return its end.

    stage_free[s] is when stage s can start its next step; it is moved on. With one stage the end is start + step.
    """
    share = step / len(stage_free)
    for stage in range(len(stage_free)):
        start = max(start, stage_free[stage]) + share
        stage_free[stage] = start
    return start


def kv_tokens(input_tokens, max_new_tokens, block):
    """KV-cache tokens that a request holds from admission to its end, in whole blocks (GUARANTEED_NO_EVICT)."""
    return -(-(input_tokens + max_new_tokens) // block) * block


def transfer_ms(input_tokens, bytes_per_token, gb_per_s, fixed_ms):
    """Time to move a prompt's KV cache from context to generation server; gb_per_s is 10^9 bytes a second."""
    return fixed_ms + input_tokens * bytes_per_token / (gb_per_s * 1e6)


def least_loaded(loads, turn):
    """Index of the smallest load; ties are taken in turn (router `load_balancing`)."""
    lowest = loads[0]
    ties = 0
    for load in loads:
        if load < lowest:
            lowest, ties = load, 1
        elif load == lowest:
            ties += 1
    skip = turn % ties
    for i in range(len(loads)):
        if loads[i] == lowest:
            if skip == 0:
                return i
            skip -= 1
    return 0


def aggregated_step_ms(
    tokens, dense_ms, new, past, attention_ms, kv_batches, kv_lengths, kv_ms,
    chunks, done, count, batch, mean_tokens, context_factor, generation_factor,
):  # fmt: skip
    """Time of a mixed step of an aggregated server: `count` prompt chunks and one token for each of `batch` sequences.

    What the sequences alone would take is scaled by generation_factor, what the chunks add to it by context_factor.
    """
    total = batch
    attention = 0.0
    for i in range(count):
        total += chunks[i]
        attention += interpolate_grid(new, past, attention_ms, chunks[i], done[i])
    generation = 0.0
    alone = 0.0
    if batch > 0:
        alone = interpolate(tokens, dense_ms, batch)
        generation = alone + interpolate_grid(kv_batches, kv_lengths, kv_ms, batch, mean_tokens)
    if count > 0:
        attention += interpolate(tokens, dense_ms, total) - alone
    return context_factor * attention + generation_factor * generation
