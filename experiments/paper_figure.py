"""The published panel and ours, one above the other."""

from __future__ import annotations

from typing import Final

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.plots import COLOURS, MARKERS, STYLE

_ROWS: Final = {
    "saving_pct": "energy saved (%)",
    "energy_kj": "energy of the run (kJ)",
    "ttft_attainment_pct": "TTFT attainment (%)",
    "itl_attainment_pct": "ITL attainment (%)",
}


def draw_panel(compared: pd.DataFrame) -> Figure:
    """Draw residuals: ours as lines, the published values as open markers.

    Args:
        compared: Result of `experiments.paper.residuals`.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.6), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        handles = []
        for i, (series, rows) in enumerate(compared.groupby("series", sort=False)):
            for place, column in zip(axes.flat, _ROWS, strict=True):
                place.plot(rows["rps"], rows[f"{column}_ours"], color=COLOURS[i], linewidth=1.4)
                place.plot(
                    rows["rps"], rows[f"{column}_published"], color=COLOURS[i],
                    marker=MARKERS[i], markersize=5, linestyle="none", markerfacecolor="none",
                )  # fmt: skip
            handles.append(Line2D([], [], color=COLOURS[i], marker=MARKERS[i], markersize=5,
                                  markerfacecolor="none", label=str(series)))  # fmt: skip
        for place, (column, label) in zip(axes.flat, _ROWS.items(), strict=True):
            place.set_ylabel(label)
            if column == "energy_kj":
                place.set_ylim(bottom=0)
        for place in axes[-1]:
            place.set_xlabel("request rate (requests/s)")
        figure.legend(
            handles=handles, loc="outside lower center", ncols=3, frameon=False,
            title="lines: simulated; markers: published",
        )  # fmt: skip
    return figure
