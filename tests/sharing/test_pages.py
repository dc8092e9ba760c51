"""Pages: self-contained, and the run on one of them; tables and figures rebuilt from the logs."""

import json
import re
import shutil
from pathlib import Path

import pytest
from runs import set_json
from shared_runs import NOTEBOOK, make_site_run, site

from disagg_lib.errors import ParameterError
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.results import outputs
from disagg_lib.results.logs import SUMMARY
from disagg_lib.sharing import pages
from disagg_lib.sharing.crate import export_crate
from disagg_lib.sharing.pages import export_html
from disagg_lib.sharing.recompute import recompute


def test_pages_load_nothing_and_the_index_says_it_all(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    shared = export_html(run, tmp_path / "html")
    assert sorted(p.name for p in shared.path.iterdir()) == [
        "05_analysis.html",
        "experiment.yaml",
        "index.html",
    ]
    for page in shared.path.glob("*.html"):
        text = page.read_text()
        assert "<script" not in text and not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", text)
        assert not re.search(r"@import|url\(\s*['\"]?http", text)
    index = (shared.path / "index.html").read_text()
    assert "rehearsed" in index and "Shortened on purpose" in index and "python 3.11.2" in index
    assert index.count("data:image/png;base64,") == 3 and "python -m disagg_lib run experiment.yaml" in index


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


def test_index_names_layout_data_set_what_is_not_here_and_who_did_not_verify_it(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    set_json(run / "job/settings.json", client={"data_set": {"kind": "synthetic"}, "top_k": 1})
    (run / "logs/blob").write_bytes(b"\0\1\2\xff")
    index = (export_html(run, tmp_path / "html").path / "index.html").read_text()
    assert "1 x context server of 4 GPUs" in index and "Data set: synthetic." in index and "top_k 1" in index
    assert "logs/blob" in index and "No figure of search" not in index
    assert "Result not verified by MLCommons Association" in index


def test_index_of_a_failed_run_says_why_there_is_no_verdict(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    (run / "mlperf/performance" / SUMMARY).write_text("")
    index = (export_html(run, tmp_path / "html").path / "index.html").read_text()
    assert "No verdict: " in index and "cut log" in index and index.count("data:image/png") == 2


def test_what_is_shared_says_how_to_repeat_it_and_check_takes_it(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    set_json(run / "manifest.json", git={"url": "https://example.org/x", "commit": "abc123"})
    folder = export_crate(run, tmp_path / "crate").path
    readme = (folder / "README.md").read_text()
    assert (
        "git clone https://example.org/x" in readme
        and "git checkout abc123" in readme
        and "python -m disagg_lib run experiment.yaml" in readme
    )
    e = load_experiment([folder / "experiment.yaml"], {"container": "none"})
    assert (e.engine, e.test_modes, e.account) == ("rehearsal", ("performance",), None)


@pytest.mark.parametrize("text", ["format: 1\nparameters: 3\n", "format: 1\nparameters: {engine: trtllm}\n"])
def test_another_experiment_yaml_is_refused(tmp_path, text):
    (tmp_path / "experiment.yaml").write_text(text)
    with pytest.raises(ParameterError, match="Take it from a run folder"):
        load_experiment([tmp_path / "experiment.yaml"])


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
