"""`make lab` on a clone: what JupyterLab saves by itself is no change that git sees."""

import json
import subprocess
import sys

import nbclient
import nbformat
import pytest

from disagg_lib.files import REPOSITORY
from disagg_lib.notebook import lab
from disagg_lib.notebook.clean import clean_text
from disagg_lib.notebook.run_all import NOTEBOOKS

SOURCES = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone with this tree's library and notebooks, prepared as `make lab` does."""
    place = tmp_path / "a clone"
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "clone", "-q", "--no-hardlinks", REPOSITORY, place], check=True)
    subprocess.run(["cp", "-r", REPOSITORY / "disagg_lib", REPOSITORY / "notebooks", place], check=True)
    subprocess.run([*git, "add", "-A"], cwd=place, check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "as it is"], cwd=place, check=True)
    monkeypatch.setattr(lab, "REPOSITORY", place)
    lab.filter_notebooks()
    lab.filter_notebooks()
    return place


def status(clone):
    return subprocess.run(
        ["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True
    ).stdout


def test_a_run_all_that_jupyterlab_saved_is_no_change_and_an_edit_is_one(clone):
    path = clone / "notebooks/00_setup.ipynb"
    notebook = nbformat.read(path, 4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    notebook.metadata["widgets"] = {"state": {}}
    nbformat.write(notebook, path)
    lab.after_save({"type": "notebook"}, str(path))
    assert "outputs" in path.read_text() and notebook.cells[3].outputs
    assert status(clone) == ""
    notebook.cells[0].source += "\n\nMine."
    nbformat.write(notebook, path)
    lab.after_save({"type": "notebook"}, str(path))
    assert status(clone) == " M notebooks/00_setup.ipynb\n"
    assert (clone / ".git/info/attributes").read_text().count(lab.FILTER) == 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_sources_are_as_the_filter_leaves_them(path):
    assert clean_text(path.read_text()) == path.read_text()


def test_the_filter_reads_and_writes_as_git_wants_it():
    text = SOURCES[0].read_bytes()
    done = subprocess.run([sys.executable, "-m", "disagg_lib.notebook.clean"], input=text, capture_output=True, check=True, cwd=REPOSITORY)  # fmt: skip
    assert done.stdout == text


def test_jupyterlab_asks_nobody_for_news_and_keeps_other_settings(tmp_path):
    path = tmp_path / "share/jupyter/lab/settings/overrides.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"other": {"kept": 1}}')
    lab.ask_for_no_news(tmp_path)
    assert json.loads(path.read_text())["other"] == {"kept": 1}
    assert json.loads(path.read_text())["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"
