"""A run's servers as the workload file of another launcher: nv-sflow or srt-slurm. Measuring and judging stay ours.

Schemas: NVIDIA/nv-sflow `src/sflow/config/schema.py`, `plugins/` and docs/user (version 0.1); NVIDIA/srt-slurm
docs/schema-reference.md, topology.md, frontends.md, engines.md (`schema: 2`).
"""

import math
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from ..errors import ExportError
from ..experiment.loading import load_recorded
from ..experiment.parameters import Experiment
from ..experiment.topology import Part, Server
from ..run import dynamo
from ..run.config import config_files
from ..run.job_script import OWN_CACHES, UNSET_VARIABLES, serving_command, serving_flags, variables

_NODE = "${{ backends.slurm.nodes[%d].ip_address }}"


def export_launcher(run_dir: Path | str, launcher: str) -> Path:
    """Write `launcher_file` of a run into `RUN/launchers/`; return its path.

    Raises
    ------
    ExportError : as `launcher_file`; or the file is there and says something else.
    """
    path = Path(run_dir) / "launchers" / f"{launcher}.yaml"
    text = launcher_file(load_recorded(Path(run_dir)), launcher)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ExportError(f"{path} is there and says something else: move it away, then export again")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def launcher_file(e: Experiment, launcher: str) -> str:
    """Topology and engine settings as YAML for `launcher`, "sflow" or "srt-slurm".

    Raises
    ------
    ExportError : its schema cannot say what this run does.
    """
    make, refusals = {"sflow": (_sflow, _sflow_refusals), "srt-slurm": (_srt_slurm, _srt_slurm_refusals)}[
        launcher
    ]
    if reasons := _refusals(e) or refusals(e):
        raise ExportError(f"{launcher} cannot say what this run does: {'; '.join(reasons)}")
    return _how_to_measure(e, launcher) + _yaml(make(e))


def _refusals(e: Experiment) -> list[str]:
    cases = {
        f"engine {e.engine}: only engine trtllm has servers to launch": e.engine != "trtllm",
        "launcher local: both launch under Slurm": e.launcher != "slurm",
        "container none: both start servers in an image": e.container != "pyxis",
        "dynamo_discovery file: both expect etcd": e.orchestrator == "dynamo" and e.discovery != "etcd",
        f"{e.num_frontends} orchestrators: only Dynamo's front ends can be several": e.orchestrator
        != "dynamo"
        and e.num_frontends > 1,
    }
    return [reason for reason, holds in cases.items() if holds]


def _how_to_measure(e: Experiment, launcher: str) -> str:
    command = {"sflow": "sflow run --file", "srt-slurm": "srtctl apply -f"}[launcher]
    return (
        f"# Servers of this run for {launcher}: {command} {launcher}.yaml\n"
        "# Then measure them: a params file with engine: external and endpoint_url: the URLs of the front ends.\n"
        "# Not carried over: warm-up, watching, the janitor of containers, clean-up; they are the job script's.\n"
    )


class _Dumper(yaml.SafeDumper):
    """Files inside the file stay readable: text of several lines as a block."""

    def represent_str(self, text):
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    def ignore_aliases(self, data):
        return True


_Dumper.add_representer(str, _Dumper.represent_str)


def _yaml(values: dict[str, Any]) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


# --- nv-sflow


def _sflow_refusals(e: Experiment) -> list[str]:
    lacks = [name for name in ("account", "partition") if not getattr(e, name)]
    return [f"{name} is not given, and its schema wants one" for name in lacks] + (
        [f"container_image {e.container_image!r}: no registry image or .sqsh file as it takes them"]
        if not re.fullmatch(
            r".*\.sqsh|[A-Za-z0-9][\w./:-]*(@[A-Za-z][A-Za-z0-9]*:[A-Fa-f0-9]+)?", e.container_image or ""
        )
        else []
    )


