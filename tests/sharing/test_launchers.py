"""`export --as`: workload files of nv-sflow and srt-slurm. tests/dynamo/test_sflow.py has sflow itself read them."""

import subprocess

import pytest
import yaml
from click.testing import CliRunner
from pydantic import BaseModel, ConfigDict, Field
from renew import CASES, GOLDEN, GOLDEN_LAUNCHERS, LAUNCHER_CASES, SITE, launcher_texts

from disagg_lib.command_line import main
from disagg_lib.errors import ExportError
from disagg_lib.experiment.loading import experiment_text, load_experiment
from disagg_lib.sharing.launchers import export_launcher, launcher_file

DYNAMO = SITE | {"trtllm_dialect": "1.x", "orchestrator": "dynamo"}


@pytest.mark.parametrize("case", LAUNCHER_CASES)
def test_files_equal_the_golden_ones(case):
    golden = {path.name: path.read_text() for path in GOLDEN_LAUNCHERS.glob(f"{case}.*")}
    assert launcher_texts(case) == golden


# --- srt-slurm: the keys that its docs/schema-reference.md lists for `schema: 2`, of the sections that we write


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Model(Strict):
    path: str
    container: str
    precision: str


class Resources(Strict):
    gpu_type: str
    gpus_per_node: int


class Slurm(Strict):
    account: str
    partition: str
    time_limit: str


class Engine(Strict):
    type: str
    served_model_name: str
    publish_metrics: bool
    numa_memory_bind: bool
    sequential_node_start: int = 0


class Role(Strict):
    nodes: int
    workers: int
    gpus: int
    env: dict[str, str]
    args: dict


class Frontend(Strict):
    type: str
    enable_multiple_frontends: bool
    num_additional_frontends: int = 9
    args: dict[str, str | bool] | None = None
    ctx_router: dict | None = None
    gen_router: dict | None = None


class Dynamo(Strict):
    install: bool
    request_plane: str


class Benchmark(Strict):
    type: str


class HealthCheck(Strict):
    max_attempts: int
    interval_seconds: int


class Recipe(Strict):
    version: int = Field(alias="schema")
    name: str
    model: Model
    resources: Resources
    slurm: Slurm
    engine: Engine
    roles: dict[str, Role]
    frontend: Frontend
    dynamo: Dynamo | None = None
    benchmark: Benchmark
    health_check: HealthCheck
    environment: dict[str, str]
    container_mounts: dict[str, str]
    srun_options: dict[str, str]
    sbatch_directives: dict[str, str]


