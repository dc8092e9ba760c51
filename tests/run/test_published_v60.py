"""The golden files of recipe v6.0 against the published settings, key by key.

Source of every row: NVIDIA's configurations of closed v6.0, llama3.1-405b Interactive, GB200 and GB300 x72; the values
are theirs. Where ours differ, DIFFERS says why.
"""

import re

import pytest
import yaml
from renew import GOLDEN

NO = "not written"
POWERS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
COMPILE = {"enable_fullgraph": True, "enable_piecewise_cuda_graph": True, "enable_userbuffers": False}
# key: GB200 context, GB200 generation, GB300 context, GB300 generation
PUBLISHED = {
    "tensor_parallel_size": (4, 8, 2, 4),
    "max_batch_size": (128, 1280, 64, 256),
    "max_num_tokens": (4096, 1024, 4096, 512),
    "max_seq_len": (22000,) * 4,
    "cuda_graph_config": (
        None,
        {"enable_padding": True, "batch_sizes": [*POWERS, 512, 1024, 1280]},
        NO,
        {"enable_padding": True, "batch_sizes": [*POWERS, 512]},
    ),
    "torch_compile_config": (COMPILE, NO, COMPILE, NO),
    "sampler_type": ("TRTLLMSampler",) * 4,
    "stream_interval": (20,) * 4,
    "print_iter_log": (True,) * 4,
    "enable_iter_perf_stats": (True,) * 4,
    "num_postprocess_workers": (NO, 4, NO, 4),
    "disable_overlap_scheduler": (True, NO, True, NO),
    "enable_chunked_prefill": (True, NO, True, False),
    "kv_cache_config": ({"free_gpu_memory_fraction": 0.95, "enable_block_reuse": False, "dtype": "fp8"},) * 4,
    "cache_transceiver_config": ({"backend": "UCX", "max_tokens_in_buffer": 20192},) * 4,
    "scheduler_config": (
        {
            "capacity_scheduler_policy": "MAX_UTILIZATION",
            "context_chunking_policy": "FIRST_COME_FIRST_SERVED",
        },
    )
    * 4,
    "moe_config": (
        NO,
        {"backend": "TRTLLM", "use_low_precision_moe_combine": True},
        {"backend": "CUTLASS"},
        {"backend": "TRTLLM", "use_low_precision_moe_combine": True},
    ),
    "allreduce_strategy": (NO,) * 4,
}
# (key, column): (ours, why)
DENSE = "a dense model has no experts; the original's key stays as it was"
DIFFERS = {
    ("cuda_graph_config", 3): (
        {"enable_padding": True, "batch_sizes": POWERS},
        "a graph of 512 can never run with a batch of 256 at the most",
    ),
    ("enable_chunked_prefill", 3): (NO, "false is the release's default"),
    ("moe_config", 1): ({"backend": "TRTLLM"}, DENSE),
    ("moe_config", 2): (NO, DENSE),
    ("moe_config", 3): ({"backend": "TRTLLM"}, DENSE),
}
# Of the original, harmless and not in the published table of v6.0.
OURS_BESIDE = {
    "pipeline_parallel_size": 1,
    "moe_expert_parallel_size": "tensor_parallel_size",
    "enable_attention_dp": False,
}
FILES = [
    ("v6.0_gb200_72gpu", "ctx"),
    ("v6.0_gb200_72gpu", "gen"),
    ("v6.0_gb300_72gpu", "ctx"),
    ("v6.0_gb300_72gpu", "gen"),
]


def golden(column):
    case, short = FILES[column]
    return yaml.safe_load((GOLDEN / case / f"config.{short}.yaml").read_text())


@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("key", PUBLISHED)
def test_each_published_setting_is_in_the_golden_file(key, column):
    wanted, _ = DIFFERS.get((key, column), (PUBLISHED[key][column], ""))
    assert golden(column).get(key, NO) == wanted


@pytest.mark.parametrize("column", range(4))
def test_the_golden_file_holds_nothing_that_was_not_published_but_the_originals_own(column):
    values = golden(column)
    for key in set(values) - set(PUBLISHED):
        assert values[key] == values.get(OURS_BESIDE[key], OURS_BESIDE[key])


@pytest.mark.parametrize("difference", DIFFERS)
def test_a_difference_is_one(difference):
    key, column = difference
    assert DIFFERS[difference][0] != PUBLISHED[key][column]


OF_EVERY_WORKER = {
    "TLLM_NUMA_AWARE_WORKER_AFFINITY": "1",
    "CUDA_SCALE_LAUNCH_QUEUES": "4x",
    "TRTLLM_GEMM_ALLREDUCE_FUSION_ENABLED": "1",
    "TRTLLM_LLAMA_EAGER_FUSION_DISABLED": "1",
    "TRTLLM_DISABLE_NVFP4_LAYERNORM_FUSION": "0",
}
OF_GB300_CONTEXT = {
    "TRTLLM_GEMM_ALLREDUCE_WORKSPACE_SIZE": "137494528",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_rmaps_base_inherit": "1",
}


@pytest.mark.parametrize("column", range(4))
def test_the_workers_have_the_published_environment(column):
    case, short = FILES[column]
    script = (GOLDEN / case / "job.sh").read_text()
    role = {"ctx": "CONTEXT", "gen": "GENERATION"}[short]
    array = re.search(rf"^{role}_ENVIRONMENT=\(\n(.*?)^\)", script, re.MULTILINE | re.DOTALL)[1]
    found = dict(line.strip().split("=", 1) for line in array.splitlines())
    assert found == OF_EVERY_WORKER | (OF_GB300_CONTEXT if column == 2 else {})
