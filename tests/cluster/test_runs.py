"""Which run is meant: by what it is for, by what its job does, by a part of its name."""

import json
import os
import subprocess
import sys

import psutil
import pytest

from disagg_lib.cluster import launch, runs
from disagg_lib.cluster.slurm import slurm
from disagg_lib.errors import JobError, RunFolderError
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.run.folder import find_run, newest_runs
from disagg_lib.run.writing import create_run

SMALL = {"num_ctx_servers": 1, "rehearsal_queries": 10, "test_modes": ["performance"]}


@pytest.fixture
def new_run(results_dir):
    """new_run(name): a run folder in an empty results/, each newer than the one before."""
    made = []

    def new(name):
        run = create_run(load_experiment(given=SMALL), results_dir / name)
        made.append(run)
        os.utime(run / "experiment.yaml", (len(made), len(made)))
        return run

    return new


def phases(run, *names):
    lines = [json.dumps({"time_s": float(at), "phase": name}) for at, name in enumerate(names)]
    (run / "job/phases.jsonl").write_text("\n".join(lines) + "\n")


def measure(run):
    """LoadGen's log and the phases of a job that has ended."""
    (run / "mlperf/performance").mkdir()
    (run / "mlperf/performance/mlperf_log_detail.txt").touch()
    phases(run, "performance", "done")


@pytest.fixture
def start():
    """start(run): give it a job that is active as long as the test."""
    started = []

    def active(run):
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        started.append(process)
        created = psutil.Process(process.pid).create_time()
        record = {"launcher": "local", "job_id": str(process.pid), "create_time_s": created}
        (run / "job/job.json").write_text(json.dumps(record))
        phases(run, "performance")

    yield active
    for process in started:
        process.kill()
        process.wait()


def test_to_launch_is_the_active_run_not_the_newest(new_run, start):
    active, newest = new_run("a"), new_run("b")
    assert runs.run_for("launch") == newest
    start(active)
    assert runs.run_for("launch") == active == runs.run_for("follow")


def test_to_read_is_the_newest_with_a_result(new_run, start):
    old, measured, unsent, active = (new_run(name) for name in "abcd")
    measure(old)
    measure(measured)
    start(active)
    assert runs.run_for("read") == measured
    assert unsent not in runs.active_runs()


def test_a_cancelled_run_is_read_where_nothing_was_measured(new_run):
    cancelled, _ = new_run("a"), new_run("b")
    phases(cancelled, "workers", "failed: cancelled")
    assert runs.run_for("read") == cancelled
    assert runs.state_word(cancelled) == "failed: cancelled"


def test_two_active_runs_must_be_named(new_run, start):
    for name in ("first", "second"):
        start(new_run(name))
    for purpose in ("launch", "follow"):
        with pytest.raises(
            RunFolderError, match="2 jobs are active(.|\n)*second: performance(.|\n)*first: performance"
        ):
            runs.run_for(purpose)


def test_without_an_active_job_there_is_nothing_to_follow(new_run):
    new_run("quiet")
    with pytest.raises(RunFolderError, match="queued or running. The newest: quiet"):
        runs.run_for("follow")


def test_a_run_is_found_by_name_and_by_a_part_that_fits_one(new_run):
    first, second = new_run("20261130-195718_rehearsal"), new_run("20261130-200000_rehearsal")
    assert find_run("20261130-200000_rehearsal") == second
    assert find_run("195718") == first
    with pytest.raises(RunFolderError, match="found 2 runs of that name, needed one"):
        find_run("20261130")
    with pytest.raises(
        RunFolderError, match="nowhere is no run folder(.|\n)*The newest: 20261130-200000_rehearsal, 2026"
    ):
        find_run("nowhere")


def test_the_kept_example_is_never_meant_unless_it_is_named(new_run):
    example = new_run("example_rehearsal")
    measure(example)
    assert find_run("example_rehearsal") == example and newest_runs() == [example]
    with pytest.raises(RunFolderError):
        runs.run_for("read")


def test_nothing_is_submitted_beside_an_active_job_unless_asked(new_run, start):
    active, other = new_run("active"), new_run("other")
    start(active)
    with pytest.raises(
        JobError,
        match=r"other: not submitted, another job is active:(.|\n)*active: performance(.|\n)*--beside",
    ):
        runs.submit_alone(other)
    assert launch.read_record(other) is None
    assert runs.submit_alone(active).job_id == launch.read_record(active)["job_id"], (
        "its own job is attached to"
    )


def test_a_run_elsewhere_is_not_disturbed(new_run, start, tmp_path):
    start(new_run("active"))
    elsewhere = create_run(load_experiment(given=SMALL), tmp_path / "elsewhere/run")
    state = runs.submit_alone(elsewhere)
    try:
        assert state.state == "running"
    finally:
        launch.cancel(elsewhere, grace_s=5)


def test_a_label_tells_runs_apart(new_run, start):
    unsent, active, valid = (new_run(name) for name in "abc")
    start(active)
    measure(valid)
    (valid / "tables/result.json").write_text('{"valid": true}')
    assert [runs.state_word(run).split(",")[0] for run in (unsent, active, valid)] == [
        "not submitted",
        "performance",
        "VALID",
    ]


FATAL = """sinfo: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host
sinfo: error: fetch_config: DNS SRV lookup failed
sinfo: fatal: Could not establish a configuration source"""
REFUSED = """sbatch: error: invalid partition specified: fast
sbatch: error: Batch job submission failed: Invalid partition name specified"""


@pytest.mark.parametrize(("said", "line"), [
    (FATAL, "tool: Could not establish a configuration source"),
    (REFUSED, "tool: invalid partition specified: fast; Batch job submission failed: Invalid partition name specified"),
    ("", "tool: status 1"),
])  # fmt: skip
def test_what_slurm_says_is_one_line(said, line, tmp_path, monkeypatch):
    tool = tmp_path / "tool"
    tool.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{said}\nEND\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(JobError) as caught:
        slurm("tool", tries=1)
    assert str(caught.value) == line
