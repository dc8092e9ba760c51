"""The files of a run folder, whole, against golden ones (`python tests/renew.py` renews them), and what they must hold."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from renew import CASES, GOLDEN, texts

from disagg_lib.experiment.cuda_graphs import cuda_graph_sizes
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.run.config import config_files


@pytest.mark.parametrize("case", CASES)
def test_files_equal_the_golden_ones(case):
    golden = {path.name: path.read_text() for path in (GOLDEN / case).iterdir()}
    assert texts(CASES[case]) == golden


@pytest.mark.parametrize("case", CASES)
def test_job_scripts_are_shellcheck_clean(case):
    done = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), GOLDEN / case / "job.sh"],
        capture_output=True,
        text=True,
    )
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("case", CASES)
def test_job_scripts_substitute_no_command_once_their_traps_are_set(case):
    """In bash 5.2 a TERM that comes while `$(...)` is read fails with a syntax error in the trap, and is lost: about
    one cancelled job in a hundred went on."""
    script = (GOLDEN / case / "job.sh").read_text()
    body = script.partition("\ntrap 'signalled HUP' HUP\n")[2]
    unquoted = re.sub(r"'[^']*'", "", body)
    assert body and not re.search(r"\$\((?!\()|`", unquoted)


def group(dialect, role):
    return yaml.safe_load(config_files(load_experiment([], {"trtllm_dialect": dialect}))["config.yaml"])[role]


# (key in v5.1, key in 1.x, context value, generation value); None: not set for that group.
ORIGINAL_KEYS = [
    ("max_seq_len", "max_seq_len", 22016, 22016),
    ("kv_cache_dtype", "kv_cache_config.dtype", "fp8", "fp8"),
    (
        "cache_transceiver_config.max_num_tokens",
        "cache_transceiver_config.max_tokens_in_buffer",
        22016,
        22016,
    ),
    ("print_iter_log", "print_iter_log", True, True),
    ("kv_cache_config.free_gpu_memory_fraction", "kv_cache_config.free_gpu_memory_fraction", 0.95, 0.95),
    ("enable_attention_dp", "enable_attention_dp", False, False),
    ("tensor_parallel_size", "tensor_parallel_size", 4, 4),
    ("pipeline_parallel_size", "pipeline_parallel_size", 1, 1),
    ("moe_expert_parallel_size", "moe_expert_parallel_size", 4, 4),
    ("max_batch_size", "max_batch_size", 128, 512),
    ("max_num_tokens", "max_num_tokens", 4096, 512),
    ("disable_overlap_scheduler", "disable_overlap_scheduler", True, None),
    ("enable_chunked_prefill", "enable_chunked_prefill", True, None),
    (
        "scheduler_config.capacity_scheduler_policy",
        "scheduler_config.capacity_scheduler_policy",
        "MAX_UTILIZATION",
        None,
    ),
    (
        "scheduler_config.context_chunking_policy",
        "scheduler_config.context_chunking_policy",
        "FIRST_COME_FIRST_SERVED",
        None,
    ),
    ("cuda_graph_padding_enabled", "cuda_graph_config.enable_padding", None, True),
    ("moe_backend", "moe_config.backend", None, "TRTLLM"),
]


def look_up(values, dotted):
    for key in dotted.split("."):
        values = (values or {}).get(key)
    return values


@pytest.mark.parametrize(("flat", "nested", "context", "generation"), ORIGINAL_KEYS)
def test_every_key_of_the_original_stands_where_the_release_reads_it(flat, nested, context, generation):
    for dialect, key in (("v5.1", flat), ("1.x", nested)):
        assert look_up(group(dialect, "context_servers"), key) == context
        assert look_up(group(dialect, "generation_servers"), key) == generation


def test_top_level_keys_are_the_originals():
    for dialect in ("v5.1", "1.x"):
        values = yaml.safe_load(config_files(load_experiment([], {"trtllm_dialect": dialect}))["config.yaml"])
        assert (values["hostname"], values["port"], values["backend"]) == ("NODE_0", 8000, "pytorch")
        assert values["model"].endswith("fp4-quantized-modelopt/llama3.1-405b-instruct-hf-torch-fp4")


def test_only_1x_turns_graphs_off_on_context_servers_and_names_a_backend():
    assert "cuda_graph_config" not in group("v5.1", "context_servers")
    assert group("1.x", "context_servers")["cuda_graph_config"] is None
    assert group("1.x", "context_servers")["cache_transceiver_config"]["backend"] == "NIXL"


@pytest.mark.parametrize("batch", [1, 3, 100, 512, 992, 2000])
def test_graph_sizes_are_sorted_unique_and_end_at_the_batch(batch):
    sizes = cuda_graph_sizes(batch)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == batch


def test_worker_files_of_1x_hold_the_groups_engine_arguments():
    files = config_files(load_experiment([], {"trtllm_dialect": "1.x"}))
    whole = yaml.safe_load(files["config.yaml"])
    for name, role in (("config.ctx.yaml", "context_servers"), ("config.gen.yaml", "generation_servers")):
        arguments = {k: v for k, v in whole[role].items() if k not in ("num_instances", "urls")}
        assert yaml.safe_load(files[name]) == arguments


def test_servers_reduce_over_nvlink_in_v51_always_and_in_1x_where_they_span_nodes():
    wide = {"num_ctx_servers": 2, "ctx_tp_size": 8}
    assert "TRTLLM_MNNVL_AR_ENABLED=1" in texts({})["job.sh"]  # as the original
    assert "allreduce_strategy: MNNVL" in texts(wide | {"trtllm_dialect": "1.x"})["config.ctx.yaml"]
    assert "MNNVL" not in "".join(texts({"trtllm_dialect": "1.x"}).values())
