"""The rehearsal server: real processes over loopback, in both dialects."""

import copy
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import yaml

from disagg_lib.rehearsal.server import main

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
STREAM = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 5, "min_tokens": 5, "stream": True}


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
    return [i for event in events(content)[0] for c in event["choices"] for i in c.get("token_ids", [])]


@pytest.fixture(scope="module")
def v51(tmp_path_factory):
    with v51_job(tmp_path_factory.mktemp("v51"), ranks=(0, 1, 4, 8)) as job:
        yield job


def test_completion_streams_one_token_a_chunk_and_ends_with_done(v51):
    status, content = ask(v51.port, "/v1/completions", STREAM)
    chunks, done = events(content)
    assert status == 200 and done and len(chunks) == 5
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 4 + ["length"]
    assert all(c["choices"][0]["text"] == f" t{c['choices'][0]['token_ids'][0]}" for c in chunks)


def test_usage_comes_only_when_asked_for(v51):
    usage = [e for e in events(ask(v51.port, "/v1/completions", STREAM)[1])[0] if "usage" in e]
    asked = {**STREAM, "stream_options": {"include_usage": True}}
    last = events(ask(v51.port, "/v1/completions", asked)[1])[0][-1]
    assert usage == []
    assert last["choices"] == [] and last["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
    }


def test_same_prompt_gives_same_tokens_streamed_or_not_by_chat_or_completion(v51):
    streamed = token_ids(ask(v51.port, "/v1/completions", STREAM)[1])
    whole = json.loads(ask(v51.port, "/v1/completions", {**STREAM, "stream": False})[1])
    chat = {k: v for k, v in STREAM.items() if k != "prompt"} | {
        "messages": [],
        "prompt_token_ids": [1, 2, 3],
    }
    assert len(streamed) == 5
    assert whole["choices"][0]["token_ids"] == streamed
    assert token_ids(ask(v51.port, "/v1/chat/completions", chat)[1]) == streamed


