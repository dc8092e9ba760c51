"""Rules that are checked before the queue, each with what was found and what to do."""

import importlib.metadata
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from . import launch
from .errors import DisaggError
from .experiment import REPOSITORY, Experiment, topology_arithmetic
from .job_script import make_job_script
from .run_folder import Table
from .serving import latency

REHEARSAL_GB, CHECKPOINT_GB = 1, 250  # free space; the real checkpoint is about 230 GB


@dataclass(frozen=True)
class Check:
    """One requirement: what was found, whether it will do, and what to do if not.

    `rule` is its short name and `prevents` what goes wrong without it; an `error` stops a submission.
    """

    requirement: str
    found: str
    ok: bool
    fix: str = ""
    rule: str = ""
    prevents: str = ""
    level: str = "error"  # error | warning


class PreflightError(DisaggError):
    """A requirement is not met."""


def require(checks: Iterable[Check]) -> None:
    """Raise PreflightError with every error that is not met, what was found and what to do."""
    unmet = [check for check in checks if not check.ok and check.level == "error"]
    if unmet:
        raise PreflightError("\n".join(f"{c.requirement}: found {c.found}. To do: {c.fix}" for c in unmet))


def checks_table(checks: Iterable[Check]) -> Table:
    """One row a check: requirement, found, ok ('warning' where it stops nothing), fix (empty where nothing is to be done)."""
    rows = [
        asdict(check) | ({"fix": ""} if check.ok else {"ok": False if check.level == "error" else "warning"})
        for check in checks
    ]
    return Table(rows, columns=["requirement", "found", "ok", "fix"])


def checks_text(checks: Iterable[Check]) -> str:
    """For a terminal: a line a check, and below what is not met what it prevents and what to do."""
    lines = []
    for check in checks:
        word = "ok" if check.ok else check.level
        lines.append(
            f"{word:7}  {check.rule or check.requirement}: {check.found}"
            + ("" if check.ok else f" (needed: {check.requirement})")
        )
        if not check.ok:
            lines.append(f"         prevents: {check.prevents}")
            lines.append(f"         to do:    {check.fix}")
    return "\n".join(lines)


def _pinned_versions() -> dict[str, str]:
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    pins = (line.split(";")[0].strip().split("==") for line in lines if "==" in line)
    return {name: version for name, version in pins}


def _package(name: str, pin: str) -> Check:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = "absent"
    return Check(
        f"{name} {pin}", found, found == pin, "run `make demo` once: it installs requirements.lock into .venv"
    )


def _existing_parent(path: Path) -> Path:
    return path if path.exists() else _existing_parent(path.parent)


def machine_checks(e: Experiment) -> list[Check]:
    """What this machine has against what the run needs on it (not on the compute nodes)."""
    python = platform.python_version()
    checks = [
        Check(
            "Python 3.11 to 3.13", python, (3, 11) <= sys.version_info[:2] <= (3, 13), "install one of these"
        )
    ]
    pins = _pinned_versions()
    checks += [
        _package(name, pins[name])
        for name in (
            "mlcommons-loadgen",
            "jupyterlab",
            "papermill",
            "ipywidgets",
            "pandas",
            "huggingface-hub",
        )
    ]
    needed_gb = REHEARSAL_GB if e.engine == "rehearsal" else CHECKPOINT_GB
    free_gb = shutil.disk_usage(_existing_parent(Path(e.scratch_dir))).free / 1e9
    checks.append(
        Check(
            f"{needed_gb} GB free below scratch_dir",
            f"{free_gb:.0f} GB",
            free_gb >= needed_gb,
            "free some, or set scratch_dir",
        )
    )
    if e.launcher == "slurm":
        checks += [*_slurm_tools(e), *cluster_checks(e, make_job_script(e))]
    if e.engine == "rehearsal":
        cores = os.cpu_count() or 1
        memory_gb = psutil.virtual_memory().total / 1e9
        checks.append(
            Check(
                "2 CPU cores", str(cores), cores >= 2, "raise rehearsal_time_scale to slow the rehearsal down"
            )
        )
        checks.append(Check("4 GB of memory", f"{memory_gb:.0f} GB", memory_gb >= 4, "close other programs"))
    return checks


