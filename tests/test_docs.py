"""README and the files beside it say what is so: figures of the kept example, commands that exist, versions that are equal."""

import json
import re
import tomllib
import xml.etree.ElementTree as ElementTree

import click
import pytest
import yaml
from example import EXAMPLE
from pictures import CARD, PICTURES, RACK, rack, readme_blocks, renewed
from PIL import Image

from disagg_lib.command_line import main
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.files import REPOSITORY
from disagg_lib.notebook.pictures import topology_svg
from disagg_lib.run.durations import job_seconds
from disagg_lib.sharing.report import make_report

README = (REPOSITORY / "README.md").read_text()
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]  # fmt: skip


def test_readme_is_short_and_begins_with_a_command_and_pictures():
    lines = README.splitlines()
    assert len(lines) <= 90
    assert next(n for n, line in enumerate(lines, 1) if line.startswith("make demo")) <= 20
    assert len(re.findall(r'src="docs/pictures/[^"]+" alt="[^"]{20,}"', README)) >= 2


def test_readme_shows_what_the_kept_example_says():
    assert renewed(README, readme_blocks(make_report(EXAMPLE))) == README, "run `make pictures`"


@pytest.mark.parametrize("name", CARD.values())
def test_the_picture_of_the_report_is_of_the_kept_example(name):
    with Image.open(PICTURES / name) as picture:
        assert picture.text["Description"] == make_report(EXAMPLE).title, "run `make pictures`"


def test_the_picture_of_the_rack_is_of_its_params_file():
    drawn = (PICTURES / "topology_72gpu.svg").read_text()
    assert drawn == topology_svg(rack()) + "\n", "run `make pictures`"
    assert (
        ElementTree.fromstring(drawn).get("aria-label").startswith(f"{rack().num_ctx_servers} context server")
    )


def test_what_a_real_run_costs_is_what_check_reckons():
    for preset in ("params/gb200_20gpu.yaml", RACK):
        e = load_experiment([preset])
        seconds = job_seconds(e)
        hours = e.gpu_count * seconds / 3600
        assert f"{e.gpu_count} GPUs: {seconds / 60:.0f} minutes, {hours:.0f} GPU-hours" in README
    assert "230 GB" in (REPOSITORY / "notebooks/01_model_download.ipynb").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_disagg_command_of_the_documents_exists(document):
    for command in re.findall(r"(?<=[`\n(])disagg ([a-z]+)", document.read_text()):
        assert command in main.commands, command
    assert PROJECT["scripts"]["disagg"] == "disagg_lib.command_line:main" and isinstance(main, click.Group)


def test_contributing_links_and_targets_exist():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (REPOSITORY / target).exists(), target
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert f"\n{target}:" in (REPOSITORY / "Makefile").read_text(), target


def test_versions_and_licence_are_those_of_the_project():
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (PROJECT["version"], PROJECT["license"])
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert f"python-3.{low}_to_3.{int(high) - 1}-" in README


def test_the_development_container_uses_makes_own_set_up():
    container = json.loads((REPOSITORY / ".devcontainer/devcontainer.json").read_text())
    makefile = (REPOSITORY / "Makefile").read_text()
    assert container["postCreateCommand"] == "make .venv/.installed" and "$(VENV)/.installed:" in makefile
    assert container["postAttachCommand"] == "make demo" and "\ndemo:" in makefile


def test_the_trademark_notice_stands_in_readme_and_pages():
    from disagg_lib.results.rows import NOT_VERIFIED

    assert NOT_VERIFIED.partition(". ")[2] in " ".join(README.split())
    assert "not verified by MLCommons Association" in README
