"""python -m disagg_lib.notebook.lab: what `make lab` sets up on this machine before JupyterLab starts.

Git reads notebooks/ through `clean`, and each save that changed no source is made known to git's index (which takes another
size for a change without looking), so that JupyterLab's autosave changes nothing that git sees. JupyterLab asks nobody
whether it may fetch news. All is of this clone and this environment alone.
"""

import json
import subprocess
import sys
from pathlib import Path

from ..files import REPOSITORY
from .clean import clean_text

FILTER = "disagg-notebooks"
ATTRIBUTE = f"notebooks/*.ipynb filter={FILTER}"
NO_NEWS = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}


def _git(*words: str) -> str | None:
    """Git's answer, None where this is no clone."""
    done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def filter_notebooks() -> None:
    """The clean filter in .git/config, and the files that it is for in .git/info/attributes."""
    place = _git("rev-parse", "--git-path", "info/attributes")
    if place is None:
        return
    _git("config", f"filter.{FILTER}.clean", f'"{sys.executable}" -m disagg_lib.notebook.clean')
    attributes = REPOSITORY / place
    text = attributes.read_text() if attributes.exists() else ""
    if ATTRIBUTE not in text.splitlines():
        attributes.parent.mkdir(exist_ok=True)
        attributes.write_text(f"{text}{ATTRIBUTE}\n")


def after_save(model: dict, os_path: str, contents_manager=None, **_) -> None:
    """JupyterLab's hook: outputs alone are no change; what somebody edited is, and stays as it is."""
    path = Path(os_path)
    if model["type"] != "notebook" or path.parent != REPOSITORY / "notebooks":
        return
    name = path.relative_to(REPOSITORY).as_posix()
    if _git("show", f":{name}") == clean_text(path.read_text(encoding="utf-8")).strip():
        _git("update-index", "--", name)


def ask_for_no_news(prefix: Path = Path(sys.prefix)) -> None:
    """JupyterLab's settings of this environment; what else stands there stays."""
    path = prefix / "share/jupyter/lab/settings/overrides.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings | NO_NEWS, indent=1) + "\n")


if __name__ == "__main__":
    filter_notebooks()
    ask_for_no_news()