def _sflow(e: Experiment) -> dict[str, Any]:
    """The workflow: a task a server (v5.1: one MPI world, one task), the doors after them, their URLs last."""
    tasks = (
        [_sflow_service(e, name, command) for name, command in dynamo.service_commands(e).items()]
        if _is_dynamo(e)
        else []
    )
    services = [task["name"] for task in tasks]
    workers = (
        [_sflow_world(e)]
        if e.trtllm_dialect == "v5.1"
        else [_sflow_server(e, s, services) for s in e.servers]
    )
    doors = [_sflow_door(e, door, [*services, *(task["name"] for task in workers)]) for door in e.doors]
    urls = [f"http://{_NODE % door.node}:{door.port}" for door in e.doors]
    last = _task(
        "endpoint_url", [0], 1, 1, [f"echo endpoint_url: {url}" for url in urls], [d["name"] for d in doors]
    )
    return {
        "version": "0.1",
        "artifacts": [
            {"name": _artifact(name), "uri": f"file://{name}", "content": _with_nodes(text)}
            for name, text in {**config_files(e), "names.sh": _names(e)}.items()
        ],
        "backends": [_sflow_backend(e)],
        "operators": [_sflow_operator(e)],
        "workflow": {"name": "disagg_405B", "timeout": f"{e.time_limit_s // 60}m", "tasks": [*tasks, *workers, *doors, last]},
    }  # fmt: skip


def _sflow_backend(e: Experiment) -> dict[str, Any]:
    gpus = [f"--gpus-per-node={e.gpus_per_node}"] if e.request_gpus else []
    return {
        "name": "slurm",
        "type": "slurm",
        "default": True,
        "account": e.account,
        "partition": e.partition,
        "time": e.time_limit,
        "nodes": e.node_count,
        "gpus_per_node": e.gpus_per_node,
        "job_name": "disagg_405B",
        "extra_args": ["--exclusive", "--mem=0", *gpus, *e.sbatch_options],
    }


def _sflow_operator(e: Experiment) -> dict[str, Any]:
    mounts = {"container_mounts": e.container_mounts.split(",")} if e.container_mounts else {}
    workdir = {"container_workdir": e.work_dir} if e.work_dir else {}
    return {
        "name": "servers",
        "type": "srun",
        "container_image": e.container_image,
        "container_writable": False,
        "container_mount_home": True,
        **mounts,
        **workdir,
        "kill_on_bad_exit": True,
        "mpi": e.mpi,
        "extra_args": ["--no-container-remap-root", "--cpu-bind=none", "--distribution=block"],
    }


def _task(name, nodes, ranks, ranks_per_node, script, depends_on=(), probe=None) -> dict[str, Any]:
    return {
        "name": name,
        "operator": {"name": "servers", "ntasks": ranks, "ntasks_per_node": ranks_per_node},
        "resources": {"nodes": {"indices": list(nodes)}},
        "script": script,
        **({"depends_on": list(depends_on)} if depends_on else {}),
        **({"probes": {"readiness": probe}} if probe else {}),
    }


def _sflow_service(e: Experiment, name: str, command: str) -> dict[str, Any]:
    port = next(s.port for s in e.services if s.name == name)
    script = _script(f'{command} "$(mktemp -d)"')
    return _task(name, [0], 1, 1, script, probe={"tcp_port": {"port": port}, "timeout": 60})


def _sflow_world(e: Experiment) -> dict[str, Any]:
    serve = f'{serving_command(e)} disaggregated_mpi_worker -c "$RUN/config.yaml" --log_level info'
    script = _script(" ".join([*_values(e.ctx_environment), serve]))
    probe = {"tcp_port": {"port": e.servers[0].port}, "timeout": e.load_timeout_s}
    per_node = min(e.gpus_per_node, e.gpu_count)
    return _task("workers", range(e.node_count), e.gpu_count, per_node, script, probe=probe)


