"""One Slurm cluster for all tests of this folder; without it they are skipped, with the reason."""

import pytest
from cluster import Cluster, why_not

from disagg_lib.experiment.loading import load_experiment
from disagg_lib.run.writing import create_run


@pytest.fixture(scope="session")
def running_cluster():
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def cluster(running_cluster, monkeypatch):
    """The cluster, idle, with this process's Slurm commands talking to it."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, running_cluster.environment[name])
    monkeypatch.setenv("NO_COLOR", "1")
    yield running_cluster
    running_cluster.run("scancel", "--user=root", check=False)
    running_cluster.wait("all nodes are free", lambda: running_cluster.idle_nodes() == 18)


SMALL = {
    "launcher": "slurm",
    "rehearsal_time_scale": 0.05,
    "server_target_qps": 40.0,
    "rehearsal_queries": 60,
    "rehearsal_accuracy_samples": 10,
    "rehearsal_output_tokens": 8,
    "load_timeout_s": 60,
    "stall_timeout_s": 30,
    "time_limit": "0:30:00",
    "partition": "batch",
    "account": "mlperf",
}


@pytest.fixture
def make_run(tmp_path):
    """make_run(**given): a new run folder of a small rehearsal for this cluster."""
    number = iter(range(100))
    return lambda **given: create_run(
        load_experiment(given={**SMALL, **given}), tmp_path / f"run{next(number)}"
    )
