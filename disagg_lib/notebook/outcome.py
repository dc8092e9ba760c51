"""What became of a run, for the places that show it: the report's card, or why there is none."""

from collections.abc import Callable
from pathlib import Path

from ..errors import DisaggError
from ..sharing.report import report_html, report_line, report_text
from .elements import lines_html


def _told(say: Callable[[Path], str], run: Path, without: Callable[[str], str] = str) -> str:
    try:
        return say(run)
    except DisaggError as error:  # no run folder, or logs that cannot be read
        return without(f"no result: {error}")


def outcome_text(run: Path) -> str:
    return _told(report_text, run)


def outcome_html(run: Path) -> str:
    return _told(report_html, run, lines_html)


def outcome_line(run: Path) -> str:
    """One line to paste."""
    return _told(report_line, run)
