"""Servers that die while their step lives on, as the real launchers let them: found by log and /health, not by an exit."""

import json
import re

import pytest
from test_job import finish, make, no_process_left


def make_quiet(run_dir, **given):
    run = make(run_dir, test_modes=["performance"], **given)
    path = run / "job/settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"error_grace_s": 2}))
    return run


@pytest.mark.parametrize("dialect", ["v5.1", "1.x"])
def test_a_server_that_dies_quietly_while_loading_is_named_with_its_error(tmp_path, dialect):
    run = make_quiet(tmp_path / "run", fault="crash_loading_quiet:gen0", trtllm_dialect=dialect)
    state = finish(run, 60)
    assert re.match(
        r"generation server gen0 \(rank 4, node 127.0.0.1\) wrote an error, then nothing for 2 s, and does not answer "
        r"/health: 4: .*CUDA out of memory",
        state.reason,
    ), state.reason
    assert no_process_left(run)


@pytest.mark.parametrize("qps", [40.0, 1.0])  # the client's failure leads to it, or the silence itself
def test_a_server_that_dies_quietly_in_mid_run_is_named_by_its_silence(tmp_path, qps):
    load = {"server_target_qps": qps, "rehearsal_queries": 400}
    run = make_quiet(tmp_path / "run", fault="crash_midrun_quiet:gen0:40", **load)
    state = finish(run, 90)
    assert re.match(
        r"generation server gen0 \(rank 4, node 127.0.0.1\) was well and does not answer /health any more; its step "
        r"lives on: 4: .*executor worker died after 40 requests",
        state.reason,
    ), state.reason
    assert no_process_left(run)