def test_chat_stream_names_the_role_then_gives_content(v51):
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 2,
        "min_tokens": 2,
        "stream": True,
    }
    deltas = [e["choices"][0]["delta"] for e in events(ask(v51.port, "/v1/chat/completions", body)[1])[0]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [set(d) for d in deltas[1:]] == [{"content"}, {"content"}]


def test_without_a_fixed_length_the_answer_has_a_drawn_one(v51):
    body = {"model": "m", "prompt": "free length", "max_tokens": 2000, "min_tokens": 1}
    choice = json.loads(ask(v51.port, "/v1/completions", body)[1])["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert 180 <= len(choice["token_ids"]) <= 1097


@pytest.mark.parametrize(
    "body",
    [
        b"not json", b"[]", {"prompt": "x"}, {"model": "m"}, {"model": "m", "prompt": []}, {"model": "m", "prompt": ["a", "b"]},
        {"model": "m", "prompt": [1, "a"]}, {"model": "m", "prompt": "x", "n": 2}, {"model": "m", "prompt": "x", "max_tokens": 0},
        {"model": "m", "prompt": "x", "no_such_field": 1}, {"model": "m", "prompt": "x", "disaggregated_params": []},
        b"[" * 100_000, {"model": "m", "prompt": "x", "stream": "yes"},
        {"model": "m", "prompt": "x", "stream_options": {"include_usage": True}},
    ],
)  # fmt: skip
def test_bad_bodies_get_400_with_an_error(v51, body):
    status, content = ask(v51.port, "/v1/completions", body)
    assert status == 400 and json.loads(content)["error"]


def test_endpoints_answer_as_the_release_does(v51):
    worker = v51.ports[3]
    assert ask(v51.port, "/health") == (200, b"") and ask(worker, "/health") == (200, b"")
    assert "rehearsal" in json.loads(ask(v51.port, "/version")[1])["version"]
    assert ask(v51.port, "/metrics")[0] == 404 and ask(v51.port, "/v1/models")[0] == 404


def test_steps_are_logged(v51):
    ask(v51.port, "/v1/completions", STREAM)
    assert "'num_generation_tokens': 1" in v51.log("rank8")


def test_context_only_then_generation_only_by_hand(v51):
    request = {"model": "m", "prompt": [7] * 50, "max_tokens": 3, "min_tokens": 3}
    status, content = ask(
        v51.ports[1], "/v1/completions", {**request, "disaggregated_params": {"request_type": "context_only"}}
    )
    answer = json.loads(content)
    params = answer["choices"][0]["disaggregated_params"]
    assert status == 200 and answer["prompt_token_ids"] == [7] * 50
    assert params["ctx_request_id"] >= 1 and len(params["first_gen_tokens"]) == 1
    params["request_type"] = "generation_only"
    generated = json.loads(
        ask(v51.ports[3], "/v1/completions", {**request, "disaggregated_params": params})[1]
    )
    assert generated["choices"][0]["token_ids"][0] == params["first_gen_tokens"][0]


def test_a_worker_refuses_the_other_phase_and_plain_requests(v51):
    for params in ({"request_type": "generation_only"}, None):
        status, content = ask(v51.ports[1], "/v1/completions", {**STREAM, "disaggregated_params": params})
        assert status == 400 and b"ctx0 is a context server" in content


def test_requests_go_round_the_context_servers(v51):
    before = [v51.log(rank).count("iter = ") for rank in ("rank0", "rank4")]
    for _ in range(4):
        ask(v51.port, "/v1/completions", STREAM)
    assert [v51.log(rank).count("iter = ") for rank in ("rank0", "rank4")] == [n + 2 for n in before]


def test_connections_are_reused(v51):
    connection = http.client.HTTPConnection("127.0.0.1", v51.port, timeout=DEADLINE_S)
    ports = set()
    for _ in range(3):
        connection.request("POST", "/v1/completions", json.dumps(STREAM))
        connection.getresponse().read()
        ports.add(connection.sock.getsockname())
    connection.close()
    assert len(ports) == 1


def test_too_long_a_prompt_is_refused_by_the_worker_who_says_why(v51):
    body = {**STREAM, "prompt": [1] * 22016, "disaggregated_params": {"request_type": "context_only"}}
    status, content = ask(v51.ports[1], "/v1/completions", body)
    assert status == 400 and "max_seq_len is 22016" in json.loads(content)["error"]


def test_ranks_that_lead_nothing_stay_small_and_import_little(v51):
    process = Path(f"/proc/{v51.processes['rank1'].pid}")
    assert int((process / "status").read_text().split("VmRSS:")[1].split()[0]) < 25_000
    maps = (process / "maps").read_text()
    assert "numpy" not in maps and "aiohttp" not in maps


def test_workers_listen_on_loopback_only(v51):
    listening = subprocess.run(
        ["cat", "/proc/net/tcp", "/proc/net/tcp6"], capture_output=True, text=True, check=True
    ).stdout
    hosts = {
        line.split()[1].split(":")[0]
        for line in listening.splitlines()
        if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) in v51.ports
    }
    assert hosts == {"0100007F"}


def test_sigterm_ends_every_process_cleanly_even_amid_a_stream(tmp_path):
    with v51_job(tmp_path, ranks=(0, 1, 4, 8), environment={"REHEARSAL_TIME_SCALE": "0.2"}) as job:
        connection = http.client.HTTPConnection("127.0.0.1", job.port, timeout=DEADLINE_S)
        connection.request(
            "POST", "/v1/completions", json.dumps({**STREAM, "max_tokens": 2000, "min_tokens": 2000})
        )
        connection.getresponse().read(10)
        for process in job.processes.values():
            process.send_signal(signal.SIGTERM)
        assert [job.exit_status(name) for name in job.processes] == [0] * 5
        connection.close()


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
                      "--extra_llm_api_options", folder / f"config.{name}.yaml", "--server_role", role)  # fmt: skip
        job.start("orchestrator", "disaggregated", "-c", folder / "config.yaml", "-t", 10, "-r", 30)
        if ready:
            job.wait_for("orchestrator", "ready on")
        yield job
    finally:
        job.end()


