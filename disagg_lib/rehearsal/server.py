"""The rehearsal server: stands in for `trtllm-serve` on a machine without GPUs, with the same argv, files and HTTP.

  python -m disagg_lib.rehearsal disaggregated -c FILE [-t START_TIMEOUT] [-r REQUEST_TIMEOUT]
  python -m disagg_lib.rehearsal disaggregated_mpi_worker -c FILE      one process per rank, rank in SLURM_PROCID
  python -m disagg_lib.rehearsal MODEL --host H --port P [...]         one server of dialect 1.x

How it differs from TensorRT-LLM:
  - No model: tokens are invented from a checksum of the prompt, so no answer means anything. If min_tokens = max_tokens the answer
    has exactly that length; otherwise its length is drawn (from the same checksum) out of the built-in shape, and one in 32 has one
    token and the end token. A token's text is made from its id. Text prompts count one token for four characters.
  - Time passes as the serving model says: step times from a latency table x REHEARSAL_TIME_SCALE, the same rules as `simulate`.
    Loading takes 1.5 s x the scale. No GPU, no MPI: a rank that leads no server only sleeps.
  - The KV cache is not moved, only its time is spent. Stream interval, beams, several choices, conditional disaggregation
    and service discovery are not rehearsed. Plain requests are refused by workers: each serves one
    phase, and a MODEL needs its --server_role. Workers have no /metrics.
  - Workers listen on the host named for them in urls and nowhere else.

Environment:
  REHEARSAL_TIME_SCALE   seconds that pass for each second of the model (default 1.0)
  REHEARSAL_SYSTEM       latency table (default gb200)
  REHEARSAL_STACK        constants on it, by name or file (default none)
  REHEARSAL_SERVER_NAME  the name in messages and faults of a server started as MODEL (default: role@port)
  REHEARSAL_FAULT        what goes wrong; SERVER is ctx0, ctx1, gen0 ... (default gen0), N a number of requests
      crash_loading[:SERVER], crash_midrun[:SERVER[:N]]   the server dies, while loading or after N requests (20)
      crash_loading_quiet, crash_midrun_quiet             the same, but what started it lives on, as with the real ones
      gen_refuses[:SERVER[:N]]                            after N requests the server answers 400 to each
      no_request_id                                       context servers' answers lack the id that joins the two phases
      health_503, no_tokens, slow_tokens                  never well; 200 and then silence; 20 times slower
      truncated_stream[:N], eos_first[:N]                 every Nth answer breaks half way; ends with its first token
      no_detokenize                                       a release that does not know the field `detokenize`
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from ..errors import DisaggError, ServeConfigError
from . import configuration
from .knobs import Knobs, read_knobs

# The HTTP side is imported where it is needed: a rank that only sleeps must stay small.
SIGNALS = {signal.SIGTERM, signal.SIGINT}


def _sleep_until_signalled() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    signal.sigwait(SIGNALS)


def _outlive_server() -> bool:
    """Go on as two: the server, and what started it, which never looks whether it lives; True in the latter, at its end.

    So do `trtllm-llmapi-launch` (1.x) and rank 0 of `disaggregated_mpi_worker` (v5.1).
    """
    server = os.fork()
    if server:
        _sleep_until_signalled()
        os.kill(server, signal.SIGTERM)
    return bool(server)


def _serve(name: str, role: str, model: str, args, knobs: Knobs, dialect: str, host: str, port: int) -> None:
    if knobs.fault_of(name).endswith("_quiet") and _outlive_server():
        return
    from .http import run_server
    from .worker import Worker

    run_server(Worker(name, role, model, args, knobs, dialect), host, port)


def _slurm_number(name: str) -> int:
    text = os.environ.get(name, "")
    if text.isdigit():
        return int(text)
    raise ServeConfigError(f"{name} is {text!r}; an MPI worker is one rank of an srun step, which sets it.")


def run_mpi_worker(options, knobs: Knobs) -> None:
    """One rank: the leader of a server serves, the others sleep."""
    rank, tasks = _slurm_number("SLURM_PROCID"), _slurm_number("SLURM_NTASKS")
    file = configuration.read_serve_file(options.config_file)
    world = sum(instance.ranks for instance in file.instances)
    if tasks != world or rank >= world:
        parts = " + ".join(f"{i.name} {i.ranks}" for i in file.instances)
        raise ServeConfigError(
            f"{options.config_file}: rank {rank} of {tasks}, but the servers need exactly {parts} = {world} ranks."
            f" Start {world} tasks."
        )
    leader = next((i for i in file.instances if i.first_rank == rank), None)
    if leader is None:
        return _sleep_until_signalled()
    where = f"{options.config_file}: {leader.name} ({leader.role}_servers)"
    args = configuration.engine_args(where, leader.engine, file.dialect, leader.role)
    model = str(leader.engine.get("model", "model"))
    _serve(leader.name, leader.role, model, args, knobs, file.dialect, leader.host, leader.port)


def run_orchestrator(options, knobs: Knobs) -> None:
    """Wait for every worker, then take requests."""
    file = configuration.read_serve_file(options.config_file)
    from .http import run_orchestrator as run

    run(file, options.server_start_timeout, options.request_timeout, knobs)


def run_worker(options, knobs: Knobs) -> None:
    """A server of dialect 1.x: rank 0 of its step serves."""
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return _sleep_until_signalled()
    role = (options.server_role or "").lower()
    if role not in ("context", "generation"):
        raise ServeConfigError(f"--server_role is {options.server_role}; context or generation is needed.")
    file = options.extra_llm_api_options
    known = configuration.known_keys("engine", "both")
    engine = {key: value for key, value in vars(options).items() if key in known and value is not None}
    engine |= configuration.load_yaml(file) if file else {}
    fraction = options.kv_cache_free_gpu_memory_fraction
    if fraction is not None:
        given = engine.get("kv_cache_config") or {}
        engine["kv_cache_config"] = {"free_gpu_memory_fraction": fraction} | given
    args = configuration.engine_args(str(file or "command line"), engine, "1.x", role, per_worker=True)
    name = os.environ.get("REHEARSAL_SERVER_NAME") or f"{role}@{options.port}"
    _serve(name, role, options.model, args, knobs, "1.x", options.host, options.port)


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m disagg_lib.rehearsal {command}".rstrip(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-l", "--log_level", default="info")
    if command:
        add("-c", "--config_file", type=Path, required=True)
    if command == "disaggregated":
        waits, lasts = "s to wait for every worker's /health", "s for one forwarded request, stream included"
        add("-t", "--server_start_timeout", type=float, default=180, help=waits)
        add("-r", "--request_timeout", type=float, default=180, help=lasts)
        add("--metrics-log-interval", type=int, default=0)
    elif command == "disaggregated_mpi_worker":
        add("--disable_gc", action="store_true")
    else:
        add("model")
        add("--host", default="localhost")
        add("--port", type=int, default=8000)
        for short, key in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "moe_expert")):
            add(f"--{short}_size", dest=f"{key}_parallel_size", type=int)
        for key in ("max_batch_size", "max_num_tokens", "max_seq_len"):
            add(f"--{key}", type=int)
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
        rank = f"rank {os.environ['SLURM_PROCID']}: " if "SLURM_PROCID" in os.environ else ""
        print(f"{rank}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0
