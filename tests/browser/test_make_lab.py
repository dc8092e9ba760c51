"""`make lab` as a newcomer types it: it opens 00, and nothing lies over it."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SCREENSHOTS, free_port, wait_for_answer

from disagg_lib.files import REPOSITORY

pytestmark = pytest.mark.skipif(
    not shutil.which("make") or not Path(sys.prefix, ".installed").exists(),
    reason="`make` is absent, or this Python is not one that the Makefile set up",
)


@pytest.fixture
def address(tree, tmp_path):
    """Where `make lab` serves a fresh copy of the project, with a newcomer's empty settings."""
    clone, port, token = tmp_path / "project", free_port(), secrets.token_hex(16)
    shutil.copytree(tree, clone)
    shutil.copy2(REPOSITORY / "Makefile", clone)
    (clone / ".venv").symlink_to(sys.prefix)
    root = " --allow-root" if os.geteuid() == 0 else ""
    options = f"--no-browser --ServerApp.port={port} --ServerApp.port_retries=0 --IdentityProvider.token={token}{root}"
    folders = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    with (tmp_path / "lab.log").open("wb") as log:
        # -o: the environment is this one, whose stamp is older than the copy's files
        process = subprocess.Popen(
            ["make", "-o", ".venv/.installed", "lab", f"LAB_OPTIONS={options}"], cwd=clone, stdout=log, stderr=log,
            env={**os.environ, **folders, "PYTHONPATH": str(clone)}, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for_answer(f"http://127.0.0.1:{port}/api", process, tmp_path / "lab.log")
        yield f"http://127.0.0.1:{port}/?token={token}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def test_make_lab_opens_00_and_asks_nothing(address, browser):
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.goto(address)
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for(timeout=60_000)
    page.wait_for_timeout(3000)  # JupyterLab asks about news some time after it has opened
    assert page.locator(".lm-TabBar-tab.lm-mod-current", has_text="00_setup.ipynb").count() == 1
    assert page.locator(".jp-Dialog, .Toastify__toast").all_text_contents() == []
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "make_lab.png")
    page.context.close()
