"""What the client makes of the answers of real servers: their ids, their ends, their refusals."""

import json

import pytest
from client_runs import error_lines, make_run, run_client
from endpoint import Server
from scripted import END_ID, Scripted, answer, tensorrt, text_only, vllm
from tokenizers import Tokenizer, models, pre_tokenizers

from disagg_lib.run.tables import phases_table


@pytest.fixture
def tokenizer(tmp_path):
    """A checkpoint's tokenizer of words t0 to t9, ids 1000 to 1009, whose end token is <|eot_id|>."""
    words = {f"t{n}": 1000 + n for n in range(10)}
    made = Tokenizer(models.WordLevel({**words, "<|eot_id|>": END_ID, "?": 0}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eot_id|>"}))
    return str(tmp_path / "tokenizer.json")


def logged(run, mode="accuracy"):
    """(ids, count) of each answer in LoadGen's accuracy log."""
    entries = json.loads((run / f"mlperf/{mode}/mlperf_log_accuracy.json").read_text())
    ids = [memoryview(bytes.fromhex(entry["data"])).cast("i").tolist() for entry in entries]
    return list(zip(ids, (entry["token_count"] for entry in entries), strict=True))


@pytest.mark.parametrize(
    ("script", "way"), [(tensorrt, "detokenize"), (vllm, "return_token_ids"), (text_only, "text")]
)
@pytest.mark.parametrize("mode", ["accuracy", "test06"])
def test_answers_of_one_token_and_the_end_have_both_ids_whichever_way(tmp_path, tokenizer, script, way, mode):
    run = make_run(tmp_path / "run", tokenizer=tokenizer)
    with Scripted(script) as server:
        done, result = run_client(run, server.url, mode)
    assert done.returncode == 0, done.stdout + done.stderr
    assert result["ids"] == way and error_lines(run, mode) == []
    assert {(tuple(ids), count) for ids, count in logged(run, mode)} == {((1007, END_ID), 2)}


def test_the_table_of_phases_says_which_way_ids_came(tmp_path):
    run = make_run(tmp_path / "run")
    with Scripted(tensorrt) as server:
        run_client(run, server.url, "accuracy")
    phases = ["ready", "accuracy", "failed: " + 400 * "x"]
    lines = [json.dumps({"time_s": float(n), "phase": phase}) + "\n" for n, phase in enumerate(phases)]
    (run / "job/phases.jsonl").write_text("".join(lines))
    assert list(phases_table(run)["ids"]) == ["", "detokenize", ""]


def test_ids_need_no_tokenizer_where_the_server_sends_them(tmp_path):
    run = make_run(tmp_path / "run")
    with Scripted(tensorrt) as server:
        done, _ = run_client(run, server.url, "accuracy")
    assert done.returncode == 0 and len(logged(run)) == 16


def test_chat_has_no_ids_so_its_text_goes_through_the_tokenizer(tmp_path, tokenizer):
    def chat(body):
        if set(body) & {"detokenize", "return_token_ids"}:
            return 400
        choices = [{"delta": {"content": "t7"}}, {"delta": {}, "finish_reason": "stop"}]
        return [
            *({"choices": [c]} for c in choices),
            {"choices": [], "usage": {"completion_tokens": 2}},
            b"[DONE]",
        ]

    run = make_run(tmp_path / "run", tokenizer=tokenizer, endpoint="/v1/chat/completions")
    with Scripted(chat) as server:
        done, result = run_client(run, server.url, "accuracy")
    assert done.returncode == 0 and result["ids"] == "text"
    assert logged(run)[0] == ([1007, END_ID], 2)


def test_text_that_the_tokenizer_cuts_otherwise_keeps_the_servers_count(tmp_path, tokenizer):
    """Cut off by max_tokens there is no end token; usage counts what was generated, whatever the text gives."""
    run = make_run(tmp_path / "run", tokenizer=tokenizer)
    with Scripted(lambda body: answer(body, [None] * 3, ["t7", " t8", ""], "length")) as server:
        done, _ = run_client(run, server.url, "accuracy")
    assert done.returncode == 0 and logged(run)[0] == ([1007, 1008], 3)


def test_performance_asks_for_no_ids(tmp_path):
    run = make_run(tmp_path / "run", count=20)
    with Scripted(tensorrt) as server:
        _, result = run_client(run, server.url)
    assert result["ids"] is None and len(server.bodies) == 20
    assert not {"detokenize", "return_token_ids"} & set(server.bodies[0])


def test_probe_that_is_refused_ends_the_client_before_the_clock(tmp_path):
    run = make_run(tmp_path / "run")
    with Scripted(lambda body: 404) as server:
        done, result = run_client(run, server.url, "accuracy")
    assert done.returncode == 2 and result is None
    assert 'a completion before the run failed: http_4xx: HTTP 404 {"error": "told"' in done.stderr


def test_first_token_that_is_the_end_has_a_kind_and_a_sentence(tmp_path):
    run = make_run(tmp_path / "run", count=20)
    with Scripted(lambda body: [b"[DONE]"]) as server:
        done, result = run_client(run, server.url)
    assert done.returncode == 1 and result["kinds"]["eos_first"] == 20
    assert "the model's first token was its end token" in result["reasons"][0]
    assert len(error_lines(run)) == 20


@pytest.mark.parametrize("broken", [False, True], ids=["empty stream, v5.1", "connection broken, 1.2"])
def test_refusal_of_a_generation_server_says_where_to_look(tmp_path, broken):
    run = make_run(tmp_path / "run", count=10)
    with Scripted(lambda body: Server.HEAD if broken else []) as server:
        done, result = run_client(run, server.url)
    assert done.returncode == 1 and result["kinds"]["cut"] == result["issued"]
    assert "See logs/output_workers.log" in result["first_failure"]


def test_answer_that_breaks_amid_its_events_is_no_refusal(tmp_path):
    run = make_run(tmp_path / "run", count=10)
    with Server(lambda n: "cut") as server:
        _, result = run_client(run, server.url)
    assert result["kinds"]["cut"] == result["issued"] and "output_workers" not in result["first_failure"]


@pytest.mark.parametrize("mode", ["performance", "accuracy"])
def test_prompt_that_the_server_read_otherwise_fails_the_request(tmp_path, mode):
    run = make_run(tmp_path / "run", count=10)
    with Scripted(lambda body: answer(body, [5, 6], ["a", "b"], prompt_tokens=19)) as server:
        done, result = run_client(run, server.url, mode)
    assert done.returncode == 1 and result["kinds"]["prompt_mismatch"] == result["failed"] > 0
    assert "usage says that 19 prompt tokens were read; 2" in result["first_failure"]


def test_fifty_failures_in_a_row_end_a_run_and_fewer_do_not(tmp_path):
    for name, first, count in (("few", 60, 100), ("many", 20, 3000)):
        run = make_run(tmp_path / name, count=count)
        with Server(lambda n, first=first: "500" if n >= first else "ok") as server:
            done, result = run_client(run, server.url)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert (result["status"] == "finished") == (name == "few")
    assert result["issued"] < 1000 and result["failed"] >= 50
    assert "requests in a row failed" in result["reasons"][-1]


def test_reason_begins_with_the_first_failure_which_the_others_follow_from(tmp_path):
    def plan(n):
        return "error_event" if n == 60 else "500" if n > 80 else "ok"

    run = make_run(tmp_path / "run")
    with Server(plan) as server:
        done, result = run_client(run, server.url)
    assert (
        result["reasons"][0].startswith("first failure: sample ") and "server_error" in result["reasons"][0]
    )
    assert [reason.split(": ")[1] for reason in result["reasons"][1:3]] == ["server_error", "http_5xx"]
    assert "INVALID: first failure: sample" in done.stdout.splitlines()[-1]
