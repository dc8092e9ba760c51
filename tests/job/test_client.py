"""The measuring client against a real server on loopback, under real LoadGen.

LoadGen reads its built-in configuration once in a process, so every run is a process of its own.
"""

import asyncio
import csv
import hashlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from disagg_lib.job import client_settings, prompts, sender
from disagg_lib.results import rows, test06
from disagg_lib.run.writing import PROGRAM

LENGTHS = [(20 + index % 7, 5 + index % 4) for index in range(600)]


def event(message) -> bytes:
    return b"data: " + (message if isinstance(message, bytes) else json.dumps(message).encode()) + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Server:
    """A small streaming server on a free loopback port, in a thread of its own.

    plan(n) names what the n-th completion request gets: "ok" or a fault. It differs from trtllm-serve in that
    its text is made up; its ids are 1000, 1001, ...
    """

    HEAD = b"HTTP/1.1 200 OK\r\ncOnTeNt-TyPe: text/event-stream\r\nTRANSFER-encoding: Chunked\r\n\r\n"

    def __init__(self, plan=lambda n: "ok", step_s=0.002, with_ids=True, tls=None):
        self.plan, self.step_s, self.with_ids, self.tls = plan, step_s, with_ids, tls
        self.heads, self.bodies, self.writers, self.asked = [], [], [], 0
        self.loop = asyncio.new_event_loop()
        self.started = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self.thread.start()
        assert self.started.wait(5)
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(5)

    def _run(self):
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._serve())
        self.loop.close()

    @property
    def connections(self):
        return len(self.writers)

    async def _serve(self):
        self.stop = asyncio.Event()
        self.server = await asyncio.start_server(self._connection, "127.0.0.1", 0, ssl=self.tls)
        scheme, port = "https" if self.tls else "http", self.server.sockets[0].getsockname()[1]
        self.url = f"{scheme}://127.0.0.1:{port}"
        self.started.set()
        await self.stop.wait()
        self.server.close()
        await asyncio.sleep(
            0.05
        )  # a connection that was just accepted is a task of asyncio's own until it has a transport
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0.05)  # transports close in the loop's next turns

    async def _connection(self, reader, writer):
        self.writers.append(writer)
        try:
            while await self._request(reader, writer):
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _request(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET"):
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return True
        length = next(
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        )
        body = json.loads(await reader.readexactly(length))
        self.heads.append(head)
        self.bodies.append(body)
        what = self.plan(self.asked)
        self.asked += 1
        return await self._answer(writer, head, body, what)

    async def _answer(self, writer, head, body, what):
        if what in ("429", "500", "400", "401"):
            text = b'{"error": "told to"} %s%s' % (250 * b"x", head.partition(b"Authorization: ")[2])
            writer.write(
                b"HTTP/1.1 %s Told\r\nContent-Length: %d\r\n\r\n%s" % (what.encode(), len(text), text)
            )
            return True
        if what == "silent":
            await asyncio.sleep(60)
        if what == "vanish":
            return False
        if what == "vanish_late":  # it has worked for the request
            await asyncio.sleep(1.5)
            return False
        if what == "not_http":
            writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
            return False
        if what == "stop_listening":
            self.server.close()
        count = {"short": 1, "empty": 0, "claims_tokens": 0}.get(what, body["max_tokens"])
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" + self.HEAD + chunk(b": hello\n\n"))
        for n in range(count):
            if what in ("cut", "cut_politely", "stalled", "pings", "error_event") and n == 3:
                break
            text = {("split", 0): " t", ("split", 1): "1", ("surrogate", 0): "\ud83d"}.get(
                (what, n), f" t{n}"
            )
            choice = {"index": 0, "text": text}
            if self.with_ids:
                choice["token_ids"] = [1000 + n]
            writer.write(chunk(event({"choices": [choice]})))
            await asyncio.sleep(self.step_s)
        while what in ("stalled", "pings"):
            await asyncio.sleep(0.3)
            if what == "pings":
                writer.write(chunk(b": ping\n\n"))
        if what == "cut":
            return False
        if what == "error_event":
            writer.write(chunk(event({"error": {"message": "told to"}})))
        elif what != "cut_politely":
            said = {"mismatch": count + 1, "claims_tokens": 5}.get(what, count)
            if what != "no_usage":
                writer.write(chunk(event({"choices": [], "usage": {"completion_tokens": said}})))
            writer.write(chunk(event(b"[DONE]")))
        writer.write(b"0\r\n\r\n")
        return True


OFFLINE_CONF = "*.Offline.target_qps = 1\n*.Offline.min_duration = 1000\n*.Offline.min_query_count = 200\n"


def make_run(folder: Path, qps=150, count=100, **client) -> Path:
    (folder / "job").mkdir(parents=True)
    settings = {
        "endpoint": "/v1/completions",
        "model": "m",
        "model_key": "llama3_1-405b-interactive",
        "scenario": "Server",
        "user_conf": "user.conf",
        "total_sample_count": 500,
        "accuracy_sample_count": 16,
        "data_set": {"kind": "synthetic", "lengths": "job/lengths.csv"},
        "max_output_tokens": 2000,
        "min_output_tokens": 1,
        "temperature": 1.0,
        "top_p": 0.001,
        "top_k": 1,
        "request_timeout_s": 20,
        "connections": 8,
    }
    (folder / "job/settings.json").write_text(json.dumps({"client": {**settings, **client}}))
    with open(folder / "job/lengths.csv", "w", newline="") as file:
        csv.writer(file).writerows([("input_tokens", "output_tokens"), *LENGTHS])
    (folder / "user.conf").write_text(
        f"*.Server.target_qps = {qps}\n*.Server.min_duration = 100\n*.Server.min_query_count = {count}\n"
        "*.Server.sample_concatenate_permutation = 0\n"
    )
    return folder


def command(run, url, mode="performance"):
    return [sys.executable, str(PROGRAM), "client", "--run-dir", str(run), "--test-mode", mode, "--url", url]


def run_client(run, url, mode="performance", *more):
    done = subprocess.run(
        [*command(run, url, mode), *more], capture_output=True, text=True, timeout=60, cwd="/"
    )
    path = run / "job" / f"client_{mode}.json"
    return done, json.loads(path.read_text()) if path.exists() else None


def detail(run, mode="performance"):
    lines = (run / "mlperf" / mode / "mlperf_log_detail.txt").read_text().splitlines()
    return [json.loads(line[line.index("{") :]) for line in lines]


def value(run, key, mode="performance"):
    return next(entry["value"] for entry in detail(run, mode) if entry["key"] == key)


def error_lines(run, mode="performance"):
    return [entry["value"] for entry in detail(run, mode) if entry["metadata"]["is_error"]]


@pytest.fixture(scope="module")
def clean_run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("a run") / "with $(x) ;'q'")
    with Server() as server:
        done, result = run_client(run, server.url)
    return run, done, result, server


