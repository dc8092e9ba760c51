"""pyproject.toml, requirements.lock and environment.yml state the same versions."""

import importlib.metadata
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement

from disagg_lib.files import REPOSITORY


def pins(lines):
    requirements = [Requirement(line) for line in lines]
    return {r.name.replace("_", "-"): str(r.specifier) for r in requirements}


PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
CONDA_PIP = next(d["pip"] for d in CONDA["dependencies"] if isinstance(d, dict))
LOCK = [line for line in (REPOSITORY / "requirements.lock").read_text().splitlines() if line.strip()]


def test_every_version_is_exact():
    for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"], *LOCK):
        assert re.fullmatch(r"==[\w.]+", str(Requirement(line).specifier)), line


def test_the_lock_holds_every_direct_dependency_at_its_version():
    locked = pins(LOCK)
    direct = pins([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]])
    assert {name: locked.get(name) for name in direct} == direct


def test_environment_yml_has_the_same_pins():
    conda = pins(line for line in CONDA_PIP if not line.startswith("--editable"))
    assert conda == pins(PROJECT["dependencies"])
    assert {"jupyterlab", "papermill", "ipywidgets", "pandas", "huggingface-hub"} <= set(conda)
    tensorrt = next(line for line in PROJECT["optional-dependencies"]["trtllm"])
    assert f'# - "{tensorrt.split(";")[0]}"' in (REPOSITORY / "environment.yml").read_text()


def test_the_python_of_environment_yml_is_supported():
    python = next(d for d in CONDA["dependencies"] if str(d).startswith("python="))
    assert Requirement("python" + PROJECT["requires-python"]).specifier.contains(python.split("=")[1])


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]])
def test_what_is_installed_is_what_is_pinned(line):
    requirement = Requirement(line)
    if requirement.marker and not requirement.marker.evaluate():
        pytest.skip(f"{requirement.name} is not for this platform: {requirement.marker}")
    assert requirement.specifier.contains(importlib.metadata.version(requirement.name))
