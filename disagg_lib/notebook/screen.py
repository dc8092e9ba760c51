"""What `run` shows while it works: on a terminal a row a notebook with a bar, elsewhere a line a phase and one a minute."""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..cluster import launch
from ..errors import DisaggError
from ..files import GrowingLines
from .progress import duration, rates, remaining_s

BAR = 10  # characters


def job_words(run: Path, rows: list[dict]) -> tuple[str, str]:
    """A job's phase, and how far it is: bar, queries, tokens/s, time to go."""
    state = launch.job_state(run, ask=False)
    newest = state.progress
    if newest is None or newest["mode"] != state.phase or not newest["total"]:
        return state.phase or state.state, ""
    filled = "#" * int(BAR * newest["done"] / newest["total"])
    parts = [f"[{filled:{BAR}}] {newest['done']}/{newest['total']}"]
    speed, _ = rates(rows[-10:], 0.0)
    if speed:
        parts.append(f"{sum(value for _, value in speed) / len(speed):,.0f} tok/s")
    left = remaining_s(rows) if rows else None
    if left is not None and newest["done"] < newest["total"]:
        parts.append(f"about {duration(left)}")
    return state.phase, " · ".join(parts)


class Screen:
    """One row a notebook."""

    def __init__(self, out: Callable[[str], None]):
        self.out, self.terminal = out, sys.stdout.isatty()
        self.width = shutil.get_terminal_size().columns - 1

    @contextmanager
    def row(self, name: str, run: Path | None = None) -> Iterator[None]:
        """Show a notebook's row while its block runs, and how it ended; `run`: where its job would be."""
        began, done = time.monotonic(), threading.Event()
        watcher = threading.Thread(target=self._watch, args=(name, run, began, done), daemon=True)
        watcher.start()
        mark = "✗"
        try:
            yield
            mark = "✓"
        finally:
            done.set()
            watcher.join()
            self._last(f"{mark} {name}  {duration(time.monotonic() - began)}")

    def _watch(self, name: str, run: Path | None, began: float, done: threading.Event) -> None:
        rows: list[dict] = []
        progress = GrowingLines(run / "job/progress.jsonl") if run else None
        told, said_at = "", 0.0
        while not done.wait(0.5 if self.terminal else 1.0):
            phase, how_far = "", ""
            if progress:
                try:
                    rows += progress.new_rows()
                    phase, how_far = job_words(run, rows)
                except (DisaggError, OSError, ValueError):  # half a line, or a folder that is just being made
                    continue
            words = f"{name} {phase}".strip()
            if self.terminal:
                self._rewrite(f"▶ {words}  {how_far or duration(time.monotonic() - began)}")
            elif words != told or time.monotonic() - said_at >= 60:
                told, said_at = words, time.monotonic()
                self.out(f"{time.strftime('%H:%M:%S')}  {words}  {how_far}".rstrip())

    def _rewrite(self, text: str) -> None:
        sys.stdout.write("\r" + text[: self.width].ljust(self.width))
        sys.stdout.flush()

    def _last(self, text: str) -> None:
        if self.terminal:
            self._rewrite(text)
            sys.stdout.write("\n")
        else:
            self.out(f"{time.strftime('%H:%M:%S')}  {text}")