def test_fault_free_run_ends_with_status_0_and_no_error_in_loadgens_log(clean_run):
    run, done, result, _ = clean_run
    assert (done.returncode, done.stderr) == (0, "")
    assert error_lines(run) == []
    assert result["valid_client"] and result["failed"] == 0 and result["done"] == result["issued"] == 100


def test_loadgen_gets_the_true_number_of_tokens(clean_run):
    run, _, result, server = clean_run
    assert result["output_tokens"] == sum(body["max_tokens"] for body in server.bodies)
    seconds = result["output_tokens"] / value(run, "result_completed_tokens_per_second")
    assert 0.3 < seconds < 5


def test_interactive_limits_stand_in_the_log(clean_run):
    run = clean_run[0]
    assert value(run, "requested_server_ttft_latency") == 4_500_000_000
    assert value(run, "requested_server_tpot_latency") == 80_000_000


def test_request_is_what_the_benchmark_sends(clean_run):
    body = clean_run[3].bodies[0]
    expected = {"model": "m", "temperature": 1.0, "top_p": 0.001, "top_k": 1, "stream": True}
    assert {key: body[key] for key in expected} == expected
    assert body["stream_options"] == {"include_usage": True}
    assert (len(body["prompt"]), body["max_tokens"]) in LENGTHS
    assert body["min_tokens"] == body["max_tokens"]
    assert all(0 <= token < 128256 for token in body["prompt"])


