"""What `check` finds before the queue, asked of a real controller; notebooks on Slurm; no token anywhere."""

import os
import subprocess
import sys

import pytest
import yaml

from disagg_lib.cluster import launch, preflight
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.files import REPOSITORY
from disagg_lib.run.job_script import make_job_script

SHIPPED = sorted(
    p.name for p in (REPOSITORY / "params").glob("*.yaml") if "site" not in p.name and "system" not in p.name
)


@pytest.fixture
def site(site_files, tmp_path):
    """A site file for the test cluster: its image, mounts, model folder and data set are there."""
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump({"partition": "batch", "account": "mlperf", **site_files}))
    return path


def command(*words, **environment):
    arguments = [sys.executable, "-m", "disagg_lib", *map(str, words)]
    return subprocess.run(
        arguments,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_sbatch_takes_the_script_of_every_shipped_params_file(site, name):
    e = load_experiment([f"params/{name}", site], {"launcher": "slurm"})
    checks = preflight.cluster_checks(e, make_job_script(e))
    assert checks[-1].rule == "sbatch"
    assert [
        c for c in checks if not c.ok and c.level == "error"
    ] == []  # this Slurm knows no --segment: a warning


def test_the_twenty_gpu_file_passes_the_whole_check(site):
    done = command("check", "params/gb200_20gpu.yaml", site)
    assert done.returncode == 0, done.stdout
    assert "0 errors" in done.stdout


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["partition", "nowhere"],
            ["partition: nowhere", "batch, r1, nvl, short", "set partition in params/site.yaml"],
        ),
        (
            ["account", "other"],
            ["account: other", "one of your accounts: mlperf", "set account in params/site.yaml"],
        ),
        (
            ["time_limit", "9:00:00"],
            ["partition_time: batch allows 28800 s", "time_limit 9:00:00 = 32400 s", "set time_limit"],
        ),
        (["partition", "r1"], ["gb200_60gpu"]),
        (
            ["container_image", "/nowhere.sqsh"],
            ["container_image: /nowhere.sqsh is not readable here", "see 00_setup"],
        ),
        (["segment", "5"], ["warning  segment: 5"]),
    ],
)
def test_what_slurm_would_refuse_is_found_before_submitting(site, given, words):
    if words == ["gb200_60gpu"]:
        done = command("check", "params/gb200_60gpu.yaml", site, "-p", *given)
        words = ["partition_nodes: r1 has 5 nodes (needed: 15 nodes)"]
    else:
        done = command("check", "params/gb200_20gpu.yaml", site, "-p", *given)
    assert done.returncode == (0 if given[0] == "segment" else 1), done.stdout
    for word in words:
        assert word in done.stdout


def test_a_controller_that_does_not_answer_is_an_error_in_words(cluster, site):
    cluster.stop_controller()
    try:
        done = command("check", "params/gb200_20gpu.yaml", site)
    finally:
        cluster.start_controller()
        cluster.wait("the controller is up", lambda: "is UP" in cluster.run("scontrol", "ping", check=False))
    assert done.returncode == 1
    assert "a controller that answers" in done.stdout
    assert "Traceback" not in done.stderr


SMALL = {
    "launcher": "slurm",
    "account": "mlperf",
    "num_ctx_servers": 1,
    "rehearsal_time_scale": 0.05,
    "server_target_qps": 40,
    "rehearsal_queries": 60,
    "rehearsal_accuracy_samples": 10,
    "rehearsal_output_tokens": 8,
}
CANARY = "hf_CanaryCanaryCanary123"


@pytest.mark.parametrize("fault", ["none", "crash_midrun:gen0:20"])
def test_the_notebooks_run_on_slurm_show_the_reason_and_hold_no_token(cluster, tmp_path, fault):
    run = tmp_path / "run"
    given = [word for name, value in (SMALL | {"fault": fault}).items() for word in ("-p", name, value)]
    done = command(
        "run", "params/rehearsal.yaml", "--run-dir", run, *given, HF_TOKEN=CANARY, MY_API_KEY=CANARY
    )
    executed = (run / "notebooks/04_launch.ipynb").read_text()
    if fault == "none":
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert done.returncode == 1
        reason = launch.job_state(run).reason
        node = (run / "job/nodes.txt").read_text().split()[1]
        assert reason.startswith(f"generation server gen0 (rank 4, node {node}) ended with status")
        assert reason[:60] in executed
        assert reason[:60] in done.stderr
    holders = [p for p in run.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()]
    assert holders == []
    assert CANARY not in done.stdout + done.stderr
