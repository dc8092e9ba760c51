"""All notebooks, Run All in a real JupyterLab, saved as it saves: git sees no change; axe-core finds nothing."""

import subprocess

import pytest
from conftest import axe_violations
from test_job_monitor import run  # noqa: F401, a fixture

from disagg_lib.notebook.run_all import CHAIN


def saved(opened):
    opened.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    opened.page.wait_for_function("() => !window.jupyterapp.shell.currentWidget.context.model.dirty")


@pytest.mark.parametrize("name", CHAIN)
def test_run_all_and_save_leave_git_clean(notebook, tree, name, request):
    """04 starts a job, 05 then reads the newest run with a result: the example, whose files git knows."""
    if name == "04_launch":
        request.getfixturevalue("run")
    opened = notebook(name)
    opened.run_all(timeout_s=240)
    opened.refuse_ugliness()
    saved(opened)
    status = subprocess.run(
        ["git", "status", "--porcelain"], cwd=tree, capture_output=True, text=True, check=True
    )
    assert status.stdout == ""
    text = (tree / f"notebooks/{name}.ipynb").read_text()
    assert '"output_type"' in text, "outputs are kept on the disk"
    opened.close()


@pytest.mark.parametrize(
    ("name", "part"), [("00_setup", ".disagg-site"), ("03_configuration", ".disagg-topology")]
)
def test_axe_finds_nothing_in_the_forms_in_both_themes(notebook, name, part):
    opened = notebook(name)
    opened.run_all()
    for dark in (False, True):
        opened.theme(dark)
        opened.page.wait_for_timeout(500)
        assert axe_violations(opened.page, part) == []
    opened.screenshots("after_axe", part)
    opened.close()
