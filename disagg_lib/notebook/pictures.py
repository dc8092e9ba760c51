"""Pictures as SVG text: the topology, and the frame, text and colours that the other pictures share.

Pure: plain values in, text out, quick enough to be drawn at each keystroke. Ground and ink are the theme's, so that they
read in light and dark. Colours never stand alone: letters, marks, hatches.
"""

from collections.abc import Iterable, Iterator
from html import escape

from ..experiment.parameters import Experiment
from ..experiment.topology import Server, topology_arithmetic
from ..results.style import INK, MID, server_mark

CELL_WIDTH, CELL_HEIGHT, PICTURE_WIDTH = 36, 26, 640  # px
MOST_NODES_IN_FULL = 40  # more are a square a node
MOST_GPUS_DRAWN = 1152  # sixteen racks of 72: more is neither readable nor quick
GROUND, THEME_INK = "var(--jp-layout-color1, white)", f"var(--jp-content-font-color1, {INK})"
MUTED_INK = f"var(--jp-content-font-color2, {MID})"
_FONT = 'font-family="system-ui, sans-serif"'


def svg_picture(width: float, height: float, title: str, body: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" '
        f'aria-label="{escape(title)}" style="max-width:100%;height:auto" {_FONT} font-size="12" fill="{THEME_INK}">'
        f'<rect width="{width:g}" height="{height:g}" rx="6" fill="{GROUND}" stroke="{MID}" stroke-opacity="0.4"/>{"".join(body)}</svg>'
    )


def svg_text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {more}>{escape(text)}</text>'


WIDTH, HEIGHT = CELL_WIDTH - 4, CELL_HEIGHT - 4  # of a GPU's box


def _framed(x: float, y: float, note: str, look: str, inside: str) -> str:
    frame = f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="3" {look}/>'
    return f"<g><title>{escape(note)}</title>{frame}{inside}</g>"


def _box(x: float, y: float, mark: str, colour: str, leads: bool = False, note: str = "") -> str:
    """A GPU of a server; the leading one is bold and thick-edged."""
    weight = 'font-weight="bold"' if leads else ""
    text = svg_text(x + WIDTH / 2, y + HEIGHT / 2 + 4, mark, f'fill="{INK}" text-anchor="middle" {weight}')
    look = f'fill="{colour}" stroke="{THEME_INK}" stroke-width="{2.2 if leads else 0.6}"'
    return _framed(x, y, note, look, text)


def _idle_box(x: float, y: float, note: str = "") -> str:
    """A GPU that no server has: hatched."""
    ends = range(2, WIDTH - HEIGHT // 2, 7)
    strokes = "".join(f"M{x + d:g} {y + HEIGHT:g}L{x + d + HEIGHT / 2:g} {y:g}" for d in ends)
    hatch = f'<path d="{strokes}" stroke="{MID}" stroke-width="1"/>'
    return _framed(x, y, note, f'fill="none" stroke="{MID}" stroke-dasharray="3 2"', hatch)


def _tag(x: float, y: float, letter: str) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="16" height="16" rx="8" fill="{THEME_INK}"/>'
        + svg_text(x + 8, y + 12.5, letter, f'style="fill:{GROUND}" font-size="11" font-weight="bold" text-anchor="middle"')
    )  # fmt: skip