def test_dialect_1x_serves_the_same_answer(tmp_path, v51):
    with nested_job(tmp_path) as job:
        content = ask(job.port, "/v1/completions", STREAM)[1]
        assert token_ids(content) == token_ids(ask(v51.port, "/v1/completions", STREAM)[1])
        job.start("idle", "m", "--port", job.ports[1], SLURM_PROCID="3")
        job.processes["ctx"].kill()
        assert ask(job.port, "/v1/completions", STREAM)[0] == 500
        assert job.processes["idle"].poll() is None


def test_dialect_1x_without_a_transport_fails_each_request(tmp_path):
    context = {"disable_overlap_scheduler": True, "enable_chunked_prefill": True}
    with nested_job(tmp_path, context) as job:
        status, content = ask(job.port, "/v1/completions", STREAM)
        assert status == 500 and b"cache_transceiver_config.backend" in content


def test_dialect_1x_dies_of_an_unknown_nested_key(tmp_path):
    context = {"disable_overlap_scheduler": True, "kv_cache_config": {"free_gpu_mem_fraction": 0.9}}
    with nested_job(tmp_path, context, ready=False) as job:
        assert job.exit_status("ctx") == 1
        assert "kv_cache_config.free_gpu_mem_fraction in dialect 1.x" in job.log("ctx")


