"""The workers' log. Its lines have the forms of TensorRT-LLM 0.2x, 1.0 and 1.2 and of srun --label; no GPU wrote them."""

import math

import pytest

from disagg_lib.experiment.loading import load_experiment
from disagg_lib.results.logs import LogError
from disagg_lib.results.server_logs import WORKERS_LOG, first_error, iteration_table, split_ranks, steps_table

STEP_02 = "iter = 12, global_rank = 16, rank = 0, currank_total_requests = 3/9, elapsed_time = 0.0625s, timestamp = 2025-07-24 10:00:01, num_scheduled_requests: 40, states = {'num_ctx_requests': 2, 'num_ctx_tokens': 4096, 'num_generation_tokens': 38}"
STEP_10 = "iter = 13, global_rank = 0, rank = 0, currank_total_requests = 3/9, host_step_time = 62.5ms, prev_device_step_time = N/A, timestamp = 2025-07-24 10:00:02, num_scheduled_requests: 40, states = {'num_ctx_requests': 0, 'num_ctx_tokens': 0, 'num_generation_tokens': 40}"
STEP_12 = "iter = 14, global_rank = 0, rank = 0, num_scheduled_requests = 8, kv_cache_util = 0.125, currank_total_requests = 1/8, host_step_time = 7.5ms, prev_device_step_time = 6.25ms, timestamp = 2026-08-04 19:08:13, states = {'num_ctx_requests': 0, 'num_ctx_tokens': 0, 'num_generation_tokens': 8}"
LOG = f""" 0: [07/24/2025-10:00:00] [TRT-LLM] [I] loading
16: [07/24/2025-10:00:01] [TRT-LLM] [I] {STEP_02}
 3: [07/24/2025-10:00:09] [TRT-LLM] [E] second in time, first in the file
 7: [07/24/2025-10:00:05] [TRT-LLM] [I] about to fail
 7: Traceback (most recent call last):
 7:   File "worker.py", line 3, in <module>
 0: [07/24/2025-10:00:10] [TRT-LLM] [I] other rank in between
 7: RuntimeError: CUDA error: an illegal memory access
11: [07/24/2025-10:00:07] [TRT-LLM] [E] late in the file, first in time
srun: error: node3: task 7: Exited with exit code 1
"""


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "output workers.log"
    path.write_text(LOG)
    return path


def test_lines_are_split_by_rank_with_slurms_own_at_the_end(log):
    ranks = split_ranks(log)
    assert list(ranks) == [0, 3, 7, 11, 16, None]
    assert len(ranks[7]) == 4 and ranks[7][1] == "Traceback (most recent call last):"
    assert ranks[None] == ["srun: error: node3: task 7: Exited with exit code 1"]


def test_windows_line_ends_are_no_part_of_a_line(log):
    before = split_ranks(log)
    log.write_bytes(LOG.replace("\n", "\r\n").encode())
    assert split_ranks(log) == before


def test_first_error_is_first_in_time_and_not_in_the_file(log):
    error = first_error(log)
    assert (error.rank, error.number, error.time.second) == (11, 9, 7)
    assert "rank 11, line 9" in str(error)


def test_traceback_gives_the_exception_at_its_foot_across_other_ranks_lines(tmp_path):
    path = tmp_path / "w.log"
    path.write_text(
        "\n".join(line for line in LOG.splitlines() if not line.startswith((" 3:", "11:"))) + "\n"
    )
    error = first_error(path)
    assert error.rank == 7 and error.message == "RuntimeError: CUDA error: an illegal memory access"
    assert all("other rank" not in line for line in error.context) and len(error.context) == 4


def test_rank_that_slurm_killed_is_named(tmp_path):
    path = tmp_path / "w.log"
    path.write_text("0: fine\nsrun: error: node3: task 12: Killed\n")
    assert first_error(path).rank == 12


