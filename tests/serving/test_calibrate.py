"""Calibration: two constants, fitted on some runs and scored on others."""

import pytest
import yaml

from disagg_lib.errors import CalibrationError
from disagg_lib.serving.calibrate import (
    FIGURES,
    SHIPPED,
    Calibration,
    Observed,
    calibrate,
    fit,
    observe,
    predict,
    read_calibration,
    relative_errors,
    write_calibration,
)
from disagg_lib.serving.simulate import Deployment, ServerGroup

FITTED_ON = "NVIDIA B200 x8 Interactive"
GENERATION = ServerGroup(
    1, 4, max_batch_size=512, max_num_tokens=512, cuda_graph_sizes=tuple(range(8, 513, 8))
)
DISAGGREGATED = Deployment("gb200", ServerGroup(4, 4), GENERATION)


def published_aggregated_runs():
    """The published runs that the shipped calibration was fitted on and scored against."""
    runs = {}
    for name, e in yaml.safe_load(SHIPPED.read_text())["runs"].items():
        group = ServerGroup(e["servers"], e["tp"], max_batch_size=e["batch"], max_num_tokens=e["tokens"])
        deployment = Deployment(e["system"], None, group, reserve_output_tokens=None)
        runs[name] = Observed(name, deployment, e["target_qps"], {key: e[key] for key in FIGURES})
    return runs


def made_run(name, qps, truth):
    run = Observed(name, DISAGGREGATED, qps, {})
    return Observed(name, DISAGGREGATED, qps, predict(run, truth, range(50, 54)))


def test_fit_finds_the_constants_that_made_the_figures():
    found = fit([made_run("r", 3.0, Calibration(0.9, 1.2))], seeds=range(50, 54))
    assert (found.context_factor, found.generation_factor) == pytest.approx((0.9, 1.2), rel=0.002)
    assert found.fitted_on == ("r",)


def test_calibrate_scores_each_run_with_constants_of_the_others():
    truth = Calibration(0.9, 1.2)
    calibration, rows = calibrate(
        [made_run("a", 2.5, truth), made_run("b", 3.0, truth)], range(2), range(10, 13)
    )
    assert calibration.fitted_on == ("a", "b")
    for row in rows:
        assert not row["used_in_fit"]
        assert abs(row["after_tpot_mean_ms"]) < 0.02 < abs(row["before_tpot_mean_ms"])


def test_a_single_run_is_marked_as_used_in_the_fit():
    assert calibrate([made_run("a", 2.5, Calibration())], range(2), range(2))[1][0]["used_in_fit"]


def test_published_aggregated_runs_are_predicted_from_one_of_them():
    """The promise of the model on aggregated runs: fitted on B200 x8 Interactive, B200 x8 Server within 10 %, GB200 x4 within 20 %."""
    calibration, runs = read_calibration(), published_aggregated_runs()
    assert calibration.fitted_on == (FITTED_ON,)
    for name, run in runs.items():
        bound = 0.10 if "B200 x8" in name else 0.20
        errors = relative_errors(run, calibration, range(16))
        assert max(map(abs, errors.values())) < bound, (name, errors)


def test_the_shipped_constants_are_what_the_fit_finds():
    found, shipped = fit([published_aggregated_runs()[FITTED_ON]]), read_calibration()
    assert found.context_factor == pytest.approx(shipped.context_factor, rel=0.005)
    assert found.generation_factor == pytest.approx(shipped.generation_factor, rel=0.005)


def test_written_calibration_reads_back_and_is_never_overwritten(tmp_path):
    write_calibration(Calibration(0.9, 1.1, ("mine",)), tmp_path / "c.yaml")
    assert read_calibration(tmp_path / "c.yaml") == Calibration(0.9, 1.1, ("mine",))
    with pytest.raises(FileExistsError):
        write_calibration(Calibration(), tmp_path / "c.yaml")


def test_stacks_are_not_fitted_together_and_gaps_are_named():
    aggregated = published_aggregated_runs()[FITTED_ON]
    with pytest.raises(CalibrationError, match="apart"):
        fit([aggregated, made_run("d", 2.0, Calibration())])
    with pytest.raises(CalibrationError, match="no tpot_mean_ms"):
        fit([Observed("x", DISAGGREGATED, 1.0, {k: 1.0 for k in FIGURES if k != "tpot_mean_ms"})])


@pytest.mark.parametrize(
    "text",
    ["", "- 1\n", "context_factor: 1\n", "context_factor: -1\ngeneration_factor: 1\nfitted_on: [a]\n", "{"],
)
def test_a_bad_calibration_file_is_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(CalibrationError, match="c.yaml"):
        read_calibration(tmp_path / "c.yaml")


HEADER = "sample_index,issue_s,late_ms,ttft_ms,latency_ms,input_tokens,output_tokens,status\n"


def recorded(folder, text):
    (folder / "job").mkdir()
    (folder / "job" / "queries_performance.csv").write_text(HEADER + text)
    return folder


def test_a_recorded_run_keeps_its_arrivals_and_lengths_whatever_the_order_and_pace(tmp_path):
    rows = "5,2.0,0,100,300,900,11,ok\n3,1.001,1.0,50,150,800,5,ok\n"
    run = observe(recorded(tmp_path, rows), DISAGGREGATED, 1.0, time_scale=0.5)
    assert run.load.arrivals_s == pytest.approx([0.0, 2.0])
    assert run.lengths[run.load.samples]["input_tokens"].tolist() == [800, 900]
    assert run.figures["ttft_mean_ms"] == pytest.approx((100 + 51) / 2 / 0.5)
    assert run.figures["tpot_mean_ms"] == pytest.approx((20 + 25) / 2 / 0.5)
    assert set(relative_errors(run, Calibration(), names=("ttft_p90_ms", "tpot_p99_ms"))) == {
        "ttft_p90_ms",
        "tpot_p99_ms",
    }


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
        observe(recorded(tmp_path, text), DISAGGREGATED, 1.0)
    with pytest.raises(CalibrationError, match="cannot be read"):
        observe(tmp_path / "none", DISAGGREGATED, 1.0)