def _slurm_tools(e: Experiment) -> list[Check]:
    """Versions of Slurm and, for pyxis, whether its plugin and enroot are on this login node."""
    checks = []
    if shutil.which("sinfo"):
        version = launch.slurm("sinfo", "--version").strip().removeprefix("slurm ")
        new = int(version.split(".")[0]) >= 22 if version[:1].isdigit() else False
        checks.append(Check("Slurm 22 or newer", version, new, "untried with older ones", level="warning"))
    if e.container == "pyxis":
        pyxis = bool(shutil.which("srun")) and "--container-image" in launch.slurm("srun", "--help")
        found = "yes" if pyxis else "no"
        fix = "ask for pyxis and enroot, or set container: none"
        checks.append(Check("srun knows --container-image (pyxis)", found, pyxis, fix))
    return checks


# -- the experiment, before the queue


def _rule(
    rule: str, ok: bool, found: str, requirement: str, prevents: str, fix: str, level: str = "error"
) -> Check:
    return Check(requirement, found, ok, fix, rule, prevents, level)


def experiment_checks(e: Experiment) -> list[Check]:
    """Every rule that needs no cluster: arithmetic, memory, time, paths, secrets."""
    checks = [_secrets(e), _walltime(e), _time_limit(e), _free_space(e)]
    if e.servers:
        checks += [
            _gpus(e),
            _nvlink(e),
            *_memory(e),
            _generation_tokens(e),
            _sequence_length(e),
            _transfer_buffer(e),
        ]
        if e.engine == "trtllm":
            checks += [_model_folder(e), *_container(e)]
    if e.engine != "rehearsal" and e.client == "loadgen":
        checks.append(_data_set(e))
    if e.client == "nvidia_harness":
        checks += _harness(e)
    return checks


def _gpus(e: Experiment) -> Check:
    held, used = e.node_count * e.gpus_per_node, e.gpu_count
    return _rule(
        "gpu_arithmetic",
        held == used,
        f"{topology_arithmetic(e)}; {e.node_count} nodes x {e.gpus_per_node} = {held}",
        "no idle GPU in the allocation",
        f"{held - used} GPUs held and idle for the whole job",
        "choose server counts and sizes that fill the nodes",
        "warning",
    )


def _nvlink(e: Experiment) -> Check:
    wide = [server.name for server in e.servers if len(server.nodes) > 1]
    return _rule(
        "tp_over_nodes",
        not wide or e.segment is not None,
        f"{', '.join(wide)} on several nodes, segment {e.segment}" if wide else "every server on one node",
        "servers over several nodes share one NVLink domain",
        "tensor parallelism over the slow network, if Slurm picks nodes of two racks",
        "set segment in params/site.yaml to the nodes of one domain, at least those of the widest server",
        "warning",
    )


MEAN_PROMPT_TOKENS, MEAN_ANSWER_TOKENS, LONGEST_PROMPT_TOKENS, LONGEST_ANSWER_TOKENS = 9400, 653, 20000, 2000


def _memory(e: Experiment) -> list[Check]:
    """Weights and KV cache against GPU memory, for a GB200 with NVFP4 weights and an FP8 KV cache."""
    checks = []
    for role, tp_size, pp_size, batch, fraction, tokens in (
        (
            "context",
            e.ctx_tp_size,
            e.ctx_pp_size,
            e.ctx_batch_size,
            e.ctx_gpu_memory_fraction,
            e.ctx_max_num_tokens,
        ),
        ("generation", e.gen_tp_size, 1, e.gen_batch_size, e.gen_gpu_memory_fraction, e.gen_max_num_tokens),
    ):
        try:
            capacity = latency.read_table("gb200", tp_size, pp_size).kv_capacity_tokens(fraction, tokens)
        except latency.LatencyTableError as error:
            fits = tp_size * pp_size > 1
            level = "warning" if fits else "error"
            found = str(error) if fits else f"TP{tp_size} PP{pp_size}: 216 GiB of weights on one GPU of 186"
            prevents = "an engine that cannot start"
            fix = f"use TP 2 to 16 for the {role} servers"
            checks.append(
                _rule(f"{role}_memory", False, found, "weights and KV cache fit", prevents, fix, level)
            )
            continue
        mean = MEAN_PROMPT_TOKENS + (MEAN_ANSWER_TOKENS if role == "generation" else 0)
        requests = capacity // mean
        checks.append(
            _rule(
                f"{role}_memory",
                capacity >= e.max_seq_len,
                f"TP{tp_size} PP{pp_size}: {capacity:,} KV tokens hold about {requests} of {batch} mean requests",
                f"weights and one request of {e.max_seq_len} tokens fit",
                "an engine that cannot start, or never finishes its longest request",
                f"raise the {role} servers' TP, or their gpu_memory_fraction",
            )
        )
    return checks


