"""Setup jobs: their texts, run here by bash, and what is made of what they find."""

import shutil
import stat
import subprocess
import sys

import pytest
import yaml

from disagg_lib import setup_jobs
from disagg_lib.experiment import load_experiment
from disagg_lib.setup_jobs import SetupError

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
    "end": "",
}


@pytest.fixture
def harness(tmp_path):
    folder = tmp_path / "closed NVIDIA"
    folder.mkdir()
    (folder / "Makefile.pyxis").write_text("build_base_sqsh:\n\tfalse\n")
    return folder


@pytest.fixture
def site(odd_dir, harness):
    return {
        "engine": "trtllm",
        "container": "pyxis",
        "partition": "batch",
        "account": "mlperf",
        "scratch_dir": str(odd_dir),
        "container_image": str(odd_dir / "image.sqsh"),
        "container_mounts": f"{harness}:/work,/data:/data",
        "harness_dir": str(harness),
    }


def scripts(given):
    e = load_experiment((), given)
    yield setup_jobs.probe_script(e)
    yield setup_jobs.client_script(e)
    yield setup_jobs.client_script(e, wheels=given["scratch_dir"] + "/wheels")
    yield setup_jobs.image_script(e)


@pytest.mark.parametrize("given", [{}, {"account": None}, {"container": "none"}, {"launcher": "slurm"}])
def test_every_script_is_clean_to_shellcheck(site, given):
    shellcheck = shutil.which("shellcheck", path=str(sys.executable).rsplit("/", 1)[0]) or "shellcheck"
    for text in scripts({**site, **given}):
        done = subprocess.run([shellcheck, "-"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_image_job_answers_the_makefiles_questions(site):
    text = setup_jobs.image_script(load_experiment((), site))
    assert "printf 'y\\n' | make -f Makefile.pyxis build_base_sqsh" in text
    text = setup_jobs.image_script(load_experiment((), {**site, "account": None}))
    assert "printf '\\ny\\n' | make" in text and "SBATCH_ACCOUNT= " in text


@pytest.mark.parametrize("key", ["harness_dir", "container_image", "partition"])
def test_an_image_job_without_what_it_needs_is_refused(site, key):
    with pytest.raises(SetupError, match=f"^{key}: not given"):
        setup_jobs.image_script(load_experiment((), {**site, key: None}))


def test_the_original_readmes_folder_for_the_makefile_is_refused(site, harness):
    (harness / "pyxis").mkdir()
    with pytest.raises(SetupError, match="has no Makefile.pyxis. Needed: the v5.1 tree's closed/NVIDIA"):
        setup_jobs.image_script(load_experiment((), {**site, "harness_dir": str(harness / "pyxis")}))


def test_a_container_sees_the_scratch_folder_once(site):
    e = load_experiment(
        (), {**site, "container_mounts": f"{site['scratch_dir']}:{site['scratch_dir']}", "launcher": "slurm"}
    )
    line = next(line for line in setup_jobs.client_script(e).splitlines() if "--container-mounts" in line)
    assert line.count("owned") == 3  # the image, and one host:container pair of the awkward name


def test_the_probe_runs_here_in_an_awkward_folder(odd_dir):
    said = []
    checks = setup_jobs.probe(load_experiment((), {**LOCAL, "scratch_dir": str(odd_dir)}), out=said.append)
    assert [check.requirement for check in checks if not check.ok] == []
    assert said[-1].endswith("its script ended with status 0")
    assert [path.name for path in odd_dir.iterdir()] == ["setup"]


def test_a_whole_probe_is_read_again_and_one_cut_short_or_of_other_parameters_is_not(tmp_path):
    e = load_experiment((), {**LOCAL, "scratch_dir": str(tmp_path)})
    said = []
    first = setup_jobs.probe(e, out=list)
    assert setup_jobs.probe(e, out=said.append) == first
    assert len(list(tmp_path.glob("setup/*"))) == 1 and "is read again; for a new one remove" in said[0]
    setup_jobs.probe(load_experiment((), {**LOCAL, "scratch_dir": str(tmp_path), "account": "x"}), out=list)
    assert len(list(tmp_path.glob("setup/*"))) == 2
    for found in tmp_path.glob("setup/*/probe.txt"):
        found.write_text(found.read_text().replace("end\t\n", ""))
    setup_jobs.probe(e, out=list)
    assert len(list(tmp_path.glob("setup/*"))) == 3


@pytest.mark.parametrize("given", [LOCAL, {"setup_jobs": "none"}])
def test_no_job_looks_at_a_node_where_none_may_or_has_to(given, tmp_path):
    said = []
    e = load_experiment((), {**given, "scratch_dir": str(tmp_path)})
    assert setup_jobs.node_rows(e, out=said.append) == []
    assert said[0].startswith(("launcher: local", "setup_jobs: none")) and not list(tmp_path.iterdir())


def test_an_image_is_looked_at_where_there_shall_be_one(site):
    def unmet(**given):
        rows = setup_jobs.image_rows(load_experiment((), {**site, **given}), out=list)
        return [row.requirement for row in rows if not row.ok]

    assert unmet(container="none") == unmet(container_image="nvcr.io/nvidia/tensorrt-llm:1.2") == []
    assert unmet() == unmet(container_image=None) == ["container_image is there"]


def test_a_built_client_environment_is_cited_and_an_unnamed_one_told(site, odd_dir):
    def row(**given):
        return setup_jobs.client_rows(load_experiment((), {**site, **given}), out=list)[0]

    assert not row().ok and "setup_jobs: all" in row().fix and row().level == "warning"
    folder = odd_dir / "client_env"
    folder.mkdir()
    (folder / "client_env.json").write_text('{"mlcommons-loadgen": "5.1.2", "machine": "aarch64"}')
    assert not row().ok and row().fix == f"set client_dir: {folder} in params/site.yaml"
    assert row(client_dir=str(folder)).ok
    assert setup_jobs.client_rows(load_experiment((), {**site, **LOCAL})) == []


def test_a_setup_job_that_fails_says_its_last_lines(tmp_path):
    e = load_experiment((), {**LOCAL, "scratch_dir": str(tmp_path)})
    with pytest.raises(SetupError, match="the x job: ended with status 3: .*no such thing"):
        setup_jobs.run_setup_job(
            e, "x", setup_jobs._header(e, "x", "0:01:00") + "echo no such thing\nexit 3\n", out=list
        )


SPANS = "one NVLink domain (a server spans several nodes)"


def unmet(found, **given):
    e = load_experiment((), {"engine": "trtllm", "scratch_dir": "/scratch", **given})
    return [check.requirement for check in setup_jobs.probe_checks(e, {**GOOD, **found}) if not check.ok]


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
        ({"fabric": "a 1 a 1 a 2 a 2"}, {"gen_tp_size": 8}, SPANS),
        ({"fabric": "N/A N/A N/A N/A"}, {"gen_tp_size": 8}, SPANS),
        ({"fabric": ""}, {"gen_tp_size": 8}, SPANS),
    ],
)
def test_each_lack_of_a_node_is_found(found, given, requirement):
    assert unmet(found, **given) == ["on gb01: " + requirement]


