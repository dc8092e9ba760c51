"""Prediction against measurement: a run that the model itself made, the ledger, and what `calibrate` takes from it."""

import json

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from published_runs import GB200_V60, PUBLISHED_AT_HAND, V51

from disagg_lib.command_line import main
from disagg_lib.errors import CalibrationError
from disagg_lib.experiment.loading import experiment_text, load_experiment
from disagg_lib.serving import calibration_runs, ledger
from disagg_lib.serving.lengths import built_in_lengths
from disagg_lib.serving.loadgen_rules import random_load
from disagg_lib.serving.plan import deployment_of
from disagg_lib.serving.simulate import simulate
from disagg_lib.serving.stacks import read_stack

E = load_experiment([], {"engine": "trtllm"})


def made_folder(folder, stack="v5.1", slower=1.0):
    """A run folder whose record is what the model says under this stack, its times `slower`."""
    e = load_experiment([], {"stack": stack})
    load, lengths = random_load(3.85, 1, 0.001, 2000, equal_issue=False), built_in_lengths()
    run = simulate(deployment_of(e), load, lengths)
    ttft = run.ttft_ms * slower
    latency = ttft + run.tpot_ms * slower * (run.output_tokens - 1)
    columns = (
        load.samples,
        load.arrivals_s,
        np.zeros(2000),
        ttft,
        latency,
        run.input_tokens,
        run.output_tokens,
    )
    rows = [",".join(map(repr, map(float, row))) + ",ok" for row in zip(*columns, strict=True)]
    (folder / "job").mkdir(parents=True)
    header = "sample_index,issue_s,late_ms,ttft_ms,latency_ms,input_tokens,output_tokens,status"
    (folder / "job/queries_performance.csv").write_text("\n".join([header, *rows]) + "\n")
    (folder / "experiment.yaml").write_text(experiment_text(E))
    (folder / "job/settings.json").write_text(json.dumps({}))
    return folder


def test_a_run_that_follows_the_model_has_no_error(tmp_path):
    table = ledger.compare(made_folder(tmp_path / "run"))
    # The model holds admission to max_tokens; nothing was refused here.
    assert table["error"].abs().max() < 1e-6 and table["agrees"].all()
    assert table.set_index("figure").loc["tpot_p99_ms", "limit_ms"] == 80


def test_a_slower_run_is_told_by_its_error_and_its_side_of_the_limit(tmp_path):
    table = ledger.compare(made_folder(tmp_path / "run", slower=2.0)).set_index("figure")
    assert table["error"].to_numpy() == pytest.approx(-0.5, abs=1e-6)
    assert not table.loc["tpot_p99_ms", "agrees"]


def test_the_ledger_has_one_row_a_run_however_often_it_is_looked_at(tmp_path):
    shown = [ledger.compared(made_folder(tmp_path / name), E) for name in ("a", "b")]
    ledger.compared(tmp_path / "a", E)
    kept = ledger.read_ledger(tmp_path / "ledger.csv")
    assert sorted(kept["run"]) == ["a", "b"] and set(kept["source"]) == {"measured"}
    assert kept["error_ttft_p50_ms"].abs().max() < 1e-6 and set(kept["stack"]) == {"v5.1"}
    assert len(shown[0]) == 2 and not list(tmp_path.glob("*.draft"))


def test_what_cannot_be_compared_says_why_and_leaves_no_ledger(tmp_path):
    (tmp_path / "run").mkdir()
    assert "cannot be read" in ledger.compared(tmp_path / "run", E)[0]
    external = load_experiment([], {"engine": "external", "endpoint_url": "http://h:1"})
    assert "no layout" in ledger.compared(tmp_path / "run", external)[0]
    assert not (tmp_path / "ledger.csv").exists()


def test_calibrate_takes_the_ledgers_measured_runs_and_writes_a_stack(tmp_path):
    ledger.compared(made_folder(tmp_path / "a"), E)
    assert calibration_runs.runs_of_ledger(tmp_path / "ledger.csv") == ["a"]
    with pytest.raises(CalibrationError, match="no measured run in it"):
        calibration_runs.runs_of_ledger(tmp_path / "none.csv")
    text = calibration_runs.calibrate_runs([tmp_path / "a"], [], [], "", tmp_path / "site.yaml")
    found, shipped = read_stack(str(tmp_path / "site.yaml")), read_stack("v5.1")
    assert "give it as `stack`" in text and "the only run" in text
    assert found.b_context == pytest.approx(shipped.b_context, abs=0.02)
    assert found.host_ms == pytest.approx(shipped.host_ms, abs=0.4)
    with pytest.raises(CalibrationError, match="nothing is overwritten"):
        calibration_runs.calibrate_runs([tmp_path / "a"], [], [], "", tmp_path / "site.yaml")


@pytest.mark.skipif(not PUBLISHED_AT_HAND, reason="no published logs in ../shared")
def test_calibrate_takes_a_published_row_and_names_what_it_cannot_find(tmp_path):
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(V51.params))
    words = [str(tmp_path / "p.yaml")]
    done = CliRunner().invoke(
        main, ["calibrate", "--published", f"{V51.source}:x72", *words, "--out", str(tmp_path / "v.yaml")]
    )
    assert done.exit_code == 0, done.output
    assert "stack v: b_context 0.8" in done.output and "in sample: ttft_p50" in done.output
    done = CliRunner().invoke(
        main, ["calibrate", "--published", "Nowhere", *words, "--out", str(tmp_path / "w.yaml")]
    )
    assert done.exit_code == 1 and "0 rows have it" in done.output and not (tmp_path / "w.yaml").exists()


@pytest.mark.skipif(not PUBLISHED_AT_HAND, reason="no published logs in ../shared")
def test_a_log_with_another_rounds_or_no_seeds_is_refused(tmp_path):
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(V51.params))
    log = (
        GB200_V60.source.parent.parent / "mlperf_logs/Nebius__GB200-NVL72_GB200-186GB_aarch64x4_TRT__Offline"
    )
    arguments = ["calibrate", "--log", str(log), str(tmp_path / "p.yaml"), "--out", str(tmp_path / "v.yaml")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and "needed is a Server run" in done.output
