"""Experiment -> the text of the job script: for Slurm's sbatch, or for bash on this machine."""

import shlex
import sys
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..experiment.parameters import Experiment
from ..experiment.topology import Server, topology_arithmetic
from . import dynamo


def variables(e: Experiment) -> dict[str, str]:
    """What the servers are told through the environment; TensorRT-LLM, facts of the v5.1 runs."""
    own_python = {"PYTHONNOUSERSITE": "1"}  # the home folder's packages would come before the image's
    if e.engine == "external":
        return own_python
    if e.engine == "rehearsal":
        return own_python | {
            "REHEARSAL_TIME_SCALE": str(e.rehearsal_time_scale),
            "REHEARSAL_SYSTEM": e.gpu_system,
            "REHEARSAL_STACK": e.serving_stack,
            "REHEARSAL_FAULT": e.fault,
            # Five servers share a laptop: none may start a thread a core.
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
    variables = own_python | {
        # At these levels a run writes megabytes; somebody's DEBUG or TRACE would be gigabytes.
        "TLLM_LOG_LEVEL": "INFO",
        "NCCL_DEBUG": "WARN",
        "UCX_LOG_LEVEL": "warn",
        "TRTLLM_ENABLE_PDL": "1",
        "TRTLLM_SERVER_DISABLE_GC": "1",
        "TRTLLM_WORKER_DISABLE_GC": "1",
        "NCCL_GRAPH_MIXING_SUPPORT": "0",
    }
    if e.trtllm_dialect == "v5.1":
        # This release chooses the KV transport by environment alone.
        variables |= {f"TRTLLM_USE_{e.transfer_backend}_KVCACHE": "1", "TRTLLM_MNNVL_AR_ENABLED": "1"}
        if path := tensorrt_llm_path(e):
            variables["PYTHONPATH"] = path
    return variables


def tensorrt_llm_path(e: Experiment) -> str | None:
    """Where v5.1's TensorRT-LLM lies in the container: in the mounted tree, which the image does not hold."""
    mounted = e.container == "pyxis" and e.trtllm_dialect == "v5.1" and e.work_dir
    return f"{e.work_dir}/.llm_aarch64/lib/python3.12/site-packages" if mounted else None


def container_options(e: Experiment) -> list[str]:
    """srun's options for a container as the job's, but for its name and the run folder's mount."""
    options = {"image": e.container_image, "mounts": e.container_mounts, "workdir": e.work_dir}
    return [f"--container-{name}={value}" for name, value in options.items() if value] + [
        # Root inside is not who the job is outside: PMIx would refuse each rank.
        "--no-container-remap-root",
        "--container-mount-home",
    ]


# What would redirect servers or harness.
UNSET_VARIABLES = [
    "UCX_TLS",
    "LOG_DIR",
    "MODEL_DIR",
    "DATA_DIR",
    "PREPROCESSED_DATA_DIR",
    "BUILD_DIR",
    "CONFIG_DIR",
    "ARTIFACTS_DIR",
]

# Bash: a rank's caches in a folder of its own, or ranks of one node write over each other's.
OWN_CACHES = """\
  own=/tmp/disagg_405B_${USER-}/${SLURM_JOB_ID-}.${SLURM_STEP_ID-}.${SLURM_PROCID-}
  for name in XDG_CACHE_HOME TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR FLASHINFER_WORKSPACE_BASE CUDA_CACHE_PATH; do
    mkdir -p "$own/$name" && export "$name=$own/$name"
  done
"""

_HARNESS_CONSTANTS = {
    "ENV": "dev",
    "BUILD_CONTEXT": "aarch64-Grace",
    "CUDA_VER": "12.9",
    "TRT_VER": "10.11.0.33",
    "INSTALL_RGAT_DEPS": "0",
    "INSTALL_TRTLLM": "",
    "INSTALL_LOADGEN": "",
}


def serving_command(e: Experiment) -> str:
    """TensorRT-LLM's own command, by dialect."""
    return {"v5.1": "python3 -m tensorrt_llm.commands.serve", "1.x": "trtllm-serve"}[e.trtllm_dialect]


def serving_flags(e: Experiment, role: str) -> str:
    """What dialect 1.x tells each server of a role, in lines for the shell."""
    short = {"context": "ctx", "generation": "gen"}[role]
    tp_size, batch, tokens = (
        getattr(e, f"{short}_{name}") for name in ("tp_size", "batch_size", "max_num_tokens")
    )
    return (
        f"  --tp_size {tp_size} --pp_size {e.ctx_pp_size if short == 'ctx' else 1}\n"
        f"  --max_batch_size {batch} --max_num_tokens {tokens} --max_seq_len {e.max_seq_len}\n"
        f'  --backend pytorch --extra_llm_api_options "$RUN/config.{short}.yaml" --server_role {role} --log_level info\n'
    )


def serve_check(e: Experiment, python: str) -> str:
    """The command that shows, where the servers will run, that what serves is there."""
    if e.orchestrator == "dynamo":
        return f"{dynamo.python_of(e)} -c '{dynamo.check_code(e)}'"
    if e.engine == "rehearsal":
        return f"{shlex.quote(python)} -c 'import disagg_lib.rehearsal'"
    if e.trtllm_dialect == "v5.1":
        return "python3 -c 'import tensorrt_llm'"
    return (
        """python3 -c 'import shutil, tensorrt_llm; """
        """lacks = [p for p in ("trtllm-llmapi-launch", "trtllm-serve") if not shutil.which(p)]; """
        """assert not lacks, f"not on PATH: {lacks}"'"""
    )


def start_waves(servers: tuple[Server, ...]) -> list[list[Server]]:
    """The first server of each node, then the second of each, and so on: those of a wave start at once."""

    def place(server: Server) -> int:
        return [other for other in servers if other.node == server.node].index(server)

    return [list(wave) for _, wave in groupby(sorted(servers, key=place), place)]


def make_job_script(e: Experiment, python: str = sys.executable) -> str:
    """The whole job script; every value from a parameter is quoted for the shell.

    Parameters
    ----------
    python : interpreter of a rehearsal's servers and client and of anything local; a cluster run uses
        the nodes' own `python3`.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",  # bash writes ${#name}
        comment_end_string="##}",
    )
    # shlex.quote leaves commas bare, which reads like an array of another language.
    environment.filters["sh"] = lambda text: (
        f"'{text}'" if "," in text and "'" not in text else shlex.quote(text)
    )
    python = python if e.engine == "rehearsal" or e.launcher == "local" else "python3"

    def gpus(server: Server) -> str:
        shared = len(server.nodes) == 1 and len(server.gpus) < e.gpus_per_node
        return ",".join(str(gpu) for _, gpu in server.gpus) if shared else "all"

    return environment.get_template("job.sh.j2").render(
        e=e,
        arithmetic=topology_arithmetic(e)
        if e.servers
        else f"no servers: measures {', '.join(e.endpoint_url)}",
        variables=variables(e),
        harness_variables={
            "SYSTEM_NAME": e.system_name or "",
            "MLPERF_SCRATCH_PATH": e.scratch_dir,
            **_HARNESS_CONSTANTS,
        },
        python=python,
        serve='"$PYTHON" -m disagg_lib.rehearsal' if e.engine == "rehearsal" else serving_command(e),
        serving_flags=serving_flags,
        unset_variables=UNSET_VARIABLES,
        own_caches=OWN_CACHES,
        serve_check=serve_check(e, python),
        tasks_per_node=min(e.gpus_per_node, e.gpu_count),
        waves=start_waves(e.servers),
        gpus=gpus,
        urls=[shlex.quote(url) for url in e.endpoint_url]
        or [f'"http://${{NODES[{door.node}]}}:${{PORT[{door.name}]}}"' for door in e.doors],
        dynamo=dynamo if e.orchestrator == "dynamo" and e.servers else None,
    )