def test_prompts_differ_and_repeat_from_run_to_run(clean_run, tmp_path):
    first = {json.dumps(body["prompt"]) for body in clean_run[3].bodies}
    assert len(first) > 80  # 100 draws from 500 samples, each sample its own prompt
    with Server() as server:
        run_client(make_run(tmp_path / "run"), server.url)
    assert {json.dumps(body["prompt"]) for body in server.bodies} == first


def test_progress_is_cumulative_and_knows_the_total(clean_run):
    lines = [json.loads(line) for line in (clean_run[0] / "job/progress.jsonl").read_text().splitlines()]
    assert lines[-1]["done"] == lines[-1]["total"] == 100
    assert [line["tokens"] for line in lines] == sorted(line["tokens"] for line in lines)
    counts = {"issued", "done", "failed", "outstanding", "tokens", "total", "kinds", "resent"}
    assert set(lines[0]) == counts | {"time_s", "mode", "target_qps"}


def test_queries_table_has_a_row_for_each_query(clean_run):
    with open(clean_run[0] / "job/queries_performance.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100 and {row["status"] for row in rows} == {"ok"}
    for row in rows:
        lengths = LENGTHS[int(row["sample_index"])]
        assert (int(row["input_tokens"]), int(row["output_tokens"])) == lengths
        assert 0 < float(row["ttft_ms"]) < float(row["latency_ms"])
        assert float(row["late_ms"]) >= 0


def test_rows_agree_with_loadgens_ttft(clean_run):
    with open(clean_run[0] / "job/queries_performance.csv", newline="") as file:
        seen = [float(row["ttft_ms"]) + float(row["late_ms"]) for row in csv.DictReader(file)]
    loadgen_ms = value(clean_run[0], "result_first_token_mean_latency_ns") / 1e6
    assert sum(seen) / len(seen) == pytest.approx(loadgen_ms, abs=1.5)


def test_issue_times_follow_loadgens_schedule(clean_run):
    # The client computes LoadGen's arrivals from its seed; were they wrong, lateness would be tens of ms.
    assert clean_run[2]["late_p99_ms"] < 25


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


FAULTS = {
    "429": "http_429",
    "400": "http_4xx",
    "500": "http_5xx",
    "cut": "cut",
    "cut_politely": "cut",
    "error_event": "server_error",
    "empty": "empty",
    "claims_tokens": "empty",
    "short": "short",
    "not_http": "protocol",
    "silent": "timeout",
    "stalled": "stalled",
    "pings": "stalled",
}


def test_counts_by_kind_equal_what_was_injected(tmp_path):
    faults = list(FAULTS)
    plan = lambda n: faults[n // 5 % len(faults)] if n % 5 == 4 else "ok"  # noqa: E731
    run = make_run(tmp_path / "run", count=130, request_timeout_s=3, stall_timeout_s=1.0)
    with Server(plan) as server:
        done, result = run_client(run, server.url)
    assert done.returncode == 1
    assert {kind: count for kind, count in result["kinds"].items() if count} == {
        **{kind: 2 for kind in FAULTS.values()},
        "cut": 4,
        "empty": 4,
        "stalled": 4,
    }
    assert result["done"] == 104 and result["failed"] == 26 and result["outstanding"] == 0
    assert not result["valid_client"] and "4 requests failed: stalled" in result["reasons"]
    live = json.loads((run / "job/progress.jsonl").read_text().splitlines()[-1])
    assert live["kinds"] == {kind: count for kind, count in result["kinds"].items() if count}
    assert (
        len(error_lines(run)) == 26
    )  # one in LoadGen's log for each failed request: a checker refuses the run
    assert result["loadgen_errors"] == 26
    with open(run / "job/queries_performance.csv", newline="") as file:
        statuses = [row["status"] for row in csv.DictReader(file)]
    assert statuses.count("ok") == 104 and statuses.count("http_429") == 2


def test_server_that_goes_away_mid_run_fails_requests_and_not_the_client(tmp_path):
    def plan(n):
        return "stop_listening" if n == 30 else "cut" if n > 30 else "ok"

    run = make_run(tmp_path / "run")
    with Server(plan) as server:
        done, result = run_client(run, server.url)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert result["kinds"]["refused"] > 20
    assert result["done"] + result["failed"] == result["issued"] == 100


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
    assert done.returncode == 1 and result["kinds"]["no_ids"] == 16
    assert "the server sends text, and client.tokenizer is not set" in done.stdout


def test_tokenizer_that_cannot_be_read_matters_only_to_servers_that_send_text(tmp_path):
    for with_ids in (True, False):
        run = make_run(tmp_path / f"run {with_ids}", tokenizer="/nowhere/tokenizer.json")
        with Server(with_ids=with_ids) as server:
            done, result = run_client(run, server.url, "accuracy")
        assert (done.returncode == 0) == with_ids and result["kinds"]["no_ids"] == 16 * (not with_ids)
    assert "client.tokenizer /nowhere/tokenizer.json: " in done.stdout


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


async def client_here(url):
    """The client in this process, with a stub in LoadGen's place; it opens no spare connections."""
    endpoint = "/v1/completions"
    options = {**client_settings.DEFAULTS, "endpoint": endpoint, "model": "m", "connections": 0}
    target = prompts.Target(url, endpoint)
    samples = prompts.Samples(target, options)
    samples.add(0, b"1,2", 2, 10, 10)
    loop = asyncio.get_running_loop()
    return sender.Client(loop, MagicMock(), target, options, samples, "performance", print)


async def send_in_turn(client, count):
    """Send requests one after the other, and close all connections; return the connection that each one took."""
    taken = []
    for number in range(count):
        client.begin([(number, 0)], time.perf_counter())
        taken.append(client.active[number].connection)
        while client.active:
            await asyncio.sleep(0.01)
    for connection in client.connections:
        connection.abort()
    await asyncio.sleep(0.01)
    return taken


def test_connections_are_reused():
    async def main(url):
        client = await client_here(url)
        await client.open_connections(2)
        await send_in_turn(client, 5)
        return client.done, client.resent

    with Server() as server:
        assert asyncio.run(main(server.url)) == (5, 0)
    assert server.connections == 2


def test_oldest_unused_connection_is_taken_first_and_a_used_one_before_it():
    """A server with a thread for each connection may not look at more of them than it has threads."""

    async def main(url):
        client = await client_here(url)
        await client.open_connections(3)
        oldest = client.idle[0]
        return await send_in_turn(client, 2) == [oldest, oldest]

    with Server() as server:
        assert asyncio.run(main(server.url))


def test_connection_that_the_server_has_ended_is_not_taken():
    """The end is there to be read, but the event loop has not come to it: a request sent now would be lost."""

    async def main(server):
        client = await client_here(server.url)
        await client.open_connections(3)
        while len(server.writers) < 3:
            await asyncio.sleep(0.01)
        for writer in server.writers[1:]:
            server.loop.call_soon_threadsafe(writer.close)
        time.sleep(0.2)
        await send_in_turn(client, 1)
        return client.done, client.kinds

    with Server() as server:
        assert asyncio.run(main(server)) == (1, {})
        assert server.connections == 3


@pytest.mark.parametrize(
    ("plan", "kinds", "resent"),
    [
        (("ok", "vanish", "ok"), {}, 1),  # the server ended an idle connection as we wrote
        (("ok", "vanish", "vanish"), {"cut": 1}, 1),
        (("ok", "vanish_late"), {"cut": 1}, 0),
        (("vanish",), {"cut": 1}, 0),  # a connection of its own: no idling ended it
        (("ok", "cut"), {"cut": 1}, 0),
    ],
)
def test_request_that_met_the_end_of_an_idle_connection_is_sent_once_more(plan, kinds, resent):
    async def main(url):
        client = await client_here(url)
        await client.open_connections(1)
        await send_in_turn(client, 2 if plan[0] == "ok" else 1)
        return client

    with Server(lambda n: plan[n]) as server:
        client = asyncio.run(main(server.url))
    assert (client.kinds, client.resent, server.asked) == (kinds, resent, len(plan))
    assert client.done + sum(kinds.values()) == client.issued


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="only Linux can be told when to acknowledge")
def test_acknowledgements_wait_only_while_a_long_answer_streams():
    """In this process: another process's sockets cannot be asked."""

    async def main(url):
        client = await client_here(url)
        await client.open_connections(1)

        def acknowledges_at_once():
            raw = next(iter(client.connections)).transport.get_extra_info("socket")
            return raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK)

        client.begin([(1, 0)], time.perf_counter())
        request = client.active[1]
        while not request.first_s:
            await asyncio.sleep(0.01)
        client.sweep()
        seen = [acknowledges_at_once()]
        while client.active:
            await asyncio.sleep(0.01)
        client.begin([(2, 0)], time.perf_counter())
        seen.append(acknowledges_at_once())
        for connection in client.connections:
            connection.abort()
        await asyncio.sleep(0.01)
        return seen

    with Server(step_s=0.05) as server:
        assert asyncio.run(main(server.url)) == [0, 1]


