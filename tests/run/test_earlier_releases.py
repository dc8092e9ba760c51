"""A run folder that an earlier release made (tests/data/run_before_rooms, a rehearsal) still opens everywhere."""

import shutil
from pathlib import Path

import pytest

from disagg_lib.cluster.launch import job_state, submit
from disagg_lib.errors import JobError
from disagg_lib.experiment.loading import load_recorded
from disagg_lib.results.outputs import write_outputs
from disagg_lib.results.rows import read_result, run_row
from disagg_lib.run.tables import parameters_table, phases_table
from disagg_lib.sharing.crate import export_crate
from disagg_lib.sharing.pages import export_html


@pytest.fixture
def earlier(tmp_path):
    return Path(shutil.copytree(Path(__file__).parents[1] / "data/run_before_rooms", tmp_path / "run"))


def test_its_parameters_phases_and_job_are_read(earlier):
    assert load_recorded(earlier).num_ctx_servers == 4
    assert list(phases_table(earlier)["phase"])[-1] == "done"
    assert len(parameters_table(load_recorded(earlier))) > 5
    assert job_state(earlier).state == "done"


def test_its_result_is_judged_and_its_outputs_are_written_again(earlier):
    assert read_result(earlier).verdict.claim.source == "rehearsed"
    assert run_row(earlier)["ttft_p99_ms"] > 4500 and run_row(earlier)["error"] == ""
    assert {path.suffix for path in write_outputs(earlier)} == {".png", ".csv", ".json"}


def test_it_can_be_shared(earlier, tmp_path):
    export_html(earlier, tmp_path / "pages")
    export_crate(earlier, tmp_path / "crate")
    assert (tmp_path / "pages/index.html").exists() and (tmp_path / "crate/ro-crate-metadata.json").exists()


def test_a_job_that_was_not_started_yet_is_refused_with_what_made_it(earlier):
    for name in ("job.json", "phases.jsonl"):
        (earlier / "job" / name).unlink()
    with pytest.raises(
        JobError, match=r"written by [0-9a-f]{40}, whose .* Make a new run \(03_configuration\)"
    ):
        submit(earlier)
