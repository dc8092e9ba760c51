"""Experiment -> the text of the job script: for Slurm's sbatch, or for bash on this machine."""

import shlex
import sys
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..experiment.parameters import Experiment
from ..experiment.topology import Server, topology_arithmetic


def _environment_variables(e: Experiment) -> list[tuple[str, str]]:
    """What the servers are told through the environment; TensorRT-LLM, facts of the v5.1 runs."""
    if e.engine == "external":
        return []
    if e.engine == "rehearsal":
        return [
            ("REHEARSAL_TIME_SCALE", str(e.rehearsal_time_scale)),
            ("REHEARSAL_SYSTEM", e.gpu_system),
            ("REHEARSAL_FAULT", e.fault),
            # Five servers share a laptop: none may start a thread a core.
            ("OMP_NUM_THREADS", "1"),
            ("PYTHONUNBUFFERED", "1"),
        ]
    variables = [
        ("TLLM_LOG_LEVEL", "INFO"),
        ("TRTLLM_ENABLE_PDL", "1"),
        ("TRTLLM_SERVER_DISABLE_GC", "1"),
        ("TRTLLM_WORKER_DISABLE_GC", "1"),
        ("NCCL_GRAPH_MIXING_SUPPORT", "0"),
    ]
    if e.trtllm_dialect == "v5.1":
        # This release chooses the KV transport by environment alone.
        variables.append((f"TRTLLM_USE_{e.transfer_backend}_KVCACHE", "1"))
        if any(len(server.nodes) > 1 for server in e.servers):
            variables.append(("TRTLLM_MNNVL_AR_ENABLED", "1"))
    if e.container == "pyxis":
        variables.append(("ENROOT_ALLOW_DEV", "yes"))
        # The v5.1 image's TensorRT-LLM lives in the mounted tree.
        if e.work_dir and e.trtllm_dialect == "v5.1":
            variables.append(("PYTHONPATH", f"{e.work_dir}/.llm_aarch64/lib/python3.12/site-packages"))
    if e.client == "nvidia_harness":
        variables += [
            ("SYSTEM_NAME", e.system_name or ""),
            ("MLPERF_SCRATCH_PATH", e.scratch_dir),
            ("ENV", "dev"),
            ("BUILD_CONTEXT", "aarch64-Grace"),
            ("CUDA_VER", "12.9"),
            ("TRT_VER", "10.11.0.33"),
            ("INSTALL_RGAT_DEPS", "0"),
            ("INSTALL_TRTLLM", ""),
            ("INSTALL_LOADGEN", ""),
        ]
    return variables


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
    ours = e.engine == "rehearsal" or e.launcher == "local"

    def gpus(server: Server) -> str:
        shared = len(server.nodes) == 1 and len(server.gpus) < e.gpus_per_node
        return ",".join(str(gpu) for _, gpu in server.gpus) if shared else "all"

    return environment.get_template("job.sh.j2").render(
        e=e,
        arithmetic=topology_arithmetic(e) if e.servers else f"no servers: measures {e.endpoint_url}",
        environment=_environment_variables(e),
        python=python if ours else "python3",
        # The container's PYTHONPATH stays behind it: the client brings LoadGen, the container the rest.
        with_client_dir=f'env PYTHONPATH={shlex.quote(e.client_dir)}"${{PYTHONPATH:+:$PYTHONPATH}}" '
        if e.client_dir
        else "",
        client_python=python if ours else "python3",
        serve='"$PYTHON" -m disagg_lib.rehearsal' if e.engine == "rehearsal" else "trtllm-serve",
        launch="trtllm-llmapi-launch " if e.engine == "trtllm" else "",
        tasks_per_node=min(e.gpus_per_node, e.gpu_count),
        gpus=gpus,
        url=shlex.quote(e.endpoint_url) if e.endpoint_url else '"http://${NODES[0]}:${PORT[orchestrator]}"',
    )
