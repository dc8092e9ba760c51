"""The rehearsal server: real processes over loopback, in both dialects."""

import http.client
import json
import signal
import subprocess
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import yaml
from processes import DEADLINE_S, REHEARSAL, STREAM, ask, events, flat_config, nested_job, token_ids, v51_job

from disagg_lib.rehearsal.server import main


@pytest.fixture(scope="module")
def v51(tmp_path_factory):
    with v51_job(tmp_path_factory.mktemp("v51"), ranks=(0, 1, 4, 8)) as job:
        yield job


def test_completion_streams_one_token_a_chunk_and_ends_with_done(v51):
    status, content = ask(v51.port, "/v1/completions", STREAM)
    chunks, done = events(content)
    assert status == 200 and done and len(chunks) == 5
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 4 + ["length"]
    assert {c["choices"][0]["text"] for c in chunks} == {""} and len(token_ids(content)) == 5


def test_usage_comes_only_when_asked_for(v51):
    options = {"include_usage": True, "continuous_usage_stats": False}
    usage = [e for e in events(ask(v51.port, "/v1/completions", STREAM)[1])[0] if "usage" in e]
    *chunks, last = events(ask(v51.port, "/v1/completions", {**STREAM, "stream_options": options})[1])[0]
    assert usage == [] and not any("usage" in chunk for chunk in chunks)
    assert last["choices"] == [] and last["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
    }


def test_same_prompt_gives_same_tokens_streamed_or_not_by_chat_or_completion(v51):
    streamed = token_ids(ask(v51.port, "/v1/completions", STREAM)[1])
    text = "".join(f" t{i}" for i in streamed)
    whole = json.loads(ask(v51.port, "/v1/completions", {**STREAM, "stream": False})[1])["choices"][0]
    chat = {k: v for k, v in STREAM.items() if k not in ("prompt", "detokenize")}
    chat |= {"messages": [], "prompt_token_ids": [1, 2, 3]}
    deltas = [e["choices"][0]["delta"] for e in events(ask(v51.port, "/v1/chat/completions", chat)[1])[0]]
    assert len(streamed) == 5 and (whole["text"], whole["token_ids"]) == ("", streamed)
    assert "".join(delta.get("content", "") for delta in deltas) == text
    whole = json.loads(ask(v51.port, "/v1/completions", {**STREAM, "stream": False, "detokenize": True})[1])
    assert (whole["choices"][0]["text"], whole["choices"][0]["token_ids"]) == (text, None)


def test_chat_stream_names_the_role_then_gives_content(v51):
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 2,
        "min_tokens": 2,
        "stream": True,
    }
    deltas = [e["choices"][0]["delta"] for e in events(ask(v51.port, "/v1/chat/completions", body)[1])[0]]
    assert deltas[0] == {"role": "assistant"}
    assert [set(d) for d in deltas[1:]] == [{"content"}, {"content"}]


def test_without_a_fixed_length_the_answer_has_a_drawn_one(v51):
    body = {"model": "m", "prompt": "free length", "max_tokens": 2000, "min_tokens": 1, "detokenize": False}
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
    request = {"model": "m", "prompt": [7] * 50, "max_tokens": 3, "min_tokens": 3, "detokenize": False}
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
        answers = [ask(job.port, "/v1/completions", {**STREAM, "stream": False}) for _ in range(3)]
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