def _generation_tokens(e: Experiment) -> Check:
    return _rule(
        "gen_max_num_tokens",
        e.gen_max_num_tokens >= e.gen_batch_size,
        f"{e.gen_max_num_tokens} tokens a step for {e.gen_batch_size} requests",
        "gen_max_num_tokens not below gen_batch_size",
        "a batch that can never fill: each request needs one token a step",
        f"set gen_max_num_tokens: {e.gen_batch_size}",
    )


def _sequence_length(e: Experiment) -> Check:
    needed = LONGEST_PROMPT_TOKENS + LONGEST_ANSWER_TOKENS
    return _rule(
        "max_seq_len",
        e.max_seq_len >= needed,
        f"{e.max_seq_len} tokens",
        f"at least {LONGEST_PROMPT_TOKENS} in + {LONGEST_ANSWER_TOKENS} out = {needed} tokens",
        "requests that are refused or cut short, which make a run INVALID",
        "set max_seq_len: 22016",
    )


def _transfer_buffer(e: Experiment) -> Check:
    return _rule(
        "transfer_buffer",
        e.max_seq_len >= LONGEST_PROMPT_TOKENS,
        f"{e.max_seq_len} tokens",
        f"the KV transfer buffer (as long as max_seq_len) holds the longest prompt, {LONGEST_PROMPT_TOKENS} tokens",
        "transfers that stall under load",
        "set max_seq_len: 22016",
    )


def job_seconds(e: Experiment) -> float:
    """How long the test modes take at least: their queries at the target, and LoadGen's minimum."""
    qps = e.server_target_qps
    if e.engine == "rehearsal":
        counts = {"performance": e.rehearsal_queries, "accuracy": e.rehearsal_accuracy_samples}
        return sum(counts[mode] / qps for mode in e.test_modes) + 30
    return (
        sum(max(600.0, SAMPLES / qps) if mode == "performance" else SAMPLES / qps for mode in e.test_modes)
        + LOAD_S
    )


SAMPLES, LOAD_S = 8313, 600  # of the data set; a fair guess for loading 230 GB of weights on every server


def _walltime(e: Experiment) -> Check:
    needed_s = job_seconds(e)
    return _rule(
        "walltime",
        e.time_limit_s - 120 >= needed_s,
        f"{e.time_limit} = {e.time_limit_s} s, of which teardown keeps 120 s; loading and {' and '.join(e.test_modes)} take about {needed_s:.0f} s",
        "time_limit covers loading and all test modes at server_target_qps",
        "a job that is ended in the middle of its last test mode",
        f"set time_limit to at least {math.ceil((needed_s + 120) / 1800) * 1800 // 3600}:{math.ceil((needed_s + 120) / 1800) * 30 % 60:02d}:00",
    )


def _time_limit(e: Experiment) -> Check:
    return _rule(
        "teardown_time",
        e.time_limit_s >= 240 or e.launcher == "local",
        f"{e.time_limit}",
        "a time_limit of 0:04:00 or more",
        "teardown that begins with the job: Slurm signals it 120 s before the limit",
        "raise time_limit",
        "warning",
    )