# What the real reader refuses


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Runs a command that must refuse config.yaml, in this process, and gives its message."""

    def run(rank=0, tasks=12, command="disaggregated_mpi_worker", text=None, **changes):
        (tmp_path / "c.yaml").write_text(text or yaml.safe_dump(flat_config([1, 2, 3, 4], **changes)))
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        monkeypatch.setenv("SLURM_NTASKS", str(tasks))
        assert main([command, "-c", str(tmp_path / "c.yaml")]) == 1
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"max_retries": 2}, "unknown engine argument max_retries"),
        (
            {"context_servers__cuda_graph_config": {}},
            "unknown engine argument cuda_graph_config in dialect v5.1",
        ),
        ({"backend": "tensorrt"}, "backend: pytorch"),
        ({"max_seq_len": 1}, "a key at the top is inherited"),
        ({"context_servers__urls": ["http://a:1", "b:2"]}, "no scheme"),
        ({"context_servers__urls": ["a:1"]}, "has 1 urls for num_instances 2"),
        ({"context_servers__urls": ["a:1", "a:1"]}, "is the url of ctx0 and of ctx1"),
        ({"context_servers__num_instances": 0, "context_servers__urls": []}, "num_instances: found 0"),
        ({"context_servers__disable_overlap_scheduler": False}, "disable_overlap_scheduler: true"),
        ({"context_servers__kv_cache_config": 5}, "kv_cache_config is 5; a mapping is needed"),
        (
            {"context_servers__kv_cache_config": {"free_gpu_memory_fraction": "most"}},
            "a number between 0 and 1",
        ),
        ({"context_servers": [1]}, "context_servers is [1]; a mapping is needed"),
        ({"context_servers__router": "random"}, "router is 'random'; a mapping is needed"),
        ({"tasks": 11}, "ctx0 4 + ctx1 4 + gen0 4 = 12 ranks"),
        ({"context_servers__tensor_parallel_size": 1, "tasks": 6}, "no latency table for gb200 TP1"),
    ],
)
def test_a_worker_refuses(refusal, changes, word):
    assert word in refusal(**changes)


def test_the_orchestrator_takes_any_engine_key_but_no_bad_url_and_no_list(refusal):
    assert "no scheme" in refusal(command="disaggregated", context_servers__urls=["http://a:1", "b:2"])
    assert "a mapping is needed" in refusal(command="disaggregated", text="- a list\n")


@pytest.mark.parametrize("fault", ["earthquake", "truncated_stream:0", "crash_midrun:gen0:x", "no_tokens:1"])
def test_an_unknown_fault_is_refused(fault, monkeypatch, capsys):
    monkeypatch.setenv("REHEARSAL_FAULT", fault)
    assert main(["m"]) == 1
    assert f"REHEARSAL_FAULT is '{fault}'" in capsys.readouterr().err


def test_a_refusal_is_an_exit_status_and_one_line(tmp_path):
    done = subprocess.run(
        [*REHEARSAL, "disaggregated", "-c", tmp_path / "none"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "cannot be read as YAML" in done.stderr


@pytest.mark.parametrize("command", [[], ["disaggregated"], ["disaggregated_mpi_worker"]])
def test_help_says_how_it_differs(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    assert "How it differs from TensorRT-LLM" in capsys.readouterr().out


def test_load_balancing_takes_the_idle_server_and_ties_in_turn(tmp_path):
    with v51_job(tmp_path, context_servers__router={"type": "load_balancing", "use_tokens": True}) as job:
        for _ in range(4):
            assert ask(job.port, "/v1/completions", STREAM)[0] == 200
        assert [job.log(rank).count("iter = ") for rank in ("rank0", "rank4")] == [2, 2]


# Faults


def test_crash_loading_kills_the_named_server_and_the_orchestrator_names_it(tmp_path):
    with v51_job(
        tmp_path, environment={"REHEARSAL_FAULT": "crash_loading:ctx1"}, ready=False, start_timeout=2
    ) as job:
        assert job.exit_status("rank4") == 1 and "crash_loading" in job.log("rank4")
        assert job.exit_status("orchestrator") == 1
        assert "ctx1 (127.0.0.1:" in job.log("orchestrator")


def test_health_503_keeps_the_orchestrator_waiting(tmp_path):
    fault = {"REHEARSAL_FAULT": "health_503"}
    with v51_job(tmp_path, ranks=(8,), environment=fault, ready=False, start_timeout=1) as job:
        job.wait_for("rank8", "ready on")
        assert ask(job.ports[3], "/health")[0] == 503
        assert job.exit_status("orchestrator") == 1 and "gen0" in job.log("orchestrator")


def test_crash_midrun_comes_after_n_requests(tmp_path):
    with v51_job(tmp_path, environment={"REHEARSAL_FAULT": "crash_midrun:gen0:2"}) as job:
        answers = [ask(job.port, "/v1/completions", STREAM) for _ in range(3)]
        assert [status for status, _ in answers] == [200, 200, 429]
        assert json.loads(answers[2][1]) == {"error": "Too many requests"}
        assert job.exit_status("rank8") == 1


def test_truncated_stream_ends_without_done(tmp_path):
    with v51_job(tmp_path, environment={"REHEARSAL_FAULT": "truncated_stream:2"}) as job:
        assert events(ask(job.port, "/v1/completions", STREAM)[1])[1]
        with pytest.raises((http.client.IncompleteRead, ConnectionError)) as error:
            ask(job.port, "/v1/completions", STREAM)
        assert 0 < len(token_ids(getattr(error.value, "partial", b""))) < 5


@contextmanager
def generation_server(folder, fault):
    """A generation server alone: its job and a body that it takes."""
    with v51_job(folder, ranks=(8,), environment={"REHEARSAL_FAULT": fault}, ready=False) as job:
        job.wait_for("rank8", "ready on")
        params = {"request_type": "generation_only", "ctx_request_id": 1, "first_gen_tokens": [5]}
        yield job, {**STREAM, "disaggregated_params": params}


def test_no_tokens_answers_200_and_then_nothing(tmp_path):
    with (
        generation_server(tmp_path, "no_tokens") as (job, body),
        closing(http.client.HTTPConnection("127.0.0.1", job.ports[3], timeout=0.5)) as connection,
    ):
        connection.request("POST", "/v1/completions", json.dumps(body))
        with connection.getresponse() as answer, pytest.raises(TimeoutError):
            answer.read()
        assert answer.status == 200


def test_slow_tokens_take_twenty_times_as_long(tmp_path):
    with generation_server(tmp_path, "slow_tokens") as (job, body):
        assert token_ids(ask(job.ports[3], "/v1/completions", body)[1])[0] == 5
        slow_s = float(job.log("rank8").rpartition("elapsed_time = ")[2].partition("s,")[0])
        assert 0.02 * 20 * 15 < 1e3 * slow_s < 0.02 * 20 * 40
