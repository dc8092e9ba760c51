"""What several parameters owe each other."""

from ..errors import ParameterError, TopologyError
from .parameters import Experiment
from .topology import topology_arithmetic


def check_together(e: Experiment) -> None:
    """Rules over several parameters.

    Raises
    ------
    ParameterError, TopologyError
    """
    if e.engine == "rehearsal" and e.container != "none":
        raise ParameterError(
            "container: found 'pyxis' with engine: rehearsal, which runs outside containers. Set container: none"
        )
    if e.client == "nvidia_harness":
        if e.scenario != "Interactive" or "test06" in e.test_modes:
            raise ParameterError(
                f"client: found 'nvidia_harness' with scenario: {e.scenario} and test_modes: {', '.join(e.test_modes)}; here it "
                "makes performance and accuracy runs of Interactive. Set client: loadgen"
            )
        if e.engine != "trtllm":
            raise ParameterError(
                f"client: found 'nvidia_harness' with engine: {e.engine}; it measures engine: trtllm. Set client: loadgen"
            )
        for key in ("scratch_dir", "harness_dir", "work_dir"):
            if any(c in "$#'\"`;() \t" for c in getattr(e, key) or ""):
                raise ParameterError(
                    f"{key}: found {getattr(e, key)!r}; the harness's makefiles expand such characters. Use a plain path"
                )
    if e.trtllm_dialect == "1.x" and e.kv_transfer_backend == "MPI":
        raise ParameterError(
            "kv_transfer_backend: found 'MPI' in dialect 1.x, where each server is a step of its own and no MPI world "
            "joins them. Use NIXL or UCX"
        )
    low, high = e.search_bounds_qps
    if low >= high:
        raise ParameterError(
            f"target_qps_min: found {low:g}, needed less than target_qps_max, {high:g}. Set both, or neither"
        )
    if e.find_target_qps and (e.client != "loadgen" or "performance" not in e.test_modes):
        raise ParameterError(
            "find_target_qps: found true, which needs client: loadgen and 'performance' among test_modes. Set them"
        )
    if e.search_rows_from and not e.find_target_qps:
        raise ParameterError(
            f"search_rows_from: found {e.search_rows_from!r} without find_target_qps: true. Set it, or leave this out"
        )
    if e.find_target_qps and e.shortened and e.rehearsal_queries < 459:
        raise ParameterError(
            f"rehearsal_queries: found {e.rehearsal_queries} with find_target_qps: true; early stopping needs 459 to call "
            "a trial VALID. Set 459 or more"
        )
    if e.find_target_qps and e.scenario == "Offline":
        raise ParameterError(
            "find_target_qps: found true with scenario: Offline, which has no limits. Leave it out"
        )
    if e.engine == "external":
        if e.endpoint_url is None:
            raise ParameterError(
                "endpoint_url: not given, but engine: external measures the server behind it. Set endpoint_url"
            )
        return
    # 128 query heads, 8 KV heads, 53248 feed-forward columns and 126 layers: config.json of the checkpoint.
    for key in ("ctx_tp_size", "gen_tp_size"):
        if 128 % getattr(e, key):
            raise TopologyError(
                f"{key}: found {getattr(e, key)}, which does not divide the model's 128 attention heads. Use 1, 2, 4, 8, 16, 32 or 64"
            )
    if 126 % e.ctx_pp_size:
        raise TopologyError(
            f"ctx_pp_size: found {e.ctx_pp_size}, which does not divide the model's 126 layers. Use 1, 2, 3, 6, 7, 9 or 14"
        )
    if e.max_seq_len % 32:
        raise ParameterError(
            f"max_seq_len: found {e.max_seq_len}, needed a multiple of 32 (tokens per KV block): {-(-e.max_seq_len // 32) * 32}"
        )
    sums = topology_arithmetic(e)
    for key, derived, why in (
        ("nodes", e.node_count, f"on {e.gpus_per_node} GPUs a node that is {e.node_count} nodes"),
        ("ntasks", e.gpu_count, f"one task a GPU is {e.gpu_count} tasks"),
    ):
        claim = getattr(e, key)
        if claim is not None and claim != derived:
            raise TopologyError(
                f"{key}: found {claim}, needed {derived}: {sums}, and {why}. "
                f"Set {key}: {derived}, or leave it out: it follows from the topology"
            )
    if e.launcher == "local" and e.engine == "trtllm" and (e.node_count > 1 or e.container != "none"):
        raise ParameterError(
            "launcher: found 'local' with engine: trtllm, which works on one node with container: none only "
            f"({sums}). Set launcher: slurm, or engine: rehearsal to try it without GPUs"
        )
    last_port = e.worker_port + len(e.servers) - 1
    if e.worker_port <= e.server_port <= last_port or last_port > 65535:
        raise ParameterError(
            f"worker_port: {len(e.servers)} servers take ports {e.worker_port}-{last_port}, which must be at most 65535 and leave out "
            f"server_port {e.server_port}. Choose another worker_port"
        )
