"""Warm-up: the client's own requests before the clock, counted as nothing."""

import asyncio
import itertools
import json
from types import SimpleNamespace

import pytest
from client_runs import LENGTHS, make_run, run_client
from endpoint import Server
from scripted import Scripted, tensorrt, text_only

from disagg_lib.job import warmup


def test_warm_up_ends_once_two_waves_are_alike_and_leaves_nothing_that_counts(tmp_path):
    run = make_run(tmp_path / "run", qps=400)
    with Server(step_s=0.02) as server:
        done, result = run_client(run, server.url, "warmup")
    waves = result["waves"]
    assert done.returncode == 0 and result["stable"], done.stdout + done.stderr
    assert waves[0]["requests"] == warmup.FEWEST_OPEN < waves[-1]["requests"] == waves[-2]["requests"]
    assert 30 < waves[-1]["requests"] < 300  # 400/s, each open for 0.1 to 0.2 s and more
    assert sum(wave["requests"] for wave in waves) == server.asked
    assert not (run / "mlperf").exists() and not list(run.glob("job/queries*"))
    lines = [json.loads(line) for line in (run / "job/progress.jsonl").read_text().splitlines()]
    assert {line["mode"] for line in lines} == {"warmup"} and lines[-1]["done"] == server.asked


def test_warm_up_sends_the_runs_fields_and_lengths_and_none_of_its_prompts(tmp_path):
    run = make_run(tmp_path / "run", count=60)
    with Server() as server:
        assert run_client(run, server.url, "warmup")[0].returncode == 0
        warm = list(server.bodies)
        assert run_client(run, server.url)[0].returncode == 0
    measured = server.bodies[len(warm) :]
    plain = [
        {k: v for k, v in b.items() if k not in ("prompt", "min_tokens", "max_tokens")}
        for b in (warm + measured)
    ]
    assert all(body == plain[0] for body in plain)
    assert {(len(body["prompt"]), body["max_tokens"]) for body in warm} <= set(LENGTHS)
    assert not {tuple(body["prompt"][:4]) for body in warm} & {tuple(body["prompt"][:4]) for body in measured}


def test_warm_up_goes_on_while_the_engine_still_stops_to_compile(tmp_path):
    run = make_run(tmp_path / "run", qps=1)
    with Server() as server:
        server.plan = lambda n: setattr(server, "step_s", 0.06 if n < 8 else 0.01) or "ok"
        _, result = run_client(run, server.url, "warmup")
    seconds = [wave["seconds"] for wave in result["waves"]]
    assert len(seconds) >= 3 and seconds[-1] < seconds[0] / 2


def test_every_pair_of_servers_is_reached(tmp_path):
    run = make_run(tmp_path / "run", qps=1)
    settings = json.loads((run / "job/settings.json").read_text())
    settings["servers"] = [{"role": "context"}] * 7 + [{"role": "generation"}] * 3
    (run / "job/settings.json").write_text(json.dumps(settings))
    with Server() as server:
        _, result = run_client(run, server.url, "warmup")
    assert result["waves"][0]["requests"] == 42


def test_server_that_answers_nothing_fails_the_warm_up_with_the_first_failure(tmp_path):
    run = make_run(tmp_path / "run")
    with Scripted(lambda body: 500) as server:
        done, result = run_client(run, server.url, "warmup")
    assert done.returncode == 1 and not result["stable"]
    assert "no request of a wave was answered; the first failure: sample 0: http_5xx" in done.stdout


def test_ids_that_an_accuracy_run_will_miss_are_missed_in_the_warm_up(tmp_path):
    for script, code in ((text_only, 2), (tensorrt, 0)):
        run = make_run(tmp_path / script.__name__, test_modes=["performance", "accuracy"])
        with Scripted(script) as server:
            done, result = run_client(run, server.url, "warmup")
        assert done.returncode == code, done.stderr
    assert result["ids"] == "detokenize"
    run = make_run(tmp_path / "performance alone", test_modes=["performance"])
    with Scripted(text_only) as server:
        assert run_client(run, server.url, "warmup")[0].returncode == 0


def test_lengths_come_from_the_whole_data_set_which_is_ordered_by_task(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "job/lengths.csv").write_text(
        "input_tokens,output_tokens\n" + "".join(f"{n},{n}\n" for n in range(1, 501))
    )
    settings = {"data_set": {"kind": "synthetic", "lengths": "job/lengths.csv"}, "total_sample_count": 500}
    assert [pair[0] for pair in warmup.lengths_of(run, settings, 5)] == [1, 101, 201, 301, 401]


@pytest.mark.parametrize(("seconds", "count"), [(1.0, warmup.MOST_WAVES), (110.0, 2)])
def test_warm_up_that_never_gets_steady_has_an_end(seconds, count):
    class Unsteady:
        recorder, numbers = SimpleNamespace(log=print), itertools.count(1)

        async def send(self, size):
            known = {"requests": size, "failed": 0, "seconds": seconds, "latency_mean_ms": 1.0}
            return {**known, "tpot_mean_ms": 2.0 ** next(self.numbers)}

    stable, waves = asyncio.run(warmup.until_alike(Unsteady(), 8, lambda latency_s: 8))
    assert not stable and len(waves) == count
