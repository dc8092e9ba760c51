"""What several parameters owe each other: each rule yields a sentence for what is broken."""

import re
from collections.abc import Iterator

from ..errors import ParameterError, TopologyError
from .parameters import Experiment
from .topology import topology_arithmetic


def check_together(e: Experiment) -> None:
    """Rules over several parameters.

    Raises
    ------
    ParameterError, TopologyError : the first that is broken.
    """
    rules = {
        _engine: ParameterError,
        _paths: ParameterError,
        _harness: ParameterError,
        _search: ParameterError,
    }
    if e.engine != "external":
        rules |= {
            _dialect: ParameterError,
            _divisors: TopologyError,
            _claims: TopologyError,
            _orchestrator: ParameterError,
            _placement: ParameterError,
        }
    for rule, kind in rules.items():
        for broken in rule(e):
            raise kind(broken)


def _engine(e: Experiment) -> Iterator[str]:
    if e.engine == "external" and not e.endpoint_url:
        yield "endpoint_url: not given, but engine: external measures the server behind it. Set endpoint_url"
    if e.trtllm_dialect == "1.x" and e.kv_transfer_backend == "MPI":
        why = "each server is a step of its own and no MPI world joins them"
        yield f"kv_transfer_backend: found 'MPI' in dialect 1.x, where {why}. Use NIXL or UCX"


ONLY_IN_1X = ("sampler_type", "allreduce_strategy", "ctx_torch_compile", "ctx_cuda_graphs")


def _dialect(e: Experiment) -> Iterator[str]:
    if e.trtllm_dialect == "1.x":
        return
    for key in ONLY_IN_1X:
        if getattr(e, key):
            of = f" (of recipe {e.recipe})" if e.provenance.get(key, "").startswith("recipe") else ""
            yield f"{key}: found {getattr(e, key)!r}{of}, which dialect v5.1 does not know. Set trtllm_dialect: 1.x, or leave it out"
    if e.ctx_environment != e.gen_environment:
        found = f"ctx_environment: found {e.ctx_environment}, and gen_environment {e.gen_environment}"
        yield f"{found}; in dialect v5.1 all servers are one step with one environment. Give both the same"


def _orchestrator(e: Experiment) -> Iterator[str]:
    dynamo, count = e.orchestrator == "dynamo", e.num_frontends
    if e.trtllm_dialect == "v5.1" and (dynamo or count > 1):
        found = "orchestrator: found 'dynamo'" if dynamo else f"num_frontends: found {count}"
        yield f"{found} in dialect v5.1, whose servers are one MPI world behind one orchestrator. Set trtllm_dialect: 1.x"
    if count > e.node_count:
        where = f"more than the {e.node_count} nodes of {topology_arithmetic(e)} can hold, one each"
        yield f"num_frontends: found {count}, {where}. Set num_frontends: {e.node_count} or fewer"
    if dynamo and e.dynamo_release == "0.8" and e.dynamo_discovery == "file":
        yield "dynamo_discovery: found 'file' with dynamo_release: 0.8, which needs etcd. Leave it out"
    if dynamo and e.fault != "none":
        yield f"fault: found {e.fault!r} with orchestrator: dynamo, whose mock workers know no faults. Leave it out"
    if e.client == "nvidia_harness" and (dynamo or count > 1):
        yield "client: found 'nvidia_harness', which here measures one orchestrator of TensorRT-LLM. Set client: loadgen"


# pyxis writes mounts and paths into a shell text of its own, between double quotes; of an image's name it keeps the words.
PLAIN_PATH = r"[A-Za-z0-9_./+@=~-]+"
_PLAIN = {
    "container_mounts": f"{PLAIN_PATH}([:,]{PLAIN_PATH})*",
    "container_image": r"[A-Za-z0-9_./+@=~:#-]+",
    "work_dir": PLAIN_PATH,
}


def _paths(e: Experiment) -> Iterator[str]:
    for key, plain in _PLAIN.items() if e.container == "pyxis" else ():
        if not re.fullmatch(plain, getattr(e, key) or "x"):
            why = "pyxis would expand other characters than letters, digits and _./+@=~-"
            yield f"{key}: found {getattr(e, key)!r}; {why}. Use a plain path"
    if e.engine == "trtllm" and e.trtllm_dialect == "1.x" and re.search(r"\s", e.model_path):
        key = "model_dir" if e.model_dir else "scratch_dir"
        yield f"{key}: found {getattr(e, key)!r}; trtllm-llmapi-launch splits its command at blanks. Use a plain path"


