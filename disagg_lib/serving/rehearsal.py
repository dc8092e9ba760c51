"""The rehearsal server: stands in for `trtllm-serve` on a machine without GPUs, with the same argv, files and HTTP.

  python -m disagg_lib.serving.rehearsal disaggregated -c FILE [-t START_TIMEOUT] [-r REQUEST_TIMEOUT]
  python -m disagg_lib.serving.rehearsal disaggregated_mpi_worker -c FILE      one process per rank, rank in SLURM_PROCID
  python -m disagg_lib.serving.rehearsal MODEL --host H --port P [...]         one server of dialect 1.x

How it differs from TensorRT-LLM:
  - No model: tokens are invented from a checksum of the prompt, so no answer means anything. If min_tokens = max_tokens the answer
    has exactly that length; otherwise its length is drawn (from the same checksum) out of the built-in shape.
  - Each choice carries `token_ids`, the ids behind its text, so that a client needs no tokenizer. Text prompts count one token for
    four characters.
  - Time passes as the serving model says: step times from a latency table x REHEARSAL_TIME_SCALE, the same rules as `simulate`.
    Loading takes 1.5 s x the scale. No GPU, no MPI: a rank that leads no server only sleeps.
  - The KV cache is not moved, only its time is spent. Stream interval, beams, several choices, conditional disaggregation
    and service discovery are not rehearsed. Plain requests are refused by workers: each serves one phase.
  - Workers listen on the host named for them in urls and nowhere else.

Environment:
  REHEARSAL_TIME_SCALE   seconds that pass for each second of the model (default 1.0)
  REHEARSAL_SYSTEM       latency table (default gb200)
  REHEARSAL_SERVER_NAME  the name in messages and faults of a server started as MODEL (default: role@port)
  REHEARSAL_FAULT        none | crash_loading[:SERVER] | crash_midrun[:SERVER[:AFTER_N_REQUESTS]] | health_503 |
                         no_tokens | slow_tokens | truncated_stream[:EVERY_N]; SERVER is ctx0, ctx1, gen0 ... (default gen0)
"""

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from disagg_lib.errors import DisaggError
from disagg_lib.serving import serve_config
from disagg_lib.serving.serve_config import ServeConfigError

FAULTS = (
    "none",
    "crash_loading",
    "crash_midrun",
    "health_503",
    "no_tokens",
    "slow_tokens",
    "truncated_stream",
)


@dataclass(frozen=True)
class Knobs:
    """What the environment asks of a rehearsal."""

    time_scale: float
    system: str
    fault: str
    fault_server: str
    fault_count: int


def read_knobs(environment) -> Knobs:
    """Read and check the REHEARSAL_* variables."""
    text = environment.get("REHEARSAL_TIME_SCALE", "1.0")
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale < 1e4:
        raise ServeConfigError(f"REHEARSAL_TIME_SCALE is {text!r}; a number above 0 is needed.")
    fault = environment.get("REHEARSAL_FAULT") or "none"
    name, *rest = fault.split(":")
    server, count = "gen0", {"crash_midrun": 20, "truncated_stream": 7}.get(name, 0)
    try:
        if name in ("crash_loading", "crash_midrun") and rest:
            server = rest.pop(0)
        if name in ("crash_midrun", "truncated_stream") and rest:
            count = int(rest.pop(0))
    except ValueError:
        rest = [fault]
    if name not in FAULTS or rest or count < (name == "truncated_stream"):
        raise ServeConfigError(
            f"REHEARSAL_FAULT is {fault!r}; one of {', '.join(FAULTS)}, see --help for what may follow."
        )
    return Knobs(scale, environment.get("REHEARSAL_SYSTEM", "gb200"), name, server, count)


def log(name: str, text: str) -> None:
    """One line of a server's log, at once."""
    print(f"[{time.strftime('%m/%d/%Y-%H:%M:%S')}] [REHEARSAL] [{name}] {text}", flush=True)


def _sleep_until_signalled() -> None:
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    signal.sigwait(signals)


def _whole_variable(environment, name: str) -> int:
    text = environment.get(name, "")
    if not text.isdigit():
        raise ServeConfigError(
            f"{name} is {text!r}; an MPI worker is one rank of an srun step, which sets it."
        )
    return int(text)


