"""Figures of a profile: iteration time, power and energy per token against batch and clock."""

from __future__ import annotations

from typing import Any, Final

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from voltana.profiles.catalog import Profile
from voltana.profiles.draw.profile_figures import decode_at_context
from voltana.profiles.draw.style import FONT_PT, STYLE, WIDTH_IN, line_style

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
        figure = Figure(figsize=(WIDTH_IN, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        _lines(left, rows, by="frequency_mhz", x="batch_size", y="time_ms", title="clock (MHz)")
        left.set(xlabel="batch (requests)", ylabel="decode iteration (ms)")
        left.set_ylim(bottom=0)
        _lines(
            right, rows, by="batch_size", x="frequency_mhz", y="relative", title="batch (requests)"
        )
        right.set(xlabel="clock (MHz)", ylabel="energy per token (top = 1)")
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
    """With the time in ms and the energy relative to the top clock."""
    rows = decode_at_context(decode[decode["batch_size"] <= MAX_BATCH], CONTEXT_TOKENS)
    by_batch = rows["energy_j"].groupby(rows["batch_size"])  # rows ascend by clock
    return rows.assign(
        time_ms=1e3 * rows["time_s"], relative=rows["energy_j"] / by_batch.transform("last")
    )


def _lines(axes: Axes, rows: pd.DataFrame, *, by: str, x: str, y: str, title: str) -> None:
    for i, value in enumerate(_spread(sorted(rows[by].unique()))):
        part = rows[rows[by] == value].sort_values(x)
        axes.plot(part[x], part[y], markersize=3.5, label=str(value), **line_style(i + 1))
    axes.legend(title=title, title_fontsize=FONT_PT, labelspacing=0.2)


def _spread(values: list[Any]) -> list[Any]:
    """A few of the values, the ends among them."""
    if len(values) <= MAX_LINES:
        return values
    last = len(values) - 1
    return [values[round(i * last / (MAX_LINES - 1))] for i in range(MAX_LINES)]
