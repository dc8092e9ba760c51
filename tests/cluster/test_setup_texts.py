"""Setup jobs: their texts, run here by bash, and what is made of what they find."""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from disagg_lib.cluster import client_environment, container_image, probe, setup_job, site_file
from disagg_lib.errors import ParameterError, SetupError
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.files import REPOSITORY
from disagg_lib.run import made_with

LOCAL = {"engine": "rehearsal", "launcher": "local", "container": "none"}
GOOD = {
    "host": "gb01",
    "arch": "aarch64",
    "python3": "3.10.12",
    "gpus": ";".join(["NVIDIA GB200, 189471 MiB, 575.57.08"] * 4),
    "fabric": " ".join(["00000000-0000-0000-0000-000000000001 32766"] * 4),
    "pyxis": "2",
    "path /scratch": "readable",
    "scratch": "writable",
    "free_kb": "900000000",
    "mpi": "MPI plugin types are... none pmi2 pmix",
    "tensorrt_llm": "1.0.0rc4",
    "end": "",
}


@pytest.fixture
def harness(tmp_path):
    folder = tmp_path / "closed/NVIDIA"
    folder.mkdir(parents=True)
    (folder / "Makefile.pyxis").write_text("build_base_sqsh:\n\tfalse\n")
    return folder


@pytest.fixture
def site(tmp_path, harness):
    (tmp_path / "scratch").mkdir()
    return {
        "engine": "trtllm",
        "container": "pyxis",
        "partition": "batch",
        "account": "mlperf",
        "scratch_dir": str(tmp_path / "scratch"),
        "container_image": str(tmp_path / "image.sqsh"),
        "container_mounts": f"{harness}:/work,/data:/data",
        "harness_dir": str(harness),
    }


@pytest.fixture
def plain(site):
    """Paths that make does not change."""
    return {**site, "scratch_dir": "/scratch", "container_image": "/images/trtllm.sqsh"}


def scripts(given, plain):
    e = load_experiment((), given)
    yield probe.probe_script(e)
    yield client_environment.client_script(e)
    yield client_environment.client_script(e, brought=True)
    yield container_image.image_script(load_experiment((), {**given, **plain, "account": given["account"]}))


