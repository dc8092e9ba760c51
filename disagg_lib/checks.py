"""What every check returns, as tables and text, and `require`, which stops on one that is not met."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import pandas as pd

from .errors import PreflightError


class Table(pd.DataFrame):
    """A table of sentences: in a notebook every cell is shown whole, to the left; an empty one says so."""

    @property
    def _constructor(self):
        return Table

    def _repr_html_(self) -> str:
        if self.empty:
            return f"<p>No {self.columns[0]} to show.</p>"
        with pd.option_context("display.max_colwidth", None):
            html = self.to_html(index=False, border=0)
        style = "text-align: left; white-space: normal; overflow-wrap: break-word"
        return re.sub("<t([dh])>", rf'<t\1 style="{style}">', html)


@dataclass(frozen=True)
class Check:
    """One requirement: what was found, whether it will do, and what to do if not.

    `rule` is its short name and `prevents` what goes wrong without it; an `error` stops a submission.
    """

    requirement: str
    found: str
    ok: bool
    fix: str = ""
    rule: str = ""
    prevents: str = ""
    level: str = "error"  # error | warning


def require(checks: Iterable[Check]) -> None:
    """Raise PreflightError with every error that is not met, what was found and what to do."""
    unmet = [check for check in checks if not check.ok and check.level == "error"]
    if unmet:
        raise PreflightError("\n".join(f"{c.requirement}: found {c.found}. To do: {c.fix}" for c in unmet))


def checks_table(checks: Iterable[Check]) -> Table:
    """One row a check: requirement, found, ok ('warning' where it stops nothing), fix (empty where nothing is to be done)."""
    rows = [
        asdict(check) | ({"fix": ""} if check.ok else {"ok": False if check.level == "error" else "warning"})
        for check in checks
    ]
    return Table(rows, columns=["requirement", "found", "ok", "fix"])


def checks_text(checks: Iterable[Check]) -> str:
    """For a terminal: a line a check, and below what is not met what it prevents and what to do."""
    lines = []
    for check in checks:
        what = f"{check.rule or check.requirement}: {check.found}"
        if check.ok:
            lines.append(f"ok       {what}")
            continue
        lines.append(f"{check.level:7}  {what} (needed: {check.requirement})")
        lines += [f"         prevents: {check.prevents}"] if check.prevents else []
        lines.append(f"         to do:    {check.fix}")
    return "\n".join(lines)
