"""The commands as a person types them; what they print, write and refuse."""

import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from disagg_lib.experiment.loading import load_experiment
from disagg_lib.files import REPOSITORY


def command(*words, cwd=REPOSITORY):
    arguments = [sys.executable, "-m", "disagg_lib", *map(str, words)]
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=180)


def test_simulate_reports_three_spreads_and_writes_a_row_a_draw(tmp_path):
    done = command("simulate", "params/gb200_20gpu.yaml", "--draws", 2, "--csv", tmp_path / "s.csv")
    assert done.returncode == 0, done.stderr
    assert all(f"cv {cv}" in done.stdout for cv in ("0.4", "0.3", "0.5"))
    table = pd.read_csv(tmp_path / "s.csv")
    assert list(table.columns[:1]) == ["topology"]
    needed = {
        "ttft_mean_ms",
        "ttft_p50_ms",
        "ttft_p99_ms",
        "tpot_mean_ms",
        "tpot_p99_ms",
        "completed_tokens_per_s",
    }
    assert needed | {"target_qps", "loadgen_valid", "valid", "submittable", "source"} <= set(table.columns)
    assert len(table) == 6
    assert set(table["source"]) == {"simulated"}
    median, low, high = (getattr(table["ttft_p99_ms"][:2], of)() for of in ("median", "min", "max"))
    assert f"{median:.0f} [{low:.0f}, {high:.0f}]" in done.stdout


def test_the_highest_valid_qps_stands_beside_the_target(tmp_path):
    done = command(
        "simulate", "params/gb200_20gpu.yaml", "--highest", "--draws", 1, "--csv", tmp_path / "h.csv"
    )
    assert done.returncode == 0, done.stderr
    row = pd.read_csv(tmp_path / "h.csv", dtype={"cv 0.5": str, "cv 0.3": str}).iloc[0]
    assert row["server_target_qps"] == 3.85 and row["source"] == "simulated"
    assert 3.5 < float(row["cv 0.5"].split()[0]) < float(row["cv 0.3"].split()[0]) < 5.0


def test_a_histogram_of_prompt_lengths_and_another_system_are_parameters(tmp_path):
    (tmp_path / "h.csv").write_text("up_to_tokens,samples\n1000,0\n2000,30\n8000,10\n")
    words = ["simulate", "params/gb200_20gpu.yaml", "--draws", 1, "-p", "lengths_file", tmp_path / "h.csv"]
    done, other = command(*words), command(*words, "-p", "gpu_system", "gb300")
    assert done.returncode == 0, done.stderr
    assert "h.csv" in done.stdout and "1 of 1" in done.stdout and "cv 0.4" not in done.stdout
    assert "[" not in done.stdout.partition("Median")[0]  # one draw has no range
    assert other.returncode == 0 and other.stdout != done.stdout
    refused = command(*words, "-p", "gpu_system", "h100")
    assert refused.returncode == 1 and "there are b200, gb200, gb300" in refused.stderr


def test_the_same_draws_give_the_same_rows(tmp_path):
    for name in ("a.csv", "b.csv"):
        command("simulate", "params/gb200_20gpu.yaml", "--draws", 1, "--csv", tmp_path / name)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_a_qps_beyond_saturation_is_a_sentence_with_the_nearest_choice():
    done = command("simulate", "params/gb200_20gpu.yaml", "-p", "server_target_qps", "9")
    assert done.returncode == 1
    assert "beyond saturation" in done.stderr
    assert "Choose less than" in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_ranks_topologies_and_writes_the_first_as_a_complete_params_file(tmp_path):
    path = tmp_path / "my8.yaml"
    done = command("plan", "--gpus", 8, "--draws", 1, "--csv", tmp_path / "p.csv", "--write", path)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "p.csv")
    assert table.columns[0] == "topology"
    assert list(table["target_qps"]) == sorted(table["target_qps"], reverse=True)
    assert "With cv 0.3" in done.stdout and "Aggregated" in done.stdout
    written = load_experiment([path])
    kind = (written.engine, written.launcher, written.container, written.gpu_count)
    assert kind == ("trtllm", "slurm", "pyxis", 8)
    again = command("plan", "--gpus", 8, "--write", path)
    assert again.returncode == 1 and "nothing is overwritten" in again.stderr


def test_a_budget_that_nothing_fits_is_a_sentence():
    done = command("plan", "--gpus", 1)
    assert done.returncode == 1
    assert "Plan for that many" in done.stderr


def test_csv_is_never_written_over(tmp_path):
    (tmp_path / "x.csv").write_text("mine")
    done = command("simulate", "params/gb200_20gpu.yaml", "--draws", 1, "--csv", tmp_path / "x.csv")
    assert done.returncode == 1
    assert (tmp_path / "x.csv").read_text() == "mine"


@pytest.mark.parametrize("text", [None, "nonsense"])
def test_results_of_what_is_no_run_is_a_row_with_its_error_and_status_1(tmp_path, text):
    folder = tmp_path / "folder"
    if text:
        folder.mkdir()
        (folder / "nonsense.txt").write_text(text)
    done = command("results", folder)
    assert done.returncode == 1
    assert str(folder) in done.stderr and len(done.stderr.splitlines()) == 1


