"""One run on one card: the verdict, why, four figures, the limits, other runs, one line to paste.

Pure: a run folder in, an HTML text out that needs no script, nothing from elsewhere, and follows the reader's light or
dark setting. 05, index.html, the monitor, the picker and `run` show this one card; no word of it is written twice.
"""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..results.found import folder_source
from ..results.logs import LogError
from ..results.outputs import result_values, verdict_word
from ..results.rows import RunResult, read_result, result_row
from .beside import beside_rows
from .findings import (
    Bar,
    bars_of,
    cause_of,
    limits_note,
    no_result,
    paste_line,
    proviso_of,
    remedy_of,
    tiles_of,
    unfinished,
    what_served,
)

MODELS = {"llama3.1-405b": "Llama-3.1-405B"}
PILLS = {
    "measured": "measured; not verified by MLCommons",
    "rehearsed": "rehearsed: no GPU was used",
    "published": "published by MLCommons",
    "simulated": "simulated: a model's word",
}


@dataclass(frozen=True)
class Report:
    """What the card says, in words and shares; `text`, `html`, `line` and `title` say it in one form each."""

    name: str
    source: str
    word: str  # VALID | INVALID | NOT JUDGED | NO RESULT
    cause: str
    remedy: str
    proviso: str = ""  # what a VALID run is not
    eyebrow: str = ""
    day: str = ""
    tiles: tuple[tuple[str, str, str], ...] = ()  # figure, what it is, more
    bars: tuple[Bar, ...] = ()
    limits_note: str = ""
    line: str = ""
    checks: str = ""  # the gate's own text, in full
    rows: tuple[dict, ...] = ()  # other runs and published ones
    values: dict[str, Any] = field(default_factory=dict)  # for machines: tables/result.json

    sign = property(lambda self: {"VALID": "✓", "INVALID": "✗"}.get(self.word, "–"))
    mood = property(lambda self: {"VALID": "good", "INVALID": "bad"}.get(self.word, "none"))
    pill = property(lambda self: PILLS.get(self.source, f"source: {self.source}"))
    has_result = property(lambda self: self.word != "NO RESULT")

    @property
    def title(self) -> str:
        """What chat programs show of a page: `INVALID (rehearsed) · 241 tokens/s · 20 GPUs · 30 Nov 2026`."""
        figures = [f"{figure} {what.split(' on ')[0]}" for figure, what, _ in self.tiles[::2]]
        return " · ".join(filter(None, [f"{self.word} ({self.source})", *figures, self.day or self.name]))

    def html(self, page: bool = False, **more: Any) -> str:
        """The card for a notebook; `page` makes it a page of its own with what `more` gives the template."""
        text = _template().render(report=self, page=page, **more)
        # no line ends between a figure and its unit
        return re.sub(r"(?<=\d) (?=(?:s|ms|%)\b|%)", "&nbsp;", text)

    def text(self, width: int = 80) -> str:
        """The card for a terminal; no line is longer than `width`."""
        return "\n".join(line for line in _text_lines(self, width))

    def markdown(self) -> str:
        """The card for a git host's pages."""
        return "\n\n".join(filter(None, _markdown_parts(self)))

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict, dict]:
        """HTML in a browser, text in a log, and, as scrapbook reads it, the values for machines."""
        scrap = {
            "name": "result",
            "data": self.values | {"title": self.title},
            "encoder": "json",
            "version": 1,
        }
        data = {"text/plain": self.text(), "text/html": self.html()}
        if not self.values:
            return data, {}
        data["application/scrapbook.scrap.json+json"] = scrap
        return data, {"scrapbook": {"name": "result", "data": True, "display": False}}


def report_html(run: Path | str | RunResult, beside: Iterable[Path] = ()) -> str:
    """The card of a run as HTML for any cell, widget or page; `beside`: other runs to set it beside."""
    return make_report(run, beside).html()


def report_text(run: Path | str | RunResult, width: int = 80) -> str:
    """The card of a run for a terminal."""
    return make_report(run).text(width)


def report_line(run: Path | str | RunResult) -> str:
    """A run in one line, to paste."""
    return make_report(run).line