def test_second_run_in_the_same_folder_is_refused(clean_run):
    run = clean_run[0]
    before = (run / "mlperf/performance/mlperf_log_detail.txt").read_bytes()
    done, _ = run_client(run, "http://127.0.0.1:9")
    assert done.returncode == 2 and "already holds mlperf_log_accuracy.json" in done.stderr
    assert (run / "mlperf/performance/mlperf_log_detail.txt").read_bytes() == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_key": "llama3.1-405b"}, "known are llama3_1-405b-interactive"),
        ({"scenario": "Interactive"}, "known are Server, Offline"),
        ({"user_conf": "absent.conf"}, "FromConfig returned -2"),
        ({"total_sample_count": 601}, "600 rows, needed are 601"),
        ({"data_set": {"kind": "other"}}, "known are synthetic, pickle"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(tmp_path, change, message):
    run = make_run(tmp_path / "run", **change)
    done, result = run_client(run, "http://127.0.0.1:9")
    assert done.returncode == 2 and message in done.stderr and result is None


def test_missing_settings_name_the_key(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "job/settings.json").write_text('{"client": {"model": "m"}}')
    done, _ = run_client(run, "http://127.0.0.1:9")
    assert done.returncode == 2 and "client lacks endpoint, model_key" in done.stderr


def test_endpoint_that_refuses_connections_is_named_before_the_run(tmp_path):
    done, _ = run_client(make_run(tmp_path / "run"), "http://127.0.0.1:9")
    assert done.returncode == 2 and "127.0.0.1:9 does not accept connections" in done.stderr


@pytest.mark.parametrize("url", ["127.0.0.1:80", "http://127.0.0.1:65536", "http://127.0.0.1:x", "ftp://h:1"])
def test_url_that_names_no_endpoint_is_refused_with_a_sentence(tmp_path, url):
    done, _ = run_client(make_run(tmp_path / "run"), url)
    assert done.returncode == 2 and "needed is http://HOST:PORT" in done.stderr


def test_full_disk_ends_reports_and_not_the_run(tmp_path):
    run = make_run(tmp_path / "run", count=30)
    with Server() as server:
        done, result = run_client(run, server.url, "performance", "--progress", "/dev/full")
    assert done.returncode == 0 and result["done"] == 30 and "30 of 30 requests served" in done.stdout
    assert "report not written: [Errno 28] No space left on device" in done.stderr


def test_sigterm_stops_with_a_message_and_what_is_known(tmp_path):
    run = make_run(tmp_path / "run", qps=20, count=400)
    with Server() as server:
        process = subprocess.Popen(command(run, server.url), stdout=subprocess.PIPE, text=True)
        while server.asked < 10:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=10)
    result = json.loads((run / "job/client_performance.json").read_text())
    assert process.returncode == 128 + signal.SIGTERM and "SIGTERM: stopping" in out
    assert result["status"] == "stopped by SIGTERM" and not result["valid_client"]
    assert result["done"] >= 5