def test_half_a_log_is_named_and_the_other_runs_still_show(tmp_path):
    good = REPOSITORY / "tests/data"
    whole = sorted(p.parent for p in good.rglob("mlperf_log_detail.txt"))[0]
    half = tmp_path / "half"
    half.mkdir()
    for name in ("mlperf_log_detail.txt", "mlperf_log_summary.txt"):
        text = (whole / name).read_bytes()
        (half / name).write_bytes(text[: len(text) // 2])
    done = command("results", whole, half)
    assert done.returncode == 1
    assert whole.name in done.stdout
    assert str(half) in done.stderr


def test_params_files_are_found_from_any_folder(tmp_path):
    (tmp_path / "mine.yaml").write_text("num_gen_servers: 0\n")
    done = command("check", "mine.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert "mine.yaml: num_gen_servers: found 0" in done.stderr
    assert command("check", "params/rehearsal.yaml", cwd=tmp_path).returncode == 0


def test_parameters_lists_every_key_in_its_group():
    said = command("parameters").stdout
    assert "gen_batch_size: 512" in said and said.startswith("# -- what runs")


def test_help_is_in_the_order_of_use_and_nothing_is_cut():
    said = command("--help").stdout
    names = [line.split()[0] for line in said.partition("Commands:")[2].splitlines() if line]
    assert names[:8] == ["plan", "check", "run", "launch", "attach", "cancel", "results", "export"]
    assert "...\n" not in said.partition("Commands:")[2] and max(map(len, said.splitlines())) <= 92
    assert command("--version").stdout.startswith("disagg, version ")


def test_a_parameter_may_be_given_as_two_words_or_with_an_equals_sign():
    two, one = (command("check", "params/rehearsal.yaml", *words) for words in (("-p", "num_gen_servers", 2), ("-p", "num_gen_servers=2")))  # fmt: skip
    assert "2 generation servers x 4 = 24 GPUs" in one.stdout and one.stdout == two.stdout
    refused = command("check", "-p", "num_gen_server=2")
    assert "-p: num_gen_server: no such parameter. Did you mean num_gen_servers?" in refused.stderr


def test_check_says_what_it_checks_and_errors_come_first():
    said = command("check").stdout
    assert said.startswith("REHEARSAL on this machine, no GPU\nparams/rehearsal.yaml, as nothing was given: ")
    real = command("check", "params/gb200_20gpu.yaml")
    words = [
        line.split()[0] for line in real.stdout.splitlines() if line.startswith(("error", "warning", "ok"))
    ]
    assert real.stdout.startswith("REAL: 20 GPUs on 5 nodes under Slurm")
    assert words == sorted(words, key=["error", "warning", "ok"].index) and words[0] == "error"


def test_a_written_plan_keeps_what_it_rests_on(tmp_path):
    preset, path = "params/gb300_72gpu_v6.0.yaml", tmp_path / "my8.yaml"
    done = command("plan", preset, "--gpus", 8, "--draws", 1, "--write", path)
    assert done.returncode == 0, done.stderr
    assert path.read_text() in done.stdout
    written, planned_from = load_experiment([path]), load_experiment([preset])
    kept = (
        "recipe",
        "round",
        "orchestrator",
        "dynamo_release",
        "router",
        "gen_capacity_policy",
        "gpu_system",
    )
    assert [getattr(written, name) for name in kept] == [getattr(planned_from, name) for name in kept]
    assert written.num_frontends == written.node_count == 2


def test_thirty_runs_fit_eighty_columns(tmp_path):
    whole = sorted(p.parent for p in (REPOSITORY / "tests/data").rglob("mlperf_log_detail.txt"))[0]
    for number in range(30):
        run = tmp_path / f"20261130-1957{number:02d}_rehearsal_144gpu"
        shutil.copytree(whole, run / "mlperf/performance")
        shutil.copy(REPOSITORY / "results/example_rehearsal/experiment.yaml", run)
    done = command("results", tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + 30 + 1 and max(map(len, lines)) <= 80
    assert [line[:15] for line in lines[1:31]] == [
        f"20261130-1957{number:02d}" for number in reversed(range(30))
    ]
    rows = json.loads(command("results", tmp_path, "--json").stdout)
    assert len(rows) == 30 and rows[0]["source"] == "rehearsed"


def test_what_is_no_run_is_a_line_beside_the_runs_that_are(tmp_path):
    done = command("results", "results/README.md", "example_rehearsal")
    assert done.returncode == 0 and "example_rehearsal" in done.stdout
    assert done.stderr == "results/README.md: a file, no run\n"


def test_published_runs_can_be_set_beside():
    done = command("results", "example_rehearsal", "--published", "--scenario", "Server")
    assert done.stdout.count("published") >= 5 and max(map(len, done.stdout.splitlines())) <= 80
