"""The figure of step responses: token gap and clock against time, one row a disturbance."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from voltana.experiments.control.step_response import (
    BASE,
    CONTROLLERS,
    END_S,
    SHAPES,
    START_S,
    Response,
)
from voltana.experiments.draw.plots import add_legend
from voltana.profiles.draw.style import GREY, STYLE, WIDTH_IN, legend_height_in, line_style

_FROM_S = START_S - 20.0
_TITLES = {
    "step": "step", "ramp": "ramp", "pulse": "pulse", "prompts": "longer\nprompts",
}  # fmt: skip


def draw_responses(responses: Mapping[tuple[str, str], Response]) -> Figure:
    """Draw the shipped controllers under each disturbance; means of the seeds over 3 s."""
    styles = {name: line_style(i) | {"marker": ""} for i, name in enumerate(CONTROLLERS)}
    with mpl.rc_context(STYLE):
        labels = list(CONTROLLERS)
        height_in = 1.6 * len(SHAPES) + 0.6 + legend_height_in(labels)
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        grid = figure.subplots(len(SHAPES), 2, sharex=True)
        at_s = np.arange(END_S) + 0.5
        for row, shape in zip(grid, SHAPES, strict=True):
            for name, style in styles.items():
                response = responses[shape, name]
                for axes, signal, scale in (
                    (row[0], response.itl_s, 1e3), (row[1], response.clock_mhz, 1.0),
                ):  # fmt: skip
                    smooth = pd.Series(signal).interpolate().rolling(3, min_periods=1).mean()
                    axes.plot(at_s, scale * smooth, **style)
            row[0].axhline(1e3 * float(str(BASE["slo_itl_s"])), color=GREY, linestyle=":")
            row[0].set_ylim(0, 70)
            row[0].set_ylabel(_TITLES[shape])
            for axes in row:
                axes.axvline(START_S, color=GREY, linewidth=0.8)
                axes.set_xlim(_FROM_S, END_S)
        grid[0, 0].set_title("token gap (ms)")
        grid[0, 1].set_title("decode clock (MHz)")
        figure.supxlabel("time (s)")
        handles = [Line2D([], [], label=name, **styles[name]) for name in labels]
        add_legend(figure, handles, "outside upper center")
    return figure
