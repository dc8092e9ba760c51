"""The room travels alone: copied into a run folder, it runs there, on whatever Python 3.8 or newer a node has."""

import ast
import shutil
import subprocess
import sys

import pytest

from disagg_lib.run.writing import PROGRAM

MODULES = sorted(PROGRAM.glob("*.py"))


def imported(path):
    """(module, level of a relative import) of every import of a source file."""
    for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 8))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0], node.level


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_nothing_of_ours_from_outside_the_room(path):
    others = {module.stem for module in MODULES} | {""}
    for module, level in imported(path):
        assert level == 1 and module in others or level == 0 and module != "disagg_lib"


def test_the_agent_needs_the_standard_library_only():
    code = "import sys; before = set(sys.modules); import disagg_lib.job.agent; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    roots = {name.partition(".")[0] for name in done.stdout.split()}
    assert roots - {"disagg_lib"} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("part", ["client", "search"])
def test_a_copy_of_the_room_runs_by_its_folder_and_leaves_it_as_it_was(part, tmp_path):
    copy = shutil.copytree(PROGRAM, tmp_path / "program", ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(copy.rglob("*"))
    done = subprocess.run([sys.executable, copy, part, "--help"], cwd="/", capture_output=True, text=True)
    assert (done.returncode, "--run-dir" in done.stdout) == (0, True), done.stderr
    assert sorted(copy.rglob("*")) == before


def test_a_part_that_is_not_there_is_refused_by_name():
    done = subprocess.run([sys.executable, PROGRAM, "agnt"], capture_output=True, text=True)
    assert done.returncode == 1 and "needed is one of agent, client, search" in done.stderr
