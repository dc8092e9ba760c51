"""The scheduling rules, one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_lib.serving import rules

XS, YS = (1.0, 2.0, 4.0), (10.0, 20.0, 60.0)


@pytest.mark.parametrize(("x", "y"), [(1, 10), (1.5, 15), (3, 40), (4, 60), (6, 100), (0, 0)])
def test_interpolation_is_linear_and_goes_on_beyond_the_ends(x, y):
    assert rules.interpolate(XS, YS, x) == pytest.approx(y)


@given(st.floats(0, 9), st.floats(0, 9))
def test_grid_interpolation_is_exact_for_a_bilinear_function(x, y):
    xs, ys = (0.0, 1.0, 5.0, 7.0), (0.0, 3.0, 4.0)
    grid = [2 + 3 * a + 5 * b + 7 * a * b for a in xs for b in ys]
    assert rules.interpolate_grid(xs, ys, grid, x, y) == pytest.approx(2 + 3 * x + 5 * y + 7 * x * y)


def test_several_requests_share_a_context_step_and_only_the_last_is_cut():
    chunks = [0] * 8
    assert rules.context_chunks([100, 200, 900, 50], [0.0] * 4, 0, 4, 0.0, 1000, 8, chunks) == 3
    assert chunks[:3] == [100, 200, 700]


def test_the_batch_limit_ends_a_context_step():
    assert rules.context_chunks([1, 1, 1], [0.0] * 3, 0, 3, 0.0, 1000, 2, [0, 0]) == 2


def test_a_prompt_whose_chunk_is_in_the_pipeline_sits_out_and_the_next_one_goes_on():
    left, busy_until, chunks = [500, 0, 700, 900], [3.0, 3.0, 0.0, 0.0], [0] * 4
    assert rules.context_chunks(left, busy_until, 0, 4, 2.0, 1000, 8, chunks) == 4
    assert chunks == [0, 0, 700, 300]
    assert rules.context_start(left, busy_until, 0, 4, 2.0) == 2.0
    assert rules.context_start(left, busy_until, 0, 2, 2.0) == 3.0


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=20), st.integers(1, 4096), st.integers(1, 10))
def test_context_steps_compute_every_token_once_in_order(lengths, max_num_tokens, max_batch_size):
    left, first, finished = list(lengths), 0, []
    chunks = [0] * max_batch_size
    while first < len(left):
        count = rules.context_chunks(
            left, [0.0] * len(left), first, len(left), 0.0, max_num_tokens, max_batch_size, chunks
        )
        assert 1 <= count <= max_batch_size and sum(chunks[:count]) <= max_num_tokens
        for i in range(count):
            left[first + i] -= chunks[i]
        while first < len(left) and left[first] == 0:
            finished.append(first)
            first += 1
    assert finished == list(range(len(lengths))) and not any(left)


@pytest.mark.parametrize(
    ("batch", "padding", "captured"), [(1, True, 1), (3, True, 4), (3, False, 0), (9, True, 0)]
)
def test_a_batch_is_padded_to_the_next_captured_size(batch, padding, captured):
    assert rules.captured_batch(batch, (1, 2, 4, 8), padding) == captured


def test_an_uncaptured_batch_cannot_step_faster_than_the_host_launches():
    table = ((1, 10), (5.0, 14.0), (1, 10), (0, 100), (0.0, 0.0, 0.0, 0.0))
    assert rules.generation_step_ms(table, 3, 50, (4,), True, 25.0) == pytest.approx(8.0)
    assert rules.generation_step_ms(table, 3, 50, (), True, 25.0) == 25.0


def test_stages_overlap_steps_but_not_one_step_with_itself():
    free = [0.0, 0.0]
    assert rules.stage_pass(0.0, 10.0, free) == 10.0
    assert free == [5.0, 10.0]
    assert rules.stage_pass(0.0, 10.0, free) == 15.0


def test_kv_is_held_in_whole_blocks_and_moved_at_the_bandwidth():
    assert rules.kv_tokens(100, 28) == 128 and rules.kv_tokens(100, 29) == 160
    assert rules.transfer_ms(10_000, 4, 8) == pytest.approx(5 + 12.9024)


def test_max_utilisation_asks_for_a_prompt_and_a_block_and_grows():
    assert rules.kv_asked(100, 2144, True) == 160 and rules.kv_asked(100, 2144, False) == 2144
    assert [rules.kv_held(100, emitted, 2144, True) for emitted in (0, 28, 29)] == [128, 128, 160]
    assert rules.kv_held(100, 29, 2144, False) == 2144


def test_least_loaded_takes_ties_in_turn():
    assert [rules.least_loaded([1, 0, 2, 0], turn) for turn in range(4)] == [1, 3, 1, 3]
    assert rules.least_loaded([5, 4, 3], 7) == 2
