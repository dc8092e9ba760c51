"""The simulation: theory, conservation, limits that bind, and the rehearsal's engine in virtual time."""

import asyncio
import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_lib.errors import SimulationError
from disagg_lib.rehearsal.configuration import EngineArgs
from disagg_lib.rehearsal.engine import ContextEngine, GenerationEngine, Sequence
from disagg_lib.serving import engines, rules, simulate
from disagg_lib.serving.latency import read_table
from disagg_lib.serving.lengths import LENGTHS, SAMPLE_COUNT, built_in_lengths, scale_outputs
from disagg_lib.serving.loadgen_rules import Load, percentile, random_load, worst_allowed
from disagg_lib.serving.simulate import Deployment, ServerGroup, queue_lengths, summarise
from disagg_lib.serving.stacks import read_stack

GRAPHS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512)
GENERATION = ServerGroup(1, 4, max_batch_size=512, max_num_tokens=512, cuda_graph_sizes=GRAPHS)
TWENTY_GPUS = Deployment("gb200", ServerGroup(4, 4), GENERATION)
ONE_MS_A_TOKEN = tuple(map(np.array, ([0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0] * 4)))


def made_lengths(inputs, outputs):
    lengths = np.empty(len(inputs), LENGTHS)
    lengths["input_tokens"], lengths["output_tokens"] = inputs, outputs
    return lengths


def made_load(arrivals):
    return Load(1.0, np.asarray(arrivals, float), np.arange(len(arrivals)))


# Theory


def unfilled(queries, servers=1):
    return engines.Served(
        np.zeros((servers, 8)),
        np.zeros(2, np.int64),
        np.empty(queries, np.int64),
        *np.full((2, queries), np.inf),
    )


def asked(arrivals, inputs, outputs, transfer_s=0.0):
    return engines.Queries(arrivals, inputs, outputs, inputs + outputs, np.full(len(inputs), transfer_s))


def waits(service_s, utilisation, seed):
    """Waiting times of one server that takes requests one by one; service times in s."""
    n = len(service_s)
    arrivals = np.cumsum(np.random.RandomState(seed).exponential(service_s.mean() / utilisation, n))
    tokens = np.maximum(1, np.rint(service_s * 1000)).astype(np.int64)
    served = unfilled(n)
    limits = engines.Limits(1, False, False, 2**40, 1, 1, False, 0, False, 1e9)
    engines.serve(
        asked(arrivals, tokens, np.ones_like(tokens)), limits, engines.Tables(ONE_MS_A_TOKEN), served
    )
    end, busy = served.end, served.busy
    assert busy.sum() == pytest.approx(tokens.sum() / 1000)
    return end - arrivals - tokens / 1000


@pytest.mark.parametrize("utilisation", [0.5, 0.8])
def test_waits_agree_with_m_m_1_and_m_d_1(utilisation):
    runs = range(20)
    n = 20_000
    exponential = [
        waits(np.random.RandomState(100 + s).exponential(1.0, n), utilisation, s).mean() for s in runs
    ]
    constant = [waits(np.ones(n), utilisation, s).mean() for s in runs]
    for found, theory in (
        (exponential, utilisation / (1 - utilisation)),
        (constant, utilisation / (2 * (1 - utilisation))),
    ):
        error = np.std(found, ddof=1) / np.sqrt(len(found))
        assert abs(np.mean(found) - theory) < 4 * error
        assert error < 0.05 * theory


# Conservation

groups = st.builds(
    ServerGroup,
    count=st.integers(1, 4),
    tp=st.sampled_from([2, 4, 8]),
    pp=st.sampled_from([1, 2]),
    max_batch_size=st.integers(1, 64),
    max_num_tokens=st.integers(64, 8192),
    cuda_graph_sizes=st.sampled_from([(), (1, 2, 4, 8), GRAPHS]),
    router=st.sampled_from(["round_robin", "load_balancing", "least_tokens"]),
    chunks_overlap=st.booleans(),
    capacity_policy=st.sampled_from(["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"]),
)
queries = st.lists(
    st.tuples(st.floats(0, 3), st.integers(1, 20_000), st.integers(2, 60)), min_size=1, max_size=40
)


@settings(max_examples=150, deadline=None)
@given(groups, groups, queries)
def test_every_query_is_served_once_in_order_of_its_phases(context, generation, drawn):
    load = made_load(np.cumsum([q[0] for q in drawn]))
    lengths = made_lengths([q[1] for q in drawn], [q[2] for q in drawn])
    run = simulate.simulate(
        Deployment("gb200", context, generation, reserve_output_tokens=None), load, lengths
    )
    assert (load.arrivals_s < run.context_end_s).all()
    assert (run.context_end_s < run.first_token_s).all() and (run.first_token_s < run.end_s).all()
    assert set(run.context_server) <= set(range(context.count))
    assert set(run.generation_server) <= set(range(generation.count))
    # Nobody is left in the system, and no batch is larger than allowed.
    inside = queue_lengths(run)
    assert not inside["context"][:, -1].any() and not inside["generation_active"][:, -1].any()
    assert inside["generation_active"].max() <= generation.max_batch_size * generation.pp


