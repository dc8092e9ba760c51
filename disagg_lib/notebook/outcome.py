"""What became of a run, for the places that show it: the report's card, or why there is none."""

from collections.abc import Callable
from pathlib import Path

from ..errors import DisaggError
from ..run.tables import orchestrator_table
from ..sharing.report import report_html, report_line, report_text
from .elements import lines_html


def _told(say: Callable[[Path], str], run: Path, without: Callable[[str], str] = str) -> str:
    try:
        return say(run)
    except DisaggError as error:  # no run folder, or logs that cannot be read
        return without(f"no result: {error}")


def orchestrator_words(run: Path) -> str:
    """Says when the orchestrator was the limit; "" when it was not."""
    busy = orchestrator_table(run).query("note != ''")
    return "\n".join(
        f"The orchestrator, {row.cores_max:g} of a core in {row.mode}, was {row.note}."
        for row in busy.itertuples()
    )


def outcome_text(run: Path) -> str:
    return "\n\n".join(filter(None, (_told(report_text, run), orchestrator_words(run))))


def outcome_html(run: Path) -> str:
    words = orchestrator_words(run)
    return _told(report_html, run, lines_html) + (lines_html(words) if words else "")


def outcome_line(run: Path) -> str:
    """One line to paste."""
    return _told(report_line, run)
