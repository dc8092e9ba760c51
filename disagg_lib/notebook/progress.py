"""A job's progress as SVG and HTML: its steps, rates, time left."""

from collections.abc import Mapping, Sequence
from html import escape

from ..experiment.parameters import Experiment
from ..results.style import INK, MID
from .pictures import THEME_INK, svg_picture, svg_text


def chart_svg(title: str, points: Sequence[tuple[float, float]], colour: str = "#0072b2") -> str:
    """A small line chart over time in seconds; its newest and its highest value in words."""
    width, height, left, top, bottom = 400, 130, 46, 30, 22
    if len(points) < 2:
        words = [svg_text(10, 20, title), svg_text(10, 70, "no figures yet")]
        return svg_picture(width, height, title, words)
    step = max(1, len(points) // 200)
    points = [*points[:-1:step], points[-1]]
    t0, t1, most = points[0][0], points[-1][0], max(value for _, value in points) or 1.0
    line = " ".join(
        f"{left + (width - left - 10) * (t - t0) / max(t1 - t0, 1e-9):.1f},"
        f"{height - bottom - (height - top - bottom) * value / most:.1f}"
        for t, value in points
    )
    small = f'font-size="11" fill="{THEME_INK}"'
    body = [
        svg_text(10, 18, f"{title}: {points[-1][1]:,.0f}", 'font-weight="bold"'),
        f'<path d="M{left} {top}V{height - bottom}H{width - 10}" fill="none" stroke="{MID}"/>',
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>',
        svg_text(left - 4, top + 8, f"{most:,.0f}", small + ' text-anchor="end"'),
        svg_text(left - 4, height - bottom, "0", small + ' text-anchor="end"'),
        svg_text(left, height - 6, f"{t0:.0f} s", small),
        svg_text(width - 10, height - 6, f"{t1:.0f} s since the job began", small + ' text-anchor="end"'),
    ]
    return svg_picture(width, height, title, body)


_STEPS = {  # state -> mark, ground, ink
    "done": ("✓", "#009e73", INK),
    "now": ("▶", "#56b4e9", INK),
    "to come": ("○", "transparent", "inherit"),
    "failed": ("✗", "#d55e00", INK),
}


def phase_steps(
    phases: Sequence[Mapping], e: Experiment, now_s: float
) -> list[tuple[str, str, float | None]]:
    """(phase, state, seconds) of each phase that was and each that is to come."""
    seen = [row["phase"] for row in phases]
    begins = [row["time_s"] for row in phases] + [now_s]
    failed = bool(seen) and seen[-1].startswith("failed")
    ended = failed or seen[-1:] == ["done"]
    broken = next((name for name in seen[-2::-1] if name != "teardown"), "") if failed else ""
    steps: list[tuple[str, str, float | None]] = []
    for place, name in enumerate(seen):
        last = place == len(seen) - 1
        state = "now" if last and not ended else "done"
        if name.startswith("failed") or name == broken:
            state = "failed"
        seconds = None if last and ended else begins[place + 1] - begins[place]
        steps.append((name.partition(":")[0], state, seconds))
    if not ended:
        usual = ["container", "bind", "workers", "orchestrator", "ready"]
        usual += ["warmup"] * (e.client == "loadgen") + ["find_target_qps"] * e.find_target_qps
        usual += [*e.test_modes, "teardown", "done"]
        left = usual[max((usual.index(name) for name in seen if name in usual), default=-1) + 1 :]
        steps += [(name, "to come", None) for name in left]
    return steps


def steps_html(steps: Sequence[tuple[str, str, float | None]]) -> str:
    parts = []
    for name, state, seconds in steps:
        mark, ground, ink = _STEPS[state]
        took = "" if seconds is None else f"<br><small>{duration(seconds)}</small>"
        parts.append(
            f'<li data-state="{state}" style="background:{ground};color:{ink};border:1px solid var(--jp-border-color1,#777);'
            f'border-radius:4px;padding:3px 8px;min-height:34px;line-height:1.25">{mark} {escape(name)}{took}</li>'
        )
    return (
        '<ol aria-label="phases" style="display:flex;flex-wrap:wrap;gap:4px;list-style:none;padding:0;margin:4px 0">'
        f"{''.join(parts)}</ol>"
    )


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(int(seconds), 3600)
    return (f"{hours} h " if hours else "") + f"{rest // 60} min {rest % 60:02d} s"


def remaining_s(rows: Sequence[Mapping]) -> float | None:
    """Seconds until the newest test mode's queries are done at the pace of its last minute; None if unknown."""
    newest = rows[-1]
    recent = [row for row in rows[-60:] if row["mode"] == newest["mode"]]
    done, seconds = newest["done"] - recent[0]["done"], newest["time_s"] - recent[0]["time_s"]
    if newest["total"] is None or done <= 0 or seconds <= 0:
        return None
    return (newest["total"] - newest["done"]) * seconds / done


def progress_html(rows: Sequence[Mapping], ended: bool = False) -> str:
    """A bar of the newest test mode's queries, and the time to go unless the job has ended."""
    if not rows:
        return ""
    newest, left = rows[-1], None if ended else remaining_s(rows)
    total = newest["total"]
    bar = "" if total is None else (
        f'<progress aria-label="queries done" value="{newest["done"]}" max="{total}" '
        'style="width:100%;height:18px;accent-color:#0072b2"></progress><br>'
    )  # fmt: skip
    failed = f', <b style="color:#d55e00">✗</b> {newest["failed"]} failed' if newest["failed"] else ""
    eta = "" if left is None or newest["done"] == total else f", about {duration(left)} to go"
    return f"{bar}{escape(newest['mode'])}: {newest['done']} of {total or '?'} queries done{failed}{eta}"


def rates(rows: Sequence[Mapping], began_s: float) -> tuple[list, list]:
    """(seconds since the job began, tokens/s) and (seconds, outstanding queries) of progress.jsonl's rows."""
    speed = [
        (b["time_s"] - began_s, (b["tokens"] - a["tokens"]) / (b["time_s"] - a["time_s"]))
        for a, b in zip(rows, rows[1:], strict=False)
        if a["mode"] == b["mode"] and b["time_s"] > a["time_s"] and b["tokens"] >= a["tokens"]
    ]
    return speed, [(row["time_s"] - began_s, row["outstanding"]) for row in rows]