def make_report(run: Path | str | RunResult, beside: Iterable[Path] = ()) -> Report:
    """Read a run, if need be, and say it; a run folder without a result gives a report that says so.

    Raises
    ------
    LogError : no run folder, and no logs that can be read.
    """
    try:
        result = run if isinstance(run, RunResult) else read_result(run)
    except LogError as error:
        if not (Path(run) / "experiment.yaml").is_file():
            raise
        folder, (cause, remedy) = Path(run), no_result(Path(run), error)
        return Report(
            folder.resolve().name, folder_source(folder), "NO RESULT", cause, remedy, checks=str(error)
        )
    row, verdict = result_row(result), result.verdict
    claim = verdict.claim
    return Report(
        name=Path(row["folder"]).resolve().name,
        source=claim.source,
        word=verdict_word(verdict),
        proviso=proviso_of(result),
        cause=cause_of(result) + unfinished(result.files.base),
        remedy=remedy_of(result),
        eyebrow=" · ".join(filter(None, [f"MLPerf Inference {claim.round}", MODELS.get(claim.model, claim.model),
                                         claim.scenario, what_served(result)])),
        day=_day(row["test_datetime"]),
        tiles=tuple(tiles_of(result, row)),
        bars=tuple(bars_of(verdict.checks)),
        limits_note=limits_note(result),
        line=paste_line(result, row),
        checks=verdict.text(),
        rows=tuple(beside_rows(row, beside)),
        values=result_values(result),
    )  # fmt: skip


# -- forms


@functools.cache
def _template():
    environment = Environment(
        loader=PackageLoader("disagg_lib.sharing", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _text_lines(report: Report, width: int) -> Iterable[str]:
    def wrapped(text: str, indent: str = "") -> list[str]:
        return textwrap.wrap(
            text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )

    yield from wrapped(
        f"{report.sign} {report.word} ({'; '.join(filter(None, [report.pill, report.proviso]))})"
    )
    yield from wrapped(report.cause)
    yield from wrapped(report.remedy)
    if not report.tiles:
        return
    yield ""
    for figure, what, more in report.tiles:
        yield from textwrap.wrap(
            f"{figure} {what}{'' if what.endswith(':') else ','} {more}",
            width,
            initial_indent="  ",
            subsequent_indent="    ",
        )
    names = max((len(bar.name) for bar in report.bars), default=0)
    for bar in report.bars:
        cells = round(20 * bar.filled)
        drawn = "".join("|" if n == round(20 * bar.mark) else "#" if n < cells else "." for n in range(21))
        yield f"  {bar.name:{names}} {drawn} {bar.figure} {bar.limit} {bar.sign}".rstrip()
    yield from wrapped(report.limits_note, "  ")
    yield ""
    yield from _at_dots(report.line, width)


def _markdown_parts(report: Report) -> Iterable[str]:
    yield f"# {report.sign} {report.title}"
    rows = [(f"**{report.sign} {report.word}**", f"**{report.cause}** {report.remedy}")]
    rows += [(what.rstrip(":"), f"**{figure}** {more}") for figure, what, more in report.tiles]
    rows += [(bar.name, f"**{bar.figure}** {bar.limit} {bar.sign}") for bar in report.bars]
    head, *rest = (f"| {name} | {words.replace('|', '/')} |" for name, words in rows)
    yield f"**source: {report.source}.** {report.eyebrow}; {report.pill}."
    yield "\n".join([head, "|---|---|", *rest])
    yield report.limits_note
    yield f"`{report.line}`" if report.line else ""
    yield f"<details><summary>Every check, in full</summary>\n\n```\n{report.checks}\n```\n\n</details>"


def _at_dots(line: str, width: int) -> Iterable[str]:
    """A line cut where a dot stands, so that none is longer than `width`."""
    first, *rest = line.split(" · ")
    for part in rest:
        if len(f"{first} · {part}") > width:
            yield first
            first = part
        else:
            first += f" · {part}"
    yield first


def _day(moment: str) -> str:
    """`2026-11-30T22:21:33Z` as `30 Nov 2026`."""
    try:
        return f"{datetime.fromisoformat(moment):%-d %b %Y}"
    except ValueError:
        return ""
