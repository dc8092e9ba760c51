"""Papermill, the command line and a typed cell: the same file means the same run by each; what each notebook says first."""

import json
import subprocess
import sys

import nbclient
import nbformat
import pytest
from test_notebooks import SMALL, papermill

from disagg_lib.arguments import experiment_of
from disagg_lib.cluster import launch
from disagg_lib.cluster.follow import watch
from disagg_lib.errors import ParameterError
from disagg_lib.experiment.loading import experiment_from, load_experiment, load_recorded
from disagg_lib.files import REPOSITORY
from disagg_lib.notebook.opening import headline
from disagg_lib.notebook.parameters import notebook_experiment, notebook_values, origins, parameters_cell
from disagg_lib.notebook.run_all import CHAIN, NOTEBOOKS
from disagg_lib.run import folder
from disagg_lib.run.writing import create_run
from disagg_lib.sharing.crate import export_crate
from disagg_lib.sharing.example import export_example

PLANNED = "num_ctx_servers: 14\nctx_pp_size: 1\nnum_gen_servers: 4\nserver_target_qps: 14\n"


def namespace(*cells):
    values = {"In": ["", *cells, "x = notebook_values(globals())"]}
    for cell in cells:
        exec(cell, values)
    return values


def test_the_same_file_through_three_doors_is_one_experiment(tmp_path):
    path, run = tmp_path / "my72.yaml", tmp_path / "run"
    path.write_text(PLANNED)
    done = papermill("03_configuration", tmp_path / "03.ipynb", "-f", path, "-p", "run_dir", run)
    assert done.returncode == 0, done.stderr
    by_papermill = load_recorded(run)
    by_command = experiment_of([str(path)], [])
    by_cell = notebook_experiment(namespace(parameters_cell(True), f"params_files = [{str(path)!r}]"))
    assert by_papermill.model_dump() == by_command.model_dump() == by_cell.model_dump()
    assert by_papermill.engine == "trtllm" and by_papermill.gpu_count == 72
    assert by_papermill.provenance["num_ctx_servers"] == "papermill"
    assert by_command.provenance["num_ctx_servers"] == str(path)


def test_only_where_nothing_at_all_is_given_it_is_a_rehearsal():
    assert experiment_from(None, {}, "-p").engine == "rehearsal"
    assert experiment_from(None, {"num_gen_servers": 2}, "-p").engine == "trtllm"
    assert experiment_from(["params/rehearsal.yaml"], {"num_gen_servers": 2}, "-p").engine == "rehearsal"


def test_who_gave_a_value_is_told_apart():
    injected = "# Parameters\nserver_target_qps = 4.0\n"
    typed = parameters_cell(True).replace("gen_batch_size: int = None", "gen_batch_size: int = 256")
    values = namespace(typed, injected)
    e = notebook_experiment(values)
    assert (e.provenance["server_target_qps"], e.provenance["gen_batch_size"]) == ("papermill", "typed here")
    assert origins(values)["num_ctx_servers"] == "typed here" and e.provenance["num_ctx_servers"] == "default"
    with pytest.raises(ParameterError, match="^typed here: gen_batch_size: found 'x'"):
        notebook_experiment(namespace(typed.replace("= 256", "= 'x'")))


def test_params_files_may_come_as_text_from_papermill():
    values = notebook_values(
        namespace(parameters_cell(True), "# Parameters\nparams_files = '[\"a.yaml\", b.yaml]'\n")
    )
    assert values["params_files"] == ["a.yaml", "b.yaml"]


@pytest.mark.parametrize(("given", "words"), [
    ({"engine": "rehearsal", "launcher": "local", "container": "none"}, "REHEARSAL on this machine, no GPU"),
    ({"engine": "rehearsal", "container": "none", "partition": "gb"}, "REHEARSAL under Slurm, 5 nodes of partition gb, no GPU"),
    ({"partition": "gb"}, "REAL: 20 GPUs on 5 nodes under Slurm, partition gb"),
    ({"engine": "external", "endpoint_url": "http://10.0.0.7:8000", "launcher": "local", "container": "none"},
     "REAL: the server at http://10.0.0.7:8000, measured from here"),
])  # fmt: skip
def test_a_notebook_begins_with_what_it_is(given, words):
    assert headline(load_experiment([], given)) == words


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run whose job has ended."""
    rehearsal = SMALL | {"test_modes": ["performance"]}
    run = create_run(
        load_experiment(["params/rehearsal.yaml"], rehearsal), tmp_path_factory.mktemp("runs") / "small"
    )
    launch.submit(run)
    watch(run, out=lambda line: None)
    return run


def test_what_was_shared_is_read_back_by_our_own_tools(finished, tmp_path):
    for share, place in (
        (export_crate, tmp_path / "crate"),
        (export_example, tmp_path / "example_rehearsal"),
    ):
        share(finished, place)
        assert load_recorded(place).endpoint == "/v1/completions", place
    done = papermill("05_analysis", tmp_path / "05.ipynb", "-p", "run_dir", tmp_path / "crate")
    assert done.returncode == 0, done.stderr
    evaluated = subprocess.run([sys.executable, "-m", "disagg_lib", "calibrate", tmp_path / "crate", "--out", tmp_path / "c.yaml"],
                               cwd=REPOSITORY, capture_output=True, text=True)  # fmt: skip
    assert "pydantic" not in evaluated.stderr + evaluated.stdout


def test_opening_03_three_times_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DISAGG_LIVE", "1")
    before = {path.name for path in folder.RESULTS.iterdir()}
    for _ in range(3):
        notebook = nbformat.read(NOTEBOOKS / "03_configuration.ipynb", 4)
        nbclient.NotebookClient(
            notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}}
        ).execute()
    assert {path.name for path in folder.RESULTS.iterdir()} == before
    assert "Not written yet" in json.dumps(notebook.cells[-1].outputs)


@pytest.mark.parametrize("name", CHAIN)
def test_an_error_of_ours_is_two_lines_in_every_notebook_and_papermill_fails(name, tmp_path):
    done = papermill(name, tmp_path / "out.ipynb", "-p", "gen_batchsize", 256)
    assert done.returncode != 0
    executed = nbformat.read(tmp_path / "out.ipynb", 4)
    (error,) = [o for cell in executed.cells for o in cell.get("outputs", []) if o.output_type == "error"]
    assert error.ename == "ParameterError"
    assert error.traceback == [f"ParameterError: {error.evalue}", "(%tb shows where)"]
    assert "Did you mean gen_batch_size?" in error.evalue
