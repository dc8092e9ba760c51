"""Token ids and counts: from the server, from usage, or through the tokenizer; what LoadGen's accuracy logs hold."""

import json

import pytest
from client_runs import LENGTHS, error_lines, make_run, run_client
from endpoint import Server

from disagg_lib.results import test06


def test_accuracy_run_logs_int32_ids_of_every_sample(tmp_path):
    run = make_run(tmp_path / "run")
    with Server() as server:
        done, result = run_client(run, server.url, "accuracy")
    assert done.returncode == 0 and error_lines(run, "accuracy") == []
    entries = json.loads((run / "mlperf/accuracy/mlperf_log_accuracy.json").read_text())
    assert sorted(entry["qsl_idx"] for entry in entries) == list(range(16))
    for entry in entries:
        count = LENGTHS[entry["qsl_idx"]][1]
        ids = memoryview(bytes.fromhex(entry["data"])).cast("i").tolist()
        assert ids == list(range(1000, 1000 + count)) and entry["token_count"] == count
        assert bytes.fromhex(entry["token_data"]) == (1000).to_bytes(4, "little")


def test_count_and_usage_that_disagree_are_a_failure_in_accuracy(tmp_path):
    run = make_run(tmp_path / "run")
    with Server(lambda n: "mismatch" if n == 3 else "ok") as server:
        done, result = run_client(run, server.url, "accuracy")
    assert done.returncode == 1 and result["kinds"]["count_mismatch"] == 1


def test_ids_give_the_count_where_usage_is_missing(tmp_path):
    run = make_run(tmp_path / "run", count=20)
    with Server(lambda n: "no_usage") as server:
        done, result = run_client(run, server.url)
    assert done.returncode == 0
    assert result["output_tokens"] == sum(body["max_tokens"] for body in server.bodies)


def test_text_without_usage_is_not_counted_by_chunks(tmp_path):
    run = make_run(tmp_path / "run", count=20)
    with Server(lambda n: "no_usage", with_ids=False) as server:
        done, result = run_client(run, server.url)
    assert done.returncode == 1 and result["kinds"]["no_count"] == 20 and result["output_tokens"] == 0


def test_text_without_ids_fails_an_accuracy_run_that_has_no_tokenizer(tmp_path):
    run = make_run(tmp_path / "run")
    with Server(with_ids=False) as server:
        done, result = run_client(run, server.url, "accuracy")
    assert done.returncode == 2 and result is None and not list((run / "mlperf/accuracy").iterdir())
    assert "this server sends text without ids, and client.tokenizer is not set" in done.stderr


def test_tokenizer_that_cannot_be_read_matters_only_to_servers_that_send_text(tmp_path):
    for with_ids in (True, False):
        run = make_run(tmp_path / f"run {with_ids}", tokenizer="/nowhere/tokenizer.json")
        with Server(with_ids=with_ids) as server:
            done, _ = run_client(run, server.url, "accuracy")
        assert done.returncode == (0 if with_ids else 2)
    assert "client.tokenizer /nowhere/tokenizer.json: " in done.stderr


@pytest.fixture
def tokenizer(tmp_path):
    """tokenizer.json of words t0, t1, ..., with ids 50, 51, ...; 0 for any other."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"t{n}": 50 + n for n in range(20)}
    made = Tokenizer(models.WordLevel({**words, "?": 0}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def test_text_becomes_ids_through_the_tokenizer(tmp_path, tokenizer):
    """Half a surrogate pair alone, which no tokenizer takes, is an unknown word and not the end of the run."""
    run = make_run(tmp_path / "run", tokenizer=tokenizer)
    with Server(lambda n: "surrogate" if n == 3 else "ok", with_ids=False) as server:
        done, _ = run_client(run, server.url, "accuracy")
    assert done.returncode == 0 and error_lines(run, "accuracy") == []
    odd = 0
    for entry in json.loads((run / "mlperf/accuracy/mlperf_log_accuracy.json").read_text()):
        ids = memoryview(bytes.fromhex(entry["data"])).cast("i").tolist()
        odd += ids[0] == 0
        assert ids[1:] == list(range(51, 50 + LENGTHS[entry["qsl_idx"]][1]))
    assert odd == 1


def test_first_id_of_text_is_its_answers_first_in_test06(tmp_path, tokenizer):
    """The first event holds half a word, so its text alone would give another id."""
    run = make_run(tmp_path / "run", tokenizer=tokenizer)
    with Server(lambda n: "split", with_ids=False) as server:
        done, _ = run_client(run, server.url, "test06")
    assert done.returncode == 0 and not error_lines(run, "test06")
    entries = json.loads((run / "mlperf/test06/mlperf_log_accuracy.json").read_text())
    assert entries and all(entry["data"].startswith(entry["token_data"]) for entry in entries)
    assert {entry["token_data"] for entry in entries} == {(51).to_bytes(4, "little").hex().upper()}
    assert test06.verify_test06(run)["TEST06, First token check"] == "True"


def test_chat_endpoint_gets_empty_messages_and_prompt_token_ids(tmp_path):
    run = make_run(tmp_path / "run", count=10, endpoint="/v1/chat/completions")
    with Server() as server:
        done, _ = run_client(run, server.url + "/v1")
    assert done.returncode == 0
    assert server.bodies[0]["messages"] == [] and len(server.bodies[0]["prompt_token_ids"]) >= 20


def test_test06_logs_ids_and_first_ids_of_100_queries(tmp_path):
    run = make_run(tmp_path / "run")
    with Server() as server:
        done, result = run_client(run, server.url, "test06")
    assert done.returncode == 0 and result["issued"] == 100
    assert not error_lines(run, "test06")
    entries = json.loads((run / "mlperf/test06/mlperf_log_accuracy.json").read_text())
    assert len(entries) > 50  # LoadGen samples about 100 of them by chance
    for entry in entries:
        ids = memoryview(bytes.fromhex(entry["data"])).cast("i").tolist()
        assert ids == list(range(1000, 1000 + LENGTHS[entry["qsl_idx"]][1]))
        assert bytes.fromhex(entry["token_data"]) == (1000).to_bytes(4, "little")
