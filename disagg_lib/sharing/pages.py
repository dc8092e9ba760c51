"""A run as self-contained pages: executed notebooks, and an index that is the report."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import DisaggError
from ..files import read_json_lines
from ..results.outputs import FIGURES
from ..run.tables import given_parameters, repeat_command
from .executed import executed_analysis
from .report import Report, make_report
from .shared import GatheredRun, Shared, gather, put, write_into

TRADEMARK = (
    "The MLPerf name and logo are registered and unregistered trademarks of MLCommons Association in the United States "
    "and other countries. All rights reserved. Unauthorized use strictly prohibited. See www.mlcommons.org."
)


def export_html(run_dir: Path | str, dest: Path | str) -> Shared:
    """One self-contained page per executed notebook, and index.html, the run's report, which needs none of them.

    A run made in JupyterLab has no executed notebooks: then 05 is executed for the page. Pages load nothing from anywhere:
    pictures are inside, scripts are taken out.

    Raises
    ------
    ExportError : no run folder, or `dest` exists. SecretError : a secret would be in a page.
    """
    run = gather(run_dir)
    notebooks = {Path(name).stem: text for name, text in sorted(run.texts.items()) if name.endswith(".ipynb")}
    left_out = run.left_out
    if not notebooks:
        notebooks, why = executed_analysis(run.folder)
        left_out = (*left_out, *([f"05_analysis.html: {why}"] if why else []))

    def write(draft: Path) -> None:
        for stem, text in notebooks.items():
            put(draft / f"{stem}.html", notebook_page(run.redactor.text(text, f"{stem}.ipynb"), notebooks))
        put(draft / "index.html", _index(run, notebooks))

    path = write_into(dest, write, run.redactor)
    return Shared(path, tuple(run.redactor.listed()), left_out)


# -- pages of notebooks

_TEMPLATE = """
{%- extends 'lab/index.html.j2' -%}
{% block input_group %}<details class="code"><summary>code</summary>{{ super() }}</details>{% endblock %}
{% block data_png scoped %}{{ super() | with_alt(output | get_metadata('alt', 'image/png')) }}{% endblock %}
"""


def notebook_page(notebook: str, pages: Iterable[str] = ()) -> str:
    """An executed notebook as one static page: code folded, light or dark as the reader has it, titled by its heading.

    Parameters
    ----------
    notebook : its JSON text. pages : notebooks that have a page beside this one; links to others are taken out.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    content = nbformat.reads(notebook, 4)
    _name_pictures(content)
    hide = Config({"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ["parameters"]}})
    exporter = HTMLExporter(config=hide, embed_images=True, raw_template=_TEMPLATE)
    # nbconvert 7.17 leaves the alt of a picture's metadata out, then says that there is none
    exporter.register_filter(
        "with_alt", lambda page, alt: page.replace("<img ", f'<img alt="{html.escape(alt)}" ')
    )
    body, _ = exporter.from_notebook_node(content)
    dark = next(
        path for root in exporter.template_paths if (path := Path(root) / "static/theme-dark.css").is_file()
    )
    style = (
        # nbconvert's own rule gives code in Markdown outputs the text's font
        "<style>.jp-OutputArea-output.jp-RenderedMarkdown pre { font-family: var(--jp-code-font-family); }\n"
        "details.code > summary { color: var(--jp-content-font-color2); cursor: pointer; font-size: 13px; margin-left: 8px; }\n"
        "@media (max-width: 640px) { .jp-Notebook { padding: 8px; } .jp-InputPrompt, .jp-OutputPrompt { display: none; } }\n"
        f"@media (prefers-color-scheme: dark) {{ {dark.read_text()} {DARK_PICTURES} }}</style>"
    )
    beside = set(pages)
    body = re.sub(r' href="([^"]+)\.ipynb"', lambda m: f' href="{m[1]}.html"' if m[1] in beside else "", body)
    body = re.sub(r' data-jp-theme-\w+="[^"]*"', "", body)  # the reader's setting decides, not these
    return static_page(body.replace("</head>", f"{style}</head>", 1))


#: figures have a white ground: in the dark it is turned, hues kept
DARK_PICTURES = "img { filter: invert(.9) hue-rotate(180deg); background: white; }"


def _name_pictures(content) -> None:
    """Give the notebook its title, and each picture without an alt the heading that it stands under."""
    heading = ""
    for cell in content.cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE) or [heading])[-1]
            content.metadata.setdefault("title", heading)
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.metadata.setdefault("image/png", {}).setdefault("alt", f"Figure: {heading}")
            if scrap := output.get("data", {}).get("application/scrapbook.scrap.json+json"):
                content.metadata["title"] = (
                    f"{scrap['data'].get('title', '')} · {content.metadata['title']}".strip(" ·")
                )


