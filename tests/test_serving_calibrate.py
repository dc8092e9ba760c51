"""Calibration: two constants, fitted on some runs and scored on others."""

import pytest

from disagg_lib.serving.calibrate import (
    FIGURES,
    Calibration,
    CalibrationError,
    Observed,
    calibrate,
    fit,
    predict,
    published_aggregated_runs,
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
        [made_run("a", 2.5, truth), made_run("b", 3.0, truth)], range(4), range(10, 14)
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