def run_mpi_worker(options, knobs: Knobs) -> None:
    """One rank: the leader of a server serves, the others sleep."""
    rank = _whole_variable(os.environ, "SLURM_PROCID")
    tasks = _whole_variable(os.environ, "SLURM_NTASKS")
    file = serve_config.read_serve_file(options.config_file)
    world = sum(instance.ranks for instance in file.instances)
    if tasks != world or rank >= world:
        parts = " + ".join(f"{i.name} {i.ranks}" for i in file.instances)
        raise ServeConfigError(
            f"{options.config_file}: rank {rank} of {tasks}, but the servers need exactly {parts} = {world} ranks."
            f" Start {world} tasks."
        )
    instance = next(i for i in file.instances if i.first_rank <= rank < i.first_rank + i.ranks)
    if rank != instance.first_rank:
        _sleep_until_signalled()
        return
    where = f"{options.config_file}: {instance.name} ({instance.role}_servers)"
    args = serve_config.engine_args(where, instance.engine, file.dialect, instance.role)
    from disagg_lib.serving.rehearsal_http import run_server

    model = str(instance.engine.get("model", "model"))
    run_server(instance.name, instance.role, instance.host, instance.port, model, args, file.dialect, knobs)


def run_orchestrator(options, knobs: Knobs) -> None:
    """Wait for every worker, then take requests."""
    file = serve_config.read_serve_file(options.config_file)
    from disagg_lib.serving.rehearsal_http import run_orchestrator as run

    run(file, options.server_start_timeout, options.request_timeout)


def run_worker(options, knobs: Knobs) -> None:
    """A server of dialect 1.x: rank 0 of its step serves."""
    if int(os.environ.get("SLURM_PROCID", "0")) != 0:
        _sleep_until_signalled()
        return
    engine = serve_config.load_yaml(options.extra_llm_api_options) if options.extra_llm_api_options else {}
    given = {
        "tensor_parallel_size": options.tp_size,
        "pipeline_parallel_size": options.pp_size,
        "moe_expert_parallel_size": options.ep_size,
        "max_batch_size": options.max_batch_size,
        "max_num_tokens": options.max_num_tokens,
        "max_seq_len": options.max_seq_len,
        "backend": options.backend,
    }
    engine = {**{key: value for key, value in given.items() if value is not None}, **engine}
    kv = options.kv_cache_free_gpu_memory_fraction
    if kv is not None and "free_gpu_memory_fraction" not in (engine.get("kv_cache_config") or {}):
        engine["kv_cache_config"] = {**(engine.get("kv_cache_config") or {}), "free_gpu_memory_fraction": kv}
    role = options.server_role and options.server_role.lower()
    if role not in (None, "context", "generation"):
        raise ServeConfigError(f"--server_role {options.server_role}: context or generation is needed.")
    where = str(options.extra_llm_api_options or "command line")
    args = serve_config.engine_args(where, engine, "1.x", role, per_worker=True)
    name = os.environ.get("REHEARSAL_SERVER_NAME") or f"{role or 'server'}@{options.port}"
    from disagg_lib.serving.rehearsal_http import run_server

    run_server(name, role, options.host, options.port, options.model, args, "1.x", knobs)


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m disagg_lib.serving.rehearsal {command}".rstrip(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-l", "--log_level", default="info")
    if command == "disaggregated":
        add("-c", "--config_file", type=Path, required=True)
        add(
            "-t",
            "--server_start_timeout",
            type=float,
            default=180,
            help="s to wait for every worker's /health",
        )
        add(
            "-r",
            "--request_timeout",
            type=float,
            default=180,
            help="s for one forwarded request, stream included",
        )
        add("--metrics-log-interval", type=int, default=0)
    elif command == "disaggregated_mpi_worker":
        add("-c", "--config_file", type=Path, required=True)
        add("--disable_gc", action="store_true")
    else:
        add("model")
        add("--host", default="localhost")
        add("--port", type=int, default=8000)
        for name in ("tp_size", "pp_size", "ep_size", "max_batch_size", "max_num_tokens", "max_seq_len"):
            add(f"--{name}", type=int)
        add("--kv_cache_free_gpu_memory_fraction", type=float)
        add("--backend")
        add("--extra_llm_api_options", "--config", type=Path)
        add("--server_role")
    return parser


def main(arguments: list[str]) -> int:
    """Run the command; the exit status is 1, with a message on stderr, for what `trtllm-serve` would refuse."""
    commands = {"disaggregated": run_orchestrator, "disaggregated_mpi_worker": run_mpi_worker}
    command = arguments[0] if arguments and arguments[0] in commands else ""
    options = _parser(command).parse_args(arguments[1:] if command else arguments)
    try:
        commands.get(command, run_worker)(options, read_knobs(os.environ))
    except DisaggError as error:
        rank = os.environ.get("SLURM_PROCID")
        print(
            f"{'' if rank is None else f'rank {rank}: '}{type(error).__name__}: {error}",
            file=sys.stderr,
            flush=True,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
