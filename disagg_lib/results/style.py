"""The look that all figures share."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

INK, MID, LIGHT = "#1a1a1a", "#6b6b6b", "#c9c9c9"
BLUE, ORANGE = "#1f4e9c", "#e08a1e"  # dark and light when printed in grey

# A hue a role (Okabe and Ito's sky blue and orange, which the colour-blind tell apart), lighter and darker from server
# to server; all bear black text. Each box says its server, too.
CONTEXT_COLOURS = ("#56b4e9", "#a6d8f5", "#3d9fd8")
GENERATION_COLOURS = ("#e69f00", "#f7cc6a", "#d98a1f")


def server_mark(role: str, name: str) -> tuple[str, str]:
    """(letter and number, colour) of a server in every picture: ctx3 is C3."""
    number = name.lstrip("abcdefghijklmnopqrstuvwxyz")
    letter, colours = ("C", CONTEXT_COLOURS) if role == "context" else ("G", GENERATION_COLOURS)
    return letter + number, colours[int(number or 0) % len(colours)]


def new_figure(width: float, height: float, **grid) -> tuple[Figure, object]:
    """A white figure and its axes; made without pyplot, so that nothing is drawn twice or kept."""
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    axes = figure.subplots(**grid)
    for axis in np.atleast_1d(axes).flat:
        axis.set_facecolor("white")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK)
        axis.grid(True, color=LIGHT, linewidth=0.5)
        axis.set_axisbelow(True)
    return figure, axes


def set_title(figure: Figure, what: str, source: str, more: str = "") -> None:
    """Title with the source, so that no figure goes about without it."""
    figure.suptitle(f"{what}\nsource: {source}" + (f" ({more})" if more else ""), fontsize=10, color=INK)
