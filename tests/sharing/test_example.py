"""The rehearsal kept in results/: labelled, without a trace of the machine, and by the notebooks as they are now.

What must be equal is each notebook's code without comments and layout. Prose, parameters and the library may change
without a new example. `make example` makes one.
"""

import ast
import json
import re
import subprocess

import pandas as pd
import pytest
from example import EXAMPLE
from test_export import make_site_run, site, survivors
from test_rows import make_run

from disagg_lib.errors import ExportError
from disagg_lib.files import REPOSITORY
from disagg_lib.notebook.run_all import CHAIN, NOTEBOOKS
from disagg_lib.results import rows
from disagg_lib.sharing.example import export_example
from disagg_lib.sharing.redaction import Redactor


def kept():
    """The files of the example that git has, or would take."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", str(EXAMPLE)]
    names = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [REPOSITORY / name for name in names.split("\0") if name]


def code_of(path):
    """Code cells as syntax trees, but for the parameters, which the example leaves out."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    own = [c for c in cells if not {"parameters", "injected-parameters"} & set(c["metadata"].get("tags", []))]
    return [ast.unparse(ast.parse("".join(cell["source"]))) for cell in own]


@pytest.mark.parametrize("name", CHAIN)
def test_the_example_was_made_by_the_notebooks_as_they_are(name):
    assert code_of(EXAMPLE / f"notebooks/{name}.ipynb") == code_of(NOTEBOOKS / f"{name}.ipynb"), (
        "run `make example`"
    )


def test_the_example_was_executed_to_its_end_with_figures():
    for name in CHAIN:
        cells = json.loads((EXAMPLE / f"notebooks/{name}.ipynb").read_text())["cells"]
        assert all(
            cell["execution_count"] for cell in cells if cell["cell_type"] == "code" and cell["source"]
        )
    text = (EXAMPLE / "notebooks/05_analysis.ipynb").read_text()
    assert text.count('"image/png"') >= 4 and "rehearsed" in text


def test_everything_of_the_example_says_rehearsed():
    readme = (EXAMPLE / "README.md").read_text()
    assert "**source: rehearsed.**" in readme and "Submittable: no" in readme
    tables = sorted(path.name for path in (EXAMPLE / "tables").iterdir())
    assert tables == ["result.json", "run_rehearsed.csv"], "run `make example`"
    assert json.loads((EXAMPLE / "tables/result.json").read_text())["source"] == "rehearsed"
    assert all(path.stem.endswith("_rehearsed") for path in (EXAMPLE / "figures").iterdir())
    for target in re.findall(r"\]\(([^)]+)\)", readme):
        assert (EXAMPLE / target).is_file(), target


def test_no_user_host_path_or_token_is_in_the_example():
    redactor = Redactor({})
    for path in kept():
        if path.suffix != ".png":
            text = path.read_text()
            assert redactor.text(text, path.name) == text, (path, redactor.listed()[-1])
        redactor.refuse_rest(path.read_bytes(), path.name)


def test_the_example_is_small_and_whole_and_all_of_it_is_in_git():
    files = {path.relative_to(EXAMPLE).as_posix() for path in kept()}
    manifest = json.loads((EXAMPLE / "manifest.json").read_text())
    assert files == set(manifest["sha256"]) | {"manifest.json"}
    assert {"experiment.yaml", "config.yaml", "job.sh", "README.md"} <= files
    assert sum(path.stat().st_size for path in kept()) < 3e6


def test_the_examples_table_is_what_its_logs_give():
    written = pd.read_csv(EXAMPLE / "tables/run_rehearsed.csv").iloc[0]
    row = rows.run_row(EXAMPLE)
    assert row["source"] == "rehearsed" and not row["submittable"]
    values = json.loads((EXAMPLE / "tables/result.json").read_text())
    for name in ("samples_per_s", "completed_tokens_per_s", "ttft_p99_ms", "tpot_p99_ms", "query_count"):
        assert written[name] == row[name] == values[name], name


# -- how it is made


def test_an_example_replaces_its_predecessor_and_nothing_else(tmp_path):
    run, example = make_site_run(tmp_path / "run", site()), tmp_path / "example"
    for _ in range(2):
        export_example(run, example)
    (example / "mine.txt").write_text("x")
    with pytest.raises(ExportError, match=r"found mine\.txt"):
        export_example(run, example)
    (example / "mine.txt").unlink()
    (example / "README.md").write_text("edited")
    with pytest.raises(ExportError, match=r"found README\.md"):
        export_example(run, example)
    assert (example / "README.md").read_text() == "edited"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "example"}


def test_no_name_of_the_site_is_in_an_example_and_large_files_are_named(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    (run / "logs/large.log").write_text("step\n" * 40_000)
    (run / "job/program").mkdir()
    (run / "job/program/agent.py").write_text("print()\n")
    shared = export_example(run, tmp_path / "example")
    assert survivors(shared.path, site()) == set()
    assert set(shared.left_out) == {"logs/large.log: 200 kB", "job/program/agent.py: 0 kB"}
    assert "logs/large.log: 200 kB" in (shared.path / "README.md").read_text()


def test_an_example_holds_neither_the_parameters_cell_nor_the_state_of_widgets(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    path = run / "notebooks/05_analysis.ipynb"
    notebook = json.loads(path.read_text())
    notebook["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    tagged = {"cell_type": "code", "execution_count": 1, "id": "t", "metadata": {"tags": ["parameters"]}, "source": "x: int = 1", "outputs": []}  # fmt: skip
    path.write_text(json.dumps(notebook | {"cells": [tagged, *notebook["cells"]]}))
    kept_ = json.loads((export_example(run, tmp_path / "example").path / "notebooks/05_analysis.ipynb").read_text())  # fmt: skip
    assert [cell["id"] for cell in kept_["cells"]] == ["a"] and "widgets" not in kept_["metadata"]


def test_only_a_rehearsal_is_kept(tmp_path):
    with pytest.raises(ExportError, match="needed: rehearsed"):
        export_example(make_run(tmp_path / "run", engine="trtllm"), tmp_path / "example")
