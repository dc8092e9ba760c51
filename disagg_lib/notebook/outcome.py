"""What became of a run, for the places that show it: the report's card, as HTML or in words."""

from pathlib import Path

from ..errors import DisaggError
from ..results.rows import verdict_text
from .elements import lines_html

try:
    from ..sharing.report import report_html, report_line, report_text
except ImportError:  # the card is not part of this release yet: the gate's own words
    report_html = report_line = report_text = None


def outcome_text(run: Path, width: int = 80) -> str:
    try:
        return report_text(run, width) if report_text else verdict_text(run)
    except DisaggError as error:
        return f"no result: {error}"


def outcome_html(run: Path) -> str:
    try:
        return report_html(run) if report_html else lines_html(verdict_text(run))
    except DisaggError as error:
        return lines_html(f"no result: {error}")


def outcome_line(run: Path) -> str:
    """One line to paste; empty where there is no result."""
    try:
        return report_line(run) if report_line else ""
    except DisaggError:
        return ""
