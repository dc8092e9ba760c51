"""Calibration: runs inverted into step times, constants solved from those, and the shipped stacks against published runs."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from published_runs import GB200_V60, GB300_V60, PUBLISHED_AT_HAND, V51, published_run

from disagg_lib.errors import CalibrationError
from disagg_lib.files import DATA
from disagg_lib.serving import plan
from disagg_lib.serving.calibrate import (
    FIGURES,
    Observed,
    calibrate,
    calibration_text,
    invert,
    length_draws,
    observe_record,
    observe_row,
    predict,
    relative_errors,
    solve,
    step_times,
    under,
)
from disagg_lib.serving.loadgen_rules import official_load
from disagg_lib.serving.simulate import Deployment, ServerGroup
from disagg_lib.serving.stacks import NO_STACK, read_stack

GENERATION = ServerGroup(
    1, 4, max_batch_size=512, max_num_tokens=512, cuda_graph_sizes=tuple(range(8, 513, 8))
)
DISAGGREGATED = Deployment("gb200", ServerGroup(4, 4), GENERATION)
needs_logs = pytest.mark.skipif(not PUBLISHED_AT_HAND, reason="no published logs in ../shared")


def made_run(name, qps, truth, **context):
    """A run that really has the steps of a stack; by default 4 x TP4 and 1 x TP4."""
    d = replace(DISAGGREGATED, context=replace(DISAGGREGATED.context, **context))
    run = Observed(name, d, official_load("v5.1", qps), {}, length_draws(1))
    return replace(run, figures=predict(under(run, truth)))


def test_inversion_finds_the_steps_that_made_the_figures():
    truth = replace(NO_STACK, context_factor=0.9, generation_factor=1.2)
    stack = invert(made_run("r", 3.0, truth), NO_STACK).deployment.stack
    assert (stack.context_factor, stack.generation_factor) == pytest.approx((0.9, 1.2), rel=0.002)


def test_constants_that_made_two_runs_are_solved_and_predict_each_from_the_other():
    truth = replace(NO_STACK, b_context=0.3, b_generation=0.0, host_ms=8.0)
    base = replace(truth, b_context=0.5, host_ms=0.0)
    runs = [made_run("a", 3.0, truth), made_run("b", 5.0, truth, count=6)]
    stack, table = calibrate(runs, base, "site")
    assert (stack.b_context, stack.b_generation) == (pytest.approx(0.3, abs=0.03), 0.0)
    assert stack.host_ms == pytest.approx(8.0, rel=0.05) and stack.fitted_on == ("a", "b")
    assert (
        table[[f"left_out_{f}" for f in ("ttft_p50_ms", "ttft_p90_ms", "tpot_p50_ms")]].abs().to_numpy().max()
        < 0.03
    )
    assert "left out: ttft_p50" in calibration_text(stack, table)


def test_generation_keeps_the_ratio_of_the_stack_it_began_from():
    step = {"context_compute": 500.0, "context_comm": 200.0, "context_needed": 600.0}
    step |= {"generation_compute": 40.0, "generation_comm": 20.0, "generation_needed": 60.0}
    assert solve([step], read_stack("v5.1"), ["r"]).b_generation == pytest.approx(0.5)
    assert solve([step], read_stack("v5.1"), ["r"]).host_ms == pytest.approx(10.0)
    assert solve([step], read_stack("v6.0"), ["r"]).b_generation == 0.0


def test_a_single_run_has_no_others_to_be_predicted_from():
    stack, table = calibrate([made_run("a", 2.5, NO_STACK)], NO_STACK, "site")
    assert table["left_out_ttft_p50_ms"].isna().all() and abs(table["context_residual"][0]) < 1e-9
    assert "the only run" in calibration_text(stack, table)


def test_a_run_that_no_step_time_reaches_is_a_sentence():
    run = made_run("odd", 3.0, NO_STACK)
    with pytest.raises(
        CalibrationError, match=r"odd: no generation step time within 0.4 to 2.5 .* reaches its tpot_p50_ms"
    ):
        invert(replace(run, figures=run.figures | {"tpot_p50_ms": 500.0}), NO_STACK)
    with pytest.raises(CalibrationError, match="odd: TTFT p50 is 70 ms"):
        invert(replace(run, figures=run.figures | {"ttft_p50_ms": 70.0}), NO_STACK)


def test_runs_of_aggregated_servers_have_no_separate_steps_to_solve():
    aggregated = Observed(
        "x", replace(DISAGGREGATED, context=None), official_load("v5.1", 1.0), {}, length_draws(1)
    )
    with pytest.raises(CalibrationError, match="aggregated ones have one step for both"):
        calibrate([aggregated], NO_STACK, "site")


# The promise of the shipped stacks


@needs_logs
@pytest.mark.parametrize(
    ("spec", "ttft", "tail", "tpot"),
    [(V51, 0.03, 0.10, 0.02), (GB200_V60, 0.07, 0.12, 0.025), (GB300_V60, 0.05, 0.08, 0.02)],
)
def test_shipped_stacks_give_the_published_runs(spec, ttft, tail, tpot):
    errors = relative_errors(published_run(spec, draws=8))
    assert max(abs(errors["ttft_p50_ms"]), abs(errors["ttft_p90_ms"])) < ttft, errors
    assert (
        abs(errors["ttft_p99_ms"]) < tail
        and max(abs(errors["tpot_p50_ms"]), abs(errors["tpot_p99_ms"])) < tpot
    ), errors


@needs_logs
def test_gb300_is_predicted_from_gb200():
    """Constants of GB200 v6.0 alone (facts: 0.203, 11.02 ms); the bound for TTFT p50, p90, p99 is 5, 5, 8 %, for TPOT 4 %."""
    alone = replace(read_stack("v6.0"), b_context=0.203, host_ms=11.02)
    errors = relative_errors(under(published_run(GB300_V60, draws=8), alone))
    bounds = {
        "ttft_p50_ms": 0.05,
        "ttft_p90_ms": 0.05,
        "ttft_p99_ms": 0.08,
        "tpot_p50_ms": 0.04,
        "tpot_p99_ms": 0.04,
    }
    assert {name: errors[name] for name in bounds if abs(errors[name]) > bounds[name]} == {}


@needs_logs
@pytest.mark.parametrize(
    ("spec", "qps", "within"), [(V51, 15.2, 0.04), (GB200_V60, 22.2, 0.015), (GB300_V60, 29.3, 0.015)]
)
def test_the_highest_valid_qps_is_what_was_published(spec, qps, within):
    run = published_run(spec, draws=8)
    least = spec.params.get("min_query_count", 100)
    loads = partial(official_load, spec.claimed, min_query_count=least)
    found = plan.qps_over_draws(run.deployment, run.lengths, loads, guess=qps, error=0.002)
    assert np.median(found) == pytest.approx(qps, rel=within)


@needs_logs
def test_the_shipped_constants_are_what_the_fit_finds():
    """Another implementation's constants (facts), found again here: the fit is no accident of one program."""
    base = read_stack("v5.1")
    found = solve([step_times(invert(published_run(V51), base))], base, ["d72"])
    assert found.b_context == pytest.approx(base.b_context, abs=0.02)
    assert found.host_ms == pytest.approx(base.host_ms, abs=0.4)


