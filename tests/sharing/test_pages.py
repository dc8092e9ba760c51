"""Pages: self-contained, and the run on one of them; tables and figures rebuilt from the logs."""

import json
import re
import shutil
from pathlib import Path

import yaml
from shared_runs import NOTEBOOK, make_site_run, site

from disagg_lib.results import outputs
from disagg_lib.results.logs import SUMMARY
from disagg_lib.run.tables import repeat_command
from disagg_lib.sharing import pages
from disagg_lib.sharing.pages import export_html
from disagg_lib.sharing.recompute import recompute


def test_pages_load_nothing_and_the_index_says_it_all(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    shared = export_html(run, tmp_path / "html")
    assert sorted(p.name for p in shared.path.iterdir()) == ["05_analysis.html", "index.html"]
    for page in shared.path.iterdir():
        text = page.read_text()
        assert "<script" not in text and not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", text)
        assert not re.search(r"@import|url\(\s*['\"]?http", text)
    index = (shared.path / "index.html").read_text()
    assert "rehearsed" in index and "Shortened on purpose" in index and "python 3.11.2" in index
    assert (
        index.count("data:image/png;base64,") == 3
        and "python -m disagg_lib run params/site.yaml -p account" in index
    )


def test_pages_follow_the_readers_dark_setting_and_link_to_pages_that_are_there():
    cells = [
        {
            "cell_type": "markdown",
            "id": "b",
            "metadata": {},
            "source": "[next](05_a.ipynb) [gone](02_plan.ipynb)",
        }
    ]
    page = pages.notebook_page(json.dumps({**NOTEBOOK, "cells": cells}), ["05_a"])
    assert "@media (prefers-color-scheme: dark)" in page and 'href="05_a.html"' in page
    assert ".ipynb" not in page and ">gone</a>" in page


def test_index_of_a_failed_run_says_why_there_is_no_verdict(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    (run / "mlperf/performance" / SUMMARY).write_text("")
    index = (export_html(run, tmp_path / "html").path / "index.html").read_text()
    assert "No verdict: " in index and "cut log" in index and index.count("data:image/png") == 2


def test_the_command_to_repeat_a_run_is_quoted(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    recorded = yaml.safe_load((run / "experiment.yaml").read_text())
    recorded["parameters"]["test_modes"] = {"value": ["performance"], "from": "given"}
    (run / "experiment.yaml").write_text(yaml.safe_dump(recorded))
    command = repeat_command(run)
    assert command.startswith("python -m disagg_lib run params/site.yaml -p ")
    assert """-p test_modes '["performance"]'""" in command


def test_tables_and_figures_are_rebuilt_to_the_byte_wherever_the_run_lies(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    outputs.write_outputs(run)
    (run / "tables/notes.csv").unlink()
    assert set(recompute(run)["word"]) == {"same"} and len(recompute(run)) == 4
    moved = Path(shutil.copytree(run, tmp_path / "elsewhere/run"))
    assert set(recompute(moved)["word"]) == {"same"}


def test_edited_table_and_raw_log_are_found(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    outputs.write_outputs(run)
    table = run / "tables/run_rehearsed.csv"
    table.write_text(table.read_text().replace("4394", "5394"))
    (run / "figures/topology_rehearsed.png").unlink()
    words = recompute(run).set_index("file")["word"].to_dict()
    assert (
        words["tables/run_rehearsed.csv"] == "differs"
        and words["figures/topology_rehearsed.png"] == "absent before"
    )
    assert words["tables/notes.csv"] == "not rebuilt" and words["figures/latency_rehearsed.png"] == "same"
