"""The client spreads over the URLs of several front ends, and says which of them did what."""

import asyncio
import socket
import time

import pytest
from client_runs import make_run, run_client
from endpoint import Server
from test_client_connections import client_here, send_in_turn


def two_urls(run, first, second, mode="performance"):
    return run_client(run, first, mode, "--url", second)


def test_queries_go_to_the_urls_in_turn_over_connections_of_their_own(tmp_path):
    with Server() as one, Server() as other:
        done, result = two_urls(make_run(tmp_path / "run", count=101), one.url, other.url)
    assert (done.returncode, one.asked, other.asked) == (0, 51, 50)
    assert one.connections >= 4 <= other.connections  # half each of those that are opened before the run
    shares = [(share["url"], share["issued"], share["done"], share["failed"]) for share in result["urls"]]
    assert shares == [(one.url, 51, 51, 0), (other.url, 50, 50, 0)]


def test_each_request_names_the_host_that_it_goes_to(tmp_path):
    with Server() as one, Server() as other:
        two_urls(make_run(tmp_path / "run", count=20), one.url, other.url)
    for server in (one, other):
        assert {head.split(b"Host: ")[1].split(b"\r\n")[0] for head in server.heads} == {
            server.url.removeprefix("http://").encode()
        }


def test_two_requests_in_turn_take_one_connection_of_each():
    async def main(*urls):
        client = await client_here(*urls)
        await client.open_connections(1)
        taken = await send_in_turn(client, 4)
        return [taken[0] is taken[2], taken[1] is taken[3], taken[0] is taken[1]]

    with Server() as one, Server() as other:
        assert asyncio.run(main(one.url, other.url)) == [True, True, False]


def test_a_front_end_that_dies_in_mid_run_is_named_and_the_other_goes_on(tmp_path):
    plan = lambda n: "stop_listening" if n == 10 else "cut" if n > 10 else "ok"  # noqa: E731
    with Server() as well, Server(plan) as dying:
        done, result = two_urls(make_run(tmp_path / "run", count=100), well.url, dying.url)
    assert done.returncode == 1
    assert f" at {dying.url}: " in result["first_failure"]
    failed = result["urls"][1]["failed"]
    assert result["urls"][0]["failed"] == 0 < failed == result["failed"]
    assert f"{dying.url}: {failed} of its 50 requests failed" in result["reasons"]


def test_fifty_failures_in_a_row_of_one_url_end_the_run_while_the_other_answers(tmp_path):
    with Server() as well, Server(lambda n: "500") as sick:
        run = make_run(tmp_path / "run", qps=60, count=500)
        done, result = two_urls(run, well.url, sick.url)
        time.sleep(0.5)  # the client leaves in the middle of answers: their server sees the ends
    assert done.returncode == 1 and result["issued"] < 500
    assert any(f"requests in a row failed at {sick.url}" in reason for reason in result["reasons"])


@pytest.mark.parametrize("place", [0, 1])
def test_a_url_that_nobody_listens_at_is_named_before_the_run(tmp_path, place):
    with socket.socket() as taken, Server() as server:
        taken.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
        urls = [server.url, server.url]
        urls[place] = dead
        done, result = two_urls(make_run(tmp_path / "run"), *urls)
    assert (done.returncode, result) == (2, None)
    assert f"{dead.removeprefix('http://')} does not accept connections" in done.stderr


def test_a_warm_up_goes_through_every_url(tmp_path):
    run = make_run(tmp_path / "run", qps=10, count=20)
    with Server() as one, Server() as other:
        done, result = two_urls(run, one.url, other.url, "warmup")
    assert (done.returncode, result["urls"]) == (0, [one.url, other.url])
    assert one.asked and abs(one.asked - other.asked) <= 1
