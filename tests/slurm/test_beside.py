"""04 and a second run folder while a job is in the queue or runs, on a real Slurm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_slurm_jobs import jobs_of, until

from disagg_lib.cluster import launch, runs
from disagg_lib.errors import JobError
from disagg_lib.files import REPOSITORY


def test_04_with_a_running_job_in_another_folder_refuses_a_second_submission(cluster, make_run, tmp_path):
    first, second = make_run(rehearsal_queries=2000, server_target_qps=20.0), make_run()
    runs.submit_alone(first)
    until(first, lambda state: state.phase == "performance")
    notebook = [
        Path(sys.executable).parent / "papermill",
        "notebooks/04_launch.ipynb",
        tmp_path / "04.ipynb",
        "-p",
        "run_dir",
        second,
    ]
    refused = subprocess.run(
        notebook, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=180
    )
    assert refused.returncode != 0
    assert "another job is active" in refused.stderr and f"{first.name}: performance" in refused.stderr
    assert launch.read_record(second) is None and jobs_of(cluster, second) == []
    asked = runs.submit_alone(second, beside=True)
    assert jobs_of(cluster, second) == [asked.job_id]
    launch.cancel(second)
    launch.cancel(first)


def test_a_job_that_waits_in_the_queue_counts_as_active(cluster, make_run):
    cluster.run("scontrol", "update", "PartitionName=batch", "State=DOWN")
    try:
        waiting, other = make_run(), make_run()
        assert runs.submit_alone(waiting).state == "queued"
        with pytest.raises(JobError, match=f"{waiting.name}: queued"):
            runs.submit_alone(other)
    finally:
        cluster.run("scontrol", "update", "PartitionName=batch", "State=UP")
    launch.cancel(waiting)