def test_a_probe_cut_short_is_refused(tmp_path):
    (tmp_path / "probe.txt").write_text("host\tgb01\n")
    with pytest.raises(SetupError, match="cut short"):
        setup_jobs.read_probe(tmp_path)


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
    assert [check.ok for check in setup_jobs.image_checks(image, arch, min_gb=0)] == [True, True, True]
    assert [check.found for check in setup_jobs.image_checks(image, other, min_gb=0) if not check.ok] == [
        arch
    ]


def test_an_image_that_is_none_is_found(tmp_path):
    (tmp_path / "image.sqsh").write_bytes(b"#!/bin/sh\n")
    assert [check.ok for check in setup_jobs.image_checks(tmp_path / "image.sqsh")] == [False, False, False]
    assert [check.ok for check in setup_jobs.image_checks(tmp_path / "absent.sqsh")] == [False]


def test_site_yaml_is_written_once_and_then_compared(tmp_path):
    path = tmp_path / "site.yaml"
    e = load_experiment(
        (), {**LOCAL, "scratch_dir": str(tmp_path), "partition": "batch", "time_limit": "4:00:00"}
    )
    table = setup_jobs.write_site(setup_jobs.suggest_site(e), path)
    assert (table["in the file"] == table["found"]).all()
    assert yaml.safe_load(path.read_text())["time_limit"] == "4:00:00"
    assert load_experiment((path,), LOCAL).partition == "batch"
    before = path.read_text()
    other = setup_jobs.write_site({"partition": ("other", "given"), "account": ("a", "given")}, path)
    assert path.read_text() == before
    rows = (
        other.set_index("key")[["in the file", "found"]]
        .astype(object)
        .where(other.set_index("key").notna(), None)
    )
    assert tuple(rows.loc["partition"][["in the file", "found"]]) == ("batch", "other")


def test_site_yaml_is_readable_by_the_owners_group_as_others_files_are(tmp_path):
    setup_jobs.write_site({"partition": ("batch", "given")}, tmp_path / "site.yaml")
    (tmp_path / "other").touch()
    assert stat.S_IMODE((tmp_path / "site.yaml").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "other").stat().st_mode
    )
