"""Jobs whose servers live but refuse: the reason says so, and where to look."""

import json
import re

import pytest
from test_job import finish, make, no_process_left

LONG = {"server_target_qps": 40.0, "rehearsal_queries": 4000}
REFUSALS = [
    (
        "gen_refuses:gen0:200",
        "v5.1",
        LONG,
        r"the performance client .*See logs/output_workers\.log.*in a row failed",
    ),
    (
        "gen_refuses:gen0:200",
        "1.x",
        LONG,
        r"the performance client .*See logs/output_workers\.log.*in a row failed",
    ),
    ("no_request_id", "1.x", {"load_timeout_s": 8}, r"not ready after .*disagg_request_id is None"),
    ("no_request_id", "v5.1", {"load_timeout_s": 8}, r"not ready after .*ctx_request_id is None"),
    (
        "eos_first:30",
        "v5.1",
        LONG | {"rehearsal_queries": 200},
        r"the performance client .*the model's first token was its end token",
    ),
]


@pytest.mark.parametrize(("fault", "dialect", "given", "reason"), REFUSALS)
def test_a_refusal_is_told_as_what_it_is(tmp_path, fault, dialect, given, reason):
    run = make(tmp_path / "run", fault=fault, trtllm_dialect=dialect, test_modes=["performance"], **given)
    state = finish(run)
    assert state.state == "failed" and re.match(reason, state.reason), state.reason
    assert no_process_left(run)


def test_refusals_end_a_run_long_before_its_queries(tmp_path):
    run = make(tmp_path / "run", fault="gen_refuses:gen0:200", test_modes=["performance"], **LONG)
    finish(run)
    result = json.loads((run / "job/client_performance.json").read_text())
    assert result["issued"] < 1000 and result["kinds"]["cut"] >= 50
