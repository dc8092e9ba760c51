"""A rehearsal from 04: started, watched, left, found again, cancelled; then two runs ticked in 05."""

import json
import os
import subprocess
import sys

import psutil
import pytest
from conftest import SMALL, axe_violations

MAKE = """
import json, sys
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.run.writing import create_run
from disagg_lib.cluster import follow, launch
given = json.loads(sys.argv[1])
for _ in range(int(sys.argv[2])):
    run = create_run(load_experiment(given=given))
    if sys.argv[3] == "finish":
        launch.submit(run)
        follow.watch(run, out=lambda line: None)
print(run)
"""


def make_runs(tree, given, count=1, then="leave"):
    """Run folders in the copy's results/, by its own library; the newest's path."""
    done = subprocess.run([sys.executable, "-c", MAKE, json.dumps(given), str(count), then], cwd=tree, text=True, check=True,
                          capture_output=True, timeout=240, env=os.environ | {"PYTHONPATH": str(tree)})  # fmt: skip
    return tree / "results" / os.path.basename(done.stdout.split()[-1])


def phases(run):
    path = run / "job/phases.jsonl"
    return [json.loads(line)["phase"] for line in path.read_text().splitlines()] if path.exists() else []


def bar(opened):
    return int(opened.page.locator(".disagg-monitor progress").get_attribute("value", timeout=90_000))


@pytest.fixture
def run(tree):
    """A run whose job takes some minutes if nobody cancels it."""
    run = make_runs(tree, SMALL | {"rehearsal_queries": 3000})
    yield run
    record = run / "job/job.json"
    if record.exists() and psutil.pid_exists(pid := int(json.loads(record.read_text())["job_id"])):
        psutil.Process(pid).terminate()


def test_04_shows_the_job_live_and_finds_it_again_after_a_reload(notebook, run):
    opened = notebook("04_launch")
    opened.run_all()
    assert "done" not in phases(run), "no cell waited for the job"
    opened.refuse_ugliness()
    first = bar(opened)
    opened.page.wait_for_timeout(4000)
    assert bar(opened) > first, "the bar moves"
    opened.page.locator('.disagg-monitor li[data-state="now"]', has_text="performance").wait_for()
    opened.page.wait_for_timeout(4000)
    opened.screenshots("monitor", ".disagg-monitor")
    assert axe_violations(opened.page, ".disagg-monitor") == []
    opened.page.get_by_role("tab", name="workers").click()
    opened.page.locator(".disagg-monitor").get_by_text("logs/output_workers.log").wait_for()
    opened.page.get_by_role("link", name="Open run folder").click()
    opened.page.locator(".jp-BreadCrumbs", has_text=run.name).wait_for()

    opened.open()  # reload the page
    assert "failed" not in phases(run)[-1]
    opened.run_all()
    opened.page.get_by_role("button", name="Attach").click()
    first = bar(opened)
    opened.page.wait_for_timeout(4000)
    assert bar(opened) > first, "attached again"

    opened.page.get_by_role("button", name="Cancel", exact=True).click()
    sure = opened.page.get_by_role("button", name="Really cancel? Press again")
    sure.wait_for()
    assert phases(run)[-1] == "performance", "asked once, nothing done"
    sure.click()
    opened.page.locator('.disagg-monitor li[data-state="failed"]').last.wait_for()
    assert phases(run)[-1].startswith("failed: cancelled")
    opened.page.locator(".disagg-monitor").get_by_text("Next: 05_analysis").wait_for()
    opened.screenshots("cancelled", ".disagg-monitor")
    opened.close()


def test_05_compares_the_runs_that_are_ticked(notebook, tree):
    quick = SMALL | {"rehearsal_time_scale": 0.05, "server_target_qps": 40.0, "rehearsal_queries": 60, "test_modes": ["performance"]}  # fmt: skip
    make_runs(tree, quick, count=2, then="finish")
    opened = notebook("05_analysis")
    opened.run_all()
    opened.refuse_ugliness()
    picker = opened.page.locator(".disagg-picker")
    picker.locator("td", has_text="rehearsed").first.wait_for()
    picker.locator("img").nth(1).wait_for()
    assert picker.locator("img").count() == 2
    picker.get_by_role("checkbox").nth(1).check()
    picker.locator("img").nth(2).wait_for()
    heads = picker.locator("tr").first.text_content()
    assert heads.count("rehearsal") == 2, heads
    opened.page.wait_for_timeout(500)
    assert "second against first" in heads
    assert axe_violations(opened.page, ".disagg-picker") == []
    opened.screenshots("two_runs", ".disagg-picker")
    opened.close()


def test_05_takes_a_run_with_a_result_not_the_newest_folder(notebook, tree, run):
    opened = notebook("05_analysis")
    opened.run_all()
    opened.refuse_ugliness()
    words = "REHEARSAL on this machine, no GPU · "
    assert words in opened.output() and words + run.name not in opened.output()
    choice = opened.page.get_by_label("run", exact=True)
    assert choice.locator("option", has_text=f"{run.name}: not submitted").count() == 1
    choice.select_option(index=1)
    opened.page.get_by_role("link", name="Run all cells").wait_for()
