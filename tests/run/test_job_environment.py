"""What a step's program finds in its environment: the job script's own arrays, run by bash over an image's values."""

import re
import subprocess

import pytest
from renew import CASES, GOLDEN, SITE, texts

ODD = "/client's $(id)"
SCRIPTS = {case: (GOLDEN / case / "job.sh").read_text() for case in CASES}


def run(command, arrays="", **image):
    """Standard output of a command in bash, after these arrays of a job script, with an image's variables."""
    environment = {"PATH": "/usr/bin:/bin", **image}
    done = subprocess.run(
        ["bash", "-uc", f"{arrays}\n{command}"], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def array(script, name):
    return re.search(rf"^{name}=\(.*?(?:\n\)|' -\)|\w+'?\))$", script, re.M | re.S)[0]


@pytest.mark.parametrize("case", CASES)
def test_root_in_the_container_never_meets_mpi(case):
    """Over TCP a PMIx client sends its own user id, which must be the job's."""
    assert "--container-remap-root" not in SCRIPTS[case]
    assert ("--no-container-remap-root" in SCRIPTS[case]) == ("--container-image" in SCRIPTS[case])


@pytest.mark.parametrize("case", CASES)
def test_no_variable_of_a_server_is_exported(case):
    """pyxis lets an image's value win over an exported one."""
    exported = re.findall(r"^ *export (.*?)(?: #.*)?$", SCRIPTS[case], re.M)
    assert set(exported) <= {"PATH SLURM_EXPORT_ENV=ALL", "JOB_SCRIPT_PID=$$"}


@pytest.mark.parametrize("case", CASES)
def test_every_program_in_a_container_gets_the_environment(case):
    for line in re.sub(r"\\\n", "", SCRIPTS[case]).splitlines():
        if '"${CONTAINER[@]}"' in line:
            assert '"${ENVIRONMENT[@]}"' in line.partition('"${CONTAINER[@]}"')[2]


def test_values_of_the_job_win_over_the_images_and_unset_ones_are_gone():
    arrays = array(SCRIPTS["v5.1_20gpu_slurm_pyxis"], "ENVIRONMENT")
    image = {"UCX_TLS": "tcp", "PYTHONPATH": "/image", "TLLM_LOG_LEVEL": "TRACE", "LOG_DIR": "/image"}
    image["TMPDIR"] = "/of/the/host"
    found = run('"${ENVIRONMENT[@]}" OWN=1 env', arrays, **image).splitlines()
    assert "PYTHONPATH=/work/.llm_aarch64/lib/python3.12/site-packages" in found
    assert {"TLLM_LOG_LEVEL=INFO", "PYTHONNOUSERSITE=1", "TRTLLM_USE_MPI_KVCACHE=1", "OWN=1"} <= set(found)
    assert not any(line.startswith(("UCX_TLS", "LOG_DIR", "TMPDIR")) for line in found)


def test_the_clients_folder_comes_before_the_images_and_replaces_nothing():
    arrays = array(SCRIPTS["odd_paths_slurm"], "WITH_CLIENT_DIR")
    shown = '"${WITH_CLIENT_DIR[@]}" bash -c \'printf %s "$PYTHONPATH"\''
    assert run(shown, arrays, PYTHONPATH="/image") == f"{ODD}:/image"
    assert run(shown, arrays) == ODD


def test_the_orchestrator_sees_nothing_of_the_step():
    arrays = array(SCRIPTS["v5.1_20gpu_slurm_pyxis"], "WITHOUT_SLURM")
    found = run(
        '"${WITHOUT_SLURM[@]}" env', arrays, SLURM_JOB_ID="7", SLURM_PROCID="0", SLURMD_NODENAME="gb01"
    )
    assert "SLURM_" not in found and "SLURMD_NODENAME=gb01" in found
    for case, script in SCRIPTS.items():
        assert script.count('"${WITHOUT_SLURM[@]}"') == len(
            re.findall(r"^start (?:orchestrator|frontend)", script, re.MULTILINE)
        ), case


def test_every_rank_has_caches_of_its_own(tmp_path):
    arrays = array(SCRIPTS["1.x_shared_node"], "WITH_OWN_CACHES").replace("/tmp/", f"{tmp_path}/")
    folders = set()
    for step, rank in (("1", "0"), ("1", "1"), ("2", "0")):
        place = {"USER": "me", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": step, "SLURM_PROCID": rank}
        folders.add(run('"${WITH_OWN_CACHES[@]}" bash -c \'echo "$TRITON_CACHE_DIR"\'', arrays, **place))
    assert len(folders) == 3
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["7.1.0", "7.1.1", "7.2.0"]


def test_servers_of_one_node_have_their_own_socket_and_start_apart():
    script = SCRIPTS["1.x_shared_node"]
    assert "TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR=ipc:///tmp/disagg_405B_${SLURM_JOB_ID-}_$name" in script
    starts = re.findall(r"^(?:worker (\w+)|attend (sleep \d+))", script, re.M)
    assert [a or b for a, b in starts] == ["ctx0", "ctx1", "ctx2", "ctx3", "gen0", "sleep 5", "gen1"]
    assert "attend sleep" not in texts(SITE | {"trtllm_dialect": "1.x", "load_stagger_s": 0})["job.sh"]


def test_a_site_may_leave_gpus_out_and_add_options():
    script = SCRIPTS["v5.1_rehearsal_pyxis"]
    assert (
        "--gpus-per-node" not in script and "\n#SBATCH --qos=high\n#SBATCH --reservation=mlperf\n" in script
    )
    assert "--mpi=pmi2" in script and "--mpi=pmix" not in script