@pytest.mark.parametrize(
    "line",
    ["torch.OutOfMemoryError: CUDA out of memory", "terminate called after throwing", "[FATAL] x", "NCCL error 5",
     "slurmstepd: error: Detected 1 oom_kill event", "ValueError", "[07/24/2025-10:00:00] [TRT-LLM] [E] x"],
)  # fmt: skip
def test_errors_of_every_layer_are_seen(tmp_path, line):
    path = tmp_path / "w.log"
    path.write_text(f"0: [07/24/2025-10:00:00] [TRT-LLM] [I] fine\n5: {line}\n")
    assert first_error(path).rank == 5


@pytest.mark.parametrize(
    "line", ["0 errors so far", "error_rate = 0.0", "[TRT-LLM] [W] no Error here", "Terminated by request"]
)
def test_harmless_lines_are_no_errors(tmp_path, line):
    path = tmp_path / "w.log"
    path.write_text(f"0: {line}\n")
    assert first_error(path) is None


def test_iteration_lines_of_three_releases_become_one_table(tmp_path):
    path = tmp_path / "w.log"
    path.write_text(
        f"16: {STEP_02}\n 0: [TRT-LLM] [I] {STEP_10}\n0: [TRT-LLM] [I] [_torch][RANK 0] {STEP_12}\n"
    )
    table = iteration_table(path)
    assert table["iteration"].tolist() == [12, 13, 14] and table["log_rank"].tolist() == [16, 0, 0]
    assert table["scheduled_requests"].tolist() == [40, 40, 8]
    assert table["context_tokens"].tolist() == [4096, 0, 0] and table["generation_tokens"].tolist() == [
        38,
        40,
        8,
    ]
    assert table["elapsed_ms"][0] == 62.5 and table["host_step_ms"][1] == 62.5
    assert math.isnan(table["device_step_ms"][1]) and table["device_step_ms"][2] == 6.25
    assert table["kv_cache_use"][2] == 0.125 and math.isnan(table["kv_cache_use"][0])
    assert table["time"][0].isoformat() == "2025-07-24T10:00:01"


@pytest.mark.parametrize("kept", range(20, len(STEP_12)))
def test_line_cut_anywhere_gives_no_wrong_figure(tmp_path, kept):
    path = tmp_path / "w.log"
    path.write_text(f"0: {STEP_12[:kept]}")
    table = iteration_table(path)
    if len(table):
        row = table.iloc[0]
        assert row["device_step_ms"] in (6.25,) or math.isnan(row["device_step_ms"])
        assert row["generation_tokens"] == 8 or math.isnan(row["generation_tokens"])
        assert row["kv_cache_use"] == 0.125 or math.isnan(row["kv_cache_use"])


def test_log_without_iteration_lines_is_an_empty_table(log):
    log.write_text("0: nothing\n")
    assert len(iteration_table(log)) == 0 and "kv_cache_use" in iteration_table(log).columns


def test_steps_are_told_by_server(tmp_path):
    """Ranks 0 and 16 lead ctx0 and gen0 of the 20-GPU topology; rank 3 repeats what its leader says."""
    experiment = load_experiment(["params/gb200_20gpu.yaml"], {"engine": "rehearsal", "container": "none"})
    path = tmp_path / WORKERS_LOG
    path.parent.mkdir()
    busy = STEP_02.replace("= 0.0625s", "= 0.0425s").replace("_tokens': 38", "_tokens': 42")
    path.write_text(f"16: {STEP_02}\n16: {busy}\n0: {STEP_12}\n3: {STEP_12}\n")
    (tmp_path / "experiment.yaml").write_text("parameters: {engine: {value: rehearsal}}\n")
    ctx0, gen0 = steps_table(tmp_path, experiment).itertuples(index=False)
    assert (ctx0.server, ctx0.steps, ctx0.step_ms, ctx0.kv_cache_use_max) == ("ctx0", 1, 6.25, 0.12)
    assert math.isnan(ctx0.context_tokens)
    assert gen0[:6] == ("gen0", 2, 52.5, 4096, 40, 42) and gen0.source == "rehearsed"


def test_absent_log_is_named(tmp_path):
    with pytest.raises(LogError, match="missing file"):
        first_error(tmp_path / "no.log")
