"""What the job leaves behind by digest, and how the gate and the manifest use it."""

import json

from runs import make_valid_run, set_json

from disagg_lib.files import sha256
from disagg_lib.job.digests import write_digests
from disagg_lib.results import rows
from disagg_lib.run.manifest import edited_files


def test_digests_are_of_loadgens_files_and_of_what_the_job_was_told(tmp_path):
    run = make_valid_run(tmp_path / "run")
    write_digests(run)
    recorded = json.loads((run / "job/digests.json").read_text())["sha256"]
    assert {name.split("/")[-1] for name in recorded} == {
        *("experiment.yaml", "user.conf", "settings.json", "client_performance.json", "client_accuracy.json"),
        *("mlperf_log_accuracy.json", "mlperf_log_detail.txt", "mlperf_log_summary.txt"),
    }
    assert all(sha256(run / name) == digest for name, digest in recorded.items())
    assert edited_files(run) == [] and rows.verdict_of(run).submittable == "yes"


def test_an_edited_file_shows(tmp_path):
    run = make_valid_run(tmp_path / "run")
    write_digests(run)
    set_json(run / "job/client_performance.json", resent=0)
    assert edited_files(run) == ["job/client_performance.json"]
    assert [check.name for check in rows.verdict_of(run).failed] == ["digests"]


def test_a_log_that_was_edited_and_recorded_anew_shows_by_the_jobs_own_digest(tmp_path):
    run = make_valid_run(tmp_path / "run")
    write_digests(run)
    path = run / "mlperf/performance/mlperf_log_detail.txt"
    path.write_text(path.read_text() + "\n")
    set_json(run / "manifest.json", sha256={"mlperf/performance/mlperf_log_detail.txt": sha256(path)})
    assert edited_files(run) == ["mlperf/performance/mlperf_log_detail.txt"]
