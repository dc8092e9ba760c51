"""Several orchestrators of TensorRT-LLM over the same servers (dialect 1.x), with the stand-in."""

import json

import yaml
from test_job import finish, make


def test_two_orchestrators_share_the_servers_and_the_load(tmp_path):
    run = make(
        tmp_path / "run",
        trtllm_dialect="1.x",
        num_frontends=2,
        num_ctx_servers=2,
        test_modes=["performance"],
    )
    state = finish(run)
    assert (state.state, state.reason) == ("done", "")
    result = json.loads((run / "job/client_performance.json").read_text())
    assert [share["done"] for share in result["urls"]] == [30, 30]
    bound = [yaml.safe_load(path.read_text()) for path in sorted(run.glob("job/config.bound*.yaml"))]
    assert len({values["port"] for values in bound}) == 2
    assert {values["node_id"] for values in bound} == {1, 2}
