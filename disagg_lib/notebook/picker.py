"""05's picker of runs to compare."""

import contextlib
import math
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
from .elements import WIDE, Latest, html_box, lines_html, message_html, muted_html, show
from .live import front_end_is_live
from .opening import runs_to_pick

CELL = "white-space:normal;min-width:110px;vertical-align:top;padding:2px 14px 2px 0;line-height:1.4"
LIMIT_OF = {"TTFT p99 ms": "TTFT limit ms", "TPOT p99 ms": "TPOT limit ms"}  # headings of table_cells


def _number(text: str) -> float:
    """What a cell holds; nan for words."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def with_difference(cells: Sequence[Sequence[str]]) -> list[list[str]]:
    """The table of two runs with a column of how far the second lies from the first, in percent of the first."""
    heading, *lines = cells
    if len(heading) != 3:
        return [list(line) for line in cells]
    told = [[*heading, "second against first"]]
    for name, *figures in lines:
        first, second = map(_number, figures)
        compared = name not in LIMIT_OF.values() and first and math.isfinite(first + second)
        share = f"{100 * (second / first - 1):+.1f} %" if compared else ""
        told.append([name, *figures, share])
    return told


def over_limit(cells: Sequence[Sequence[str]]) -> set[tuple[str, int]]:
    """The cells (heading, column) whose figure is above its limit."""
    lines = {line[0]: line[1:] for line in cells}
    found = set()
    for name, limit in LIMIT_OF.items():
        pairs = zip(lines.get(name, ()), lines.get(limit, ()), strict=False)
        found |= {(name, x) for x, pair in enumerate(pairs, 1) if _number(pair[0]) > _number(pair[1])}
    return found


def _table_html(cells: Sequence[Sequence[str]]) -> str:
    """Text cells as a table whose headings are its first line and column; numbers to the right, over-limit ones marked."""
    over = over_limit(cells)
    lines = []
    for y, row in enumerate(with_difference(cells)):
        line = ""
        for x, cell in enumerate(row):
            tag = "td" if x and y else "th"
            side = "right" if x and cell[-1:] in "0123456789%" else "left"
            style = f"{CELL};text-align:{side}"
            if (row[0], x) in over:
                style, cell = f"{style};font-weight:bold", f"{cell} over its limit"
            line += f'<{tag} style="{style}">{escape(cell)}</{tag}>'
        lines.append(f"<tr>{line}</tr>")
    return f'<div style="overflow-x:auto"><table>{"".join(lines)}</table></div>'


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
        shown.value = muted_html(f"reading {len(chosen)} runs ...")
        latest.start(chosen)

    for tick in ticks:
        tick.observe(redraw, "value")
    redraw()
    listed = ipw.VBox(ticks, layout=ipw.Layout(max_height="200px", overflow="auto", width="100%"))
    box = ipw.VBox([listed, shown], layout=WIDE)
    box.add_class("disagg-picker")
    show(box, "Runs to compare: run the cell to tick them")
