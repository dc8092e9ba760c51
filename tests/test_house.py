"""The house stays in order: rooms, sizes, and what an import costs."""

import ast
import graphlib
import statistics
import subprocess
import sys

import grimp
import pytest

from disagg_lib.files import REPOSITORY

MODULES = sorted((REPOSITORY / "disagg_lib").rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))
ROOMS = sorted(path.parent.name for path in (REPOSITORY / "disagg_lib").glob("*/__init__.py"))


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.relative_to(REPOSITORY)}: {node.name}", node.end_lineno - node.lineno + 1


def test_no_module_and_no_test_file_is_longer_than_500_lines():
    long = [str(path) for path in (*MODULES, *TESTS) if len(path.read_text().splitlines()) > 500]
    assert long == []


def test_functions_are_short():
    sizes = [size for path in MODULES for size in functions(path)]
    assert [function for function in sizes if function[1] > 60] == []
    assert statistics.median(lines for _, lines in sizes) <= 10


def test_no_module_imports_itself_by_way_of_others():
    graph = grimp.build_graph("disagg_lib", cache_dir=None)
    arrows = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    graphlib.TopologicalSorter(arrows).prepare()  # CycleError names the circle


@pytest.mark.parametrize("room", ROOMS)
def test_a_rooms_door_says_what_it_is_for_and_imports_nothing(room):
    tree = ast.parse((REPOSITORY / "disagg_lib" / room / "__init__.py").read_text())
    words = ast.get_docstring(tree)
    assert "Comes in:" in words and "Goes out:" in words
    assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))


def test_help_imports_nothing_slow():
    code = "import sys, disagg_lib.command_line; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {
        "pandas",
        "numpy",
        "numba",
        "matplotlib",
        "jupyter_client",
        "huggingface_hub",
        "aiohttp",
    }
