"""How the client uses its connections: their reuse and their end, their number, keys and certificates."""

import asyncio
import json
import os
import socket
import subprocess
import time
from unittest.mock import MagicMock

import pytest
from client_runs import OFFLINE_CONF, command, error_lines, make_run, run_client, value
from endpoint import Server

from disagg_lib.job import client_settings, prompts, sender, target


async def client_here(*urls):
    """The client in this process, with a stub in LoadGen's place; it opens no spare connections."""
    endpoint = "/v1/completions"
    options = {**client_settings.DEFAULTS, "endpoint": endpoint, "model": "m", "connections": 0}
    targets = [target.Target(url, endpoint) for url in urls]
    samples = prompts.Samples(options)
    samples.add(0, b"1,2", 2, 10, 10)
    loop = asyncio.get_running_loop()
    return sender.Client(loop, MagicMock(), targets, options, samples, "performance", print)


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
        oldest = client.pools[0].idle[0]
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
    here = target.Target("http://h", "/v1/completions")
    assert "***" in here.mask(echo(here.key)) and "et" not in here.mask(echo(here.key))


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
