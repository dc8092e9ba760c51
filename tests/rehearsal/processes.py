"""Jobs of the rehearsal server as real processes over loopback, in both dialects, and how to ask them."""

import copy
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager

import yaml

REHEARSAL = [sys.executable, "-m", "disagg_lib.rehearsal"]
DEADLINE_S = 30
CONTEXT = {
    "num_instances": 2, "tensor_parallel_size": 4, "pipeline_parallel_size": 1, "max_batch_size": 128,
    "max_num_tokens": 4096, "max_seq_len": 22016, "kv_cache_dtype": "fp8", "disable_overlap_scheduler": True,
    "enable_chunked_prefill": True, "kv_cache_config": {"free_gpu_memory_fraction": 0.95}, "print_iter_log": True,
}  # fmt: skip
GENERATION = {
    "num_instances": 1, "tensor_parallel_size": 4, "max_batch_size": 8, "max_num_tokens": 512, "max_seq_len": 22016,
    "kv_cache_dtype": "fp8", "use_cuda_graph": True, "cuda_graph_padding_enabled": True,
    "cuda_graph_batch_sizes": [1, 2, 4, 8], "print_iter_log": True, "enable_iter_perf_stats": True,
}  # fmt: skip
STREAM = {
    "model": "m",
    "prompt": [1, 2, 3],
    "max_tokens": 5,
    "min_tokens": 5,
    "stream": True,
    "detokenize": False,
}


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def flat_config(ports, **changes):
    config = {
        "model": "/models/llama", "hostname": "127.0.0.1", "port": ports[0], "backend": "pytorch",
        "context_servers": {**copy.deepcopy(CONTEXT), "urls": [f"127.0.0.1:{p}" for p in ports[1:3]]},
        "generation_servers": {**copy.deepcopy(GENERATION), "urls": [f"127.0.0.1:{ports[3]}"]},
    }  # fmt: skip
    for path, value in changes.items():
        group, _, key = path.rpartition("__")
        (config[group] if group else config)[key] = value
    return config


class Job:
    """The processes of one job, with their logs in files."""

    def __init__(self, folder, environment):
        self.folder, self.processes = folder, {}
        self.environment = {**os.environ, "REHEARSAL_TIME_SCALE": "0.02", **environment}

    def start(self, name, *arguments, **environment):
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [*REHEARSAL, *map(str, arguments)], stdout=log, stderr=subprocess.STDOUT,
                env={**self.environment, **environment},
            )  # fmt: skip

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def wait_for(self, name, text):
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.log(name):
            assert time.monotonic() < deadline, f"{name}: no {text!r} in:\n{self.log(name)}"
            time.sleep(0.02)

    def exit_status(self, name):
        return self.processes[name].wait(DEADLINE_S)

    def end(self):
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise


@contextmanager
def v51_job(folder, ranks=(0, 4, 8), environment=None, ready=True, start_timeout=DEADLINE_S, **changes):
    ports = free_ports(4)
    (folder / "config.yaml").write_text(yaml.safe_dump(flat_config(ports, **changes)))
    job = Job(folder, environment or {})
    job.port, job.ports = ports[0], ports
    try:
        for rank in ranks:
            job.start(f"rank{rank}", "disaggregated_mpi_worker", "-c", folder / "config.yaml", "--log_level", "info",
                      SLURM_PROCID=str(rank), SLURM_NTASKS="12")  # fmt: skip
        job.start(
            "orchestrator",
            "disaggregated",
            "-c",
            folder / "config.yaml",
            "-t",
            start_timeout,
            "-r",
            DEADLINE_S,
        )
        if ready:
            job.wait_for("orchestrator", "ready on")
        yield job
    finally:
        job.end()


# Dialect 1.x: one command per server


@contextmanager
def nested_job(folder, context=None, environment=None, ready=True):
    ports = free_ports(3)
    base = {
        "disable_overlap_scheduler": True, "enable_chunked_prefill": True, "cuda_graph_config": None,
        "kv_cache_config": {"free_gpu_memory_fraction": 0.95, "dtype": "fp8"},
        "cache_transceiver_config": {"backend": "UCX", "max_tokens_in_buffer": 22016},
    }  # fmt: skip
    generation = {
        **base,
        "disable_overlap_scheduler": False,
        "cuda_graph_config": {"batch_sizes": [1, 2, 4], "enable_padding": True},
    }
    (folder / "config.ctx.yaml").write_text(yaml.safe_dump(context or base))
    (folder / "config.gen.yaml").write_text(yaml.safe_dump(generation))
    orchestrator = {"hostname": "127.0.0.1", "port": ports[0], "max_retries": 0}
    for group, port in (("context_servers", ports[1]), ("generation_servers", ports[2])):
        orchestrator[group] = {"num_instances": 1, "urls": [f"127.0.0.1:{port}"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(orchestrator))
    job = Job(folder, environment or {})
    job.port, job.ports = ports[0], ports
    try:
        for name, port, role in (("ctx", ports[1], "context"), ("gen", ports[2], "generation")):
            job.start(name, "/models/llama", "--host", "127.0.0.1", "--port", port, "--tp_size", 4, "--pp_size", 1,
                      "--max_batch_size", 128, "--max_num_tokens", 4096, "--max_seq_len", 22016,
                      "--extra_llm_api_options", folder / f"config.{name}.yaml", "--server_role", role,
                      REHEARSAL_SERVER_NAME=f"{name}0")  # fmt: skip
        job.start("orchestrator", "disaggregated", "-c", folder / "config.yaml", "-t", 10, "-r", 30)
        if ready:
            job.wait_for("orchestrator", "ready on")
        yield job
    finally:
        job.end()


def ask(port, path, body=None):
    """Status and whole body of one request."""
    data = body if isinstance(body, bytes | None) else json.dumps(body)
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)) as connection:
        connection.request("GET" if body is None else "POST", path, data)
        with connection.getresponse() as answer:
            return answer.status, answer.read()


def events(content):
    """The JSON of each event and whether [DONE] came last."""
    parts = [part.removeprefix(b"data: ") for part in content.split(b"\n\n") if part]
    return [json.loads(p) for p in parts if p != b"[DONE]"], bool(parts) and parts[-1] == b"[DONE]"


def token_ids(content):
    return [i for event in events(content)[0] for c in event["choices"] for i in c["token_ids"]]