@pytest.mark.parametrize("given", [{}, {"account": None}, {"container": "none"}, {"launcher": "slurm"}])
def test_every_script_is_clean_to_shellcheck(site, plain, given):
    shellcheck = shutil.which("shellcheck", path=str(sys.executable).rsplit("/", 1)[0]) or "shellcheck"
    for text in scripts({**site, **given}, plain):
        done = subprocess.run([shellcheck, "-"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_image_job_answers_the_makefiles_questions(plain):
    text = container_image.image_script(load_experiment((), plain))
    assert "printf 'y\\n' | make -f Makefile.pyxis build_base_sqsh" in text
    text = container_image.image_script(load_experiment((), {**plain, "account": None}))
    assert "printf '\\ny\\n' | make" in text and "SBATCH_ACCOUNT= " in text


@pytest.mark.parametrize("key", ["harness_dir", "container_image", "partition"])
def test_an_image_job_without_what_it_needs_is_refused(site, key):
    with pytest.raises(SetupError, match=f"^{key}: not given"):
        container_image.image_script(load_experiment((), {**site, key: None}))


@pytest.mark.parametrize("path", ["/a b", "/a$b", "/a:b", "/a#b"])
def test_a_path_that_make_would_split_or_expand_is_refused(plain, path):
    for key, value in {"scratch_dir": path, "container_image": path + ".sqsh"}.items():
        with pytest.raises(
            SetupError, match=f"^{key}: found .*make and its recipes would split or expand it"
        ):
            container_image.image_script(load_experiment((), {**plain, "container": "none", key: value}))


def test_an_image_is_built_with_all_of_a_nodes_cores_and_a_draft_goes_with_the_job(plain, tmp_path, harness):
    image = tmp_path / "i.sqsh"
    e = load_experiment((), {**plain, "container_image": str(image)})
    script = container_image.image_script(e)
    assert "\n#SBATCH --exclusive\n" in script
    (harness / "Makefile.pyxis").write_text('build_base_sqsh:\n\tprintf hsq >"$(SBATCH_CONTAINER_SAVE)"\n')
    (tmp_path / "job.sh").write_text(script)
    done = subprocess.run(["bash", "job.sh"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "is no squashfs image" in done.stdout
    (harness / "Makefile.pyxis").write_text('build_base_sqsh:\n\tprintf hsqs >"$(SBATCH_CONTAINER_SAVE)"\n')
    before = (tmp_path / "status").read_text(), sorted(tmp_path.glob("i.*"))
    assert before == ("1\n", [])
    assert subprocess.run(["bash", "job.sh"], cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.glob("i.*")) == ["i.sqsh", "i.sqsh.sha256"]
    assert made_with.cite_image(e)["sha256"] == hashlib.sha256(b"hsqs").hexdigest()


def test_an_image_that_was_brought_along_is_cited_and_its_folder_left_as_it_is(plain, tmp_path):
    (tmp_path / "theirs").mkdir()
    image = tmp_path / "theirs/i.sqsh"
    image.write_bytes(b"hsqs")
    (tmp_path / "theirs/i.sqsh.sha256").write_text("their own notes\n")
    e = load_experiment(
        (), {**plain, "container_image": str(image), "scratch_dir": str(tmp_path / "scratch")}
    )
    assert made_with.cite_image(e) is None
    row = container_image.image_rows(e, out=list)[-1]
    assert row.found == made_with.cite_image(e)["sha256"] == hashlib.sha256(b"hsqs").hexdigest()
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == ["i.sqsh", "i.sqsh.sha256"]
    image.write_bytes(b"hsqs, newer")
    os.utime(image, (time.time() + 9, time.time() + 9))
    assert made_with.cite_image(e) is None
    assert made_with.cite_image(load_experiment((), {**plain, "container_image": "nvcr.io/x:1"})) is None


def test_packages_brought_along_are_taken_and_nothing_else_is_asked(site):
    e = load_experiment((), site)
    text = client_environment.client_script(e, brought=True)
    assert "--no-index --find-links" in text and "client_wheels" in text
    install = client_environment.client_script(e).split("echo")[0]
    assert "--no-index" not in install and "client_wheels" not in install


def test_nodes_without_internet_are_told_how_to_bring_the_packages(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    e = load_experiment((), {**LOCAL, "scratch_dir": str(tmp_path)})
    with pytest.raises(
        SetupError, match="bring the packages along, .*pip download --dest .*client_wheels .*pybind11"
    ):
        client_environment.build_client(e, out=list)
    assert [path.name for path in tmp_path.iterdir()] == ["setup"]


def test_a_client_environment_in_no_container_is_refused(site):
    with pytest.raises(SetupError, match="^container_image: not given, and the client job"):
        client_environment.client_script(load_experiment((), {**site, "container_image": None}))
    for path in ("/a:b", "/a b", "/a$b"):
        with pytest.raises(SetupError, match="pyxis would expand or split it"):
            client_environment.client_script(load_experiment((), {**site, "scratch_dir": path}))


def test_the_client_check_refuses_modules_from_elsewhere(tmp_path):
    command = [sys.executable, client_environment.CHECK_CLIENT, tmp_path / "logs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and f"not from {tmp_path}" in done.stderr and not (tmp_path / "logs").exists()


DEAF_ONCE = (
    "import os, signal, time; signal.signal(15, lambda *_: signal.signal(15, signal.SIG_DFL)); "
    "print('asleep', os.getpid(), flush=True); time.sleep(300)"
)


@pytest.mark.parametrize("commands", ["sleep 300 &\necho asleep $!\nsleep 300\n", f"{sys.executable} -c \"{DEAF_ONCE}\""])  # fmt: skip
def test_an_interrupt_ends_a_local_job_and_what_it_started(commands, tmp_path):
    e = load_experiment((), {**LOCAL, "scratch_dir": str(tmp_path)})

    def interrupt(line):
        if "asleep" in line:
            raise KeyboardInterrupt

    script = setup_job.job_header(e, "x", "0:01:00") + commands
    with pytest.raises(KeyboardInterrupt):
        setup_job.run_setup_job(e, "x", script, out=interrupt, poll_s=0.1)
    (output,) = tmp_path.glob("setup/*/output.txt")
    child = int(output.read_text().split()[1])
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != "zombie":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (output.parent / "status").read_text() == "143\n"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="cannot be made .* Set scratch_dir to a shared folder"):
        probe.probe(load_experiment((), {**LOCAL, "scratch_dir": str(tmp_path / "file")}), out=list)


def test_without_slurm_the_setup_has_a_row_that_says_so_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    e = load_experiment((), {"scratch_dir": str(tmp_path / "scratch"), "partition": "batch"})
    (row,) = probe.node_rows(e, out=list)
    assert not row.ok and "sbatch is not on PATH" in row.found
    assert site_file.suggest_site(e)["partition"] == ("batch", "given")


def test_the_probe_looks_at_every_path_that_a_run_reads_or_writes(site):
    e = load_experiment((), {**site, "dataset_path": "/data/x.pkl", "client_dir": "/client"})
    seen = probe._visible(e)
    assert {str(REPOSITORY), e.scratch_dir, "/data/x.pkl", "/client", e.harness_dir, "/data"} <= set(seen)


def test_the_original_readmes_folder_for_the_makefile_is_refused(site, harness):
    (harness / "pyxis").mkdir()
    with pytest.raises(SetupError, match="has no Makefile.pyxis. Needed: the v5.1 tree's closed/NVIDIA"):
        container_image.image_script(load_experiment((), {**site, "harness_dir": str(harness / "pyxis")}))


def test_a_container_sees_the_scratch_folder_once(site):
    e = load_experiment(
        (), {**site, "container_mounts": f"{site['scratch_dir']}:{site['scratch_dir']}", "launcher": "slurm"}
    )
    line = next(
        line for line in client_environment.client_script(e).splitlines() if "--container-mounts" in line
    )
    assert line.count(site["scratch_dir"]) == 2  # one host:container pair


def test_the_probe_runs_here_in_an_awkward_folder(odd_dir):
    said = []
    checks = probe.probe(load_experiment((), {**LOCAL, "scratch_dir": str(odd_dir)}), out=said.append)
    assert [check.requirement for check in checks if not check.ok] == []
    assert said[-1].endswith("its script ended with status 0")
    assert [path.name for path in odd_dir.iterdir()] == ["setup"]


def test_a_whole_probe_is_read_again_and_one_cut_short_or_of_other_parameters_is_not(tmp_path):
    e = load_experiment((), {**LOCAL, "scratch_dir": str(tmp_path)})
    said = []
    first = probe.probe(e, out=list)
    assert probe.probe(e, out=said.append) == first
    assert len(list(tmp_path.glob("setup/*"))) == 1 and "is read again; for a new one remove" in said[0]
    probe.probe(load_experiment((), {**LOCAL, "scratch_dir": str(tmp_path), "account": "x"}), out=list)
    assert len(list(tmp_path.glob("setup/*"))) == 2
    for found in tmp_path.glob("setup/*/probe.txt"):
        found.write_text(found.read_text().replace("end\t\n", ""))
    probe.probe(e, out=list)
    assert len(list(tmp_path.glob("setup/*"))) == 3


@pytest.mark.parametrize("given", [LOCAL, {"setup_jobs": "none"}])
def test_no_job_looks_at_a_node_where_none_may_or_has_to(given, tmp_path):
    said = []
    e = load_experiment((), {**given, "scratch_dir": str(tmp_path)})
    assert probe.node_rows(e, out=said.append) == []
    assert said[0].startswith(("launcher: local", "setup_jobs: none")) and not list(tmp_path.iterdir())


def test_an_image_is_looked_at_where_there_shall_be_one(site):
    def unmet(**given):
        rows = container_image.image_rows(load_experiment((), {**site, **given}), out=list)
        return [row.requirement for row in rows if not row.ok]

    assert unmet(container="none") == unmet(container_image="nvcr.io/nvidia/tensorrt-llm:1.2") == []
    assert unmet() == unmet(container_image=None) == ["container_image is there"]


def test_a_job_that_cannot_be_made_or_submitted_is_a_row(site, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    e = load_experiment((), {**site, "setup_jobs": "all", "harness_dir": None})
    (image,) = container_image.image_rows(e, out=list)
    assert not image.ok and image.found.startswith("harness_dir: not given")
    (client,) = client_environment.client_rows(e, out=list)
    assert not client.ok and client.found.startswith("sbatch is not on PATH")


def test_a_built_client_environment_is_cited_and_an_unnamed_one_told(site, tmp_path):
    def row(**given):
        return client_environment.client_rows(load_experiment((), {**site, **given}), out=list)[0]

    assert not row().ok and "setup_jobs: all" in row().fix and row().level == "warning"
    folder = tmp_path / "scratch/client_env"
    folder.mkdir()
    (folder / "client_env.json").write_text('{"mlcommons-loadgen": "5.1.2", "machine": "aarch64"}')
    assert not row().ok and row().fix == f"set client_dir: {folder} in params/site.yaml"
    assert row(client_dir=str(folder)).ok
    assert client_environment.client_rows(load_experiment((), {**site, **LOCAL})) == []


def test_a_setup_job_that_fails_says_its_last_lines(tmp_path):
    e = load_experiment((), {**LOCAL, "scratch_dir": str(tmp_path)})
    with pytest.raises(SetupError, match="the x job: ended with status 3: .*no such thing"):
        setup_job.run_setup_job(
            e, "x", setup_job.job_header(e, "x", "0:01:00") + "echo no such thing\nexit 3\n", out=list
        )


SPEAKS = "TensorRT-LLM in the container, {}: trtllm_dialect is {}"
SPANS = "one NVLink domain (a server spans several nodes)"


def unmet(found, **given):
    e = load_experiment((), {"engine": "trtllm", "scratch_dir": "/scratch", **given})
    return [check.requirement for check in probe.probe_checks(e, {**GOOD, **found}) if not check.ok]


def test_a_good_node_meets_every_requirement():
    assert unmet({}) == []


@pytest.mark.parametrize(
    ("found", "given", "requirement"),
    [
        ({"gpus": "bash: nvidia-smi: command not found"}, {}, "4 GPUs (name, memory, driver)"),
        (
            {"gpus": GOOD["gpus"] + ";NVIDIA GB200, 189471 MiB, 575.57.08"},
            {},
            "4 GPUs (name, memory, driver)",
        ),
        ({"pyxis": "0"}, {}, "srun knows --container-image (pyxis)"),
        ({"path /scratch": "not readable"}, {}, "/scratch is visible"),
        ({"scratch": "mktemp: permission denied"}, {}, "scratch_dir is writable"),
        ({"free_kb": ""}, {}, "1 GB free in scratch_dir"),
        ({"python3": "bash: python3: command not found"}, {}, "python3 3.8 or newer"),
        ({"mpi": "MPI plugin types are... none pmi2"}, {}, "srun offers --mpi=pmix"),
        ({"tensorrt_llm": "1.2.0"}, {}, SPEAKS.format("of MLPerf v5.1 (0.20 to 1.0)", "v5.1")),
        ({"tensorrt_llm": "1.1.0"}, {"trtllm_dialect": "1.x"}, SPEAKS.format("1.2 or newer", "1.x")),
        (
            {"tensorrt_llm": "ModuleNotFoundError: No module named"},
            {},
            SPEAKS.format("of MLPerf v5.1 (0.20 to 1.0)", "v5.1"),
        ),
        ({"fabric": "a 1 a 1 a 2 a 2"}, {"gen_tp_size": 8}, SPANS),
        ({"fabric": "N/A N/A N/A N/A"}, {"gen_tp_size": 8}, SPANS),
        ({"fabric": "0 00000000-0000-0000-0000-000000000000"}, {"gen_tp_size": 8}, SPANS),
        ({"fabric": ""}, {"gen_tp_size": 8}, SPANS),
    ],
)
def test_each_lack_of_a_node_is_found(found, given, requirement):
    assert unmet(found, **given) == ["on gb01: " + requirement]


def test_the_probe_looks_inside_the_image_as_the_jobs_steps_will(site):
    def srun(**given):
        text = probe.probe_script(load_experiment((), {**site, **given}))
        return next((line for line in text.splitlines() if "import tensorrt_llm" in line), "")

    line = srun(work_dir="/work", mpi="pmi2")
    assert f"srun --mpi=pmi2 --container-image={site['container_image']} --container-mounts=" in line
    assert "--no-container-remap-root" in line and "PYTHONPATH=/work/.llm_aarch64/" in line
    assert "PYTHONPATH" not in srun(work_dir="/work", trtllm_dialect="1.x")
    assert srun(container="none") == srun(container_image=None) == ""


def test_what_an_image_says_is_its_version_or_the_first_error(site, tmp_path):
    e = load_experiment((), site)
    look = probe._look_inside(e).replace(str(site["container_image"]), "x")
    for said, found in (
        ("[TensorRT-LLM] hello\ntensorrt_llm 1.2.0\nbye", "1.2.0"),
        ("Traceback\nModuleNotFoundError: No module\nsrun: error: gb01", "ModuleNotFoundError: No module"),
        ("odd\nend", "end"),
    ):
        (tmp_path / "said").write_text(said)
        script = f'say() {{ echo "$2"; }}; srun() {{ cat {tmp_path}/said; }}\n{look}'
        assert subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout == found + "\n"


def test_a_probe_cut_short_is_refused(tmp_path):
    (tmp_path / "probe.txt").write_text("host\tgb01\n")
    with pytest.raises(SetupError, match="cut short"):
        probe.read_probe(tmp_path)


@pytest.fixture
def image(tmp_path):
    """A real squashfs image that holds this machine's env program."""
    if shutil.which("mksquashfs") is None:
        pytest.skip("mksquashfs is absent; on Debian: apt install squashfs-tools")
    root = tmp_path / "root/usr/bin"
    root.mkdir(parents=True)
    shutil.copy(shutil.which("env"), root / "env")
    subprocess.run(
        ["mksquashfs", tmp_path / "root", tmp_path / "image.sqsh", "-quiet", "-no-progress"], check=True
    )
    return tmp_path / "image.sqsh"


def test_an_image_for_another_architecture_is_found(image):
    arch = subprocess.run(["uname", "-m"], capture_output=True, text=True).stdout.strip()
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[arch]
    assert [check.ok for check in container_image.image_checks(image, arch, min_gb=0)] == [True, True, True]
    assert [
        check.found for check in container_image.image_checks(image, other, min_gb=0) if not check.ok
    ] == [arch]


def test_an_image_that_is_none_is_found(tmp_path):
    (tmp_path / "image.sqsh").write_bytes(b"#!/bin/sh\n")
    assert [check.ok for check in container_image.image_checks(tmp_path / "image.sqsh")] == [
        False,
        False,
        False,
    ]
    assert [check.ok for check in container_image.image_checks(tmp_path / "absent.sqsh")] == [False]


def test_an_image_whose_program_is_a_link_is_not_judged_by_this_machines(tmp_path):
    if shutil.which("mksquashfs") is None:
        pytest.skip("mksquashfs is absent; on Debian: apt install squashfs-tools")
    (tmp_path / "root/usr/bin").mkdir(parents=True)
    (tmp_path / "root/usr/bin/env").symlink_to(shutil.which("env"))
    command = ["mksquashfs", tmp_path / "root", tmp_path / "i.sqsh", "-quiet", "-no-progress"]
    subprocess.run(command, check=True)
    row = container_image.image_checks(tmp_path / "i.sqsh", os.uname().machine, min_gb=0)[-1]
    assert (row.ok, row.level, row.found) == (False, "warning", "not known: no program usr/bin/env in it")


def test_site_yaml_is_written_once_and_then_compared(tmp_path):
    path = tmp_path / "site.yaml"
    e = load_experiment(
        (), {**LOCAL, "scratch_dir": str(tmp_path), "partition": "batch", "time_limit": "4:00:00"}
    )
    table = site_file.write_site(site_file.suggest_site(e), path)
    assert (table["in the file"] == table["found"]).all()
    assert yaml.safe_load(path.read_text())["time_limit"] == "4:00:00"
    assert load_experiment((path,), LOCAL).partition == "batch"
    before = path.read_text()
    other = site_file.write_site({"partition": ("other", "given"), "account": ("a", "given")}, path)
    assert path.read_text() == before
    assert tuple(other.set_index("key").loc["partition", ["in the file", "found"]]) == ("batch", "other")


def test_an_experiments_own_values_do_not_become_the_sites():
    def keys(**given):
        return set(
            site_file.suggest_site(
                load_experiment(["params/gb200_20gpu.yaml"], {"launcher": "local", **given})
            )
        )

    given = LOCAL | {"scratch_dir": "/s"}
    assert keys(**given) == {"scratch_dir"}
    assert keys(**given, time_limit="1:00:00") == {"scratch_dir", "time_limit"}


def test_no_site_yaml_is_written_where_slurm_did_not_answer(tmp_path):
    site_file.write_site({"scratch_dir": ("/s", "given")}, tmp_path / "site.yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_site_yaml_that_is_none_is_named(tmp_path):
    (tmp_path / "site.yaml").write_text("- a\n")
    with pytest.raises(ParameterError, match="site.yaml: found a list, needed a mapping"):
        site_file.write_site({}, tmp_path / "site.yaml")


def test_site_yaml_says_what_the_client_environment_is(site, tmp_path):
    folder = tmp_path / "scratch/client_env"
    folder.mkdir()
    (folder / "client_env.json").write_text('{"mlcommons-loadgen": "5.1.2", "numpy": "2.1", "digest": "abc"}')
    e = load_experiment((), site | LOCAL)
    site_file.write_site(site_file.suggest_site(e), tmp_path / "s.yaml")
    text = (tmp_path / "s.yaml").read_text()
    assert "built by 00_setup: mlcommons-loadgen 5.1.2, numpy 2.1" in text and "digest abc" in text


def test_site_yaml_is_readable_by_the_owners_group_as_others_files_are(tmp_path):
    site_file.write_site({"partition": ("batch", "given")}, tmp_path / "site.yaml")
    (tmp_path / "other").touch()
    assert stat.S_IMODE((tmp_path / "site.yaml").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "other").stat().st_mode
    )


@pytest.mark.parametrize(
    ("told", "ok"),
    [
        ("0.8.1", True),
        ("1.4.0", False),
        ("AssertionError: not there: ['dynamo.trtllm', 'etcd']", False),
        ("importlib.metadata.PackageNotFoundError: No package metadata was found for ai-dynamo", False),
    ],
)
def test_an_image_without_dynamo_or_with_another_release_is_found_by_the_probe(told, ok):
    given = {"orchestrator": "dynamo", "trtllm_dialect": "1.x", "dynamo_release": "0.8"}
    given |= {"container_image": "/images/x.sqsh"}
    e = load_experiment([], given)
    assert "ai-dynamo" in probe._look_inside(e) and "ai-dynamo" not in probe._look_inside(
        load_experiment([], given | {"orchestrator": "trtllm"})
    )
    rows = probe.software_rows(e, {"mpi": "pmix", "dynamo": told})
    assert [(found, fits) for what, found, fits, _ in rows if "Dynamo" in what] == [(told, ok)]
