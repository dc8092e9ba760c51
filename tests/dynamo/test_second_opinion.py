"""The model beside Dynamo's mocker, another scheduler on the same arrivals, lengths and step times (benchmarks/dynamo_mocker.py)."""

import importlib.util
import sys
from dataclasses import replace

import numpy as np
import pytest

from disagg_lib.experiment.loading import load_experiment
from disagg_lib.files import REPOSITORY
from disagg_lib.serving import rules
from disagg_lib.serving.lengths import LENGTHS
from disagg_lib.serving.loadgen_rules import Load
from disagg_lib.serving.plan import deployment_of
from disagg_lib.serving.simulate import simulate

PARAMS = REPOSITORY / "params/gb200_20gpu.yaml"


@pytest.fixture(scope="module")
def mocker():
    spec = importlib.util.spec_from_file_location("dynamo_mocker", REPOSITORY / "benchmarks/dynamo_mocker.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def replayed(mocker):
    if not mocker.PYTHON.exists():
        pytest.skip(f"{mocker.PYTHON} is missing: ai-dynamo 1.4.0 could not be installed")
    return mocker


@pytest.mark.parametrize("whole", [False, True], ids=["chunked", "whole prompts"])
def test_a_prompt_alone_takes_our_time_and_one_generation_step_more(replayed, tmp_path, whole):
    d = deployment_of(load_experiment([PARAMS]))
    d = replace(d, context=replace(d.context, count=1))
    lengths = np.array([(9400, 50)], LENGTHS)
    run = simulate(d, Load(1.0, np.zeros(1), np.zeros(1, int)), lengths)
    replayed.write_trace(tmp_path / "trace.jsonl", np.zeros(1), run.input_tokens, run.output_tokens)
    arguments = replayed.engine_arguments(d, run.input_tokens, whole, tmp_path)
    row = replayed.replay(d, tmp_path / "trace.jsonl", arguments, tmp_path).iloc[0]
    step_ms = (row["last_token_ms"] - row["first_token_ms"]) / 49
    added_ms = d.stack.ttft_ms + rules.TRANSFER_FIXED_MS
    assert row["ttft_ms"] + added_ms - step_ms == pytest.approx(run.ttft_ms[0], rel=0.005)
    assert step_ms == pytest.approx(run.tpot_ms[0], rel=0.01)


def test_under_load_both_say_the_same_where_their_rules_are_the_same(replayed):
    table = replayed.compare(str(PARAMS), 1500)
    off = table["whole prompts", "difference"]
    assert off[["tpot p50", "tpot p99", "tokens/s"]].abs().max() < 2
    assert off[["ttft p50", "ttft p90", "ttft p99"]].abs().max() < 8


def test_without_dynamo_it_says_so_and_compares_nothing(mocker, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(mocker, "PYTHON", tmp_path / "python")
    monkeypatch.setattr(sys, "argv", ["dynamo_mocker.py"])
    mocker.main()
    assert "is missing: `make test-dynamo` makes it. Nothing was compared." in capsys.readouterr().out
