"""Experiment -> config.yaml text, per TensorRT-LLM dialect.

Node names are placeholders (NODE_0, NODE_1, ...) until the job knows its nodes: the agent's `bind` puts them in.
Which key stands where in which release: TensorRT-LLM `tensorrt_llm/llmapi/disagg_utils.py` and the engine
arguments of the releases; what the MLPerf v5.1 original sets: `closed/CoreWeave/.../run_disagg_405B` of
mlcommons/inference_results_v5.1.
"""

from typing import Any

import yaml

from ..experiment.cuda_graphs import cuda_graph_sizes
from ..experiment.parameters import Experiment


def node_placeholder(index: int) -> str:
    return f"NODE_{index}"


def _engine_arguments(e: Experiment, role: str) -> dict[str, Any]:
    """The engine arguments of one group of servers, in the dialect's own keys and places."""
    short = "ctx" if role == "context" else "gen"
    tp_size = getattr(e, f"{short}_tp_size")
    return {
        "tensor_parallel_size": tp_size,
        "pipeline_parallel_size": e.ctx_pp_size if role == "context" else 1,
        "moe_expert_parallel_size": tp_size,
        "enable_attention_dp": False,
        "max_batch_size": getattr(e, f"{short}_batch_size"),
        "max_num_tokens": getattr(e, f"{short}_max_num_tokens"),
        "max_seq_len": e.max_seq_len,
        "print_iter_log": True,
        **_speed(e, role),
        **_kv_cache(e, role, getattr(e, f"{short}_gpu_memory_fraction")),
        **(_context(e) if role == "context" else _generation(e)),
    }


def _speed(e: Experiment, role: str) -> dict[str, Any]:
    """What v6.0's record added to the original's keys; nothing of what is not given."""
    compile_whole = {
        "enable_fullgraph": True,
        "enable_piecewise_cuda_graph": True,
        "enable_userbuffers": False,
    }
    is_context = role == "context"
    keys = {
        "stream_interval": e.stream_interval,
        "sampler_type": e.sampler_type,
        "enable_iter_perf_stats": e.iter_perf_stats or None,
        "torch_compile_config": compile_whole if e.ctx_torch_compile and is_context else None,
        "num_postprocess_workers": None if is_context else e.gen_postprocess_workers,
    }
    return {key: value for key, value in keys.items() if value is not None}


def _kv_cache(e: Experiment, role: str, fraction: float) -> dict[str, Any]:
    # The fraction belongs inside kv_cache_config in every release: beside it, it is lost (up to 1.1) or refused.
    cache = {"free_gpu_memory_fraction": fraction, "enable_block_reuse": False}
    if e.trtllm_dialect == "v5.1":
        transfer = {"max_num_tokens": e.buffer_tokens}
        return {"kv_cache_dtype": "fp8", "kv_cache_config": cache, "cache_transceiver_config": transfer}
    transfer = {"backend": e.transfer_backend, "max_tokens_in_buffer": e.buffer_tokens}
    spans_nodes = any(len(s.nodes) > 1 for s in e.servers if s.role == role)
    strategy = e.allreduce_strategy or ("MNNVL" if spans_nodes else "AUTO")
    reduce = {} if strategy == "AUTO" else {"allreduce_strategy": strategy}  # AUTO is the default
    return {"kv_cache_config": cache | {"dtype": "fp8"}, "cache_transceiver_config": transfer, **reduce}


def _context(e: Experiment) -> dict[str, Any]:
    return {
        "disable_overlap_scheduler": True,
        "enable_chunked_prefill": True,
        "scheduler_config": _scheduler(e.ctx_capacity_policy),
        # From 1.0 CUDA graphs are on by default, for context servers, too.
        **({} if e.trtllm_dialect == "v5.1" or e.ctx_cuda_graphs else {"cuda_graph_config": None}),
    }


def _scheduler(policy: str) -> dict[str, str]:
    return {
        "capacity_scheduler_policy": policy,
        "context_chunking_policy": "FIRST_COME_FIRST_SERVED",
    }


def _generation(e: Experiment) -> dict[str, Any]:
    sizes = cuda_graph_sizes(e.gen_batch_size, e.gen_cuda_graphs)
    # GUARANTEED_NO_EVICT is every release's default.
    policy = e.gen_capacity_policy
    scheduler = {} if policy == "GUARANTEED_NO_EVICT" else {"scheduler_config": _scheduler(policy)}
    if e.trtllm_dialect == "v5.1":
        graphs = {
            "use_cuda_graph": True,
            "cuda_graph_padding_enabled": True,
            "cuda_graph_batch_sizes": sizes,
        }
        return graphs | {"moe_backend": "TRTLLM"} | scheduler
    graphs = {"enable_padding": True, "batch_sizes": sizes}
    return {"cuda_graph_config": graphs, "moe_config": {"backend": "TRTLLM"}} | scheduler


_ROUTERS = {"round_robin": {}, "least_tokens": {"router": {"type": "load_balancing", "use_tokens": True}}}


def _group(e: Experiment, role: str) -> dict[str, Any]:
    servers = [s for s in e.servers if s.role == role]
    return {
        "num_instances": len(servers),
        "urls": [f"{node_placeholder(s.node)}:{s.port}" for s in servers],
        **_ROUTERS[e.routing or "round_robin"],
        **_engine_arguments(e, role),
    }


class _Dumper(yaml.SafeDumper):
    """Lists on one line (the agent's `bind` counts on it), block style elsewhere; no anchors."""

    def ignore_aliases(self, data):
        return True

    def represent_list(self, data):
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_list)


def _text(header: str, values: dict[str, Any]) -> str:
    body = yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=False
    )
    return f"# {header}\n{body}"


def config_files(e: Experiment) -> dict[str, str]:
    """File name -> text of everything that the servers read; the same text for the same experiment, always.

    `config.yaml` holds the whole deployment. In dialect 1.x each worker reads its engine arguments from
    `config.ctx.yaml` or `config.gen.yaml`, and the orchestrator only the urls of `config.yaml`.
    """
    if not e.servers:
        return {}
    head = f"TensorRT-LLM disaggregated serving, dialect {e.trtllm_dialect}"
    whole = {
        "model": e.model_path,
        "hostname": node_placeholder(0),
        "port": e.server_port,
        "backend": "pytorch",
        "context_servers": _group(e, "context"),
        "generation_servers": _group(e, "generation"),
    }
    files = {"config.yaml": _text(f"{head}. NODE_n: the n-th node of the job, put in when it starts.", whole)}
    if e.trtllm_dialect == "1.x":
        for short, role in (("ctx", "context"), ("gen", "generation")):
            files[f"config.{short}.yaml"] = _text(
                f"{head}: engine arguments of the {role} servers", _engine_arguments(e, role)
            )
    return files