def _harness(e: Experiment) -> Iterator[str]:
    if e.client != "nvidia_harness":
        return
    found, fix = "client: found 'nvidia_harness' with", "Set client: loadgen"
    if e.scenario != "Interactive" or "test06" in e.test_modes:
        both = f"scenario: {e.scenario} and test_modes: {', '.join(e.test_modes)}"
        yield f"{found} {both}; here it makes performance and accuracy runs of Interactive. {fix}"
    if e.engine != "trtllm":
        yield f"{found} engine: {e.engine}; it measures engine: trtllm. {fix}"
    for key in ("scratch_dir", "harness_dir", "work_dir"):
        if any(c in "$#'\"`;() \t" for c in getattr(e, key) or ""):
            why = "the harness's makefiles expand such characters"
            yield f"{key}: found {getattr(e, key)!r}; {why}. Use a plain path"


def _search(e: Experiment) -> Iterator[str]:
    low, high = e.search_bounds_qps
    if low >= high:
        yield f"target_qps_min: found {low:g}, needed less than target_qps_max, {high:g}. Set both, or neither"
    if not e.find_target_qps:
        if e.search_rows_from:
            found = f"search_rows_from: found {e.search_rows_from!r}"
            yield f"{found} without find_target_qps: true. Set it, or leave this out"
        return
    if e.client != "loadgen" or "performance" not in e.test_modes:
        needed = "client: loadgen and 'performance' among test_modes"
        yield f"find_target_qps: found true, which needs {needed}. Set them"
    if e.shortened and e.rehearsal_queries < 459:
        why = "early stopping needs 459 to call a trial VALID"
        yield f"rehearsal_queries: found {e.rehearsal_queries} with find_target_qps: true; {why}. Set 459 or more"
    if e.scenario == "Offline":
        yield "find_target_qps: found true with scenario: Offline, which has no limits. Leave it out"


def _divisors(e: Experiment) -> Iterator[str]:
    # 128 query heads, 8 KV heads, 53248 feed-forward columns and 126 layers: config.json of the checkpoint.
    for key, whole, of, allowed in (
        ("ctx_tp_size", 128, "128 attention heads", "1, 2, 4, 8, 16, 32 or 64"),
        ("gen_tp_size", 128, "128 attention heads", "1, 2, 4, 8, 16, 32 or 64"),
        ("ctx_pp_size", 126, "126 layers", "1, 2, 3, 6, 7, 9 or 14"),
    ):
        if whole % getattr(e, key):
            yield f"{key}: found {getattr(e, key)}, which does not divide the model's {of}. Use {allowed}"


def _claims(e: Experiment) -> Iterator[str]:
    for key, derived, why in (
        ("nodes", e.node_count, f"on {e.gpus_per_node} GPUs a node that is {e.node_count} nodes"),
        ("ntasks", e.gpu_count, f"one task a GPU is {e.gpu_count} tasks"),
    ):
        if getattr(e, key) not in (None, derived):
            found = f"{key}: found {getattr(e, key)}, needed {derived}: {topology_arithmetic(e)}, and {why}"
            yield f"{found}. Set {key}: {derived}, or leave it out: it follows from the topology"


def _placement(e: Experiment) -> Iterator[str]:
    if e.buffer_tokens % 32:  # the transfer buffer holds whole blocks
        key = "kv_buffer_tokens" if e.kv_buffer_tokens else "max_seq_len"
        needed = f"a multiple of 32 (tokens per KV block): {-(-e.buffer_tokens // 32) * 32}"
        yield f"{key}: found {e.buffer_tokens}, needed {needed}"
    if e.launcher == "local" and e.engine == "trtllm" and (e.node_count > 1 or e.container != "none"):
        limits = f"which works on one node with container: none only ({topology_arithmetic(e)})"
        fix = "Set launcher: slurm, or engine: rehearsal to try it without GPUs"
        yield f"launcher: found 'local' with engine: trtllm, {limits}. {fix}"
    first, last = e.worker_port, e.worker_port + len(e.servers) - 1
    others = [part.port for part in (*e.doors, *e.services)]
    if first <= others[-1] and others[0] <= last or max(last, *others) > 65535:
        to = f" to {others[-1]}" if len(others) > 1 else ""
        needed = f"must be at most 65535 and leave out server_port {e.server_port}{to}"
        yield f"worker_port: {len(e.servers)} servers take ports {first}-{last}, which {needed}. Choose another worker_port"
