"""job/settings.json and user.conf: what the job and LoadGen are told, as plain values."""

from dataclasses import asdict

from ..experiment.parameters import Experiment
from ..serving import lengths
from ..serving.lengths import SAMPLE_COUNT
from ..serving.loadgen_rules import seeds_of
from .durations import MIN_DURATION_S, TEARDOWN_S, performance_run, runs_of


def user_conf_text(e: Experiment) -> str:
    """LoadGen's user.conf; durations in ms.

    A rehearsal is shortened the second way of MLPerf's short runs: exactly `rehearsal_queries` queries,
    drawn from all samples. LoadGen's equal issue is off for that, so such a run can claim no round.
    """
    short = {"min_duration": 1, "min_query_count": e.rehearsal_queries, "sample_concatenate_permutation": 0}
    whole = {"min_duration": 1000 * MIN_DURATION_S, "performance_sample_count_override": SAMPLE_COUNT}
    if e.min_query_count:
        whole["min_query_count"] = e.min_query_count
    settings = {"target_qps": e.server_target_qps, **(short if e.shortened else whole)}
    return "".join(f"*.{loadgen_scenario(e)}.{name} = {value}\n" for name, value in settings.items())


def loadgen_scenario(e: Experiment) -> str:
    """LoadGen's word: Interactive is its Server with the limits of another model key."""
    return "Offline" if e.scenario == "Offline" else "Server"


_OF_A_SERVER = ("name", "role", "ranks", "nodes", "node", "port", "gpus")


def settings_of(e: Experiment) -> dict:
    """job/settings.json: what the job agent and the measuring client need to know, as plain values."""
    if e.dataset_path:
        data_set = {"kind": "pickle", "path": e.dataset_path, "sha256": None, "trust": e.trust_dataset}
    else:
        data_set = {"kind": "synthetic", "lengths": "job/lengths.csv"}
    full_queries, full_s = performance_run(e)
    # Servers that send text alone: the client makes ids of it after an accuracy or TEST06 run.
    has_model = e.engine == "trtllm" or e.orchestrator == "dynamo" or e.model_dir
    return {
        "engine": e.engine,
        "launcher": e.launcher,
        "node_count": e.node_count,
        "gpus_per_node": e.gpus_per_node,
        "orchestrator": e.orchestrator,
        "doors": [asdict(door) for door in e.doors],
        "services": [asdict(service) for service in e.services],
        "endpoint_url": e.endpoint_url,
        "time_limit_s": e.time_limit_s,
        "load_timeout_s": e.load_timeout_s,
        "stall_timeout_s": e.stall_timeout_s,
        "error_grace_s": 60,  # from an error in a loading server's log on, without another line and without /health
        "servers": [{name: getattr(server, name) for name in _OF_A_SERVER} for server in e.servers],
        "find_target_qps": {
            "low_qps": e.search_bounds_qps[0],
            "high_qps": e.search_bounds_qps[1],
            "budget_s": e.search_budget_s,
            "end_s": e.time_limit_s - TEARDOWN_S,
            "runs_after": runs_of(e),
            "full_queries": full_queries,
            "full_s": full_s,
        },
        "client": {
            "kind": e.client,
            "endpoint": e.endpoint,
            "model": e.model_name,
            "model_key": "llama3_1-405b" + "-interactive" * (e.scenario == "Interactive"),
            "scenario": loadgen_scenario(e),
            "max_in_flight": e.max_in_flight if e.scenario == "Offline" else None,
            "tokenizer": f"{e.model_path}/tokenizer.json" if has_model else None,
            "user_conf": "user.conf",
            "seeds": seeds_of(e.round),
            "total_sample_count": SAMPLE_COUNT,
            "accuracy_sample_count": e.rehearsal_accuracy_samples if e.shortened else SAMPLE_COUNT,
            "data_set": data_set,
            "max_output_tokens": lengths.MAX_OUTPUT_TOKENS,
            "min_output_tokens": 1,
            "temperature": 1.0,
            "top_p": 0.001,
            "top_k": 1,
            "request_timeout_s": e.request_timeout_s,
            # Of one request; where all are silent the job's watchdog speaks first.
            "stall_timeout_s": e.stall_timeout_s + 60,
            # Opened before the run. Somebody else's server may keep a thread for each.
            "connections": 8 if e.engine == "external" else 64,
            "test_modes": list(e.test_modes),
        },
    }
