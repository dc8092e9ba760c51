"""Tables of what a run folder tells."""

import json

import pytest

from disagg_lib.run.tables import orchestrator_table
from disagg_lib.serving.prediction import orchestrator_cores


def samples(run, mode, cores):
    """A line a second: `cores` holds what each second took."""
    (run / "job").mkdir(exist_ok=True)
    used = 5.0
    with (run / "job/orchestrator.jsonl").open("a") as file:
        for second, share in enumerate([0.0, *cores]):
            used += share
            file.write(json.dumps({"time_s": 1000.0 + second, "mode": mode, "cpu_s": used}) + "\n")


def test_the_orchestrators_cores_are_a_mean_and_the_busiest_ten_seconds(tmp_path):
    samples(tmp_path, "performance", [0.2] * 20 + [0.9] * 10 + [0.2] * 10)
    samples(tmp_path, "accuracy", [0.1] * 30)
    table = orchestrator_table(tmp_path).set_index("mode")
    assert table["cores_mean"].tolist() == pytest.approx([0.375, 0.1], abs=0.006)
    assert table["cores_max"].tolist() == pytest.approx([0.9, 0.1], abs=0.01)
    assert table["note"]["performance"].startswith("the limit: ") and table["note"]["accuracy"] == ""


def test_a_run_without_samples_has_an_empty_table(tmp_path):
    assert list(orchestrator_table(tmp_path).columns) == ["mode", "cores_mean", "cores_max", "note"]
    assert len(orchestrator_table(tmp_path)) == 0


def test_the_planned_orchestrator_passes_half_a_core_at_72_gpus_only():
    assert orchestrator_cores("v5.1", 3.85) == pytest.approx(0.127, abs=0.001)
    assert orchestrator_cores("v5.1", 17.13) == pytest.approx(0.563, abs=0.001)
    assert orchestrator_cores("1.x", 17.13) == pytest.approx(0.619, abs=0.001)
