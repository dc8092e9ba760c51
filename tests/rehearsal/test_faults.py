"""Faults as the real ones show them: deaths that their steps outlive, refusals inside a 200, lost ids."""

import http.client
import json
import re
import time

import pytest
from processes import DEADLINE_S, STREAM, ask, events, nested_job, v51_job

from disagg_lib.experiment import parameters
from disagg_lib.rehearsal.knobs import FAULTS

JOBS = {"v5.1": v51_job, "1.x": nested_job}


def gone(port):
    """Wait until nothing listens any more."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            ask(port, "/health")
        except ConnectionError:
            return True
        time.sleep(0.05)
    return False


def test_a_server_may_die_while_loading_and_its_step_lives(tmp_path):
    fault = {"REHEARSAL_FAULT": "crash_loading_quiet:ctx1"}
    with v51_job(tmp_path, environment=fault, ready=False, start_timeout=2) as job:
        job.wait_for("rank4", "RuntimeError: Executor worker returned error")
        assert job.exit_status("orchestrator") == 1 and gone(job.ports[2])
        assert job.processes["rank4"].poll() is None and "[E] Failed to initialize executor" in job.log(
            "rank4"
        )
        job.processes["rank4"].terminate()
        assert job.exit_status("rank4") == 0


def test_a_server_may_die_in_mid_run_and_its_step_lives(tmp_path):
    with v51_job(tmp_path, environment={"REHEARSAL_FAULT": "crash_midrun_quiet:gen0:2"}) as job:
        assert [ask(job.port, "/v1/completions", STREAM)[0] for _ in range(2)] == [200, 200]
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            ask(job.port, "/v1/completions", STREAM)
        assert gone(job.ports[3]) and job.processes["rank8"].poll() is None


def test_what_outlives_its_server_ends_it_when_told_to_end(tmp_path):
    with v51_job(tmp_path, environment={"REHEARSAL_FAULT": "crash_midrun_quiet:gen0:9"}) as job:
        assert ask(job.ports[3], "/health")[0] == 200
        job.processes["rank8"].terminate()
        assert job.exit_status("rank8") == 0 and gone(job.ports[3])


def test_a_refusing_generation_server_is_an_empty_stream_in_v51(tmp_path):
    with v51_job(tmp_path, environment={"REHEARSAL_FAULT": "gen_refuses:gen0:1"}) as job:
        assert events(ask(job.port, "/v1/completions", STREAM)[1])[1]
        assert ask(job.port, "/v1/completions", STREAM) == (200, b"")
        job.wait_for("rank8", "[E] the executor takes no request any more")
        assert ask(job.ports[3], "/health")[0] == 200


def test_a_refusing_generation_server_is_a_broken_connection_in_12(tmp_path):
    with nested_job(tmp_path, environment={"REHEARSAL_FAULT": "gen_refuses:gen0:1"}) as job:
        assert events(ask(job.port, "/v1/completions", STREAM)[1])[1]
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            ask(job.port, "/v1/completions", STREAM)
        job.wait_for("gen", "[E] the executor takes no request any more")
        assert ask(job.ports[2], "/health")[0] == 200


@pytest.mark.parametrize(("dialect", "name"), [("v5.1", "ctx_request_id"), ("1.x", "disagg_request_id")])
def test_context_answers_without_the_request_id_are_refused(tmp_path, dialect, name):
    with JOBS[dialect](tmp_path, environment={"REHEARSAL_FAULT": "no_request_id"}) as job:
        status, content = ask(job.port, "/v1/completions", STREAM)
    said = f"Invalid disaggregated params in context phase response. {name} is None"
    assert status == 500 and said in json.loads(content)["error"]


def test_an_answer_that_ends_with_its_first_token_is_done_and_nothing_else(tmp_path):
    with v51_job(tmp_path, environment={"REHEARSAL_FAULT": "eos_first:2"}) as job:
        contents = [ask(job.port, "/v1/completions", STREAM) for _ in range(4)]
        whole = json.loads(ask(job.port, "/v1/completions", {**STREAM, "stream": False})[1])
    # two context servers in turn: each one's second answer
    assert [content == b"data: [DONE]\n\n" for _, content in contents] == [False, False, True, True]
    assert {status for status, _ in contents} == {200} and len(whole["choices"][0]["token_ids"]) == 5


@pytest.mark.parametrize("dialect", ["v5.1", "1.x"])
def test_a_release_before_detokenize_refuses_it(tmp_path, dialect):
    with JOBS[dialect](tmp_path, environment={"REHEARSAL_FAULT": "no_detokenize"}) as job:
        status, content = ask(job.port, "/v1/completions", STREAM)
        assert status == 400 and b"unknown field detokenize" in content
        plain = {key: value for key, value in STREAM.items() if key != "detokenize"}
        assert ask(job.port, "/v1/completions", plain)[0] == 200


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_of_the_stand_in_is_one_of_the_parameters(name):
    full = name + {"server": ":ctx0", "server count": ":gen0:3", "count": ":3", "": ""}[FAULTS[name]]
    assert re.match(parameters.FAULTS, name) and re.match(parameters.FAULTS, full)
