"""The sources are in order: notebooks without outputs and with current parameters, no private paths, versions equal."""

import json
import re
import subprocess

import pytest
from renew import renew_parameters_cell

from disagg_lib.files import REPOSITORY
from disagg_lib.notebook.run_all import CHAIN, NOTEBOOKS

SOURCES = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_source_notebook_carries_no_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs"), cell["id"]
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_parameters_cell_is_the_librarys(path):
    assert path.read_text() == renew_parameters_cell(path), "run `make renew` and read the diff"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_has_the_agreed_shape(path):
    cells = json.loads(path.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert texts[0].startswith(f"# {path.stem[:2]} · ")
    assert "parameters" in code[0]["metadata"]["tags"]
    assert (
        "hat you have now"
        in [text for cell, text in zip(cells, texts, strict=True) if cell["cell_type"] == "markdown"][-1]
    )
    assert not any(
        re.search(r"^\s*def ", text, re.M)
        for text in texts
        if text in map(lambda c: "".join(c["source"]), code)
    )


def test_each_notebook_links_to_the_next():
    for name, following in zip(CHAIN, CHAIN[1:], strict=False):
        cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
        last = [cell for cell in cells if cell["cell_type"] == "markdown"][-1]
        assert f"]({following}.ipynb)" in "".join(last["source"])


def test_no_tracked_file_holds_a_path_of_one_machine_or_a_token():
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    pattern = re.compile(rb"(/home/\w|/root/|/work/(main|steering)|hf_[A-Za-z0-9]{30,})")
    found = []
    for name in filter(None, tracked.stdout.split("\0")):
        path = REPOSITORY / name
        if path.is_file() and path.name != "test_sources.py" and pattern.search(path.read_bytes()):
            found.append(name)
    assert found == []


def test_every_link_and_command_of_the_documents_exists():
    missing = []
    for document in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]:
        text = document.read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            if not (document.parent / target).exists():
                missing.append(f"{document.name}: {target}")
        makefile = (REPOSITORY / "Makefile").read_text()
        for target in re.findall(r"`make ([a-z-]+)", text):
            if f"\n{target}:" not in makefile:
                missing.append(f"{document.name}: make {target}")
        for command in re.findall(r"python -m disagg_lib ([a-z]+)", text):
            if f"def {command}(" not in (REPOSITORY / "disagg_lib/command_line.py").read_text():
                missing.append(f"{document.name}: python -m disagg_lib {command}")
    assert missing == []
