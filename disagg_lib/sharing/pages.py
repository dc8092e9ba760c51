"""A run as self-contained pages: executed notebooks and an index."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from textwrap import indent

from ..files import read_json
from ..results.found import folder_source
from ..results.logs import LogError
from ..results.outputs import FIGURES
from ..results.rows import format_table, runs_table, verdict_text
from ..run.tables import given_parameters
from .shared import GatheredRun, Shared, gather, put, write_into


def export_html(run_dir: Path | str, dest: Path | str) -> Shared:
    """One self-contained page per executed notebook, index.html of the run, which needs none of them, and experiment.yaml.

    Pages load nothing from anywhere: pictures are inside, scripts are taken out.

    Raises
    ------
    ExportError : no run folder, or `dest` exists. SecretError : a secret would be in a page.
    """
    run = gather(run_dir)
    notebooks = {Path(name).stem: name for name in sorted(run.texts) if name.endswith(".ipynb")}

    def write(draft: Path) -> None:
        for stem, name in notebooks.items():
            put(draft / f"{stem}.html", notebook_page(run.redactor.text(run.texts[name], name), notebooks))
        put(draft / "index.html", _index(run, notebooks))
        put(draft / "experiment.yaml", run.redactor.text(run.texts["experiment.yaml"], "experiment.yaml"))

    path = write_into(dest, write, run.redactor)
    return Shared(path, tuple(run.redactor.listed()), run.left_out)


def notebook_page(notebook: str, pages: Iterable[str] = ()) -> str:
    """An executed notebook as one static page that follows the reader's light or dark setting.

    Parameters
    ----------
    notebook : its JSON text. pages : notebooks that have a page beside this one; links to others are taken out.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    hide = Config({"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ["parameters"]}})
    exporter = HTMLExporter(config=hide, embed_images=True)
    body, _ = exporter.from_notebook_node(nbformat.reads(notebook, 4))
    dark = next(
        path for root in exporter.template_paths if (path := Path(root) / "static/theme-dark.css").is_file()
    )
    style = (
        # nbconvert's own rule gives code in Markdown outputs the text's font
        "<style>.jp-OutputArea-output.jp-RenderedMarkdown pre { font-family: var(--jp-code-font-family); }\n"
        f"@media (prefers-color-scheme: dark) {{ {dark.read_text()} img {{ background: white; }} }}</style>"
    )
    beside = set(pages)
    body = re.sub(r' href="([^"]+)\.ipynb"', lambda m: f' href="{m[1]}.html"' if m[1] in beside else "", body)
    return static_page(body.replace("</head>", f"{style}</head>", 1))


def static_page(page: str) -> str:
    """Without scripts and without anything that a browser would fetch."""
    page = re.sub(r"<script\b.*?</script\s*>", "", page, flags=re.DOTALL | re.IGNORECASE)
    return re.sub(r"<link\b[^>]*>", "", page, flags=re.IGNORECASE)


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
pre, table { font: 13px/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; }
td, th { text-align: left; padding: 0 1.2em 0 0; vertical-align: top; }
img { max-width: 100%; margin: 1rem 0; background: white; } .anchor-link { display: none; }
"""


def _index(run: GatheredRun, notebooks: Iterable[str]) -> str:
    """The run on one page, its figures inside."""
    from nbconvert.filters import markdown2html

    pictures = []
    for title, draw in FIGURES.items():
        try:
            picture = io.BytesIO()
            draw(run.folder).savefig(picture, format="png", dpi=110)
            data = base64.b64encode(picture.getvalue()).decode()
            pictures.append(f"![{title}](data:image/png;base64,{data})")
        except LogError as error:
            if error.case != "missing_file":  # what such a run does not have is no news
                pictures.append(f"    No figure of {title}: {error}")
    text = run_summary(run, "index.html", pictures, [f"{stem}.html" for stem in notebooks], run.left_out)
    title = html.escape(text.split("\n", 1)[0].strip("# "))
    head = f"<meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'>{head}{static_page(markdown2html(text))}"


_REHEARSED = """No GPU was there: a stand-in served at the modelled GPUs' pace; the processes, HTTP and LoadGen were real."""


def _settings_words(settings: dict) -> str:
    """Layout, data set and decoding, which no parameter says by itself."""
    client, servers = settings.get("client", {}), settings.get("servers", [])
    roles = [f"{server['role']} server of {len(server['ranks'])} GPUs" for server in servers]
    decoding = ("min_output_tokens", "max_output_tokens", "temperature", "top_p", "top_k")
    parts = {
        "Layout": ", ".join(f"{roles.count(role)} x {role}" for role in dict.fromkeys(roles)),
        "Data set": client.get("data_set", {}).get("kind", ""),
        "Decoding": ", ".join(f"{name} {client[name]}" for name in decoding if name in client),
    }
    return " ".join(f"{name}: {words}." for name, words in parts.items() if words)


def how_to_repeat(run: GatheredRun, experiment: str) -> str:
    """Commands that make the run again from the shared `experiment`, indented."""
    git = read_json(run.folder / "manifest.json").get("git") or {}
    where = [f"git clone {git['url']}"] if git.get("url") else []
    where += [f"git checkout {git['commit']}  # of this package"] if git.get("commit") else []
    return indent("\n".join([*where, shlex.join(["python", "-m", "disagg_lib", "run", experiment])]), "    ")


def run_summary(
    run: GatheredRun,
    file: str,
    pictures: Iterable[str],
    notebooks: Iterable[str],
    left_out: Iterable[str] = (),
) -> str:
    """The run in Markdown, redacted: verdict, table, figures, what was run, how to repeat it, what was replaced."""
    source = folder_source(run.folder)
    try:
        verdict = verdict_text(run.folder)
        table = format_table(runs_table([run.folder]))
    except LogError as error:
        verdict, table = f"No verdict: {error}", ""
    rows = [
        f"| {name} | `{value}` | {where} |".replace("\n", " ")
        for name, value, where in given_parameters(run.folder)
    ]
    manifest = json.loads(run.texts.get("manifest.json", "{}"))
    git = manifest.get("git") or {}
    versions = {**manifest.get("versions", {}), "repository": git.get("url"), "commit": git.get("commit")}
    parts = [
        f"# {run.folder.resolve().name} ({source})",
        f"**source: {source}.** {_REHEARSED if source == 'rehearsed' else ''}",
        "## The verdict", indent(verdict, "    "),
        "## The figures", indent(table, "    "), *pictures,
        "## What was run", "\n".join(["| parameter | value | from |", "|---|---|---|", *rows]),
        _settings_words(read_json(run.folder / "job/settings.json")),
        ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "## How to repeat it", how_to_repeat(run, "experiment.yaml"),
        "Its paths and names of the site are left out: give your own in a second file, such as params/site.yaml.",
        "## The notebooks, executed", "\n".join(f"- [{Path(name).stem}]({name})" for name in notebooks),
        "## What is not here" if left_out else "", "\n".join(f"- `{item}`" for item in left_out),
    ]  # fmt: skip
    text = run.redactor.text("\n\n".join(filter(None, parts)), file)
    marks = ", ".join(sorted({item["placeholder"] for item in run.redactor.listed()}))
    return f"{text}\n\nNames and paths of the site are replaced by: {marks or 'nothing'}.\n"
