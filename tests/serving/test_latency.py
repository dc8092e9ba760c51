"""The shipped latency tables."""

import numpy as np
import pytest

from disagg_lib.errors import LatencyTableError
from disagg_lib.serving import latency, rules
from disagg_lib.serving.latency import read_table, server_shapes

SHIPPED = [(system, *shape) for system in ("gb200", "gb300", "b200") for shape in server_shapes(system)]


def context_ms(table, new, past=0):
    return rules.context_step_ms(table.context, [new], [past], 1)


def generation_ms(table, batch, tokens):
    return rules.generation_step_ms(table.generation, batch, tokens, (batch,), False, 0.0)


@pytest.mark.parametrize(
    ("tp", "chunk", "prompt", "step128", "step160", "kv_millions"),
    [(2, 507, 1274, 62.7, 72.2, 0.56), (4, 336, 820, 42.8, 48.2, 1.99), (8, 254, 584, 31.0, 35.4, 4.85), (16, 214, 472, 29.1, 33.3, 5.27)],
)  # fmt: skip
def test_gb200_table_gives_the_example_values_of_the_library(
    tp, chunk, prompt, step128, step160, kv_millions
):
    table = read_table("gb200", tp)
    found = (
        context_ms(table, 4096),
        context_ms(table, 9400),
        generation_ms(table, 128, 9700),
        generation_ms(table, 160, 9700),
    )
    assert found == pytest.approx((chunk, prompt, step128, step160), rel=0.01)
    assert table.kv_capacity_tokens(0.95, 4096) / 1e6 == pytest.approx(kv_millions, rel=0.02)


def test_every_promised_shape_is_shipped():
    wanted = {(s, tp, pp) for s in ("gb200", "gb300") for tp in (2, 4, 8, 16) for pp in (1, 2)}
    assert wanted | {("b200", 4, 1), ("b200", 8, 1)} <= set(SHIPPED)


@pytest.mark.parametrize(("system", "tp", "pp"), SHIPPED)
def test_steps_grow_with_work_and_memory_holds_the_weights(system, tp, pp):
    table = read_table(system, tp, pp)
    assert (
        0
        < context_ms(table, 64)
        < context_ms(table, 1024)
        < context_ms(table, 4096)
        < context_ms(table, 4096, 8192)
    )
    assert (
        0 < generation_ms(table, 1, 9700) < generation_ms(table, 64, 9700) < generation_ms(table, 512, 9700)
    )
    # 405e9 parameters at a little over half a byte, shared by all GPUs of the server.
    assert 200e9 < table.weights_bytes * tp * pp < 260e9
    assert table.kv_capacity_tokens(0.5, 512) < table.kv_capacity_tokens(0.95, 512)


def test_two_stages_hold_twice_the_cache_of_one():
    one, two = (read_table("gb200", 8, pp).kv_capacity_tokens(0.95, 4096) for pp in (1, 2))
    assert two > 2 * one


def test_unknown_tables_are_refused_with_what_there_is():
    with pytest.raises(LatencyTableError, match="b200, gb200, gb300"):
        read_table("a100", 4)
    with pytest.raises(LatencyTableError, match="TP2 PP1, TP4 PP1"):
        read_table("gb200", 1)


def test_a_damaged_table_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "latency_x.json").write_text("{")
    monkeypatch.setattr(latency, "DATA", tmp_path)
    with pytest.raises(LatencyTableError, match="latency_x.json: cannot be read"):
        read_table("x", 4)


@pytest.mark.parametrize(("system", "tp", "pp"), SHIPPED)
def test_tables_are_within_two_percent_of_the_library(system, tp, pp):
    pytest.importorskip("aiconfigurator_core", reason="extra `latency` is not installed")
    table, library = read_table(system, tp, pp), latency.compile_engine(system, tp, pp)
    random = np.random.RandomState(1)
    for _ in range(300):
        new = int(random.randint(1, 8193))
        past = int(random.randint(0, 20001 - new))
        truth = library.predict_prefill_latency(1, new + past, past)
        assert context_ms(table, new, past) == pytest.approx(truth, rel=0.02)
        batch, length = int(random.randint(1, 513)), int(random.randint(500, 22001))
        truth = library.decode_step_latency(batch, length, 2)
        assert generation_ms(table, batch, length) == pytest.approx(truth, rel=0.02)