def topology_svg(e: Experiment) -> str:
    """Nodes with their GPUs, or above 40 nodes a square each; every GPU with its server's letter and number; a legend."""
    shown = min(e.node_count, max(1, MOST_GPUS_DRAWN // e.gpus_per_node))
    holder = {}
    for server in e.servers:
        holder |= {place: (server, rank) for rank, place in zip(server.ranks, server.gpus, strict=True)}
    draw = _nodes_in_full if shown <= MOST_NODES_IN_FULL else _squares
    body, width, y = draw(e, shown, holder)
    if shown < e.node_count:
        body.append(svg_text(8, y + 12, f"and {e.node_count - shown:,} more nodes, not drawn"))
        y += 20
    legend, y = _legend(e, y)
    title = f"{topology_arithmetic(e)}, {e.node_count} nodes"
    return svg_picture(max(width, 620), y, title, [*body, *legend])


Holder = dict[tuple[int, int], tuple[Server, int]]  # (node, GPU) -> server and rank


def _nodes_in_full(e: Experiment, shown: int, holder: Holder) -> tuple[list[str], float, float]:
    """Every node as a box of its GPUs; what was drawn, how wide it is, and where it ends."""
    drawn_gpus = min(e.gpus_per_node, MOST_GPUS_DRAWN)
    columns = min(e.gpus_per_node, 8)
    width = max(columns * CELL_WIDTH + 8, 104)
    height = 24 + -(-drawn_gpus // columns) * CELL_HEIGHT + 4
    in_row = max(1, PICTURE_WIDTH // (width + 8))
    body: list[str] = []
    doors = {door.node for door in e.doors}
    for node in range(shown):
        x0, y0 = 8 + node % in_row * (width + 8), 10 + node // in_row * (height + 10)
        frame = f'<rect x="{x0}" y="{y0}" width="{width}" height="{height}" rx="4" fill="{MID}" fill-opacity="0.1" stroke="{MID}"/>'
        body += [frame, svg_text(x0 + 6, y0 + 16, f"node {node}")]
        body += _domain(e, node, x0, y0, width, in_row, shown)
        letters = "O" * (node in doors) + "L" * (node == 0)
        ends = x0 + width - 2 - 20 * len(letters)
        body += [_tag(ends + 20 * k, y0 + 4, letter) for k, letter in enumerate(letters)]
        for gpu in range(drawn_gpus):
            x, y = x0 + 6 + gpu % columns * CELL_WIDTH, y0 + 24 + gpu // columns * CELL_HEIGHT
            body.append(_cell(x, y, (node, gpu), holder))
    return body, 16 + min(shown, in_row) * (width + 8) - 8, 10 + -(-shown // in_row) * (height + 10)


def _cell(x: float, y: float, place: tuple[int, int], holder: Holder) -> str:
    where = f"node {place[0]}, GPU {place[1]}"
    if place not in holder:
        return _idle_box(x, y, f"{where}: idle")
    server, rank = holder[place]
    note = f"{where}: {server.role} server {server.name}, rank {rank}"
    return _box(x, y, *server_mark(server.role, server.name), rank == server.first_rank, note)


def _domain(
    e: Experiment, node: int, x: float, y: float, width: float, in_row: int, shown: int
) -> Iterator[str]:
    """The bracket above nodes of one NVLink domain, which `segment` asks for; open to the next node of the same domain."""
    if not e.segment:
        return
    first, last = node % e.segment == 0, (node + 1) % e.segment == 0 or node + 1 == shown
    right = x + width + (0 if last or (node + 1) % in_row == 0 else 8)
    ends = f"M{x} {y + 2}V{y - 4}H{right}" if first else f"M{x} {y - 4}H{right}"
    yield f'<path d="{ends}{f"V{y + 2}" if last else ""}" fill="none" stroke="{THEME_INK}" stroke-width="2"/>'
    if first:
        name, look = f"NVLink {node // e.segment}", f'font-size="11" style="fill:{MUTED_INK}"'
        yield svg_text(x + 50, y + 16, name, look)


def _squares(e: Experiment, shown: int, holder: Holder) -> tuple[list[str], float, float]:
    """A square a node, with the first server that it holds (and + for more); what was drawn, its width and its end."""
    in_row, body = PICTURE_WIDTH // CELL_WIDTH, []
    for node in range(shown):
        x, y = 8 + node % in_row * CELL_WIDTH, 8 + node // in_row * CELL_HEIGHT
        places = [(node, gpu) for gpu in range(e.gpus_per_node)]
        held = list(dict.fromkeys(holder[place][0] for place in places if place in holder))
        if not held:
            body.append(_idle_box(x, y, f"node {node}: idle"))
            continue
        mark, colour = server_mark(held[0].role, held[0].name)
        more, note = "+" * (len(held) > 1), f"node {node}: {', '.join(server.name for server in held)}"
        body.append(_box(x, y, mark + more, colour, held[0].node == node, note))
    y = 8 + -(-shown // in_row) * CELL_HEIGHT
    words = f"A square is a node of {e.gpus_per_node} GPUs, in order; node 0 also has O and L."
    body.append(svg_text(8, y + 12, words))
    return body, PICTURE_WIDTH + 8, y + 20


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
            words = f"{count} {role} server{'s' if count > 1 else ''} of {size}"
            rows.append((_box(8, 0, *server_mark(role, server.name), True), words))
    rows.append((_idle_box(8, 0), f"idle GPUs: {idle}"))
    if e.doors:
        word, count = {"trtllm": "orchestrator", "dynamo": "Dynamo front end"}[e.orchestrator], len(e.doors)
        rows.append((_tag(20, 4, "O"), f"{count} {word}s" if count > 1 else word))
    rows.append((_tag(20, 4, "L"), "client (LoadGen)"))
    body, x = [], 0
    for drawn, words in rows:
        if x + 58 + 6.6 * len(words) > 620:
            x, y = 0, y + CELL_HEIGHT
        body.append(f'<g transform="translate({x:g} {y:g})">{drawn}{svg_text(54, 16, words)}</g>')
        x += 66 + 6.6 * len(words)
    y += CELL_HEIGHT
    body.append(svg_text(8, y + 14, "A bold, thick-edged box leads its server.", f'style="fill:{MUTED_INK}"'))
    return body, y + 26
