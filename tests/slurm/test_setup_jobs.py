"""Setup jobs on a real Slurm: the probe, the image with a stand-in makefile, the client's environment."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import yaml

from disagg_lib.cluster import client_environment, container_image, probe, setup_job, site_file, slurm
from disagg_lib.errors import SetupError
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.files import REPOSITORY
from disagg_lib.run import made_with

# It checks what it is given, asks as the original does, and "builds" with mksquashfs inside an srun step.
MAKEFILE = """
build_base_sqsh:
	test "$(ARCH)" = {arch} -a "$(SLURM_MODE)" = srun -a "$(SBATCH_PARTITION)" = batch
	test "$(INSTALL_TRTLLM)" = 1 -a "$(INSTALL_LOADGEN)" = 1
	test "$(MLPERF_SCRATCH_PATH)" = "{scratch}"
	test "$(EXTRA_SRUN_FLAGS)" = "--container-remap-root --container-writable"
	test -z "$$LOG_DIR$$MODEL_DIR$$HF_TOKEN"
	bash ask.sh "$(SBATCH_ACCOUNT)"
	srun --partition=$(SBATCH_PARTITION) mksquashfs root "$(SBATCH_CONTAINER_SAVE)" -quiet -no-progress
"""
ASK = """
if [ -z "$1" ]; then read -r -p "Leave blank to not specify account: " account; [ -z "$account" ] || exit 7; fi
read -r -p "Continue? [y/n] " answer
[ "$answer" = y ] || exit 8
"""
ARCH = subprocess.run(["uname", "-m"], capture_output=True, text=True).stdout.strip()


@pytest.fixture
def site(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "closed/NVIDIA").mkdir(parents=True)
    return {
        "engine": "rehearsal",
        "launcher": "slurm",
        "container": "none",
        "partition": "batch",
        "account": "mlperf",
        "scratch_dir": str(tmp_path / "scratch"),
        "container_image": str(tmp_path / "images/trtllm.sqsh"),
        "harness_dir": str(tmp_path / "closed/NVIDIA"),
        "time_limit": "0:10:00",
    }


@pytest.fixture
def harness(site, tmp_path):
    if shutil.which("mksquashfs") is None:
        pytest.skip("mksquashfs is absent; on Debian: apt install squashfs-tools")
    folder = tmp_path / "closed/NVIDIA"
    (folder / "root/usr/bin").mkdir(parents=True)
    shutil.copy(shutil.which("env"), folder / "root/usr/bin/env")
    (folder / "Makefile.pyxis").write_text(MAKEFILE.format(arch=ARCH, scratch=site["scratch_dir"]))
    (folder / "ask.sh").write_text(ASK)
    return folder


def test_the_probe_job_tells_what_a_node_has(site):
    said = []
    checks = probe.probe(load_experiment((), site), out=said.append)
    assert [check.requirement for check in checks if not check.ok] == []
    (node,) = {check.requirement.split(":")[0] for check in checks}
    assert re.fullmatch(r"on gb\d\d", node)
    assert said[-1].endswith("its script ended with status 0")


def test_the_probe_of_a_node_without_gpus_and_pyxis_says_so(site):
    e = load_experiment(
        (), {**site, "engine": "trtllm", "container": "pyxis", "container_mounts": "/no/such/folder:/data"}
    )
    unmet = [check.requirement for check in probe.probe(e, out=list) if not check.ok]
    assert [re.sub(r"^on gb\d\d: ", "", requirement) for requirement in unmet] == [
        "4 GPUs (name, memory, driver)",
        "srun knows --container-image (pyxis)",
        "/no/such/folder is visible",
        "TensorRT-LLM in the container, of MLPerf v5.1 (0.20 to 1.0): trtllm_dialect is v5.1",
    ]


@pytest.mark.parametrize("account", ["mlperf", None])
def test_the_image_job_gives_the_makefile_what_it_needs(site, harness, account, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "canary" * 5)
    monkeypatch.setenv("LOG_DIR", "/elsewhere")
    e = load_experiment((), {**site, "account": account})
    checks = container_image.build_image(e, ARCH, out=print, min_gb=0)
    assert [check.ok for check in checks] == [True, True, True]
    digest = subprocess.run(["sha256sum", e.container_image], capture_output=True, text=True).stdout.split()[
        0
    ]
    assert made_with.cite_image(e) == {"path": e.container_image, "sha256": digest}
    before = slurm.slurm("squeue", "--states=all", "--noheader")
    container_image.build_image(e, ARCH, out=print, min_gb=0)  # an existing image is taken as it is
    assert slurm.slurm("squeue", "--states=all", "--noheader") == before


def test_an_image_job_whose_make_fails_says_why_and_leaves_no_image(site, harness):
    (harness / "ask.sh").write_text("echo the base image is gone; exit 9")
    with pytest.raises(SetupError, match="the image job: ended with status 1: .*the base image is gone"):
        container_image.build_image(load_experiment((), site), ARCH, out=list)
    assert list((harness.parents[1] / "images").iterdir()) == []


def test_a_setup_job_that_is_cancelled_is_named(site):
    e = load_experiment((), site)
    script = setup_job.job_header(e, "x", "0:02:00") + "sleep 300\n"
    timer = threading.Timer(4, lambda: slurm.slurm("scancel", "--name=disagg_setup_x"))
    timer.start()
    with pytest.raises(SetupError, match="the x job: (cancelled by a user|ended with status 143)"):
        setup_job.run_setup_job(e, "x", script, out=list)
    timer.join()


def test_the_clients_environment_is_built_from_source_and_checked(site, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{sys.executable.rsplit('/', 1)[0]}:{os.environ['PATH']}")
    e = load_experiment((), site)
    built = client_environment.build_client(e)
    assert (built["result"], built["machine"], built["mlcommons-loadgen"]) == ("VALID", ARCH, "5.1.2")
    assert built["numpy"] and built["uvloop"] and len(built["digest"]) == 64
    assert json.loads((client_environment.client_folder(e) / "client_env.json").read_text()) == built
    assert client_environment.build_client(e, out=None) == built  # there already: no job


def test_the_site_file_is_suggested_from_what_slurm_says(site):
    found = site_file.suggest_site(load_experiment((), {**site, "partition": None, "account": None}))
    assert found["partition"] == ("batch", "sinfo: the default partition")
    assert len(slurm.accounts()) == 2 and "account" not in found  # several: the user's choice


def test_the_setup_notebook_looks_at_a_node_judges_the_image_and_writes_no_params(site, harness, tmp_path):
    params, out = tmp_path / "site.yaml", tmp_path / "00.ipynb"
    # The engine is said to be the real one, so that an image is wanted; the node has no GPU, which the table then says.
    values = {"engine": "trtllm", "container": "pyxis", "setup_jobs": "probe"}
    params.write_text(yaml.safe_dump({**site, **values}))
    before = sorted((REPOSITORY / "params").iterdir())
    command = [sys.executable, "-m", "papermill", REPOSITORY / "notebooks/00_setup.ipynb", out]
    given = yaml.safe_dump({"params_files": [str(params)], "run_dir": str(tmp_path / "run")})
    done = subprocess.run(
        [*command, "-y", given], cwd=REPOSITORY / "notebooks", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    text = out.read_text()
    assert re.search(r"on gb\d\d: 4 GPUs", text) and "srun knows --container-image (pyxis)" in text
    assert "container_image is there" in text and "sinfo: the default" not in text
    assert sorted((REPOSITORY / "params").iterdir()) == before
    assert re.search(r"ok +Slurm 22 or newer: slurm-wlm \d+", text)