def _free_space(e: Experiment) -> Check:
    free_gb = shutil.disk_usage(_existing_parent(REPOSITORY / "results")).free / 1e9
    return _rule(
        "free_space",
        free_gb >= 1,
        f"{free_gb:.1f} GB",
        "1 GB free for the run folder",
        "logs cut short",
        "free some space, or give run_dir elsewhere",
    )


SECRET = re.compile(
    r"hf_[A-Za-z0-9]{16,}|(?i:(?:api[_-]?key|token|password|secret)\s*[=:]\s*\S{8,})|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,}"
)


def _secrets(e: Experiment) -> Check:
    holders = [
        name for name, value in e.model_dump().items() if isinstance(value, str) and SECRET.search(value)
    ]
    return _rule(
        "secrets",
        not holders,
        f"something like a token in {', '.join(holders)}" if holders else "none",
        "no token in any parameter",
        "a secret in experiment.yaml, the job script and every notebook that is shared",
        "take it out and revoke it; log in to the hub instead (`hf auth login`), or set HF_TOKEN",
    )


def _model_folder(e: Experiment) -> Check:
    config = Path(e.model_path) / "config.json"
    found, real = f"no readable config.json in {e.model_path}", False
    if os.access(config, os.R_OK):
        # A rehearsal's two-layer checkpoint may stand in the same place below the default scratch_dir.
        layers = re.search(r'"num_hidden_layers":\s*(\d+)', config.read_text(errors="replace"))
        real = bool(layers) and layers[1] == "126"
        found = f"{e.model_path}, {layers[1] if layers else 'unknown'} layers"
    return _rule(
        "model_folder",
        real,
        found,
        "the checkpoint of 126 layers is readable here",
        "servers that die while loading, after the queue",
        "run 01_model_download, or set scratch_dir or model_dir (params/site.yaml)",
    )


def _data_set(e: Experiment) -> Check:
    if e.dataset_path is None:
        found, fix, level = (
            "synthetic prompts",
            "set dataset_path and trust_dataset: true in params/site.yaml",
            "warning",
        )
        prevents = "a measured run that can claim no round: its prompts are made up"
    elif not os.access(e.dataset_path, os.R_OK):
        found, fix, level = f"{e.dataset_path} is not readable here", "correct dataset_path", "error"
        prevents = "a client that ends after the servers have loaded"
    else:
        found, fix, level = (
            f"{e.dataset_path}, trust_dataset: {str(e.trust_dataset).lower()}",
            "set trust_dataset: true",
            "error",
        )
        prevents = "a client that refuses the pickle after the servers have loaded (a pickle can run code)"
        if e.trust_dataset:
            return _rule("data_set", True, found, "the benchmark's data set", prevents, fix)
    return _rule(
        "data_set", False, found, "the benchmark's data set, readable and trusted", prevents, fix, level
    )


def _container(e: Experiment) -> list[Check]:
    if e.container == "none":
        return []
    image = e.container_image
    if image is None:
        found, ok = "not given", False
    elif image.endswith(".sqsh"):
        ok = os.access(image, os.R_OK)
        found = image if ok else f"{image} is not readable here"
    else:
        found, ok = f"{image} (a registry's name: pulled on the nodes)", True
    checks = [
        _rule(
            "container_image",
            ok,
            found,
            "the container image is there",
            "a job that ends in its first phase",
            "set container_image in params/site.yaml, see 00_setup",
        )
    ]
    for mount in (e.container_mounts or "").split(",") if e.container_mounts else []:
        host, colon, inside = mount.partition(":")
        good = bool(colon) and inside.startswith("/") and os.path.exists(host)
        found = (
            mount
            if good
            else (f"{host} does not exist here" if colon else f"{mount}: no host:container pair")
        )
        checks.append(
            _rule(
                "container_mounts",
                good,
                found,
                "each mount is an existing host path, a colon, an absolute path",
                "containers that do not start",
                "correct container_mounts in params/site.yaml",
            )
        )
    return checks


