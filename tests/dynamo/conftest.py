"""What tests with the real Dynamo share: its environments, a network namespace, a checkpoint, run folders; else they skip."""

import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from cluster import Cluster
from cluster import why_not as why_no_cluster

from disagg_lib.checkpoint.synthetic import make_rehearsal_checkpoint
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.files import REPOSITORY
from disagg_lib.run.writing import create_run

ADDRESS = "10.9.9.1"  # that of in_namespace.sh
OF_RELEASE = {"1.4": REPOSITORY / ".venv-dynamo", "0.8": REPOSITORY / "build/dynamo-0.8"}
SMALL = {
    "engine": "rehearsal",
    "orchestrator": "dynamo",
    "trtllm_dialect": "1.x",
    "num_frontends": 2,
    "num_ctx_servers": 2,
    "ctx_tp_size": 2,
    "num_gen_servers": 2,
    "gen_tp_size": 2,
    "rehearsal_time_scale": 0.02,
    "server_target_qps": 10.0,
    "rehearsal_queries": 60,
    "rehearsal_accuracy_samples": 10,
    "rehearsal_output_tokens": 8,
    "load_timeout_s": 120,
    "stall_timeout_s": 30,
    "load_stagger_s": 0,
}


def why_not(release: str) -> str | None:
    """Why this release cannot be tried here, or None."""
    if not (OF_RELEASE[release] / "bin/python").exists():
        return f"{OF_RELEASE[release]} is not there; `make test-dynamo` installs it"
    if release == "0.8" and not shutil.which("etcd"):
        return "etcd, which Dynamo 0.8 needs, is absent; on Debian: apt install etcd-server"
    with socket.socket() as probe:
        try:
            probe.bind((ADDRESS, 0))
        except OSError:
            return (
                f"not in a network namespace that has {ADDRESS} (it needs root): `make test-dynamo` makes one"
            )
    return None


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_rehearsal_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def make_run(tmp_path, checkpoint):
    """make_run(release, **given): a new run folder behind the real front ends, on this machine if nothing else is said."""
    number = iter(range(100))

    def make(release="1.4", **given) -> Path:
        reason = why_not(release)
        if reason:
            pytest.skip(reason)
        own = {
            "dynamo_release": release,
            "dynamo_dir": str(OF_RELEASE[release]),
            "model_dir": str(checkpoint),
        }
        local = {"launcher": "local", "container": "none"}
        e = load_experiment(given={**SMALL, **local, **own, **given})
        return create_run(e, tmp_path / f"run{next(number)}")

    return make


@pytest.fixture(scope="session")
def cluster():
    reason = why_not("1.4") or why_no_cluster()
    if reason:
        pytest.skip(reason)
    with Cluster() as cluster, pytest.MonkeyPatch.context() as patch:
        for name in ("PATH", "SLURM_CONF"):
            patch.setenv(name, cluster.environment[name])
        yield cluster


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    """No process that has to do with this test's run folders is left, and none of the services' folders."""
    yield
    done = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if str(tmp_path) in line] == []
    assert not list(tmp_path.glob("run*/job/services"))