def test_client_that_was_late_says_so_in_the_result_and_in_the_verdict(tmp_path):
    run = make_run(tmp_path / "run", count=300)
    with Server() as server:
        process = subprocess.Popen(command(run, server.url), stdout=subprocess.DEVNULL)
        while server.asked < 50:
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)  # as a machine with too few cores would
        time.sleep(0.5)
        process.send_signal(signal.SIGCONT)
        assert process.wait(20) == 0
    result = json.loads((run / "job/client_performance.json").read_text())
    assert result["client_was_late"] and result["late_limit_ms"] == 45 and result["late_issues"] > 30
    words = f"The client itself was late: {result['late_issues']} of 300 requests left more than 45 ms"
    assert words in rows.verdict_text(run) and "twice" not in rows.verdict_text(run)
    (run / "job/client_performance.json").write_text(json.dumps({**result, "resent": 2}))
    assert "The client sent 2 requests twice" in rows.verdict_text(run)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickle_is_not_opened_unless_known_or_trusted(tmp_path):
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    data_set = {"kind": "pickle", "path": str(path), "sha256": None, "trust": False}
    done, _ = run_client(make_run(tmp_path / "a", data_set=data_set), "http://127.0.0.1:9")
    assert done.returncode == 2 and digest in done.stderr and "runs code" in done.stderr
    data_set.update(sha256="0" * 64, trust=True)
    done, _ = run_client(make_run(tmp_path / "b", data_set=data_set), "http://127.0.0.1:9")
    assert done.returncode == 2 and "another or a damaged file" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_pickle_prompts_are_sent_as_they_are(tmp_path):
    import pandas as pd

    frame = pd.DataFrame({"tok_input": [[5, 6, 7 + n] for n in range(16)], "gt_output": ["x"] * 16})
    frame.to_pickle(tmp_path / "data.pkl")
    digest = hashlib.sha256((tmp_path / "data.pkl").read_bytes()).hexdigest()
    data_set = {"kind": "pickle", "path": str(tmp_path / "data.pkl"), "sha256": digest, "trust": False}
    run = make_run(tmp_path / "run", data_set=data_set, total_sample_count=16, max_output_tokens=9)
    with Server() as server:
        done, _ = run_client(run, server.url, "accuracy")
    assert done.returncode == 0, done.stderr
    assert sorted(body["prompt"] for body in server.bodies) == [[5, 6, 7 + n] for n in range(16)]
    assert {(body["min_tokens"], body["max_tokens"]) for body in server.bodies} == {(1, 9)}


