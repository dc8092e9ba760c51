"""Every rule before the queue can fail, and says what it prevents and what to do."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from disagg_lib import checks, errors
from disagg_lib.checkpoint import synthetic
from disagg_lib.cluster import machine, preflight, probe
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.files import REPOSITORY
from disagg_lib.run.durations import job_seconds, search_seconds
from disagg_lib.run.settings import settings_of

CLUSTER = {"engine": "trtllm", "launcher": "slurm", "container": "pyxis"}


def unmet(experiment):
    checks = [*preflight.experiment_checks(experiment), *preflight.scoring_checks(experiment)]
    return {check.rule: check for check in checks if not check.ok}


@pytest.fixture
def site(site_files):
    return CLUSTER | site_files


def test_the_twenty_gpu_file_passes_with_a_site(site):
    assert set(unmet(load_experiment(["params/gb200_20gpu.yaml"], site))) <= {"sentence_splitter"}


def test_a_rehearsals_checkpoint_is_not_taken_for_the_real_one(site):
    folder = synthetic.make_rehearsal_checkpoint(Path(site["model_dir"]) / "two_layers")
    found = unmet(load_experiment(["params/gb200_20gpu.yaml"], site | {"model_dir": str(folder)}))
    assert found["model_folder"].found.endswith("two_layers, 2 layers")


def test_it_tells_how_many_mean_requests_fit(site):
    checks = preflight.experiment_checks(load_experiment(["params/gb200_20gpu.yaml"], site))
    assert "about 198 of 512 mean requests" in next(c.found for c in checks if c.rule == "generation_memory")


@pytest.mark.parametrize(
    ("given", "rule", "level"),
    [
        ({"num_gen_servers": 3, "gen_tp_size": 2, "trtllm_dialect": "1.x"}, "gpu_arithmetic", "warning"),
        ({"ctx_tp_size": 8}, "tp_over_nodes", "warning"),
        ({"gen_tp_size": 1, "num_gen_servers": 4}, "generation_memory", "error"),
        ({"ctx_tp_size": 1}, "context_memory", "error"),
        ({"gen_batch_size": 513}, "gen_max_num_tokens", "warning"),
        ({"max_seq_len": 20000}, "max_seq_len", "error"),
        ({"max_seq_len": 16384}, "transfer_buffer", "error"),
        ({"time_limit": "1:00:00"}, "walltime", "error"),
        ({"time_limit": "0:03:00"}, "teardown_time", "warning"),
        ({"container_image": "/nowhere/image.sqsh"}, "container_image", "error"),
        ({"container_mounts": "/nowhere:/scratch"}, "container_mounts", "error"),
        ({"container_mounts": "/tmp"}, "container_mounts", "error"),
        ({"dataset_path": "/nowhere.pkl"}, "data_set", "error"),
        ({"trust_dataset": False}, "data_set", "error"),
        ({"model_dir": "/nowhere"}, "model_folder", "error"),
        ({"container_mounts": "/tmp:/elsewhere"}, "tensorrt_llm_mount", "error"),
        ({"work_dir": "/other"}, "tensorrt_llm_mount", "error"),
        ({"trust_dataset": False}, "accuracy_inputs", "error"),
        ({"container_mounts": "/tmp:/hf_abcdefghijklmnopqrstu"}, "secrets", "error"),
        ({"client": "nvidia_harness"}, "harness_dir", "error"),
        ({"client": "nvidia_harness", "system_name": "x20"}, "harness_config", "error"),
    ],
)
def test_each_rule_can_fail(site, given, rule, level):
    found = unmet(load_experiment(["params/gb200_20gpu.yaml"], site | given))
    assert rule in found
    assert found[rule].level == level
    assert found[rule].prevents
    assert found[rule].fix


def test_a_harness_with_its_configuration_passes(site, tmp_path):
    (tmp_path / "Makefile").touch()
    config = tmp_path / "configs/x20/Interactive/llama3_1-405b.py"
    config.parent.mkdir(parents=True)
    config.touch()
    given = {"client": "nvidia_harness", "system_name": "x20", "harness_dir": str(tmp_path)}
    assert set(unmet(load_experiment(["params/gb200_20gpu.yaml"], site | given))) <= {"sentence_splitter"}


def test_a_mount_without_tensorrt_llm_is_found_and_1x_needs_none(site, tmp_path):
    (tmp_path / "tree/.llm_aarch64").rename(tmp_path / "elsewhere")
    found = unmet(load_experiment(["params/gb200_20gpu.yaml"], site))["tensorrt_llm_mount"]
    assert found.found == f"no TensorRT-LLM in {tmp_path}/tree" and "closed/NVIDIA>:/work" in found.fix
    assert "tensorrt_llm_mount" not in unmet(load_experiment([], site | {"trtllm_dialect": "1.x"}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda model, data: (model / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
        (lambda model, data: data.write_bytes(b""), "EOFError"),
        (
            lambda model, data: pd.DataFrame({"tok_input": [[1]]}).to_pickle(data),
            "no column gt_output, metric",
        ),
        (
            lambda model, data: pd.DataFrame({"tok_input": [[900]], "gt_output": "", "metric": ""}).to_pickle(
                data
            ),
            "1 samples with ids up to 900; a tokenizer up to 1",
        ),
    ],
)
def test_what_an_accuracy_runs_score_lacks_is_found_before_the_run(site, spoil, words):
    spoil(Path(site["model_dir"]), Path(site["dataset_path"]))
    assert words in unmet(load_experiment([], site))["accuracy_inputs"].found
    assert "accuracy_inputs" not in unmet(load_experiment([], site | {"test_modes": ["performance"]}))


def test_a_client_environment_with_another_rounds_loadgen_is_found(site, tmp_path):
    cited = tmp_path / "client_env.json"
    for version, found in (("6.0.9", ["6.0.9"]), ("5.1.2", [])):
        cited.write_text(f'{{"mlcommons-loadgen": "{version}"}}')
        rows = unmet(load_experiment([], site | {"client_dir": str(tmp_path)}))
        assert [row.found for rule, row in rows.items() if rule == "client_loadgen"] == found


def test_a_rehearsal_in_a_container_needs_the_project_there(site, monkeypatch):
    monkeypatch.setenv("HOME", "/nowhere")  # which is mounted, too
    given = site | {"engine": "rehearsal", "work_dir": None, "test_modes": ["performance"]}
    assert "rehearsal_mount" in unmet(load_experiment([], given))
    covered = given | {"container_mounts": f"{REPOSITORY}:{REPOSITORY}"}
    assert set(unmet(load_experiment([], covered))) == set()


def test_the_last_probes_word_on_the_image_is_a_rule(site, tmp_path):
    e = load_experiment([], site | {"scratch_dir": str(tmp_path)})
    folder = tmp_path / "setup/1_probe"
    folder.mkdir(parents=True)
    (folder / "job.sh").write_text(probe.probe_script(e))
    (folder / "probe.txt").write_text("mpi\tnone pmi2 pmix\ntensorrt_llm\t1.2.0\nend\t\n")
    told = {check.requirement: check for check in preflight._last_probe(e)}
    assert [check.ok for check in told.values()] == [True, False]
    (row,) = [check for check in told.values() if not check.ok]
    assert row.found == "1.2.0" and "trtllm_dialect is v5.1" in row.requirement
    assert row.fix.endswith("or trtllm_dialect: 1.x") and row.level == "error"


def test_warnings_do_not_stop_a_submission_and_errors_do(site):
    checks.require(preflight.experiment_checks(load_experiment([], site | {"ctx_tp_size": 8})))
    with pytest.raises(errors.PreflightError, match="time_limit covers loading"):
        checks.require(preflight.experiment_checks(load_experiment([], site | {"time_limit": "0:10:00"})))


def test_without_slurm_one_sentence_hints_at_the_local_launcher(site, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    checks = preflight.cluster_checks(load_experiment([], site), "")
    assert [(c.rule, c.ok) for c in checks] == [("slurm", False)]
    assert "sbatch, srun, squeue, scontrol, sinfo not on PATH" in checks[0].found
    assert "launcher: local" in checks[0].fix


def check(*words):
    command = [sys.executable, "-m", "disagg_lib", "check", *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_the_command_exits_0_for_the_rehearsal_and_1_for_an_error():
    assert check("params/rehearsal.yaml").returncode == 0
    bad = check("params/rehearsal.yaml", "-p", "time_limit", "0:01:00")
    assert bad.returncode == 1
    assert "to do:    set time_limit to at least 0:30:00" in bad.stdout


def test_a_search_counts_in_the_walltime_and_ends_with_what_it_leaves(site):
    searching = load_experiment([], site | {"find_target_qps": True})
    assert job_seconds(searching) + search_seconds(searching) > 3 * job_seconds(load_experiment([], site)) / 2
    told = settings_of(searching)["find_target_qps"]
    assert told["end_s"] == searching.time_limit_s - 120 and told["runs_after"] == [(8313, 600), (8313, 0)]
    tight = load_experiment([], site | {"find_target_qps": True, "time_limit": "2:00:00"})
    assert "walltime" in unmet(tight)


def test_the_walltime_advice_is_enough(site):
    advised = next(
        c.fix
        for c in unmet(load_experiment([], site | {"time_limit": "1:00:00"})).values()
        if c.rule == "walltime"
    )
    assert "walltime" not in unmet(load_experiment([], site | {"time_limit": advised.split()[-1]}))


@pytest.mark.parametrize(("come_gb", "needed_gb"), [(0, 250), (100, 150), (300, 1)])
def test_room_is_wanted_only_for_what_of_the_checkpoint_has_not_come(site, come_gb, needed_gb):
    parts = Path(site["model_dir"]).with_name(".model.parts")
    parts.mkdir()
    with (parts / "a").open("wb") as file:
        file.truncate(come_gb * 10**9)  # takes no room itself
    (check,) = [c for c in machine.machine_checks(load_experiment((), site)) if "GB free" in c.requirement]
    assert check.requirement == f"{needed_gb} GB free in model_dir"


def test_a_controller_that_is_silent_is_a_row_of_the_machines_table(site, tmp_path, monkeypatch):
    """With commands that fail as Slurm's do where there is no configuration."""
    for name in ("sinfo", "srun", "sbatch", "squeue", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'DNS SRV lookup failed' >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = {check.rule: check for check in machine.machine_checks(load_experiment((), site))}
    assert not found["slurm"].ok and "DNS SRV lookup failed" in found["slurm"].found


def test_a_rehearsal_behind_dynamo_wants_its_release_and_a_checkpoint_that_front_ends_take(tmp_path):
    given = {"engine": "rehearsal", "launcher": "local", "container": "none", "trtllm_dialect": "1.x"}
    given |= {
        "orchestrator": "dynamo",
        "dynamo_dir": str(tmp_path / "dynamo"),
        "model_dir": str(tmp_path / "model"),
    }
    found = unmet(load_experiment([], given))
    assert found["dynamo"].requirement == "ai-dynamo 1.4 in dynamo_dir"
    assert found["dynamo_model"].found.endswith("model, without a chat template")
    synthetic.make_rehearsal_checkpoint(tmp_path / "model")
    (tmp_path / "dynamo/lib/python3.11/site-packages/ai_dynamo-0.8.1.dist-info").mkdir(parents=True)
    (tmp_path / "dynamo/bin").mkdir()
    (tmp_path / "dynamo/bin/python").symlink_to("/usr/bin/env")
    found = unmet(load_experiment([], given))
    assert "dynamo_model" not in found and found["dynamo"].found.endswith("ai_dynamo-0.8.1")
    assert "dynamo" not in unmet(load_experiment([], given | {"dynamo_release": "0.8"}))
