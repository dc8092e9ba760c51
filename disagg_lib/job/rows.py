"""The trials of a search, as JSON lines in a file."""

import json
import math
import time
from pathlib import Path

from .margins import SearchError, passes


class Rows:
    """The trials so far, as JSON lines in a file: a search that was interrupted repeats none of them."""

    def __init__(self, path=None):
        self.path, self.rows = path and Path(path), []
        # s of the trials that ran here; s that the VALID ones took beyond their queries at their QPS, at the most
        self.spent_s = self.overhead_s = 0.0
        if self.path and self.path.exists():
            text = self.path.read_text()
            if text and not text.endswith("\n"):  # killed while writing: that trial runs again
                text = text[: text.rfind("\n") + 1]
                self.path.write_text(text)
            self.rows = [self._read(*numbered) for numbered in enumerate(text.splitlines(), 1)]

    def _read(self, number, line):
        try:
            row = json.loads(line)
            row["qps"] / row["queries"] + row["seconds"], row["valid"], row["ttft_share"], row["tpot_share"]
        except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
            found = f"not a trial's row ({type(error).__name__}: {error})"
            raise SearchError(f"{self.path}, line {number}: {found}. Remove that line") from None
        return row

    def known(self, qps, queries):
        """Return the row of that trial, or None."""
        same = (row for row in self.standing() if row["queries"] == queries)
        return next((row for row in same if math.isclose(row["qps"], qps, rel_tol=1e-9)), None)

    def standing(self):
        """Return the rows that count: of a trial that was repeated, the last."""
        return list({(row["qps"], row["queries"]): row for row in self.rows}.values())

    def has_confirmed(self):
        """Return whether a trial that was repeated is INVALID still."""
        return any(row.get("repeated") and not passes(row) for row in self.rows)

    def best(self):
        """Return the VALID row of the highest QPS that no INVALID trial, at least as long, contradicts; or None."""
        fails = [row for row in self.standing() if not passes(row)]

        def stands(row):
            return not any(f["qps"] <= row["qps"] and f["queries"] >= row["queries"] for f in fails)

        sound = (row for row in self.rows if row["valid"] and stands(row))
        return max(sound, key=lambda row: row["qps"], default=None)

    def run(self, trial, qps, queries):
        """Run a trial and return its row."""
        start = time.monotonic()
        result = trial(qps, queries)
        took_s = time.monotonic() - start
        row = dict({"seconds": round(took_s, 3)}, **result)
        row = dict(row, qps=qps, queries=queries, **({"repeated": True} if self.known(qps, queries) else {}))
        self.rows.append(row)
        took_s = max(took_s, row["seconds"])  # a client prepares its requests before its own seconds begin
        self.spent_s += took_s
        self.overhead_s = max(self.overhead_s, took_s - queries / qps if passes(row) else 0.0)
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        return row
