"""Whole local jobs with real processes: the rehearsal serves, real LoadGen measures, faults are named."""

import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from endpoint import Server

from disagg_lib import errors
from disagg_lib.cluster import follow, launch
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.files import read_json_lines
from disagg_lib.job import deaths
from disagg_lib.results import found, logs, outputs, rows
from disagg_lib.results.accuracy import evaluate
from disagg_lib.run.tables import search_table
from disagg_lib.run.writing import PROGRAM, create_run

SMALL = {
    "num_ctx_servers": 1,
    "rehearsal_time_scale": 0.05,
    "server_target_qps": 40.0,
    "rehearsal_queries": 60,
    "rehearsal_accuracy_samples": 10,
    "rehearsal_output_tokens": 8,
    "load_timeout_s": 60,
    "stall_timeout_s": 30,
}
PHASES = [
    "container",
    "bind",
    "workers",
    "orchestrator",
    "ready",
    "warmup",
    "performance",
    "accuracy",
    "teardown",
    "done",
]


def make(run_dir, **given):
    return create_run(load_experiment(given={**SMALL, **given}), run_dir)


def finish(run, timeout_s=90):
    """Submit and wait; the watchdog of these tests."""
    launch.submit(run)
    return wait(run, timeout_s)


def wait(run, timeout_s=90, until=lambda state: state.ended):
    deadline = time.monotonic() + timeout_s
    while not until(state := launch.job_state(run)):
        assert time.monotonic() < deadline, f"{state}: {deaths.last_lines(run / launch.SCRIPT_LOG, 20)}"
        time.sleep(0.1)
    return state


