"""How figures look: colours that all can tell apart, and letters that stay legible at half width.

A figure is `WIDTH_IN` wide whatever it shows, and none of its letters is smaller than `FONT_PT`:
shrunk to half a text's width, 3.3 inches, they are 7 points high.
"""

from __future__ import annotations

from typing import Any, Final

HALF_WIDTH_IN: Final = 3.3
LEAST_PT: Final = 7.0
WIDTH_IN: Final = 5.2
FONT_PT: Final = LEAST_PT * WIDTH_IN / HALF_WIDTH_IN
COLOURS: Final = (
    "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999",
)  # fmt: skip
"""Okabe and Ito's palette, distinguishable with every common colour-vision deficiency."""
MARKERS: Final = "osD^vPX*"
GREY: Final = COLOURS[-1]
STYLE: Final[dict[Any, Any]] = {
    "font.size": FONT_PT,
    "axes.titlesize": FONT_PT,
    "figure.titlesize": FONT_PT,
    "figure.labelsize": FONT_PT,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.6,
    "legend.handletextpad": 0.5,
    "savefig.dpi": 200,
    "svg.hashsalt": "voltana",
}


def line_style(index: int) -> dict[str, Any]:
    """Colour and marker of the curve of that number; past the palette's end lines are dashed."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": "-" if index < len(COLOURS) else "--",
    }


def legend_columns(labels: list[str], width_in: float = WIDTH_IN) -> int:
    """As many columns as fit: a letter takes about half its height."""
    longest_in = 0.45 + 0.0074 * FONT_PT * max((len(label) for label in labels), default=1)
    return max(1, min(len(labels), int(width_in / longest_in)))


def legend_height_in(labels: list[str]) -> float:
    """Room that a legend of these labels takes."""
    return -(-len(labels) // legend_columns(labels)) * 0.021 * FONT_PT
