"""nv-sflow itself reads what `export --as sflow` writes: its schema, its planner, its mounts, without a cluster."""

import subprocess

import pytest
from renew import GOLDEN_LAUNCHERS

from disagg_lib.files import REPOSITORY

SFLOW = REPOSITORY / "build/sflow/bin/sflow"


@pytest.mark.skipif(not SFLOW.exists(), reason=f"{SFLOW} is not there; `make test-dynamo` installs it")
@pytest.mark.parametrize("path", sorted(GOLDEN_LAUNCHERS.glob("*.sflow.yaml")), ids=lambda path: path.name)
def test_sflow_takes_the_workflow(path, tmp_path):
    done = subprocess.run(
        [SFLOW, "run", "--dry-run", "--file", path], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Configuration is valid" in done.stdout
