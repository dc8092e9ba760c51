"""Pictures as SVG and HTML text: the topology, a job's phases and load, what differs between two files.

Pure: plain values in, text out, quick enough to be drawn at each keystroke. SVG has a white ground of its own and HTML
takes the theme's ink, so that both read in light and dark themes. Colours never stand alone: letters, marks, hatches.
"""

from collections.abc import Iterable
from html import escape

from ..experiment.parameters import Experiment
from ..experiment.topology import Server, topology_arithmetic
from ..results.style import INK, LIGHT, MID, server_mark

CELL_WIDTH, CELL_HEIGHT, PICTURE_WIDTH = 44, 28, 860  # px
MOST_GPUS_DRAWN = 1152  # sixteen racks of 72: more is neither readable nor quick
_FONT = 'font-family="system-ui, sans-serif"'


def svg_picture(width: float, height: float, title: str, body: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" '
        f'aria-label="{escape(title)}" style="max-width:100%;height:auto" {_FONT} font-size="12" fill="{INK}">'
        f'<rect width="{width:g}" height="{height:g}" rx="6" fill="white" stroke="{LIGHT}"/>{"".join(body)}</svg>'
    )


def svg_text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {more}>{escape(text)}</text>'


def _box(x: float, y: float, mark: str, colour: str, leads: bool = False, note: str = "") -> str:
    """A GPU of a server; the leading one is bold and thick-edged."""
    width, height = CELL_WIDTH - 4, CELL_HEIGHT - 4
    weight = 'font-weight="bold"' if leads else ""
    return (
        f'<g><title>{escape(note)}</title><rect x="{x:g}" y="{y:g}" width="{width}" height="{height}" rx="3" fill="{colour}" '
        f'stroke="{INK}" stroke-width="{2 if leads else 0.6}"/>'
        + svg_text(x + width / 2, y + height / 2 + 4, mark, f'text-anchor="middle" {weight}')
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
        + svg_text(x + 8, y + 12.5, letter, 'fill="white" font-size="11" font-weight="bold" text-anchor="middle"')
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
        body += [frame, svg_text(x0 + 6, y0 + 16, f"node {node}")]
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
        body.append(svg_text(8, y + 12, f"and {e.node_count - shown:,} more nodes, not drawn"))
        y += 20
    legend, y = _legend(e, y)
    return svg_picture(total_width, y, f"{topology_arithmetic(e)}, {e.node_count} nodes", [*body, *legend])


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
        body.append(f'<g transform="translate({x:g} {y:g})">{drawn}{svg_text(54, 16, words)}</g>')
        x += 66 + 6.6 * len(words)
    y += CELL_HEIGHT
    body.append(svg_text(8, y + 14, "A bold, thick-edged box leads its server.", f'fill="{MID}"'))
    return body, y + 26