def test_client_runs_on_plain_asyncio(tmp_path):
    (tmp_path / "uvloop.py").write_text("raise ImportError('not here')\n")
    run = make_run(tmp_path / "run", count=20)
    with Server() as server:
        done = subprocess.run(
            command(run, server.url),
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            timeout=60,
        )
    result = json.loads((run / "job/client_performance.json").read_text())
    assert done.returncode == 0 and result["uvloop"] is None


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


def test_audit_config_of_the_working_directory_is_not_taken(tmp_path):
    run = make_run(tmp_path / "run", count=20)
    (tmp_path / "audit.config").write_text("*.*.min_query_count = 30\n")
    with Server() as server:
        subprocess.run(command(run, server.url), cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert value(run, "generated_query_count") == 20


def test_offline_sends_everything_with_bounded_requests_in_flight(tmp_path):
    run = make_run(tmp_path / "run", scenario="Offline", model_key="llama3_1-405b", max_in_flight=40)
    (run / "user.conf").write_text(OFFLINE_CONF)
    with Server() as server:
        done, result = run_client(run, server.url)
    assert done.returncode == 0 and error_lines(run) == []
    assert result["issued"] == result["done"] == result["generated"] == 500
    assert server.connections <= 40
    assert json.loads((run / "job/progress.jsonl").read_text().splitlines()[-1])["total"] == 500


def test_offline_without_a_bound_opens_all_at_once(tmp_path):
    run = make_run(tmp_path / "run", scenario="Offline", model_key="llama3_1-405b", total_sample_count=200)
    (run / "user.conf").write_text(OFFLINE_CONF)
    with Server(step_s=0.3) as server:
        done, result = run_client(run, server.url)
    assert done.returncode == 0 and result["done"] == 200
    assert server.connections >= 190


def test_key_for_an_external_endpoint_comes_from_the_environment(tmp_path):
    """A server that echoes it, where the text is cut, gives not even half of it away."""
    run, key = make_run(tmp_path / "run", count=5), "secret-" + 100 * "4"
    with Server(lambda n: "401" if n == 2 else "ok") as server:
        environment = {**os.environ, "OPENAI_API_KEY": key}
        done = subprocess.run(
            command(run, server.url), env=environment, capture_output=True, text=True, timeout=60
        )
    assert all(b"authorization: bearer " + key.encode() in head.lower() for head in server.heads)
    assert "HTTP 401" in done.stdout and "Bearer ***" in done.stdout
    assert "secret" not in done.stdout + done.stderr
    assert not any(b"secret" in path.read_bytes() for path in run.rglob("*") if path.is_file())


@pytest.mark.parametrize("key", ["secret\n", "secret\r\nX: y", "secret\u2019"])
def test_key_that_no_header_can_hold_is_refused_and_not_said(tmp_path, key):
    with Server() as server:
        done = subprocess.run(
            command(make_run(tmp_path / "run"), server.url), env={**os.environ, "OPENAI_API_KEY": key},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 2 and "OPENAI_API_KEY: it holds what no HTTP header may" in done.stderr
    assert "secret" not in done.stdout + done.stderr and server.asked == 0


@pytest.mark.parametrize(
    "echo",
    [json.dumps, repr, lambda key: json.dumps(key).replace("/", "\\/"), lambda key: repr(json.dumps(key))],
)
def test_key_is_masked_as_json_and_python_write_it(monkeypatch, echo):
    monkeypatch.setenv("OPENAI_API_KEY", 'se/cr"et\\key')
    target = prompts.Target("http://h", "/v1/completions")
    assert "***" in target.mask(echo(target.key)) and "et" not in target.mask(echo(target.key))


def test_fewer_open_files_than_requests_in_flight_are_refused(tmp_path):
    run = make_run(tmp_path / "run", scenario="Offline", model_key="llama3_1-405b", max_in_flight=400)
    (run / "user.conf").write_text(OFFLINE_CONF)
    with Server() as server:
        words = ["bash", "-c", 'ulimit -n 300; exec "$@"', "bash", *command(run, server.url)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "300 files may be open (ulimit -Hn), needed are 500" in done.stderr
        settings = json.loads((run / "job/settings.json").read_text())
        settings["client"]["total_sample_count"] = 60  # no more are ever open
        (run / "job/settings.json").write_text(json.dumps(settings))
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_https_endpoint_is_measured_once_its_certificate_is_trusted(tmp_path, tls):
    context, certificate = tls
    with Server(tls=context) as server:
        doubted, _ = run_client(make_run(tmp_path / "doubted", count=20), server.url)
        run = make_run(tmp_path / "run", count=100)
        environment = {**os.environ, "SSL_CERT_FILE": str(certificate)}
        subprocess.run(command(run, server.url), env=environment, check=True, capture_output=True, timeout=60)
    assert doubted.returncode == 2
    assert "certificate verify failed" in doubted.stderr and "SSL_CERT_FILE names a file" in doubted.stderr
    assert error_lines(run) == [] and value(run, "result_query_count") == 100
    assert server.asked == 100