def _sflow_server(e: Experiment, s: Server, services: list[str]) -> dict[str, Any]:
    short = s.name[:3]
    own = dict(getattr(e, f"{short}_environment"))
    if len(s.nodes) == 1 and len(s.gpus) < e.gpus_per_node:
        own["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for _, gpu in s.gpus)
    proxy = f'TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR="ipc:///tmp/disagg_405B_${{SLURM_JOB_ID-}}_{s.name}"'
    host = f"${{NODES[{s.node}]}}"
    if _is_dynamo(e):
        flags = f'DYN_SYSTEM_HOST="{host}" DYN_SYSTEM_PORT={s.port}'
        command = f"{flags} {dynamo.worker_command(e)} {dynamo.role_flags(e, s.role)}"
    else:
        flags = " ".join(serving_flags(e, s.role).split())
        command = (
            f'trtllm-llmapi-launch {serving_command(e)} "$MODEL" --host "{host}" --port {s.port} {flags}'
        )
    probe = {"http_get": {"url": f"http://{_NODE % s.node}:{s.port}/health"}, "timeout": e.load_timeout_s}
    per_node = math.ceil(len(s.gpus) / len(s.nodes))
    return _task(
        s.name,
        s.nodes,
        len(s.gpus),
        per_node,
        _script(" ".join([proxy, *_values(own), command])),
        services,
        probe,
    )


def _sflow_door(e: Experiment, door: Part, depends_on: list[str]) -> dict[str, Any]:
    if _is_dynamo(e):
        command = f"{dynamo.frontend_command(e)} --http-host 0.0.0.0 --http-port {door.port}"
    else:
        limits = f"-t {e.load_timeout_s} -r {e.request_timeout_s}"
        command = f'{serving_command(e)} disaggregated -c "$RUN/config.yaml" {limits}'
    without_slurm = 'unset "${!SLURM_@}"'
    probe = {"tcp_port": {"port": door.port}, "timeout": e.load_timeout_s}
    script = _script(command, without_slurm)
    return _task(door.name, [door.node], 1, 1, script, depends_on, probe)


def _names(e: Experiment) -> str:
    """Bash that names nodes, ports, files, model and environment as the job script does: its commands hold here, too."""
    nodes = " ".join(_NODE % i for i in range(e.node_count))
    ports = " ".join(f"[{part.name}]={part.port}" for part in (*e.servers, *e.doors, *e.services))
    values = _values(variables(e))
    values += [f"{name}={value}" for name, value in dynamo.variables(e).items()] if _is_dynamo(e) else []
    lines = [
        f"NODES=({nodes})",
        f"declare -A PORT=({ports})",
        'RUN=$(dirname "${BASH_SOURCE[0]}")',  # the config files lie beside this one
        f"MODEL={shlex.quote(e.model_path)} NAME={shlex.quote(e.model_name)}",
        "# inside the step: a container's image sets variables that win over exported ones",
        f"ENVIRONMENT=(env -u {' -u '.join(UNSET_VARIABLES)}",
        *(f"  {value}" for value in values),
        ")",
        *(line.strip() for line in OWN_CACHES.splitlines()),
    ]
    return "\n".join(lines) + "\n"


def _script(command: str, *before: str) -> list[str]:
    return ['source "${{ artifacts.NAMES.path }}"', *before, f'exec "${{ENVIRONMENT[@]}}" {command}']


def _artifact(file: str) -> str:
    return file.rpartition(".")[0].replace(".", "_").upper()


def _values(environment: dict[str, str]) -> list[str]:
    return [f"{name}={shlex.quote(value)}" for name, value in environment.items()]


def _with_nodes(text: str) -> str:
    return re.sub(r"\bNODE_(\d+)\b", lambda match: _NODE % int(match[1]), text)


# --- srt-slurm


def _srt_slurm_refusals(e: Experiment) -> list[str]:
    cases = {
        "dialect v5.1: one MPI world over all servers, and it starts each by itself": e.trtllm_dialect
        == "v5.1",
        "container_mounts with flags (host:container:flags)": any(m.count(":") > 1 for m in _mounts(e)),
    }
    by_role = {role: {node for s in e.servers if s.role == role for node in s.nodes} for role in dynamo.ROLES}
    cases["a node is shared by context and generation servers"] = bool(set.intersection(*by_role.values()))
    for s in (next(s for s in e.servers if s.role == role) for role in dynamo.ROLES):
        fits = len(s.gpus) % e.gpus_per_node == 0 or e.gpus_per_node % len(s.gpus) == 0
        cases[f"{s.role} servers of {len(s.gpus)} GPUs on nodes of {e.gpus_per_node}"] = not fits
    return [reason for reason, holds in cases.items() if holds]


def _srt_slurm(e: Experiment) -> dict[str, Any]:
    """The recipe: a role a kind of server, the front ends behind its nginx, no benchmark of its own."""
    environment = {
        **variables(e),
        **{name: shlex.split(value)[0] for name, value in _shared_dynamo_variables(e).items()},
    }
    return {
        "schema": 2,
        "name": "disagg_405B",
        "model": {"path": e.model_path, "container": e.container_image, "precision": "fp4"},
        "resources": {"gpu_type": e.gpu_system, "gpus_per_node": e.gpus_per_node},
        "slurm": {k: v for k, v in {"account": e.account, "partition": e.partition, "time_limit": e.time_limit}.items() if v},
        "engine": _srt_engine(e),
        "roles": {word: _srt_role(e, role) for role, word in dynamo.ROLES.items()},
        "frontend": _srt_frontend(e),
        **({"dynamo": {"install": False, "request_plane": "tcp"}} if _is_dynamo(e) else {}),
        "benchmark": {"type": "manual"},
        "health_check": {"max_attempts": math.ceil(e.load_timeout_s / 10), "interval_seconds": 10},
        "environment": environment,
        "container_mounts": dict(mount.split(":") for mount in _mounts(e)),
        "srun_options": {"mpi": e.mpi, "cpu-bind": "none", "no-container-remap-root": "", "container-mount-home": ""},
        "sbatch_directives": {"exclusive": "", "mem": "0", **dict(map(_directive, e.sbatch_options))},
    }  # fmt: skip


def _srt_engine(e: Experiment) -> dict[str, Any]:
    """Its own metrics and memory binding off: the run had neither."""
    share = any(len(s.gpus) < e.gpus_per_node for s in e.servers)
    return {
        "type": "trtllm",
        "served_model_name": e.model_name,
        "publish_metrics": False,
        "numa_memory_bind": False,
        **({"sequential_node_start": 1} if share and e.load_stagger_s else {}),
    }


def _srt_role(e: Experiment, role: str) -> dict[str, Any]:
    short = {"context": "ctx", "generation": "gen"}[role]
    servers = [s for s in e.servers if s.role == role]
    arguments = yaml.safe_load(config_files(e)[f"config.{short}.yaml"])
    # It sets both where a role says nothing.
    metrics = {"enable_iter_perf_stats": arguments.get("enable_iter_perf_stats", False)}
    if not _is_dynamo(e):
        metrics["return_perf_metrics"] = False
    return {
        "nodes": len({node for s in servers for node in s.nodes}),
        "workers": len(servers),
        "gpus": len(servers[0].gpus),
        "env": dict(getattr(e, f"{short}_environment")),
        "args": arguments | metrics,
    }


def _srt_frontend(e: Experiment) -> dict[str, Any]:
    if not _is_dynamo(e):
        router = {"type": "load_balancing", "use_tokens": True} if e.routing == "least_tokens" else None
        routers = {"ctx_router": router, "gen_router": router} if router else {}
        return {"type": "trtllm_serve", "enable_multiple_frontends": False, **routers}
    several = {"num_additional_frontends": e.num_frontends - 1} if e.num_frontends > 1 else {}
    flags = _flags(dynamo.RELEASES[e.dynamo_release].router)
    return {"type": "dynamo", "enable_multiple_frontends": e.num_frontends > 1, **several, "args": flags}


def _flags(text: str) -> dict[str, str | bool]:
    """'--a b --c' -> {"a": "b", "c": True}."""
    return {
        words[0]: words[1] if len(words) > 1 else True
        for words in (flag.split() for flag in text.split("--") if flag.strip())
    }


def _shared_dynamo_variables(e: Experiment) -> dict[str, str]:
    """Those of Dynamo's variables that name no node: it says itself where etcd and NATS are."""
    found = dynamo.variables(e) if _is_dynamo(e) else {}
    return {name: value for name, value in found.items() if "$" not in value}


def _mounts(e: Experiment) -> list[str]:
    return e.container_mounts.split(",") if e.container_mounts else []


def _directive(option: str) -> tuple[str, str]:
    name, _, value = option.removeprefix("--").partition("=")
    return name, value


def _is_dynamo(e: Experiment) -> bool:
    return e.orchestrator == "dynamo"
