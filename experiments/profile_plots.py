"""Figures of a profile: iteration time, power and energy per token against batch and clock."""

from __future__ import annotations

from typing import Any, Final

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.plots import COLOURS, MARKERS, STYLE
from profiles.catalog import Profile

CONTEXT_TOKENS: Final = 1024
"""Context per request at which decode is drawn, or the nearest that was profiled."""
MAX_BATCH: Final = 256
"""Larger batches fit the KV cache with short contexts only and would not compare."""
MAX_LINES: Final = 4


def profile_figure(profile: Profile) -> Figure:
    """Decode iteration time against batch size, and energy per output token against clock.

    One line a clock on the left. One line a batch size on the right, relative to the top clock,
    which shows the U: left of its lowest point a lower clock costs energy.
    """
    rows = _at_context(profile.decode)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        _lines(left, rows, by="frequency_mhz", x="batch_size", y="time_ms", title="clock (MHz)")
        left.set(xlabel="batch (requests)", ylabel="decode iteration (ms)")
        left.set_ylim(bottom=0)
        _lines(
            right, rows, by="batch_size", x="frequency_mhz", y="relative", title="batch (requests)"
        )
        right.set(xlabel="clock (MHz)", ylabel="energy per token (top clock = 1)")
        right.set_ylim(bottom=0)
    return figure


def provenance_table(profile: Profile) -> pd.DataFrame:
    """Quantity by quantity: measured, calibrated or modelled, from what, and how certain."""
    rows = profile.meta.provenance.items()
    return pd.DataFrame(
        [(name, p.status, p.uncertainty or "not stated") for name, p in rows],
        columns=["quantity", "status", "uncertainty"],
    ).set_index("quantity")


def _at_context(decode: pd.DataFrame) -> pd.DataFrame:
    """Of each clock and batch size the profiled point nearest to the context, medians of trials."""
    keys = ["frequency_mhz", "batch_size", "tokens"]
    medians = decode.groupby(keys, as_index=False)[["time_s", "power_w"]].median()
    medians = medians[medians["batch_size"] <= MAX_BATCH]
    off = (medians["tokens"] / medians["batch_size"] - CONTEXT_TOKENS).abs()
    nearest = medians.loc[off.groupby([medians["frequency_mhz"], medians["batch_size"]]).idxmin()]
    energy_j = nearest["time_s"] * nearest["power_w"] / nearest["batch_size"]
    by_clock = energy_j.groupby(nearest["batch_size"])  # rows ascend by clock
    return nearest.assign(
        time_ms=1e3 * nearest["time_s"], relative=energy_j / by_clock.transform("last")
    )


def _lines(axes: Axes, rows: pd.DataFrame, *, by: str, x: str, y: str, title: str) -> None:
    for i, value in enumerate(_spread(sorted(rows[by].unique()))):
        part = rows[rows[by] == value].sort_values(x)
        axes.plot(
            part[x], part[y], color=COLOURS[i + 1], marker=MARKERS[i], markersize=3.5,
            linewidth=1.3, label=str(value),
        )  # fmt: skip
    axes.legend(title=title, frameon=False, fontsize=8, title_fontsize=8)


def _spread(values: list[Any]) -> list[Any]:
    """A few of the values, the ends among them."""
    if len(values) <= MAX_LINES:
        return values
    last = len(values) - 1
    return [values[round(i * last / (MAX_LINES - 1))] for i in range(MAX_LINES)]