@pytest.mark.parametrize("submitter, system, scenario, qps, layout, bounds", [
    ("NVIDIA", "B200-SXM-180GBx8_TRT", "Interactive", 1.15, ("b200", 2, 1536), (0.06, 0.02)),
    ("NVIDIA", "B200-SXM-180GBx8_TRT", "Server", 1.9, ("b200", 2, 2048), (0.20, 0.06)),
    ("Azure", "ND_GB200_v6", "Server", 0.89, ("gb200", 1, 2048), (0.06, 0.03)),
    ("Nebius", "GB200-NVL72_GB200-186GB_aarch64x4_TRT", "Server", 0.91, ("gb200", 1, 2048), (0.06, 0.03)),
])  # fmt: skip
def test_aggregated_engines_are_predicted_from_one_run(submitter, system, scenario, qps, layout, bounds):
    """The aggregated stack, fitted on the first; TTFT and TPOT bounds over p50, p90, p99."""
    table = pd.read_csv(DATA / "published_v5.1.csv", comment="#")
    keys = {"submitter": submitter, "system": system, "scenario": scenario, "target_qps": qps}
    row = table.loc[(table[list(keys)] == pd.Series(keys)).all(axis=1)].iloc[0].to_dict()
    group = ServerGroup(layout[1], 4, max_batch_size=256, max_num_tokens=layout[2])
    d = Deployment(layout[0], None, group, read_stack("aggregated"), reserve_output_tokens=None)
    errors = relative_errors(observe_row(row, "v5.1", d, system))
    for name, bound in zip(("ttft", "tpot"), bounds, strict=True):
        assert max(abs(errors[f"{name}_p{q}_ms"]) for q in (50, 90, 99)) < bound, errors


# What is observed

HEADER = "sample_index,issue_s,late_ms,ttft_ms,latency_ms,input_tokens,output_tokens,status\n"


def recorded(folder, text):
    (folder / "job").mkdir()
    (folder / "job" / "queries_performance.csv").write_text(HEADER + text)
    return folder


def test_a_recorded_run_keeps_its_arrivals_and_lengths_whatever_the_order_and_pace(tmp_path):
    rows = "5,2.0,0,100,300,900,11,ok\n3,1.001,1.0,50,150,800,5,ok\n4,3.0,0,40,160,700,13,ok\n"
    run = observe_record(recorded(tmp_path, rows), DISAGGREGATED, 1.0, time_scale=0.5)
    assert run.load.arrivals_s == pytest.approx([0.0, 2.0, 4.0])
    assert run.lengths[0][run.load.samples]["input_tokens"].tolist() == [800, 900, 700]
    figures = [run.figures[f"{name}_ms"] for name in ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99")]
    assert figures == pytest.approx([51 / 0.5, 100 / 0.5, 20 / 0.5, 25 / 0.5])
    assert set(relative_errors(run)) >= set(FIGURES)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "0 of 0"),
        ("1,0,0,,5,9,0,timeout\n", "1 of 1 requests failed"),
        ("1,0,0,5\n", "1 of 1"),
        ("1,x,0,5,9,9,9,ok\n", "cannot be read"),
    ],
)
def test_an_incomplete_record_is_not_compared(tmp_path, text, word):
    with pytest.raises(CalibrationError, match=word):
        observe_record(recorded(tmp_path, text), DISAGGREGATED, 1.0)
    with pytest.raises(CalibrationError, match="cannot be read"):
        observe_record(tmp_path / "none", DISAGGREGATED, 1.0)


def test_a_published_row_without_token_figures_is_refused():
    row = pd.Series({"target_qps": 1.0, "min_duration_ms": 1, "tokens_per_sample": 650.0}).to_dict()
    with pytest.raises(CalibrationError, match="no ttft_p50_ms and tpot_p50_ms"):
        observe_row(row, "v5.1", DISAGGREGATED, "row")
