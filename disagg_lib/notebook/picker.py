"""05's picker of runs to compare."""

import contextlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

import ipywidgets as ipw
from IPython.display import display

from ..errors import DisaggError
from ..results.figures import figure_interactivity, figure_latency_distributions
from ..results.published import beside_published
from ..results.rows import format_table, runs_table, table_cells
from ..serving.figures import as_image
from .elements import MUTED, WIDE, Latest, html_box, lines_html, message_html, show
from .live import front_end_is_live
from .opening import runs_to_pick


def _table_html(cells: Sequence[Sequence[str]]) -> str:
    """Text cells as a table whose headings are its first line and column."""
    style = 'style="text-align:left;white-space:normal;min-width:110px;vertical-align:top;padding:2px 14px 2px 0;line-height:1.4"'
    rows = "".join(
        "<tr>"
        + "".join(
            f"<{'td' if x and y else 'th'} {style}>{escape(c)}</{'td' if x and y else 'th'}>"
            for x, c in enumerate(row)
        )
        + "</tr>"
        for y, row in enumerate(cells)
    )
    return f'<div style="overflow-x:auto"><table>{rows}</table></div>'


def picked_html(runs: Sequence[Path]) -> str:
    """Table and figures of some runs, to be made in a thread."""
    if not runs:
        return "Tick a run."
    table = runs_table(runs)
    cells = table_cells(table)
    parts = [_table_html(cells)] if cells else []
    parts += [message_html(f"{row.folder}: {row.error}") for row in table[table["error"] != ""].itertuples()]
    figures = []
    with contextlib.suppress(DisaggError):  # no run could be read: the lines above say why
        beside, words = beside_published(table)
        figures.append(figure_interactivity(beside))
        parts.append(lines_html(words))
    for run in runs[:4]:
        with contextlib.suppress(DisaggError):
            figures.append(figure_latency_distributions(run))
    for figure in figures:
        picture = as_image(figure)._repr_mimebundle_()[0]["image/png"]
        parts.append(f'<img src="data:image/png;base64,{picture}" style="max-width:100%" alt="{escape(figure.get_suptitle(), quote=True)}">')  # fmt: skip
    return "".join(parts)


def run_picker(run: Path) -> None:
    """Live: tick runs, table and figures follow. Headless: the table and the figure of this run alone."""
    if not front_end_is_live():
        table = runs_table([run])
        print(format_table(table))
        if table_cells(table):
            beside, words = beside_published(table)
            print(words)
            display(as_image(figure_interactivity(beside)))
        return
    runs = runs_to_pick(run)
    ticks = [ipw.Checkbox(path == run.resolve(), description=path.name, indent=False, layout=WIDE) for path in runs]  # fmt: skip
    shown = html_box()
    latest = Latest(picked_html, lambda html: setattr(shown, "value", html), rest_s=0.2)

    def redraw(_=None):
        chosen = [path for path, tick in zip(runs, ticks, strict=True) if tick.value]
        shown.value = f'<span style="{MUTED}">reading {len(chosen)} runs ...</span>'
        latest.start(chosen)

    for tick in ticks:
        tick.observe(redraw, "value")
    redraw()
    listed = ipw.VBox(ticks, layout=ipw.Layout(max_height="200px", overflow="auto", width="100%"))
    box = ipw.VBox([listed, shown], layout=WIDE)
    box.add_class("disagg-picker")
    show(box, "Runs to compare: run the cell to tick them")