@settings(max_examples=100, deadline=None)
@given(groups, queries)
def test_aggregated_servers_serve_every_query_once(group, drawn):
    load = made_load(np.cumsum([q[0] for q in drawn]))
    group = dataclasses.replace(group, pp=1)
    lengths = made_lengths([q[1] for q in drawn], [q[2] for q in drawn])
    run = simulate.simulate(Deployment("gb200", None, group, reserve_output_tokens=None), load, lengths)
    assert (load.arrivals_s < run.first_token_s).all() and (run.first_token_s < run.end_s).all()
    assert queue_lengths(run)["generation_active"].max() <= group.max_batch_size


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), queries)
def test_each_step_gives_each_sequence_one_token(servers, max_batch, drawn):
    """With steps of 10 ms, whatever the batch, a sequence takes exactly 10 ms for each token after the first."""
    n = len(drawn)
    arrivals = np.cumsum([q[0] for q in drawn])
    inputs, outputs = (np.array([q[k] for q in drawn], np.int64) for k in (1, 2))
    steps = (np.array([0.0, 1.0]), np.full((max_batch + 1, 2), 10.0), np.zeros(max_batch + 1))
    served, limits = (
        unfilled(n, servers),
        engines.Limits(servers, False, False, 1, max_batch, 1, False, 2**40, False, 1e9),
    )
    engines.serve(asked(arrivals, inputs, outputs, 0.005), limits, engines.Tables(steps=steps), served)
    first, end = served.first, served.end
    assert (end - first) / 0.010 == pytest.approx(outputs - 1)
    assert (first >= arrivals + 0.005 - 1e-9).all()


