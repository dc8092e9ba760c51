"""What all tests share: experiments and run folders below a fixed root, and a folder with an awkward name."""

from pathlib import Path

import pytest

from disagg_lib import run_folder
from disagg_lib.experiment import load_experiment

PROJECT = Path("/project")  # golden files must not depend on where the repository lies


@pytest.fixture
def experiment():
    """experiment(**given): defaults plus these values, with paths below /project."""
    return lambda *params_files, **given: load_experiment(params_files, given, root=PROJECT)


@pytest.fixture
def odd_dir(tmp_path):
    """A folder whose name holds spaces, quotes, a semicolon, a dollar sign and a command."""
    path = tmp_path / "odd 'name'; \"x\" $(touch owned) & more"
    path.mkdir()
    return path


@pytest.fixture
def results_dir(tmp_path, monkeypatch):
    """An empty results folder in place of the repository's."""
    path = tmp_path / "results"
    monkeypatch.setattr(run_folder, "RESULTS", path)
    return path
