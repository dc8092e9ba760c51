"""Client, orchestrator and servers say to one another only what the real ones take: every message of whole runs."""

import json
from contextlib import contextmanager

import pydantic
import pytest
import yaml
from client_runs import make_run, run_client
from contract import check_answer, check_request, check_stream
from processes import DEADLINE_S, STREAM, ask, free_ports, nested_job, v51_job
from relay import Relay

CHAT = "/v1/chat/completions"


@contextmanager
def relayed_job(folder, dialect, **environment):
    """A job whose orchestrator is behind one relay and each server behind another: (client's url, what was heard)."""
    start = v51_job if dialect == "v5.1" else nested_job
    with start(folder, environment=environment) as job, Relay(*job.ports[1:]) as servers:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        ports = iter(servers.ports)
        for group in ("context_servers", "generation_servers"):
            config[group]["urls"] = [f"127.0.0.1:{next(ports)}" for _ in config[group]["urls"]]
        config["port"] = free_ports(1)[0]
        (folder / "relayed.yaml").write_text(yaml.safe_dump(config))
        job.start("relayed", "disaggregated", "-c", folder / "relayed.yaml", "-r", DEADLINE_S)
        job.wait_for("relayed", "ready on")
        with Relay(config["port"]) as front:
            yield f"http://127.0.0.1:{front.ports[0]}", front, servers


@pytest.fixture(scope="module", params=["v5.1", "1.x"])
def heard(request, tmp_path_factory):
    """All messages of a performance, an accuracy and a TEST06 run, of a warm-up, and of a run over chat."""
    folder = tmp_path_factory.mktemp("contract")
    with relayed_job(folder, request.param) as (url, front, servers):
        run = make_run(folder / "run", qps=30, count=20)
        for mode in ("warmup", "performance", "accuracy", "test06"):
            done, result = run_client(run, url, mode)
            assert done.returncode == 0, done.stdout + done.stderr
        assert result["ids"] == "detokenize"
        done, _ = run_client(make_run(folder / "chat", qps=30, count=20, endpoint=CHAT), url)
        assert done.returncode == 0, done.stdout + done.stderr
        yield request.param, front.heard, servers.heard


def test_every_request_of_the_client_is_one_that_the_release_takes(heard):
    dialect, front, _ = heard
    for _, path, body, status, _ in front:
        check_request(dialect, path, body, by_orchestrator=False)
        assert status == 200
    assert {path for _, path, *_ in front} == {"/v1/completions", CHAT}


def test_every_request_of_the_orchestrator_is_one_that_its_servers_take(heard):
    dialect, front, servers = heard
    kinds = [
        check_request(dialect, path, body, by_orchestrator=True).disaggregated_params.request_type
        for _, path, body, *_ in servers
    ]
    assert kinds.count("context_only") == kinds.count("generation_only") == len(front)


def test_every_answer_of_the_servers_is_one_that_the_orchestrator_takes(heard):
    dialect, _, servers = heard
    for _, path, body, status, content in servers:
        asked = check_request(dialect, path, body, by_orchestrator=True)
        assert status == 200
        if asked.stream:
            check_stream(path, content, asked, dialect)
        else:
            check_answer(path, content, asked, dialect)


def test_the_contract_refuses_what_the_real_orchestrators_refused(heard):
    """Its own proof: ids in a chat choice (both), and an answer without the id it was given (1.2)."""
    dialect, _, servers = heard
    _, path, body, _, content = next(m for m in servers if m[1] == CHAT and not m[2]["stream"])
    asked, answer = check_request(dialect, path, body, True), json.loads(content)
    answer["choices"][0]["token_ids"] = [1]
    with pytest.raises(pydantic.ValidationError, match="token_ids"):
        check_answer(path, json.dumps(answer).encode(), asked, dialect)
    del answer["choices"][0]["token_ids"]
    check_answer(path, json.dumps(answer).encode(), asked, dialect)
    if dialect == "1.x":
        answer["choices"][0]["disaggregated_params"]["disagg_request_id"] = None
        with pytest.raises(pydantic.ValidationError, match="disagg_request_id"):
            check_answer(path, json.dumps(answer).encode(), asked, dialect)


