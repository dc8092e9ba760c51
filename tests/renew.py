"""python tests/renew.py: write the golden files and the notebooks' parameter cells anew, then read the diff."""

import json
from pathlib import Path

from disagg_lib.experiment.loading import load_experiment, read_params_file
from disagg_lib.files import REPOSITORY
from disagg_lib.notebook.clean import clean_text
from disagg_lib.notebook.parameters import parameters_cell
from disagg_lib.notebook.run_all import NOTEBOOKS
from disagg_lib.run.config import config_files
from disagg_lib.run.job_script import make_job_script
from disagg_lib.run.settings import user_conf_text
from disagg_lib.sharing.launchers import launcher_file

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_LAUNCHERS = Path(__file__).parent / "golden_launchers"
REHEARSAL = {"engine": "rehearsal", "launcher": "local", "container": "none"}
SITE = {
    "partition": "batch",
    "account": "mlperf",
    "container_image": "/images/mlpinf.sqsh",
    "container_mounts": "/scratch:/scratch,/code:/work",
    "work_dir": "/work",
    "scratch_dir": "/scratch",
}


def of_params(name: str) -> dict:
    """A params file's values, as given."""
    return read_params_file(REPOSITORY / f"params/{name}.yaml", name)


CASES = {
    "v5.1_20gpu_slurm_pyxis": SITE,
    "v5.1_20gpu_slurm_none": SITE | {"container": "none", "container_image": None, "container_mounts": None},
    "1.x_20gpu_slurm_pyxis": SITE | {"trtllm_dialect": "1.x"},
    "1.x_least_tokens": SITE
    | {
        "trtllm_dialect": "1.x",
        "routing": "least_tokens",
        "gen_capacity_policy": "MAX_UTILIZATION",
        "gen_cuda_graphs": "powers_of_two",
        "round": "v6.0",
        "min_query_count": 49878,
    },
    "1.x_shared_node": SITE
    | {
        "trtllm_dialect": "1.x",
        "ctx_tp_size": 8,
        "num_gen_servers": 2,
        "gen_tp_size": 2,
        "gen_batch_size": 100,
    },
    "v5.1_rehearsal_local": REHEARSAL,
    "1.x_rehearsal_local": REHEARSAL | {"trtllm_dialect": "1.x"},
    "v5.1_rehearsal_slurm": REHEARSAL | {"launcher": "slurm", "partition": "batch"},
    "external_local": {
        "engine": "external",
        "launcher": "local",
        "container": "none",
        "endpoint_url": "http://10.0.0.7:8000",
    },
    "offline_test06_local": REHEARSAL
    | {"scenario": "Offline", "test_modes": ["performance", "accuracy", "test06"]},
    "v5.1_nvidia_harness": SITE
    | {"client": "nvidia_harness", "system_name": "GB200-NVL72_x20", "harness_dir": "/code"},
    "v5.1_client_dir": SITE | {"client_dir": "/scr atch/client_env"},
    "odd_paths_slurm": SITE
    | {"container": "none", "container_image": None, "container_mounts": None, "work_dir": None}
    | {"scratch_dir": "/scr atch/`id`", "client_dir": "/client's $(id)"},
    "v5.1_rehearsal_pyxis": REHEARSAL
    | {"launcher": "slurm", "container": "pyxis", "container_image": "/images/python3.sqsh"}
    | {"container_mounts": "/project:/project", "mpi": "pmi2", "request_gpus": False}
    | {"sbatch_options": ["--qos=high", "--reservation=mlperf"]},
    "v6.0_gb200_72gpu": SITE | of_params("gb200_72gpu_v6.0_published"),
    "v6.0_gb300_72gpu": SITE
    | {"recipe": "v6.0", "gpu_system": "gb300", "num_ctx_servers": 26, "ctx_tp_size": 2, "num_gen_servers": 5}
    | {"server_target_qps": 29.3, "min_query_count": 33252},
    "1.x_dynamo_rehearsal_local": REHEARSAL
    | {"trtllm_dialect": "1.x", "orchestrator": "dynamo", "num_frontends": 2},
    "1.x_dynamo_slurm": SITE | {"trtllm_dialect": "1.x", "orchestrator": "dynamo", "num_frontends": 2},
    "1.x_two_orchestrators": SITE | {"trtllm_dialect": "1.x", "num_frontends": 2},
}

# Which of them go to which other launcher: `export --as`.
LAUNCHER_CASES = {
    "v5.1_20gpu_slurm_pyxis": ["sflow"],
    "1.x_shared_node": ["sflow"],
    "1.x_least_tokens": ["sflow", "srt-slurm"],
    "v6.0_gb200_72gpu": ["sflow", "srt-slurm"],
}


def launcher_texts(case: str) -> dict[str, str]:
    """File name -> text of what other launchers get of a case."""
    e = load_experiment([], CASES[case], root=Path("/project"))
    return {f"{case}.{launcher}.yaml": launcher_file(e, launcher) for launcher in LAUNCHER_CASES[case]}


def texts(given: dict) -> dict[str, str]:
    """File name -> text of all that a run folder of these parameters has, for a project at /project."""
    e = load_experiment([], given, root=Path("/project"))
    return {
        **config_files(e),
        "user.conf": user_conf_text(e),
        "job.sh": make_job_script(e, python="/project/.venv/bin/python"),
    }


def renew_parameters_cell(path: Path) -> str:
    """The notebook's text with its parameters cell as the library writes it, and as git's filter leaves it."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cell = next(c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", []))
    source = parameters_cell(makes_runs=path.name[:2] not in ("04", "05"))
    cell["source"] = source.splitlines(keepends=True)
    # Folded: a line for every key, of which few readers need one.
    cell["metadata"]["jupyter"] = {"source_hidden": True}
    return clean_text(json.dumps(notebook))


if __name__ == "__main__":
    for case, given in CASES.items():
        folder = GOLDEN / case
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for name, text in texts(given).items():
            (folder / name).write_text(text)
    for case in LAUNCHER_CASES:
        for name, text in launcher_texts(case).items():
            (GOLDEN_LAUNCHERS / name).write_text(text)
    for path in NOTEBOOKS.glob("*.ipynb"):
        path.write_text(renew_parameters_cell(path), encoding="utf-8")
