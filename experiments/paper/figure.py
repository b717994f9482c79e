"""The published panel and ours, one above the other."""

from __future__ import annotations

from typing import Final

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from voltana.experiments.draw.plots import add_legend, display_name
from voltana.profiles.draw.style import GREY, STYLE, WIDTH_IN, line_style

_ROWS: Final = {
    "saving_pct": "energy saved (%)",
    "energy_kj": "energy of the run (kJ)",
    "ttft_attainment_pct": "TTFT attainment (%)",
    "itl_attainment_pct": "ITL attainment (%)",
}


def draw_panel(compared: pd.DataFrame) -> Figure:
    """Draw residuals: ours as lines, the published values as open markers.

    Args:
        compared: Result of `voltana.experiments.paper.panel.residuals`.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 5.2), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        handles = []
        for i, (series, rows) in enumerate(compared.groupby("series", sort=False)):
            style = line_style(i) | {"markerfacecolor": "none"}
            for place, column in zip(axes.flat, _ROWS, strict=True):
                place.plot(rows["rps"], rows[f"{column}_ours"], color=style["color"])
                published = style | {"linestyle": ""}
                place.plot(rows["rps"], rows[f"{column}_published"], clip_on=False, **published)
            handles.append(Line2D([], [], label=display_name(series), **style))
        for place, (column, label) in zip(axes.flat, _ROWS.items(), strict=True):
            place.set_ylabel(label)
            if column == "energy_kj":
                place.set_ylim(bottom=0)
        figure.supxlabel("rate (requests/s)")
        handles += [
            Line2D([], [], color=GREY, label="simulated"),
            Line2D([], [], color=GREY, marker="o", linestyle="", markerfacecolor="none",
                   label="published"),
        ]  # fmt: skip
        add_legend(figure, handles, "outside upper center")
    return figure