def static_page(page: str) -> str:
    """Without scripts and without anything that a browser would fetch."""
    page = re.sub(r"<script\b.*?</script\s*>", "", page, flags=re.DOTALL | re.IGNORECASE)
    return re.sub(r"<link\b[^>]*>", "", page, flags=re.IGNORECASE)


# -- the report, with all that belongs to it


def _index(run: GatheredRun, notebooks: Iterable[str]) -> str:
    """The run's report on one page, redacted, its figures inside."""
    report, pictures = make_report(run.folder), []
    for name, draw in FIGURES.items():
        try:
            picture = io.BytesIO()
            draw(run.folder).savefig(picture, format="png", dpi=110)
        except DisaggError:  # a figure that this run cannot have: no search, no job, no token latencies
            continue
        data = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
        pictures.append({"name": name, "data": data, "alt": figure_alt(name, run.folder, report)})
    page = report.html(
        page=True,
        pictures=pictures,
        given=given_parameters(run.folder),
        versions=_versions(run),
        repeat=repeat_command(run.folder),
        notebooks=list(notebooks),
        footnote="",
    )
    page = run.redactor.text(static_page(page), "index.html")
    return page.replace("</section>", f'<p class="note">{_footnote(run, report)}</p></section>', 1)


def figure_alt(name: str, run: Path, report: Report) -> str:
    """What a figure shows, as a finding."""
    bars = {bar.name: bar.finding for bar in report.bars}
    if name == "latency":
        return "TTFT and TPOT over all queries. " + "; ".join(list(bars.values())[:2])
    if name == "timeline":
        phases = read_json_lines(run / "job/phases.jsonl")
        took = phases[-1]["time_s"] - phases[0]["time_s"] if phases else 0
        open_ = max(
            (row.get("outstanding", 0) for row in read_json_lines(run / "job/progress.jsonl")), default=0
        )
        end = phases[-1]["phase"] if phases else "no phases"
        return f"The run over time: {end} after {took:.0f} s; at most {open_} queries outstanding"
    if name == "search":
        rows = read_json_lines(run / "job/find_target_qps.jsonl")
        best = max((row["qps"] for row in rows if row.get("valid")), default=None)
        return f"The search for the target QPS: {len(rows)} trials, highest VALID {best or 'none'}"
    if name == "topology":
        return "Topology: " + (
            f"{report.tiles[2][2]} on {report.tiles[2][0]} GPUs" if report.tiles else report.name
        )
    return f"Throughput against interactivity: this run, {report.tiles[0][2]}, among the published ones"


def figure_images(names: Iterable[str], run: Path, report: Report, written: Mapping[str, Path]) -> list:
    """Figures that were written, for a notebook: 900 px wide, each with its finding as its alt text."""
    from IPython.display import Image

    return [Image(written[n], width=900, alt=figure_alt(n, run, report)) for n in names if n in written]


def _versions(run: GatheredRun) -> str:
    manifest = json.loads(run.texts.get("manifest.json", "{}"))
    versions = {**manifest.get("versions", {}), "commit": (manifest.get("git") or {}).get("commit")}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _footnote(run: GatheredRun, report: Report) -> str:
    """Who vouches for it, whose name MLPerf is, and what was replaced."""
    marks = ", ".join(sorted({item["placeholder"] for item in run.redactor.listed()}))
    verified = "" if report.source == "published" else "Result not verified by MLCommons Association. "
    return f"{verified}{TRADEMARK} Names and paths of the site are replaced by: {marks or 'nothing'}."


def run_summary(run: GatheredRun, file: str, pictures: Mapping[str, str], notebooks: Iterable[str],
                left_out: Iterable[str] = ()) -> str:  # fmt: skip
    """The report in Markdown, redacted: the card, figures, what was run, how to repeat it, what is not here.

    Parameters
    ----------
    pictures : name of a figure -> its file. notebooks, left_out : files.
    """
    report = make_report(run.folder)
    rows = [
        f"| {name} | `{value}` | {where} |".replace("\n", " ")
        for name, value, where in given_parameters(run.folder)
    ]
    parts = [
        report.markdown(),
        *(f"![{figure_alt(name, run.folder, report)}]({picture})" for name, picture in pictures.items()),
        "## What was run", "\n".join(["| parameter | value | from |", "|---|---|---|", *rows]), _versions(run),
        "## How to repeat it", f"    {repeat_command(run.folder)}",
        "## The notebooks, executed", "\n".join(f"- [{Path(name).stem}]({name})" for name in notebooks),
        "## What is not here" if left_out else "", "\n".join(f"- `{item}`" for item in left_out),
    ]  # fmt: skip
    text = run.redactor.text("\n\n".join(filter(None, parts)), file)
    return f"{text}\n\n{_footnote(run, report)}\n"