def processes_of(run):
    """Every process that names the run folder in its command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(run) in word for word in process.info["cmdline"] or ()):
            found.append(process)
    return found


def no_process_left(run, within_s=5):
    deadline = time.monotonic() + within_s
    while processes_of(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not processes_of(run)


@pytest.mark.parametrize("dialect", ["v5.1", "1.x"])
def test_a_job_runs_through_all_phases_and_leaves_no_process(tmp_path, dialect):
    run = make(tmp_path / "run", trtllm_dialect=dialect)
    state = finish(run)
    assert (state.state, state.reason) == ("done", "")
    assert [line["phase"] for line in read_json_lines(run / "job/phases.jsonl")] == PHASES
    for mode in ("performance", "accuracy"):
        assert 'is_error": true' not in (run / f"mlperf/{mode}/mlperf_log_detail.txt").read_text()
    assert no_process_left(run)


def test_the_search_finds_a_target_and_the_run_takes_it(tmp_path):
    search = {
        "find_target_qps": True,
        "target_qps_min": 90.0,
        "target_qps_max": 95.0,
        "rehearsal_queries": 459,
    }
    run = make(tmp_path / "run", rehearsal_time_scale=0.01, test_modes=["performance"], **search)
    state = finish(run, 180)
    assert (state.state, state.reason) == ("done", "")
    assert "find_target_qps" in [line["phase"] for line in read_json_lines(run / "job/phases.jsonl")]
    found = json.loads((run / "job/find_target_qps.json").read_text())["target_qps"]
    assert f"target_qps = {found}\n" in (run / "user.conf").read_text()
    assert logs.read_run(run / "mlperf/performance").target_qps == pytest.approx(found, rel=1e-5)
    assert (outputs.write_outputs(run), (run / "figures/search_rehearsed.png").exists())[1]
    trials = search_table(run)
    assert len(trials) >= 1
    assert set(trials["queries"]) == {459}


def test_test06_is_a_test_mode_and_evaluate_judges_it(tmp_path):
    run = make(tmp_path / "run", test_modes=["test06"])
    assert finish(run).state == "done"
    assert "test06" in [line["phase"] for line in read_json_lines(run / "job/phases.jsonl")]
    assert "accuracy_log_sampling_target = 100" in (run / "job/audit.config").read_text()
    result = evaluate(run)
    assert [result[f"TEST06, {name} check"] for name in ("First token", "EOS", "Sample length")] == [
        "True"
    ] * 3
    assert "EOS check pass: True\n" in (run / "mlperf/test06/verify_accuracy.txt").read_text()


def test_offline_keeps_to_max_in_flight_and_has_no_token_latencies(tmp_path):
    run = make(tmp_path / "run", scenario="Offline", max_in_flight=20, rehearsal_queries=100)
    assert finish(run).state == "done"
    done = json.loads((run / "job/client_performance.json").read_text())
    assert (done["issued"], done["done"], done["scenario"]) == (100, 100, "Offline")
    assert max(line["outstanding"] for line in read_json_lines(run / "job/progress.jsonl")) <= 100
    verdict = rows.verdict_of(run)
    assert verdict.claim.scenario == "Offline" and verdict.failed == ()
    assert "latency_rehearsed.png" not in [path.name for path in outputs.write_outputs(run)]


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_a_server_that_is_already_up_is_measured(tmp_path, endpoint):
    """The server knows no /health, and its name of the model is its own."""
    with Server(step_s=0.001) as server:
        given = {
            "engine": "external",
            "endpoint": endpoint,
            "served_model": "mine",
            "endpoint_url": server.url + "/v1",
        }
        run = make(tmp_path / "run", **given)
        (run / "user.conf").write_text(
            "*.Server.target_qps = 200\n*.Server.min_duration = 1\n*.Server.min_query_count = 60\n"
            "*.Server.sample_concatenate_permutation = 0\n"  # a short run, which no parameter of a measurement makes
        )
        settings = json.loads((run / "job/settings.json").read_text())
        settings["client"]["accuracy_sample_count"] = 20
        (run / "job/settings.json").write_text(json.dumps(settings))
        lengths = (run / "job/lengths.csv").read_text()  # short answers, or a warm-up has many open at once
        (run / "job/lengths.csv").write_text(re.sub(r",\d+$", ",5", lengths, flags=re.M))
        state = finish(run)
    assert (state.state, state.reason) == ("done", "")
    told = [json.loads((run / f"job/client_{mode}.json").read_text()) for mode in ("performance", "accuracy")]
    assert [(result["issued"], result["done"]) for result in told] == [(60, 60), (20, 20)]
    assert {body["model"] for body in server.bodies} == {"mine"}
    assert {head.split(b" ")[1].decode() for head in server.heads} == {endpoint}
    key = "messages" if "chat" in endpoint else "prompt"
    assert all(key in body for body in server.bodies)
    assert found.folder_source(run) == "measured"
    assert logs.read_run(run / "mlperf/performance").query_count == 60


def test_an_endpoint_that_refuses_us_ends_the_job_at_once(tmp_path, monkeypatch, tls):
    """load_timeout_s is for servers that load: keys, names and certificates do not come right by waiting."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret-405")
    given = {"engine": "external", "test_modes": ["performance"]}
    with Server(lambda n: ("401", "400")[n]) as server:
        refused = [
            finish(make(tmp_path / name, endpoint_url=server.url, **given)).reason for name in ("key", "name")
        ]
    assert re.match(r"endpoint 127.*: status 401: .*Set OPENAI_API_KEY to a key that it accepts", refused[0])
    assert re.match(
        r"endpoint 127.*: status 400: .*Check endpoint_url, endpoint and served_model", refused[1]
    )
    assert not any(b"secret-405" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    monkeypatch.setenv("OPENAI_API_KEY", "secret-405\n")
    with Server() as server:
        unfit = finish(make(tmp_path / "unfit", endpoint_url=server.url, **given)).reason
    assert re.match("OPENAI_API_KEY: it holds what no HTTP header may", unfit) and not server.asked
    assert not any(b"secret-405" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    monkeypatch.delenv("OPENAI_API_KEY")
    with Server(tls=tls[0]) as server:
        doubted = finish(make(tmp_path / "tls", endpoint_url=server.url, **given)).reason
    assert re.match(r"endpoint_url: no TLS with 127.*certificate verify failed.*SSL_CERT_FILE", doubted)


def test_folders_with_spaces_quotes_and_commands_break_and_run_nothing(odd_dir):
    run = make(odd_dir / "run", scratch_dir=str(odd_dir / "scratch"))
    assert finish(run).state == "done"
    assert [path for path in odd_dir.parent.rglob("owned")] == []
    assert not Path("owned").exists()


def test_only_loopback_ports_are_open(tmp_path):
    run = make(tmp_path / "run", rehearsal_queries=200, test_modes=["performance"])
    launch.submit(run)
    wait(run, until=lambda state: state.phase == "performance" or state.ended)
    listening = set()
    for process in processes_of(run):
        with contextlib.suppress(psutil.NoSuchProcess):  # a step of the agent that has just ended
            listening |= {
                c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN
            }
    launch.cancel(run)
    assert listening == {"127.0.0.1"}


def test_submitting_twice_attaches_to_the_same_job(tmp_path):
    run = make(tmp_path / "run", test_modes=["accuracy"])
    first, second = launch.submit(run), launch.submit(run)
    assert first.job_id == second.job_id
    assert wait(run).state == "done"
    assert launch.submit(run).state == "done"


def test_a_corrected_clock_does_not_lose_a_job_and_another_program_is_none(tmp_path):
    run = make(tmp_path / "run", rehearsal_queries=4000, test_modes=["performance"])
    launch.submit(run)
    record = run / "job/job.json"
    kept = json.loads(record.read_text())
    states = []
    for seconds in (1.5, 3600, 0):
        record.write_text(json.dumps({**kept, "create_time_s": kept["create_time_s"] + seconds}))
        states.append(launch.job_state(run).state)
    launch.cancel(run)
    assert states == ["running", "lost", "running"]


def test_cancel_tears_down_and_says_so(tmp_path):
    run = make(tmp_path / "run", rehearsal_queries=4000, test_modes=["performance"])
    launch.submit(run)
    wait(run, until=lambda state: state.phase == "performance" or state.ended)
    state = launch.cancel(run)
    said = deaths.last_lines(run / launch.SCRIPT_LOG, 20)
    assert state.reason.startswith("cancelled (signal TERM) during performance"), (state, said)
    assert [line["phase"] for line in read_json_lines(run / "job/phases.jsonl")][-2] == "teardown"
    assert no_process_left(run)


def test_a_used_folder_is_refused_and_stays_as_it_is(tmp_path):
    run = make(tmp_path / "run", test_modes=["accuracy"])
    finish(run)
    before = (run / "job/phases.jsonl").read_text()
    done = subprocess.run(["bash", "job.sh"], cwd=run, capture_output=True, text=True)
    assert done.returncode == 1
    assert "this run folder was used before" in done.stdout
    assert (run / "job/phases.jsonl").read_text() == before


FAULTS = [
    (
        "crash_loading:ctx0",
        {},
        r"context server ctx0 \(rank 0, node 127.0.0.1\) ended with status \d+: .*ctx0",
    ),
    (
        "crash_loading:gen0",
        {},
        r"generation server gen0 \(rank 4, node 127.0.0.1\) ended with status \d+: .*gen0",
    ),
    ("crash_midrun:gen0:20", {}, r"generation server gen0 \(rank 4, node 127.0.0.1\) ended with status \d+"),
    ("health_503", {"load_timeout_s": 6}, r"not ready after load_timeout_s = 6 s: .*"),
    (
        "no_tokens",
        {"stall_timeout_s": 2},
        r"every server answers /health with 200, but for \d+ s \(2 x stall_timeout_s\) no completion came through: .*no error in it",
    ),
    ("truncated_stream:10", {}, r"the performance client ended with status \d+: .*"),
]


@pytest.mark.parametrize(("fault", "given", "reason"), FAULTS)
def test_a_fault_is_named_and_every_server_ended(tmp_path, fault, given, reason):
    run = make(tmp_path / "run", fault=fault, test_modes=["performance"], **given)
    state = finish(run)
    assert state.state == "failed"
    assert re.match(reason, state.reason), state.reason
    assert no_process_left(run)


def test_a_fault_in_dialect_1x_names_the_server_too(tmp_path):
    run = make(tmp_path / "run", fault="crash_loading:gen0", trtllm_dialect="1.x")
    assert re.match(r"generation server gen0 \(rank 4, node 127.0.0.1\)", finish(run).reason)


def test_a_stall_ends_the_job_after_stall_timeout_s(tmp_path):
    run = make(tmp_path / "run", rehearsal_queries=4000, stall_timeout_s=3, test_modes=["performance"])
    launch.submit(run)
    wait(run, until=lambda state: state.ended or (state.progress or {}).get("tokens", 0) > 0)
    for process in processes_of(run):
        if "disaggregated_mpi_worker" in process.cmdline():
            process.suspend()
    state = wait(run, timeout_s=30)
    assert state.reason.startswith("stalled: no token for ")
    assert "stall_timeout_s = 3" in state.reason
    assert no_process_left(run)


def test_a_client_that_hangs_with_no_query_open_is_a_stall(tmp_path):
    run = make(tmp_path / "run", server_target_qps=0.5, stall_timeout_s=3, test_modes=["performance"])
    launch.submit(run)
    wait(
        run,
        until=lambda state: (
            state.ended
            or (state.phase == "performance" and state.progress["mode"] == "performance")
            and (state.progress["done"] and not state.progress["outstanding"])
        ),
    )
    for process in processes_of(run):
        if "client" in process.cmdline() and "ranks" not in process.cmdline():
            process.suspend()
    assert wait(run, timeout_s=30).reason.startswith("stalled: ")
    assert no_process_left(run)


def test_a_killed_job_script_is_lost_and_its_servers_end_by_themselves(tmp_path):
    run = make(tmp_path / "run", rehearsal_queries=4000, test_modes=["performance"])
    job = launch.submit(run).job_id
    wait(run, until=lambda state: state.phase == "performance" or state.ended)
    psutil.Process(int(job)).kill()
    state = wait(run)
    assert state.state == "lost"
    assert state.reason.startswith("the job script is gone during performance, without a last word: ")
    assert no_process_left(run, within_s=20)


def test_watch_raises_with_the_reason_and_where_to_look(tmp_path):
    run = make(tmp_path / "run", fault="crash_loading:ctx0")
    launch.submit(run)
    lines = []
    with pytest.raises(errors.JobError, match="failed: context server ctx0"):
        follow.watch(run, out=lines.append)
    assert lines[-1].endswith(launch.job_state(run).phase)


def test_tokens_in_the_environment_do_not_reach_the_job(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "MY_password", "CI_JOB_TOKEN"):
        monkeypatch.setenv(name, "hf_canary")
    run = make(tmp_path / "run", test_modes=["accuracy"])
    launch.submit(run)
    wait(run, until=lambda state: state.phase == "ready" or state.ended)
    environments = [process.environ() for process in processes_of(run)]
    launch.cancel(run)
    assert environments
    assert all("hf_canary" not in environment.values() for environment in environments)
    held = [p for p in run.rglob("*") if p.is_file() and b"hf_canary" in p.read_bytes()]
    assert held == []


def test_two_jobs_at_once_take_different_ports(tmp_path):
    runs = [make(tmp_path / name, test_modes=["accuracy"]) for name in ("a", "b")]
    for run in runs:
        launch.submit(run)
    assert [wait(run).state for run in runs] == ["done", "done"]
    assert (
        runs[0].joinpath("job/addresses.txt").read_text() != runs[1].joinpath("job/addresses.txt").read_text()
    )


def test_ranks_carry_their_number_and_end_together(tmp_path):
    script = (
        "import os, sys, time; r = os.environ['SLURM_PROCID']; print('I am', r, flush=True); open(r, 'w').close()\n"
        "while r != '1' or len(os.listdir()) < 3: time.sleep(0.05)\n"
        "sys.exit(3)"
    )
    agent = [sys.executable, PROGRAM, "agent", "ranks", "3", "4", sys.executable, "-c", script]
    done = subprocess.run(agent, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 3
    assert {"4: I am 0", "5: I am 1", "6: I am 2"} <= set(done.stdout.splitlines())
    assert "job_agent: rank 5 ended with status 3" in done.stdout
