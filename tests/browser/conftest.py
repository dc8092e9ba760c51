"""A real JupyterLab on a copy of the project, and Debian's Chromium to look at it."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from disagg_lib.files import REPOSITORY
from disagg_lib.notebook.clean import clean_text

CHROMIUM = "/usr/bin/chromium"
SCREENSHOTS = REPOSITORY / "build/screenshots"  # ignored by git
SMALL = {  # a rehearsal of about 40 s that is VALID or not as it likes
    "num_ctx_servers": 1,
    "rehearsal_time_scale": 0.1,
    "server_target_qps": 20.0,
    "rehearsal_queries": 500,
    "rehearsal_accuracy_samples": 10,
    "rehearsal_output_tokens": 8,
}


def _missing() -> str:
    try:
        import axe_playwright_python  # noqa: F401
        import playwright  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed: make test-browser installs it"
    return (
        "" if Path(CHROMIUM).exists() else f"no {CHROMIUM}: make test-browser installs it when root on Debian"
    )


def pytest_collection_modifyitems(items):
    reason = _missing()
    for item in items:
        if reason and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_answer(url: str, process: subprocess.Popen, log: Path) -> None:
    """Until a server answers; its log if it ended before, or takes more than a minute."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)


class Lab:
    """The server: its tree, its address, and its token."""

    def __init__(self, tree: Path):
        self.tree, self.token, self.port = tree, secrets.token_hex(16), free_port()
        environment = {k: v for k, v in os.environ.items() if k != "DISAGG_LIVE"} | {
            "PYTHONPATH": str(tree),  # the copy's library, whose results go to the copy's results/
            "JUPYTER_CONFIG_DIR": str(tree.parent / "jupyter/config"),
            "JUPYTER_DATA_DIR": str(tree.parent / "jupyter/data"),
            "JUPYTER_RUNTIME_DIR": str(tree.parent / "jupyter/runtime"),
        }
        words = [
            *(sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={self.port}"),
            *("--ServerApp.port_retries=0", f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={tree}"),
            "--LabApp.expose_app_in_browser=True",
            "--FileContentsManager.post_save_hook=disagg_lib.notebook.lab.after_save",
            *(["--allow-root"] if os.geteuid() == 0 else []),
        ]  # fmt: skip
        # JupyterLab asks everyone once whether it may fetch news.
        settings = tree.parent / "jupyter/config/lab/user-settings/@jupyterlab/apputils-extension"
        settings.mkdir(parents=True)
        (settings / "notification.jupyterlab-settings").write_text(
            '{"fetchNews": "false", "checkForUpdates": false}'
        )
        self.log = (tree.parent / "lab.log").open("wb")
        self.process = subprocess.Popen(
            words, cwd=tree, env=environment, stdout=self.log, stderr=subprocess.STDOUT
        )

    def wait(self) -> None:
        wait_for_answer(f"http://127.0.0.1:{self.port}/api", self.process, Path(self.log.name))

    def url(self, path: str, workspace: str) -> str:
        return f"http://127.0.0.1:{self.port}/lab/workspaces/{workspace}/tree/{path}?token={self.token}&reset"

    def api(self, path: str, method: str = "GET") -> bytes:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api/{path}", method=method)
        request.add_header("Authorization", f"token {self.token}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def axe_violations(page, selector: str) -> list[str]:
    """What axe-core finds in a part of a page: rule and element, one a line."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, context={"include": [[selector]]}).response["violations"]
    return [f"{rule['id']}: {node['html'][:160]}" for rule in found for node in rule["nodes"]]


def set_parameters(notebook: Path, given: dict) -> None:
    """Edit a notebook's parameters cell as a person would."""
    content = json.loads(notebook.read_text())
    cell = next(c for c in content["cells"] if "parameters" in c["metadata"].get("tags", []))
    lines = "".join(cell["source"]).splitlines()
    for name, value in given.items():
        place = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
        lines[place] = f"{name} = {value!r}"
    cell["source"] = "\n".join(lines).splitlines(keepends=True)
    notebook.write_text(clean_text(json.dumps(content)))


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A copy of what a person has after `git clone`, with the library's compiled code."""
    tree = tmp_path_factory.mktemp("browser") / "project"
    tree.mkdir()
    for name in ("disagg_lib", "notebooks", "params", "results", "requirements.lock", "pyproject.toml"):
        source = REPOSITORY / name
        if source.is_dir():
            ignore = shutil.ignore_patterns(
                "20*", ".draft-*", ".notebooks-*", ".ipynb_checkpoints", "site.yaml*"
            )
            shutil.copytree(source, tree / name, ignore=ignore)
        else:
            shutil.copy2(source, tree / name)
    set_parameters(
        tree / "notebooks/03_configuration.ipynb", {"params_files": ["params/rehearsal.yaml"], **SMALL}
    )
    shutil.copy2(REPOSITORY / ".gitignore", tree)
    for words in (("init", "-q"), ("add", "-A"), ("-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "cloned")):  # fmt: skip
        subprocess.run(["git", *words], cwd=tree, check=True)
    prepare = "from disagg_lib.notebook import lab; lab.filter_notebooks()"
    subprocess.run(
        [sys.executable, "-c", prepare], cwd=tree, check=True, env=os.environ | {"PYTHONPATH": str(tree)}
    )
    return tree


@pytest.fixture(scope="session")
def lab(tree):
    lab = Lab(tree)
    try:
        lab.wait()
        yield lab
    finally:
        lab.stop()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])  # fmt: skip
        yield browser
        browser.close()


class Notebook:
    """A notebook open in JupyterLab."""

    def __init__(self, lab: Lab, browser, name: str, width: int = 1280):
        self.lab, self.name = lab, name
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.open()

    def open(self) -> None:
        """Load the page and wait for the kernel."""
        self.page.goto(self.lab.url(f"notebooks/{self.name}.ipynb", self.name))
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        self.page.wait_for_function(
            """() => {
              const session = window.jupyterapp.shell.currentWidget?.sessionContext;
              return session?.isReady && session.session?.kernel?.status === 'idle';
            }"""
        )

    def command(self, name: str, arguments: dict | None = None) -> None:
        """A command of JupyterLab, as its menus would send it."""
        self.page.evaluate(
            "([name, arguments]) => { window.jupyterapp.commands.execute(name, arguments); }",
            [name, arguments or {}],
        )

    def run_all(self, timeout_s: float = 180) -> None:
        """Run > Run All Cells, and wait until the kernel has run the last one and its widgets stand."""
        self.command("notebook:run-all-cells")
        self.page.wait_for_function(
            """() => {
              const cells = window.jupyterapp.shell.currentWidget.content.widgets.map(widget => widget.model);
              const code = cells.filter(cell => cell.type === 'code' && cell.sharedModel.getSource());
              const loading = [...document.querySelectorAll('.jp-OutputArea-output')].some(o => o.textContent === 'Loading widget...');
              return code.length && code.every(cell => cell.executionCount && cell.executionState !== 'running') && !loading ||
                document.querySelector('.jp-RenderedText[data-mime-type*="error"]');
            }""",
            timeout=1000 * timeout_s,
        )

    def output(self) -> str:
        """All outputs' text. Not innerText: JupyterLab leaves cells out of sight unrendered, where that is empty."""
        return "\n".join(self.page.locator(".jp-OutputArea-output").all_text_contents())

    def refuse_ugliness(self) -> None:
        """No traceback, no word on stderr, no repr of a widget or a picture."""
        for mime in ("error", "stderr"):
            found = self.page.locator(f'.jp-RenderedText[data-mime-type*="{mime}"]').all_text_contents()
            assert found == [], found
        for ugly in (
            "VBox(",
            "HTML(value",
            "<IPython.core",
            "Error displaying widget",
            "Traceback",
            "Text(value=",
        ):
            assert ugly not in self.output()

    def theme(self, dark: bool) -> None:
        self.command("apputils:change-theme", {"theme": f"JupyterLab {'Dark' if dark else 'Light'}"})
        self.page.wait_for_selector(f'body[data-jp-theme-light="{str(not dark).lower()}"]', state="attached")

    def screenshots(self, what: str, selector: str | None = None) -> None:
        """At both widths, light and dark; the selector is scrolled into sight first."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        for dark in (False, True):
            self.theme(dark)
            for width in (1280, 1920):
                self.page.set_viewport_size({"width": width, "height": 1000})
                if selector:
                    self.page.locator(selector).first.evaluate("e => e.scrollIntoView({block: 'start'})")
                self.page.wait_for_timeout(300)
                name = f"{self.name}_{what}_{width}_{'dark' if dark else 'light'}.png"
                self.page.screenshot(path=SCREENSHOTS / name)

    def close(self) -> None:
        """Close the page and end its kernel: it would take the next test's time."""
        if self.page.is_closed():
            return
        self.context.close()
        for session in json.loads(self.lab.api("sessions")):
            if session["path"] == f"notebooks/{self.name}.ipynb":
                self.lab.api(f"sessions/{session['id']}", "DELETE")


@pytest.fixture(scope="module")
def notebook(lab, browser):
    """notebook(name): opens it; all are closed at the end of the module."""
    opened = []

    def open_(name: str) -> Notebook:
        opened.append(Notebook(lab, browser, name))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()