# The rehearsal's engine, on a clock that jumps


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer as soon as nothing else is to do."""

    now = 0.0

    def time(self):
        return self.now

    def _run_once(self):
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0]._when)
        super()._run_once()


def engine_args(group):
    return EngineArgs(
        group.tp, group.pp, group.max_batch_size, group.max_num_tokens, 2**20, True, group.kv_fraction, group.cuda_graph_sizes,
        group.cuda_graph_padding, True, False, group.chunks_overlap, group.capacity_policy,
    )  # fmt: skip


async def run_engines(deployment, load, lengths):
    """First-token and end time (s) of each query when the real-time engines serve them, routed as the orchestrator does."""
    loop = asyncio.get_running_loop()
    c, g = deployment.context, deployment.generation
    contexts, generations = (
        [
            engine(engine_args(group), read_table("gb200", group.tp, group.pp).under(deployment.stack), 1e-3)
            for _ in range(group.count)
        ]
        for engine, group in ((ContextEngine, c), (GenerationEngine, g))
    )
    runners = [asyncio.create_task(e.run()) for e in contexts + generations]
    loads, turns = ([0] * c.count, [0] * g.count), (itertools.count(), itertools.count())

    @contextlib.contextmanager
    def routed(role, engines, group, tokens):
        turn = next(turns[role])
        balanced = group.router != "round_robin"
        index = rules.least_loaded(loads[role], turn) if balanced else turn % group.count
        load = tokens if group.router == "least_tokens" else 1
        loads[role][index] += load
        yield engines[index]
        loads[role][index] -= load

    class Clock:
        def __init__(self):
            self.times = []

        def is_closing(self):
            return False

        def write(self, _):
            self.times.append(loop.time())

    async def query(arrival, inputs, outputs):
        await asyncio.sleep(arrival - loop.time())
        prompt = Sequence(inputs, 1)
        with routed(0, contexts, c, inputs) as context:
            await context.serve(prompt)
        answer = Sequence(inputs, outputs, transport=Clock(), frame=lambda s: b"")
        answer.transfer_s = rules.transfer_ms(inputs, c.tp * c.pp, g.tp * g.pp) / 1e3
        with routed(1, generations, g, inputs) as generation:
            await generation.serve(answer)
        assert len(answer.transport.times) == outputs
        return answer.transport.times[0], answer.transport.times[-1]

    answers = await asyncio.gather(
        *(query(a, *pair) for a, pair in zip(load.arrivals_s.tolist(), lengths.tolist(), strict=True))
    )
    for runner in runners:
        runner.cancel()
    assert not any(generation.kv_used() or generation.admitted for generation in generations)
    return np.array(answers).T


@pytest.mark.parametrize(
    ("context", "generation", "qps"),
    [
        (ServerGroup(1, 4), GENERATION, 0.9),
        (ServerGroup(1, 4), dataclasses.replace(GENERATION, cuda_graph_sizes=()), 0.9),
        (
            ServerGroup(1, 8, 2, max_batch_size=2, max_num_tokens=2048),
            dataclasses.replace(GENERATION, tp=8, pp=2),
            2.0,
        ),
        (ServerGroup(1, 8), dataclasses.replace(GENERATION, max_batch_size=4), 1.0),
        (ServerGroup(1, 8), dataclasses.replace(GENERATION, kv_fraction=0.03), 1.2),
        (ServerGroup(1, 2, 2, chunks_overlap=True), GENERATION, 1.2),
        (ServerGroup(1, 2, 2), GENERATION, 1.0),
        (ServerGroup(3, 2, 2, max_num_tokens=2048), dataclasses.replace(GENERATION, count=2), 3.0),
        (
            ServerGroup(3, 2, 2, router="load_balancing"),
            dataclasses.replace(GENERATION, count=2, router="load_balancing"),
            3.0,
        ),
        (
            ServerGroup(3, 4, router="least_tokens"),
            dataclasses.replace(GENERATION, count=2, router="least_tokens"),
            3.0,
        ),
    ],
)
@pytest.mark.parametrize("policy", ["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"])
@pytest.mark.parametrize("stack", ["none", "v6.0"])
def test_simulation_and_rehearsal_engine_agree_to_the_microsecond(context, generation, qps, policy, stack):
    lengths = scale_outputs(built_in_lengths(150), 80)
    load = made_load(np.cumsum(np.random.RandomState(3).exponential(1 / qps, 150)))
    generation = dataclasses.replace(generation, capacity_policy=policy)
    deployment = Deployment("gb200", context, generation, read_stack(stack), reserve_output_tokens=None)
    run = simulate.simulate(deployment, load, lengths)
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        first, end = runner.run(run_engines(deployment, load, lengths))
    assert first == pytest.approx(run.first_token_s, abs=1e-6)
    assert end == pytest.approx(run.end_s, abs=1e-6)


# LoadGen's rules


@pytest.mark.parametrize(
    ("target_qps", "count"), [(0.05, 8313), (3.85, 8313), (13.0, 8313), (14.5, 16626), (30, 24939)]
)
def test_queries_come_in_whole_permutations_until_the_duration_has_passed(target_qps, count):
    load = random_load(target_qps, seed=1)
    assert len(load.samples) == count and load.arrivals_s[-1] >= 600
    assert (np.bincount(load.samples) == count // 8313).all()
    assert load.arrivals_s[0] == 0 and (np.diff(load.arrivals_s) > 0).all()


def test_a_short_run_draws_exactly_its_queries():
    load = random_load(3.85, 1, min_duration_s=1, min_query_count=459, equal_issue=False)
    assert len(load.samples) == 459 and len(set(load.samples)) > 430


def test_arrivals_are_poisson_at_the_target():
    gaps = np.diff(random_load(13.0, 5).arrivals_s)
    assert gaps.mean() == pytest.approx(1 / 13, rel=0.03) and gaps.std() == pytest.approx(
        gaps.mean(), rel=0.03
    )


def test_early_stopping_looks_at_the_allowed_query():
    values = np.arange(8313.0)
    assert worst_allowed(values) == 8312 - 62 and percentile(values, 0.99) == 8229
    assert worst_allowed(np.arange(459.0)) == 458 and worst_allowed(np.arange(458.0)) == np.inf


# The deployment


def test_the_same_seed_gives_the_same_run_and_another_another():
    lengths = built_in_lengths()
    one, two, other = (
        summarise(simulate.simulate(TWENTY_GPUS, random_load(3.5, s), lengths)) for s in (1, 1, 2)
    )
    assert one == two and one["ttft_p99_ms"] != other["ttft_p99_ms"]


def test_balancing_tokens_cuts_the_tail_that_round_robin_leaves():
    lengths, load = built_in_lengths(), random_load(3.85, 1)
    balanced = dataclasses.replace(
        TWENTY_GPUS,
        context=dataclasses.replace(TWENTY_GPUS.context, router="least_tokens"),
    )
    tails = [percentile(simulate.simulate(d, load, lengths).ttft_ms, 0.99) for d in (TWENTY_GPUS, balanced)]
    assert tails[1] < 0.8 * tails[0]


def test_each_limit_can_be_the_one_that_binds():
    lengths = built_in_lengths()

    def row(system="gb200", context=16, qps=5.2, limits=simulate.INTERACTIVE_LIMITS_MS, **changes):
        d = Deployment(system, ServerGroup(context, 4), dataclasses.replace(GENERATION, **changes))
        found = summarise(simulate.simulate(d, random_load(qps, 1), lengths), limits)
        return found["binds"], found["valid"]

    assert row(context=4, qps=3.85) == ("ttft", False)
    assert row("gb300") == ("tpot", True)
    assert row("gb300", limits=(4500.0, 60.0)) == ("tpot", False)
    assert row(qps=8.0) == ("kv", False)
    assert row("gb300", max_batch_size=128) == ("batch", False)


def test_a_full_kv_cache_makes_requests_queue_for_admission():
    lengths, load = built_in_lengths(), random_load(3.85, 1)
    small = dataclasses.replace(TWENTY_GPUS, generation=dataclasses.replace(GENERATION, kv_fraction=0.3))
    roomy, tight = (simulate.simulate(d, load, lengths) for d in (TWENTY_GPUS, small))
    capacity = read_table("gb200", 4).kv_capacity_tokens(0.3, 512)
    assert (
        queue_lengths(roomy)["generation_waiting"].max()
        < 10
        < queue_lengths(tight)["generation_waiting"].max()
    )
    assert queue_lengths(tight)["generation_active"].max() < capacity / 2432
    assert tight.ttft_ms.mean() > 3 * roomy.ttft_ms.mean()
    assert tight.tpot_ms.mean() < roomy.tpot_ms.mean()


def test_a_request_that_never_fits_is_refused():
    tiny = dataclasses.replace(TWENTY_GPUS, generation=dataclasses.replace(GENERATION, kv_fraction=0.005))
    with pytest.raises(SimulationError, match="room for .* KV-cache tokens"):
        simulate.simulate(tiny, random_load(1.0, 1), built_in_lengths())


def test_an_unknown_router_is_refused():
    odd = dataclasses.replace(
        TWENTY_GPUS, generation=dataclasses.replace(GENERATION, router="kv_cache_aware")
    )
    with pytest.raises(SimulationError, match="kv_cache_aware"):
        simulate.simulate(odd, random_load(1.0, 1), built_in_lengths())


def test_utilisation_is_the_share_of_time_that_a_server_computes():
    run = simulate.simulate(TWENTY_GPUS, random_load(3.85, 1), built_in_lengths())
    assert run.context_busy.shape == (4, engines.TRACE_BINS)
    assert 0.75 < run.context_busy[:, 10:200].mean() < 0.9
    assert run.context_busy.max() < 1.5 and 0.99 < run.generation_busy[:, 10:200].mean() < 1.01
    assert len(run.end_s) == SAMPLE_COUNT


def test_a_pipeline_stages_batch_never_passes_its_limit():
    """Found by hypothesis: two requests ready at one boundary of a PP2 server with a batch of 1 joined one batch."""
    context = ServerGroup(
        count=2,
        tp=8,
        pp=2,
        max_batch_size=3,
        max_num_tokens=8192,
        cuda_graph_sizes=(1, 2, 4, 8),
        router="load_balancing",
    )
    generation = ServerGroup(count=1, tp=8, pp=2, max_batch_size=1, max_num_tokens=128, cuda_graph_sizes=())
    run = simulate.simulate(
        Deployment("gb200", context, generation, reserve_output_tokens=None),
        made_load(np.array([1.0, 1.0])),
        made_lengths([20000, 20000], [2, 60]),
    )
    assert (run.first_token_s < run.end_s).all()


# Admission


def test_a_server_that_reserves_nothing_holds_more_sequences_in_the_same_cache():
    lengths, load = built_in_lengths(), random_load(3.3, 1)
    refused, active = [], []
    for policy in ("GUARANTEED_NO_EVICT", "MAX_UTILIZATION"):
        small = dataclasses.replace(GENERATION, kv_fraction=0.45, capacity_policy=policy)
        run = simulate.simulate(dataclasses.replace(TWENTY_GPUS, generation=small), load, lengths)
        refused.append(run.blocked_by_kv)
        active.append(queue_lengths(run)["generation_active"].max())
    assert refused[1] < refused[0] and active[1] > 1.1 * active[0]


@settings(max_examples=60, deadline=None)
@given(queries, st.floats(0.008, 0.05))
def test_max_utilisation_admits_only_what_has_room_for_its_prompt(drawn, fraction):
    load = made_load(np.cumsum([q[0] / 10 for q in drawn]))
    lengths = made_lengths([q[1] for q in drawn], [q[2] for q in drawn])
    generation = dataclasses.replace(GENERATION, kv_fraction=fraction, capacity_policy="MAX_UTILIZATION")
    capacity = read_table("gb200", 4).kv_capacity_tokens(fraction, 512)
    if rules.kv_asked(lengths["input_tokens"].max(), 0, True) > capacity:
        return
    run = simulate.simulate(Deployment("gb200", ServerGroup(2, 4), generation), load, lengths)
    for now in run.first_token_s:
        inside = (run.first_token_s <= now) & (run.end_s > now)
        assert rules.kv_tokens(run.input_tokens[inside], 0).sum() <= capacity
