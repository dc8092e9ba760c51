"""The rehearsal's real processes and the simulation, fed the same arrivals and lengths, in real time."""

import asyncio
import json
import time

import aiohttp
import numpy as np
import pytest
from processes import v51_job

from disagg_lib.experiment.cuda_graphs import cuda_graph_sizes
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.serving.lengths import built_in_lengths, scale_outputs
from disagg_lib.serving.loadgen_rules import Load
from disagg_lib.serving.plan import deployment_of
from disagg_lib.serving.simulate import Deployment, ServerGroup, simulate

QUERIES, TARGET_QPS = 18, 2.4
OVERLOADED_MS = 5.0


async def measure(port, arrivals, lengths):
    """Lateness of the issue, TTFT and TPOT (ms) of each query, as a client sees them."""

    async def query(session, started, arrival, inputs, outputs):
        await asyncio.sleep(started + arrival - time.perf_counter())
        issued = time.perf_counter()
        body = {
            "model": "m",
            "prompt": [7] * inputs,
            "max_tokens": outputs,
            "min_tokens": outputs,
            "stream": True,
        }
        first = None
        async with session.post(f"http://127.0.0.1:{port}/v1/completions", data=json.dumps(body)) as answer:
            async for _ in answer.content.iter_any():
                first = first or time.perf_counter()
        end = time.perf_counter()
        return issued - started - arrival, first - started - arrival, (end - first) / (outputs - 1)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        started = time.perf_counter() + 0.2
        pairs = zip(arrivals.tolist(), lengths.tolist(), strict=True)
        return (
            1e3 * np.array(await asyncio.gather(*(query(session, started, a, *pair) for a, pair in pairs))).T
        )


def test_rehearsal_and_simulation_agree_within_three_percent(tmp_path):
    lengths = scale_outputs(built_in_lengths(QUERIES), 64)
    arrivals = np.cumsum(np.random.RandomState(1).exponential(1 / TARGET_QPS, QUERIES))
    batch = {
        "generation_servers__max_batch_size": 512,
        "generation_servers__cuda_graph_batch_sizes": cuda_graph_sizes(512),
    }
    with v51_job(tmp_path, environment={"REHEARSAL_TIME_SCALE": "1.0"}, **batch) as job:
        late, ttft, tpot = asyncio.run(measure(job.port, arrivals, lengths))
    if np.percentile(late, 90) > OVERLOADED_MS:
        pytest.skip(f"the machine is overloaded: requests left {np.percentile(late, 90):.0f} ms late")
    generation = ServerGroup(1, 4, 1, 512, 512, tuple(cuda_graph_sizes(512)), kv_fraction=0.9)
    deployment = Deployment("gb200", ServerGroup(2, 4), generation, reserve_output_tokens=None)
    run = simulate(deployment, Load(TARGET_QPS, arrivals, np.arange(QUERIES)), lengths)
    for found, expected in ((ttft, run.ttft_ms), (tpot, run.tpot_ms)):
        for figure in (np.mean, lambda values: np.percentile(values, 90)):
            assert figure(found) == pytest.approx(figure(expected), rel=0.03)


def test_a_deployment_follows_from_the_experiment():
    real = deployment_of(load_experiment(["params/gb200_20gpu.yaml"]))
    rehearsed = deployment_of(load_experiment(["params/rehearsal.yaml"], {"trtllm_dialect": "1.x"}))
    assert real.gpus == 20 and real.reserve_output_tokens == 2000 and rehearsed.reserve_output_tokens is None
    assert real.generation.cuda_graph_sizes[-1] == 512
    assert rehearsed.context.chunks_overlap and not real.context.chunks_overlap