@pytest.mark.parametrize("dialect", ["v5.1", "1.x"])
def test_usage_is_in_every_chunk_where_the_releases_default_puts_it(tmp_path, dialect):
    with relayed_job(tmp_path, dialect) as (_, front, servers):
        ask(front.ports[0], "/v1/completions", {**STREAM, "stream_options": {"include_usage": True}})
    _, path, body, _, content = servers.heard[-1]  # a relay that has ended has heard every answer to its end
    asked = check_request(dialect, path, body, True)
    assert len(check_stream(path, content, asked, dialect)) == 5


def ids_sent(messages):
    """The ids that went to the client, by the prompt's ids."""
    sent = {}
    for _, _, body, _, content in messages:
        events = [json.loads(event[6:]) for event in content.split(b"\n\n")[:-2]]
        ids = [i for event in events for choice in event["choices"] for i in choice["token_ids"] or ()]
        counts = [event["usage"]["completion_tokens"] for event in events if event.get("usage")]
        sent[tuple(body["prompt"])] = ids, counts[-1]
    return sent


def answers(run, messages):
    """(ids in LoadGen's log, its token count, ids that were sent, usage that was sent) of each sample."""
    prompts = {
        len(prompt): sent for prompt, sent in ids_sent(messages).items()
    }  # each sample's length is its own
    entries = json.loads((run / "mlperf/accuracy/mlperf_log_accuracy.json").read_text())
    for entry in entries:
        ids = memoryview(bytes.fromhex(entry["data"])).cast("i").tolist()
        yield ids, entry["token_count"], *prompts[100 + entry["qsl_idx"]]


def free_length_run(folder, **client):
    """A run on a data set of 64 prompts whose answers may have any length; two of them will be short."""
    import pandas as pd

    frame = pd.DataFrame({"tok_input": [[1000 + i] * (100 + i) for i in range(64)], "gt_output": ["x"] * 64})
    folder.mkdir()
    frame.to_pickle(folder / "data.pkl")
    data_set = {"kind": "pickle", "path": str(folder / "data.pkl"), "trust": True}
    counts = {"total_sample_count": 64, "accuracy_sample_count": 64, "max_output_tokens": 2000}
    return make_run(folder / "run", data_set=data_set, **counts, **client)


@pytest.mark.parametrize("dialect", ["v5.1", "1.x"])
def test_accuracy_run_logs_the_very_ids_that_were_sent(tmp_path, dialect):
    run = free_length_run(tmp_path / "run")
    (tmp_path / "job").mkdir()
    with relayed_job(tmp_path / "job", dialect, REHEARSAL_TIME_SCALE="0.002") as (url, front, _):
        done, result = run_client(run, url, "accuracy")
        assert done.returncode == 0, done.stdout + done.stderr
        found = list(answers(run, front.heard[1:]))
    assert result["ids"] == "detokenize" and len(found) == 64
    assert all(ids == sent and count == usage == len(sent) for ids, count, sent, usage in found)
    assert sum(len(ids) == 2 and ids[1] == 128009 for ids, *_ in found) >= 1


def test_counts_equal_usage_where_the_release_does_not_know_detokenize(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"t{1000 + n}": 1000 + n for n in range(4096)}
    made = Tokenizer(models.WordLevel({**words, "<|eot_id|>": 128009, "?": 0}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>"}')
    run = free_length_run(tmp_path / "run", tokenizer=str(tmp_path / "tokenizer.json"))
    (tmp_path / "job").mkdir()
    fault = {"REHEARSAL_FAULT": "no_detokenize", "REHEARSAL_TIME_SCALE": "0.002"}
    with relayed_job(tmp_path / "job", "v5.1", **fault) as (url, front, _):
        done, result = run_client(run, url, "accuracy")
        assert done.returncode == 0, done.stdout + done.stderr
        found = list(answers(run, [message for message in front.heard if len(message[2]["prompt"]) >= 100]))
    assert result["ids"] == "text" and len(found) == 64
    assert all(count == usage == len(ids) for ids, count, _, usage in found)
    assert sum(len(ids) == 2 and ids[1] == 128009 for ids, *_ in found) >= 1
