"""The notebooks for real: papermill, real kernels, real jobs."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from disagg_lib.cluster import launch
from disagg_lib.errors import ParameterError, RunFolderError
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.files import REPOSITORY
from disagg_lib.notebook.parameters import notebook_experiment, notebook_values, parameters_cell
from disagg_lib.notebook.run_all import CHAIN
from disagg_lib.results import logs
from disagg_lib.run.folder import RESULTS, free_run_dir
from disagg_lib.run.writing import create_run

SMALL = {
    "num_ctx_servers": 1,
    "rehearsal_time_scale": 0.05,
    "server_target_qps": 40,
    "rehearsal_queries": 60,
    "rehearsal_accuracy_samples": 10,
    "rehearsal_output_tokens": 8,
}
BIN = Path(sys.executable).parent


def papermill(notebook, out, *options, wait=True):
    command = [BIN / "papermill", f"notebooks/{notebook}.ipynb", out, "--no-progress-bar", *map(str, options)]
    if not wait:
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=180)


def command_line(*words, cwd=REPOSITORY):
    command = [sys.executable, "-m", "disagg_lib", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """One whole run through the command line, in a folder with a name that a shell would trip over."""
    run = tmp_path_factory.mktemp("runs") / "a 'run'; $(touch owned)"
    given = [word for name, value in SMALL.items() for word in ("-p", name, value)]
    return run, command_line("run", "params/rehearsal.yaml", "--run-dir", run, *given)


def test_the_chain_ends_with_a_table_and_a_report(chain):
    run, done = chain
    assert done.returncode == 0, done.stdout + done.stderr
    assert "INVALID (rehearsed" in done.stdout
    report = Path(re.search(r"^report: (.+)$", done.stdout, re.M)[1])
    assert report == run / "notebooks/05_analysis.html"
    assert "rehearsed" in report.read_text()


def test_every_notebook_left_its_executed_copy_and_page(chain):
    run, _ = chain
    for name in set(CHAIN) - {"02_plan"}:
        assert (run / f"notebooks/{name}.ipynb").is_file()
        assert (run / f"notebooks/{name}.html").is_file()
    figure = next(
        output
        for cell in json.loads((run / "notebooks/05_analysis.ipynb").read_text())["cells"]
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    )
    assert figure


def test_the_commands_in_the_folder_name_were_not_run(chain):
    run, _ = chain
    assert not list(run.parent.rglob("owned"))
    assert not (REPOSITORY / "owned").exists()
    assert not (REPOSITORY / "notebooks/owned").exists()


def test_the_table_equals_the_detail_log_to_the_last_digit(chain):
    run, _ = chain
    import pandas as pd

    row = pd.read_csv(run / "tables/run_rehearsed.csv").iloc[0]
    lines = (run / "mlperf/performance/mlperf_log_detail.txt").read_text().splitlines()
    log = {e["key"]: e["value"] for e in (json.loads(line.removeprefix(":::MLLOG ")) for line in lines)}
    in_ms = {
        "ttft_mean_ms": "result_first_token_mean_latency_ns",
        "ttft_p50_ms": "result_first_token_50.00_percentile_latency_ns",
        "ttft_p90_ms": "result_first_token_90.00_percentile_latency_ns",
        "ttft_p99_ms": "result_first_token_99.00_percentile_latency_ns",
        "tpot_mean_ms": "result_time_to_output_token_mean",
        "tpot_p50_ms": "result_time_per_output_token_50.00_percentile_ns",
        "tpot_p90_ms": "result_time_per_output_token_90.00_percentile_ns",
        "tpot_p99_ms": "result_time_per_output_token_99.00_percentile_ns",
        "ttft_limit_ms": "requested_server_ttft_latency",
        "tpot_limit_ms": "requested_server_tpot_latency",
    }
    assert {column: row[column] for column in in_ms} == {c: log[key] / 1e6 for c, key in in_ms.items()}
    assert row["samples_per_s"] == log["result_completed_samples_per_sec"]
    assert row["completed_tokens_per_s"] == log["result_completed_tokens_per_second"]
    assert row["target_qps"] == log["effective_target_qps"] == 40
    assert log["num_errors"] == 0


def test_loadgen_was_given_exactly_the_queries_asked_for(chain):
    run, _ = chain
    assert logs.read_run(run / "mlperf/performance").query_count == 60


def test_experiment_yaml_says_where_each_value_came_from(chain):
    run, _ = chain
    recorded = yaml.safe_load((run / "experiment.yaml").read_text())["parameters"]
    assert recorded["engine"]["from"].endswith("params/rehearsal.yaml")
    assert recorded["rehearsal_queries"] == {"value": 60, "from": "papermill"}
    assert recorded["gen_batch_size"]["from"] == "default"


def test_the_manifest_has_the_digest_of_every_log(chain):
    run, _ = chain
    manifest = json.loads((run / "manifest.json").read_text())
    for mode in ("performance", "accuracy"):
        assert f"mlperf/{mode}/mlperf_log_detail.txt" in manifest["sha256"]
    assert manifest["versions"]["mlcommons-loadgen"] == "5.1.2"
    assert manifest["made_with"]["checkpoint"]["files"] == 8 and manifest["made_with"]["checkpoint"]["digest"]


def test_a_run_dir_that_is_there_is_refused(chain):
    run, _ = chain
    done = command_line("run", "--run-dir", run)
    assert done.returncode == 1
    assert "is there already, and nothing is overwritten" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("place", "given", "word"),
    [
        ("/proc/1/run", (), "not a folder that you may write to"),
        ("a,b", ("container", "pyxis"), "pyxis reads , and : as separators"),
    ],
)
def test_a_run_dir_that_cannot_do_is_refused_before_anything_is_started(tmp_path, place, given, word):
    experiment = load_experiment((), dict([given])) if given else load_experiment()
    with pytest.raises(RunFolderError, match=word):
        free_run_dir(experiment, tmp_path / place)


def test_analysis_alone_reads_the_run_folder_again(chain, tmp_path):
    run, _ = chain
    done = papermill("05_analysis", tmp_path / "05.ipynb", "-p", "run_dir", run)
    assert done.returncode == 0, done.stderr
    assert "not valid" in done.stdout or "VALID" in (tmp_path / "05.ipynb").read_text()


def test_analysis_refuses_a_value_that_the_run_was_not_made_with(chain, tmp_path):
    run, _ = chain
    done = papermill("05_analysis", tmp_path / "05.ipynb", "-p", "run_dir", run, "-p", "gen_batch_size", 8)
    assert done.returncode != 0
    assert "gen_batch_size: found 8, but" in done.stderr


def test_results_prints_the_same_run_from_the_command_line(chain, tmp_path):
    run, _ = chain
    done = command_line("results", run, "--csv", tmp_path / "out.csv")
    assert done.returncode == 0, done.stderr
    assert "rehearsed" in (tmp_path / "out.csv").read_text()


def test_tables_and_figures_are_what_the_raw_logs_give(chain):
    run, _ = chain
    done = command_line("results", run, "--recompute")
    assert done.returncode == 0, done.stdout
    assert "5 of 5 files are what the raw logs give" in done.stdout


def test_the_run_is_exported_as_pages_and_refused_as_a_submission(chain, tmp_path):
    run, _ = chain
    done = command_line("export", run, "--html", tmp_path / "html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html/index.html").is_file()
    refused = command_line(
        "export", run, "--submission", tmp_path / "tree", "--system", "params/system.example.yaml"
    )
    assert refused.returncode == 1
    assert "rehears" in refused.stderr
    assert not (tmp_path / "tree").exists()


def test_evaluating_a_rehearsal_counts_tokens_and_writes_no_accuracy_txt(chain):
    run, _ = chain
    done = command_line("evaluate", run)
    assert done.returncode == 0, done.stderr
    assert "gen_num: 10" in done.stdout
    assert not (run / "mlperf/accuracy/accuracy.txt").exists()


def test_papermill_with_a_misspelt_name_fails_and_names_the_nearest(tmp_path):
    before = {p.name for p in RESULTS.iterdir()}
    done = papermill("03_configuration", tmp_path / "03.ipynb", "-p", "gen_batchsize", 256)
    assert done.returncode != 0
    assert "gen_batchsize: no such parameter. Did you mean gen_batch_size?" in done.stderr
    assert {p.name for p in RESULTS.iterdir()} == before


def test_papermill_takes_the_cluster_and_site_files(tmp_path):
    run = tmp_path / "run"
    files = ["-f", "params/gb200_20gpu.yaml", "-f", "params/site.example.yaml", "-p", "gen_batch_size", 256]
    done = papermill("03_configuration", tmp_path / "03.ipynb", *files, "-p", "run_dir", run)
    assert done.returncode == 0, done.stderr
    assert "Passed unknown parameter" not in done.stderr
    script = (run / "job.sh").read_text()
    assert "#SBATCH --nodes=5" in script
    assert "#SBATCH --account=my_account" in script
    recorded = yaml.safe_load((run / "experiment.yaml").read_text())["parameters"]
    assert recorded["gen_batch_size"] == {"value": 256, "from": "papermill"}
    assert yaml.safe_load((run / "config.yaml").read_text())["generation_servers"]["max_batch_size"] == 256


def test_killing_the_kernel_and_running_04_again_attaches_to_the_same_job(tmp_path):
    given = SMALL | {"rehearsal_queries": 400, "server_target_qps": 20.0, "test_modes": ["performance"]}
    run = create_run(load_experiment(given=given), tmp_path / "run")
    first = papermill("04_launch", tmp_path / "first.ipynb", "-p", "run_dir", run, wait=False)
    deadline = time.monotonic() + 120
    while launch.job_state(run).phase != "performance":
        assert time.monotonic() < deadline, launch.job_state(run)
        time.sleep(0.1)
    for kernel in psutil.Process(first.pid).children(recursive=True):
        if "ipykernel_launcher" in " ".join(kernel.cmdline()):
            kernel.kill()
    first.communicate(timeout=60)
    job = launch.job_state(run).job_id
    assert launch.job_state(run).state == "running"
    again = papermill("04_launch", tmp_path / "again.ipynb", "-p", "run_dir", run)
    assert again.returncode == 0, again.stderr
    assert f"job {job}: running" in (tmp_path / "again.ipynb").read_text()
    assert launch.job_state(run).state == "done"


# -- how a notebook gets its values, without a kernel


def namespace(*cells):
    values = {"In": ["", *cells, "x = notebook_values(globals())"]}
    for cell in cells:
        exec(cell, values)
    return values


def test_nothing_given_is_only_the_default_params_file():
    values = namespace(parameters_cell(True))
    assert notebook_values(values) == {"run_dir": ""}
    assert notebook_experiment(values).provenance["engine"] == "params/rehearsal.yaml"


def test_an_injected_cell_wins_over_the_notebooks_own():
    values = notebook_values(namespace(parameters_cell(True), "# Parameters\ngen_batch_size = 256\n"))
    assert values["gen_batch_size"] == 256


def test_a_slip_in_an_edited_cell_is_refused_until_mended():
    edited = parameters_cell(True).replace("gen_batch_size:", "gen_batchsize: int = 3\ngen_batch_size:")
    with pytest.raises(ParameterError, match="gen_batchsize"):
        notebook_values(namespace(edited))
    assert notebook_values(namespace(edited, "y = print()", parameters_cell(True)))


def test_names_that_later_cells_make_are_no_parameters():
    later = "run = len('x')\njob_id = '3'"
    assert notebook_values(namespace(parameters_cell(True), later))