def _harness(e: Experiment) -> list[Check]:
    where = Path(e.harness_dir) if e.harness_dir else None
    makefile = where is not None and (where / "Makefile").is_file()
    configs = (
        sorted(where.glob(f"**/{e.system_name}/Interactive/llama3_1-405b.py"))
        if makefile and e.system_name
        else []
    )
    return [
        _rule(
            "harness_dir",
            makefile,
            str(where),
            "harness_dir holds the harness's Makefile (closed/NVIDIA)",
            "a client that cannot start",
            "set harness_dir",
        ),
        _rule(
            "harness_config",
            bool(configs),
            str(configs[0]) if configs else f"no {e.system_name}/Interactive/llama3_1-405b.py below {where}",
            "the system's configuration file exists",
            "the harness running on with an empty configuration: it only logs a line",
            "set system_name to a folder of the harness's configurations, or add the file",
        ),
    ]


# -- the cluster, before the queue


def cluster_checks(e: Experiment, script: str) -> list[Check]:
    """What Slurm itself says of partition, limits, account and the job script."""
    missing = [
        command
        for command in ("sbatch", "srun", "squeue", "scontrol", "sinfo")
        if shutil.which(command) is None
    ]
    if missing:
        found = f"{', '.join(missing)} not on PATH"
        fix = "go to a login node of the cluster, or set launcher: local for a rehearsal here"
        return [
            _rule("slurm", False, found, "Slurm's commands on PATH", "a job that nothing can submit", fix)
        ]
    try:
        return _cluster_rules(e, script)
    except launch.JobError as error:
        prevents, fix = "a submission that nobody answers", "try again, or go to a login node of the cluster"
        return [_rule("slurm", False, str(error), "a controller that answers", prevents, fix)]


def _cluster_rules(e: Experiment, script: str) -> list[Check]:
    known = launch.partitions()
    names = ", ".join(p.name for p in known)
    chosen = next((p for p in known if (p.name == e.partition if e.partition else p.is_default)), None)
    checks = [
        _rule(
            "partition",
            chosen is not None and chosen.is_up,
            f"{e.partition or 'the default'}"
            + ("" if chosen is None else f", {'up' if chosen.is_up else 'down'}"),
            f"a partition of this cluster that is up: {names}",
            "a submission that is refused",
            "set partition in params/site.yaml",
        )
    ]
    if chosen is not None:
        checks += [
            _rule(
                "partition_nodes",
                chosen.nodes >= e.node_count,
                f"{chosen.name} has {chosen.nodes} nodes",
                f"{e.node_count} nodes",
                "a job that never starts",
                "choose a larger partition or a smaller topology",
            ),
            _rule(
                "partition_time",
                chosen.time_limit_s >= e.time_limit_s,
                f"{chosen.name} allows {chosen.time_limit_s:.0f} s",
                f"time_limit {e.time_limit} = {e.time_limit_s} s",
                "a job that is refused, or waits for ever",
                f"set time_limit to at most {chosen.time_limit_s:.0f} s, or choose another partition",
            ),
        ]
    allowed = launch.accounts()
    if e.account and allowed:
        checks.append(
            _rule(
                "account",
                e.account in allowed,
                e.account,
                f"one of your accounts: {', '.join(allowed)}",
                "a submission that is refused",
                "set account in params/site.yaml",
            )
        )
    if e.segment:
        known_segment = launch.knows_segment()
        checks.append(
            _rule(
                "segment",
                known_segment,
                str(e.segment),
                "an sbatch that knows --segment",
                "nodes of two NVLink domains in one server",
                "ask for a reservation within one rack; --segment is left out",
                "warning",
            )
        )
    if all(check.ok or check.level == "warning" for check in checks):
        try:
            launch.test_submission(script)
            refusal = ""
        except launch.NoAnswer:
            raise
        except launch.JobError as error:
            refusal = str(error)
        checks.append(
            _rule(
                "sbatch",
                not refusal,
                refusal or "would take it",
                "sbatch --test-only takes the job script",
                "a submission that is refused",
                "do what the message says",
            )
        )
    return checks


def check_experiment(e: Experiment) -> list[Check]:
    """Every rule that can be checked from here, before anything is submitted."""
    checks = experiment_checks(e)
    return checks + (cluster_checks(e, make_job_script(e)) if e.launcher == "slurm" else [])
