"""Whole jobs behind Dynamo's real front ends and mock workers: they measure, every death is named, nothing is left."""

import contextlib
import json
import os
import re
import time

import psutil
import pytest
from test_job import wait

from disagg_lib.cluster import launch
from disagg_lib.files import read_json_lines

OF_DYNAMO = ("dynamo.frontend", "dynamo.mocker", "etcd", "nats-server")


def until(run, condition, timeout_s=180):
    """Poll the job's state until condition(state); these tests' watchdog."""
    return wait(run, timeout_s, condition)


def finish(run, timeout_s=180):
    launch.submit(run)
    return until(run, lambda state: state.ended, timeout_s)


def result(run, mode):
    return json.loads((run / f"job/client_{mode}.json").read_text())


def port_of(run, name):
    rows = (line.split() for line in (run / "job/addresses.txt").read_text().splitlines())
    return next(port for own, _, port in rows if own == name)


def processes():
    """(process, its environment) of all that is Dynamo's."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = [os.path.basename(word) for word in process.cmdline()[:3]]
            if set(OF_DYNAMO) & set(words) and words[0] != "bash":
                yield process, process.environ()


def nothing_runs(within_s=30):
    """Whether nothing of Dynamo's is left within that time: Slurm ends a job's last processes after its script."""
    deadline = time.monotonic() + within_s
    while list(processes()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return not list(processes())


def kill(run, name):
    """End the process of a part of this run, as a crash would."""
    port = port_of(run, name)
    flags = {"etcd": f"http://127.0.0.1:{port}"}
    (found,) = (
        process
        for process, environment in processes()
        if environment.get("DYN_SYSTEM_PORT") == port or flags.get(name, port) in process.cmdline()
    )
    found.kill()


def test_500_queries_at_10_a_second_over_two_front_ends_and_none_fails(make_run):
    run = make_run(rehearsal_queries=500)
    assert (finish(run).state, launch.job_state(run).reason) == ("done", "")
    performance, accuracy = result(run, "performance"), result(run, "accuracy")
    assert (performance["issued"], performance["done"], performance["failed"]) == (500, 500, 0)
    assert [share["done"] for share in performance["urls"]] == [250, 250]
    assert (accuracy["done"], accuracy["failed"], accuracy["ids"]) == (10, 0, "text")
    assert [share["done"] for share in accuracy["urls"]] == [5, 5]
    warmup = result(run, "warmup")
    assert sum(wave["failed"] for wave in warmup["waves"]) == 0 and len(warmup["urls"]) == 2
    assert sum(path.stat().st_size for path in (run / "logs").iterdir()) < 2e6


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("frontend1", r"frontend1 \(node 127.0.0.1\) ended with status 137"),
        ("ctx1", r"context server ctx1 \(rank 2, node 127.0.0.1\) ended with status 137"),
        ("gen0", r"generation server gen0 \(rank 4, node 127.0.0.1\) ended with status 137"),
    ],
)
def test_a_part_that_dies_in_mid_run_is_named_within_15_seconds(make_run, name, said):
    run = make_run(rehearsal_queries=600, test_modes=["performance"])
    launch.submit(run)
    until(run, lambda state: state.phase == "performance" or state.ended)
    time.sleep(1)
    kill(run, name)
    killed = time.monotonic()
    state = until(run, lambda state: state.ended, 30)
    assert time.monotonic() - killed < 15
    assert state.state == "failed"
    assert re.match(said, state.reason), state.reason


def test_front_ends_that_never_list_the_model_are_named(make_run, checkpoint, tmp_path):
    """Without a chat template Dynamo's front ends take a worker in and serve nothing."""
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    for path in checkpoint.iterdir():
        (lacking / path.name).symlink_to(path)
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    (lacking / "tokenizer_config.json").unlink()
    (lacking / "tokenizer_config.json").write_text(json.dumps(settings))
    state = finish(make_run(model_dir=str(lacking), load_timeout_s=30))
    assert state.state == "failed"
    assert "not ready after load_timeout_s = 30 s" in state.reason
    assert f"does not list the model {lacking}, but []" in state.reason


def test_workers_of_which_none_gets_ready_are_named(make_run):
    """All hang while they load: they live and answer nothing, and a stopped process takes no TERM."""
    run = make_run(load_timeout_s=30)
    launch.submit(run)
    stopped = set()

    def hang_what_began(state):
        for process, environment in processes():
            if "DYN_SYSTEM_PORT" in environment and process.pid not in stopped:
                process.suspend()
                stopped.add(process.pid)
        return state.ended

    state = until(run, hang_what_began)
    assert state.state == "failed" and len(stopped) == 4
    assert state.reason == "not ready after load_timeout_s = 30 s: no 200 from ctx0, ctx1, gen0, gen1"
    assert nothing_runs()


def test_a_cancelled_job_leaves_nothing(make_run):
    run = make_run(rehearsal_queries=600, test_modes=["performance"])
    launch.submit(run)
    until(run, lambda state: state.phase == "performance" or state.ended)
    launch.cancel(run)
    assert "cancelled" in until(run, lambda state: state.ended, 30).reason


def test_release_08_runs_with_its_etcd_and_nats(make_run):
    run = make_run("0.8")
    assert (finish(run).state, launch.job_state(run).reason) == ("done", "")
    assert (result(run, "performance")["done"], result(run, "accuracy")["done"]) == (60, 10)


@pytest.mark.parametrize("name", ["etcd", "nats"])
def test_a_service_of_release_08_that_dies_is_named(make_run, name):
    run = make_run("0.8", rehearsal_queries=600, test_modes=["performance"])
    launch.submit(run)
    until(run, lambda state: state.phase == "performance" or state.ended)
    kill(run, name)
    state = until(run, lambda state: state.ended, 30)
    assert state.reason.startswith(f"{name} (node 127.0.0.1) ended with status 137"), state.reason


@pytest.mark.parametrize("discovery", ["file", "etcd"])
def test_on_slurm_front_ends_run_on_nodes_of_their_own(cluster, make_run, discovery):
    run = make_run(
        launcher="slurm",
        partition="batch",
        account="mlperf",
        time_limit="0:30:00",
        dynamo_discovery=discovery,
    )
    assert (finish(run).state, launch.job_state(run).reason) == ("done", "")
    nodes = dict(line.split()[:2] for line in (run / "job/addresses.txt").read_text().splitlines())
    assert nodes["frontend0"] != nodes["frontend1"]
    assert (result(run, "performance")["done"], result(run, "accuracy")["done"]) == (60, 10)
    assert nothing_runs()
    lines = read_json_lines(run / "job/phases.jsonl")
    assert lines[-1]["phase"] == "done"


def test_a_front_end_killed_on_slurm_gives_the_nodes_back(cluster, make_run):
    run = make_run(
        launcher="slurm",
        partition="batch",
        account="mlperf",
        time_limit="0:30:00",
        dynamo_discovery="file",
        rehearsal_queries=600,
        test_modes=["performance"],
    )
    launch.submit(run)
    until(run, lambda state: state.phase == "performance" or state.ended)
    kill(run, "frontend1")
    killed = time.monotonic()
    state = until(run, lambda state: state.ended, 60)
    assert time.monotonic() - killed < 15
    assert state.reason.startswith("frontend1 (node gb02) "), state.reason
    assert "gb02: task 0: Killed" in state.reason
    cluster.wait("all nodes are free", lambda: cluster.idle_nodes() == 18, 30)
    assert nothing_runs()
