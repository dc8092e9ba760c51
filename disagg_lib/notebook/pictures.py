"""Pictures as SVG and HTML text: the topology, a job's phases and load, what differs between two files.

Pure: plain values in, text out, quick enough to be drawn at each keystroke. SVG has a white ground of its own and HTML
takes the theme's ink, so that both read in light and dark themes. Colours never stand alone: letters, marks, hatches.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from .experiment import Experiment, Server, topology_arithmetic
from .figures import INK, LIGHT, MID, server_mark

CELL_WIDTH, CELL_HEIGHT, PICTURE_WIDTH = 44, 28, 860  # px
MOST_GPUS_DRAWN = 1152  # sixteen racks of 72: more is neither readable nor quick
_FONT = 'font-family="system-ui, sans-serif"'


def _svg(width: float, height: float, title: str, body: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" '
        f'aria-label="{escape(title)}" style="max-width:100%;height:auto" {_FONT} font-size="12" fill="{INK}">'
        f'<rect width="{width:g}" height="{height:g}" rx="6" fill="white" stroke="{LIGHT}"/>{"".join(body)}</svg>'
    )


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {more}>{escape(text)}</text>'


def _box(x: float, y: float, mark: str, colour: str, leads: bool = False, note: str = "") -> str:
    """A GPU of a server; the leading one is bold and thick-edged."""
    width, height = CELL_WIDTH - 4, CELL_HEIGHT - 4
    weight = 'font-weight="bold"' if leads else ""
    return (
        f'<g><title>{escape(note)}</title><rect x="{x:g}" y="{y:g}" width="{width}" height="{height}" rx="3" fill="{colour}" '
        f'stroke="{INK}" stroke-width="{2 if leads else 0.6}"/>'
        + _text(x + width / 2, y + height / 2 + 4, mark, f'text-anchor="middle" {weight}')
        + "</g>"
    )


def _idle_box(x: float, y: float, note: str = "") -> str:
    """A GPU that no server has: hatched."""
    width, height = CELL_WIDTH - 4, CELL_HEIGHT - 4
    strokes = "".join(
        f"M{x + d:g} {y + height:g}L{x + d + height / 2:g} {y:g}" for d in range(2, width - height // 2, 7)
    )
    return (
        f'<g><title>{escape(note)}</title><rect x="{x:g}" y="{y:g}" width="{width}" height="{height}" rx="3" fill="white" '
        f'stroke="{MID}" stroke-dasharray="3 2"/><path d="{strokes}" stroke="{MID}" stroke-width="1"/></g>'
    )


def _tag(x: float, y: float, letter: str) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="16" height="16" rx="8" fill="{INK}"/>'
        + _text(x + 8, y + 12.5, letter, 'fill="white" font-size="11" font-weight="bold" text-anchor="middle"')
    )  # fmt: skip


def topology_svg(e: Experiment) -> str:
    """Nodes as boxes, GPUs as cells with their server's letter, number and colour, idle GPUs hatched; see the legend."""
    per_node, shown = e.gpus_per_node, min(e.node_count, max(1, MOST_GPUS_DRAWN // e.gpus_per_node))
    columns = min(per_node, 8)
    width = max(columns * CELL_WIDTH + 8, 104)
    height = 24 + -(-min(per_node, MOST_GPUS_DRAWN) // columns) * CELL_HEIGHT + 4
    nodes_in_row = max(1, PICTURE_WIDTH // (width + 8))
    holder: dict[tuple[int, int], tuple[Server, int]] = {
        place: (server, rank)
        for server in e.servers
        for rank, place in zip(server.ranks, server.gpus, strict=True)
    }
    body = []
    for node in range(shown):
        x0, y0 = 8 + node % nodes_in_row * (width + 8), 8 + node // nodes_in_row * (height + 8)
        frame = f'<rect x="{x0}" y="{y0}" width="{width}" height="{height}" rx="4" fill="#f5f5f5" stroke="{MID}"/>'
        body += [frame, _text(x0 + 6, y0 + 16, f"node {node}")]
        if node == 0:
            body += [_tag(x0 + width - 42, y0 + 4, "O"), _tag(x0 + width - 22, y0 + 4, "L")]
        for gpu in range(min(per_node, MOST_GPUS_DRAWN)):
            x, y = x0 + 6 + gpu % columns * CELL_WIDTH, y0 + 24 + gpu // columns * CELL_HEIGHT
            where = f"node {node}, GPU {gpu}"
            if (node, gpu) in holder:
                server, rank = holder[node, gpu]
                note = f"{where}: {server.role} server {server.name}, rank {rank}"
                body.append(
                    _box(x, y, *server_mark(server.role, server.name), rank == server.first_rank, note)
                )
            else:
                body.append(_idle_box(x, y, f"{where}: idle"))
    total_width = 16 + min(shown, nodes_in_row) * (width + 8) - 8
    total_width, y = max(total_width, 620), 8 + -(-shown // nodes_in_row) * (height + 8)
    if shown < e.node_count:
        body.append(_text(8, y + 12, f"and {e.node_count - shown:,} more nodes, not drawn"))
        y += 20
    legend, y = _legend(e, y)
    return _svg(total_width, y, f"{topology_arithmetic(e)}, {e.node_count} nodes", [*body, *legend])


def _legend(e: Experiment, y: float) -> tuple[list[str], float]:
    """What the boxes mean, below the nodes, and where it ends."""
    idle = e.node_count * e.gpus_per_node - (e.gpu_count if e.servers else 0)
    rows = []
    for role, count, tp, pp in (
        ("context", e.num_ctx_servers, e.ctx_tp_size, e.ctx_pp_size),
        ("generation", e.num_gen_servers, e.gen_tp_size, 1),
    ):
        server = next((s for s in e.servers if s.role == role), None)
        if server:
            size = f"TP{tp}" + (f" x PP{pp}" if pp > 1 else "")
            rows.append(
                (
                    _box(8, 0, *server_mark(role, server.name), True),
                    f"{count} {role} server{'s' if count > 1 else ''} of {size}",
                )
            )
    rows.append((_idle_box(8, 0), f"idle GPUs: {idle}"))
    rows.append((_tag(20, 4, "O"), "orchestrator"))
    rows.append((_tag(20, 4, "L"), "client (LoadGen)"))
    body, x = [], 0
    for drawn, words in rows:
        if x + 58 + 6.6 * len(words) > 620:
            x, y = 0, y + CELL_HEIGHT
        body.append(f'<g transform="translate({x:g} {y:g})">{drawn}{_text(54, 16, words)}</g>')
        x += 66 + 6.6 * len(words)
    y += CELL_HEIGHT
    body.append(_text(8, y + 14, "A bold, thick-edged box leads its server.", f'fill="{MID}"'))
    return body, y + 26


def chart_svg(title: str, points: Sequence[tuple[float, float]], colour: str = "#0072b2") -> str:
    """A small line chart over time in seconds; its newest and its highest value in words."""
    width, height, left, top, bottom = 400, 130, 46, 30, 22
    if len(points) < 2:
        return _svg(width, height, title, [_text(10, 20, title), _text(10, 70, "no figures yet")])
    step = max(1, len(points) // 200)
    points = [*points[:-1:step], points[-1]]
    t0, t1, most = points[0][0], points[-1][0], max(value for _, value in points) or 1.0
    line = " ".join(
        f"{left + (width - left - 10) * (t - t0) / max(t1 - t0, 1e-9):.1f},"
        f"{height - bottom - (height - top - bottom) * value / most:.1f}"
        for t, value in points
    )
    small = f'font-size="11" fill="{INK}"'
    body = [
        _text(10, 18, f"{title}: {points[-1][1]:,.0f}", 'font-weight="bold"'),
        f'<path d="M{left} {top}V{height - bottom}H{width - 10}" fill="none" stroke="{MID}"/>',
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>',
        _text(left - 4, top + 8, f"{most:,.0f}", small + ' text-anchor="end"'),
        _text(left - 4, height - bottom, "0", small + ' text-anchor="end"'),
        _text(left, height - 6, f"{t0:.0f} s", small),
        _text(width - 10, height - 6, f"{t1:.0f} s since the job began", small + ' text-anchor="end"'),
    ]
    return _svg(width, height, title, body)


# -- what differs between texts


def marked_lines(files: Mapping[str, str], others: Mapping[str, str]) -> dict[str, list[str]]:
    """Every line of the files with its mark: ' ' in both, '+' in these alone, '-' in the others alone."""
    marked = {}
    for name, text in files.items():
        mine, theirs = text.splitlines(), others.get(name, "").splitlines()
        lines = list(difflib.unified_diff(theirs, mine, lineterm="", n=len(mine) + len(theirs)))[3:]
        marked[name] = lines or [" " + line for line in mine]
    return marked


def marked_html(marked: Mapping[str, list[str]]) -> str:
    grounds = {"+": "rgba(0,158,115,0.3)", "-": "rgba(213,94,0,0.3)", " ": "transparent"}
    parts = []
    for name, lines in marked.items():
        count = sum(line[0] != " " for line in lines)
        body = "".join(
            f'<div style="background:{grounds[line[0]]};white-space:pre">{escape(line)}</div>'
            for line in lines
        )
        parts.append(
            f"<b>{escape(name)}</b>, {count} line{'' if count == 1 else 's'} differ{'s' if count == 1 else ''}"
            '<div tabindex="0" role="region" style="width:0;min-width:100%;box-sizing:border-box;max-height:460px;overflow:auto;border:1px solid var(--jp-border-color1,#999);'
            'padding:4px;font-family:var(--jp-code-font-family,monospace);font-size:12px;line-height:1.4" '
            f'aria-label="{escape(name)}"><div style="min-width:max-content">{body}</div></div>'
        )
    return "".join(parts)


# -- a job

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
    ended = bool(seen) and (seen[-1] == "done" or seen[-1].startswith("failed"))
    broken = (
        next((name for name in seen[-2::-1] if name != "teardown"), "")
        if ended and seen[-1] != "done"
        else ""
    )
    steps: list[tuple[str, str, float | None]] = []
    for place, name in enumerate(seen):
        last = place == len(seen) - 1
        state = (
            "failed"
            if name.startswith("failed") or name == broken
            else "now"
            if last and not ended
            else "done"
        )
        seconds = None if last and ended else begins[place + 1] - begins[place]
        steps.append((name.partition(":")[0], state, seconds))
    if not ended:
        search = ("find_target_qps",) if e.find_target_qps else ()
        usual = (
            "container",
            "bind",
            "workers",
            "orchestrator",
            "ready",
            *search,
            *e.test_modes,
            "teardown",
            "done",
        )
        left = usual[max((usual.index(name) for name in seen if name in usual), default=-1) + 1 :]
        steps += [(name, "to come", None) for name in left]
    return steps


def steps_html(steps: Sequence[tuple[str, str, float | None]]) -> str:
    parts = []
    for name, state, seconds in steps:
        mark, ground, ink = _STEPS[state]
        took = "" if seconds is None else f"<br><small>{_duration(seconds)}</small>"
        parts.append(
            f'<li data-state="{state}" style="background:{ground};color:{ink};border:1px solid var(--jp-border-color1,#777);'
            f'border-radius:4px;padding:3px 8px;min-height:34px;line-height:1.25">{mark} {escape(name)}{took}</li>'
        )
    return (
        '<ol aria-label="phases" style="display:flex;flex-wrap:wrap;gap:4px;list-style:none;padding:0;margin:4px 0">'
        f"{''.join(parts)}</ol>"
    )


def _duration(seconds: float) -> str:
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
    eta = "" if left is None or newest["done"] == total else f", about {_duration(left)} to go"
    return f"{bar}{escape(newest['mode'])}: {newest['done']} of {total or '?'} queries done{failed}{eta}"


def rates(rows: Sequence[Mapping], began_s: float) -> tuple[list, list]:
    """(seconds since the job began, tokens/s) and (seconds, outstanding queries) of progress.jsonl's rows."""
    speed = [
        (b["time_s"] - began_s, (b["tokens"] - a["tokens"]) / (b["time_s"] - a["time_s"]))
        for a, b in zip(rows, rows[1:], strict=False)
        if a["mode"] == b["mode"] and b["time_s"] > a["time_s"] and b["tokens"] >= a["tokens"]
    ]
    return speed, [(row["time_s"] - began_s, row["outstanding"]) for row in rows]