RECIPES = sorted(GOLDEN_LAUNCHERS.glob("*.srt-slurm.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_has_the_keys_of_the_published_schema_and_no_other(path):
    recipe = Recipe(**yaml.safe_load(path.read_text()))
    assert recipe.version == 2 and recipe.frontend.type == ("dynamo" if recipe.dynamo else "trtllm_serve")
    assert set(recipe.roles) == {"prefill", "decode"}
    for role in recipe.roles.values():
        assert role.workers * role.gpus == role.nodes * recipe.resources.gpus_per_node


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_says_every_engine_key_of_the_run(path):
    """What srtctl sets where a role says nothing is said, so that the engine is the run's."""
    recipe = yaml.safe_load(path.read_text())
    for role, short in (("prefill", "ctx"), ("decode", "gen")):
        ours = yaml.safe_load((GOLDEN / path.name.partition(".srt")[0] / f"config.{short}.yaml").read_text())
        theirs = recipe["roles"][role]["args"]
        added = {"return_perf_metrics": False} if recipe["frontend"]["type"] == "trtllm_serve" else {}
        assert theirs == {"enable_iter_perf_stats": False} | ours | added


def test_dynamos_flags_become_arguments_of_the_front_end():
    recipe = yaml.safe_load((GOLDEN_LAUNCHERS / "v6.0_gb200_72gpu.srt-slurm.yaml").read_text())
    script = (GOLDEN / "v6.0_gb200_72gpu/job.sh").read_text()
    assert recipe["frontend"]["num_additional_frontends"] == 3
    for name, value in recipe["frontend"]["args"].items():
        assert f"--{name}" + ("" if value is True else f" {value}") in script


# --- nv-sflow

WORKFLOWS = sorted(GOLDEN_LAUNCHERS.glob("*.sflow.yaml"))


def workflow(path):
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_the_job_scripts_commands(path):
    """Whatever a task executes stands in the run's own job script, but for node and port, which are written out."""
    script = " ".join((GOLDEN / path.name.removesuffix(".sflow.yaml") / "job.sh").read_text().split())
    for task in workflow(path)["workflow"]["tasks"][:-1]:
        command = task["script"][-1]
        for word in ("-m dynamo.trtllm", "-m dynamo.frontend", "trtllm-serve", "etcd", "nats-server"):
            if word in command:
                assert word in script
        for flags in ("--disaggregation-mode", "--tp_size", "--router-mode", "disaggregated_mpi_worker"):
            if flags in command:
                found = (
                    command[command.index(flags) :]
                    .split(" --http")[0]
                    .replace("config.yaml", "job/config.bound.yaml")
                )
                assert found in script, found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflows_shell_is_shell(path):
    found = workflow(path)
    names = next(a["content"] for a in found["artifacts"] if a["name"] == "NAMES")
    tasks = ["\n".join(task["script"]) for task in found["workflow"]["tasks"]]
    for text in [names, *tasks]:
        plain = text.replace("${{ backends.slurm.nodes", "node").replace(".ip_address }}", "")
        done = subprocess.run(["bash", "-n"], input=plain.replace("${{", "").replace("}}", ""), text=True, capture_output=True)  # fmt: skip
        assert done.stderr == ""


def test_every_rank_of_the_topology_is_a_task_of_a_server():
    for path in WORKFLOWS:
        e = load_experiment([], CASES[path.name.removesuffix(".sflow.yaml")])
        tasks = [
            t for t in workflow(path)["workflow"]["tasks"] if t["name"].startswith(("ctx", "gen", "workers"))
        ]
        assert sum(task["operator"]["ntasks"] for task in tasks) == e.gpu_count
        shared = [task for task in tasks if "CUDA_VISIBLE_DEVICES" in task["script"][-1]]
        assert bool(shared) == (path.name == "1.x_shared_node.sflow.yaml")


# --- what they cannot say


@pytest.mark.parametrize(
    ("given", "launcher", "said"),
    [
        (SITE, "srt-slurm", "one MPI world"),
        (DYNAMO | {"num_ctx_servers": 3, "ctx_tp_size": 2, "gen_tp_size": 2}, "srt-slurm", "a node is shared"),
        (DYNAMO | {"ctx_tp_size": 8, "gpus_per_node": 6, "gen_tp_size": 2}, "srt-slurm", "context servers of 8 GPUs on nodes of 6"),
        (DYNAMO | {"container_mounts": "/a:/b:ro"}, "srt-slurm", "with flags"),
        (DYNAMO | {"account": None}, "sflow", "account is not given"),
        (DYNAMO | {"container_image": "docker://host#image:1"}, "sflow", "no registry image"),
        (CASES["1.x_two_orchestrators"], "sflow", "2 orchestrators"),
        (CASES["v5.1_20gpu_slurm_none"], "sflow", "container none"),
        (CASES["external_local"], "srt-slurm", "engine external"),
        (CASES["v5.1_rehearsal_local"], "sflow", "launcher local"),
        (DYNAMO | {"dynamo_release": "1.4", "dynamo_discovery": "file"}, "sflow", "dynamo_discovery file"),
    ],
)  # fmt: skip
def test_what_a_launcher_cannot_say_is_refused_in_one_sentence(given, launcher, said):
    with pytest.raises(ExportError, match=f"^{launcher} cannot say what this run does: .*{said}[^\n]*$"):
        launcher_file(load_experiment([], given), launcher)


def test_export_writes_once_and_overwrites_nothing(tmp_path):
    (tmp_path / "experiment.yaml").write_text(experiment_text(load_experiment([], DYNAMO)))
    first = CliRunner().invoke(main, ["export", str(tmp_path), "--as", "sflow"])
    path = tmp_path / "launchers/sflow.yaml"
    assert first.output == f"Wrote {path}\n" and export_launcher(tmp_path, "sflow") == path
    path.write_text("mine")
    again = CliRunner().invoke(main, ["export", str(tmp_path), "--as", "sflow"])
    assert again.exit_code and path.read_text() == "mine" and "move it away" in again.output
