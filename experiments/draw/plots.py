"""Figures from tidy results. Colour-blind-safe, every axis with its unit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from voltana.experiments.compare.policies import BEST_PAIR, TARGET, load_columns, worse_attainment
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_figure
from voltana.profiles.draw.style import (
    COLOURS,
    GREY,
    MARKERS,
    STYLE,
    WIDTH_IN,
    legend_columns,
    legend_height_in,
    line_style,
)
from voltana.sim.policies.base import DECODE, PREFILL

__all__ = ["COLOURS", "MARKERS", "STYLE", "energy_vs_slo", "save"]

PHASE_COLOURS: Final = {PREFILL: (COLOURS[1], COLOURS[6]), DECODE: (COLOURS[2], COLOURS[5])}
"""Of the first instance of a phase and of the second."""
VOLTANALLM: Final = "ecofreq + ecoroute"
"""The published system by the names of its two policies, the same in every figure."""
Place = Literal["outside lower center", "outside upper center"]
_NAMES: Final = {"voltanallm": VOLTANALLM}
_TICKS_PCT: Final = (
    (97.0, (97, 98, 99, 99.5, 100)),
    (90.0, (90, 95, 98, 99, 100)),
    (80.0, (80, 90, 95, 99, 100)),
    (50.0, (50, 75, 90, 97, 100)),
    (0.0, (0, 50, 80, 95, 100)),
)
"""Lowest value of an axis in % and its ticks."""


def display_name(series: object) -> str:
    """A series as figures call it: one policy has one name."""
    text = f"{series:g}" if isinstance(series, float) else str(series)
    return _NAMES.get(text, text)


def energy_vs_slo(frame: pd.DataFrame, *, target: float = TARGET) -> Figure:
    """Energy and attainment against request rate, and the two against each other.

    Hollow where the promise, TTFT or ITL, is broken; the promise itself is dotted.

    Args:
        frame: Result of `voltana.experiments.compare.policies.compare`.
        target: Attainment drawn as the line to stay above.

    Raises:
        VoltanaError: Something else than rate and policy varies.
    """
    _check_rate(frame)
    with mpl.rc_context(STYLE):
        handles = []
        groups = list(frame.groupby("policy", sort=False))
        for i, (policy, _) in enumerate(groups):
            handles.append(Line2D([], [], label=display_name(policy), **line_style(i)))
        handles.append(hollow(f"hollow: below {100 * target:g} %"))
        height_in = 4.8 + legend_height_in([str(h.get_label()) for h in handles])
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        axes = figure.subplots(2, 2)
        for i, (_, rows) in enumerate(groups):
            _draw_policy(axes, rows, line_style(i))
        _finish(axes, frame, target)
        add_legend(figure, handles)
    return figure


def save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write PNG and SVG; the same figure gives the same bytes.

    Args:
        figure: What to write.
        directory: Made if it is missing.
        name: Of the files, without suffix.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.png", directory / f"{name}.svg"]
    with mpl.rc_context(STYLE):
        for path in paths:
            write_figure(figure, path)
    return paths


def hollow(label: str) -> Line2D:
    """The legend's entry for hollow markers."""
    return Line2D(
        [], [], color=GREY, marker="o", linestyle="", markerfacecolor="white", label=label
    )


def add_legend(
    figure: Figure, handles: Sequence[Line2D], where: Place = "outside lower center"
) -> None:
    """A legend as wide as the figure allows.

    Args:
        figure: Gets the legend.
        handles: Its entries, in order.
        where: Where matplotlib puts it.
    """
    labels = [str(handle.get_label()) for handle in handles]
    figure.legend(handles=list(handles), loc=where, ncols=legend_columns(labels))


def plot_kept(
    axes: Axes, x: pd.Series[Any], y: pd.Series[Any], kept: pd.Series[bool], style: dict[str, Any]
) -> None:
    """A curve whose markers are hollow where the promise is broken.

    Args:
        axes: Where to draw.
        x: Positions, shape (points,).
        y: Heights, shape (points,).
        kept: Whether each point keeps the promise, shape (points,).
        style: Colour, marker and line, as of `line_style`.
    """
    axes.plot(x, y, **(style | {"marker": ""}))
    for is_kept, face in ((True, style["color"]), (False, "white")):
        dots = kept == is_kept
        if not dots.any():  # an empty line, not clipped, would count as a point at the corner
            continue
        axes.plot(
            x[dots], y[dots], style["marker"], color=style["color"], markerfacecolor=face,
            clip_on=False, zorder=3,
        )  # fmt: skip


def stretch_attainment(axes: Axes, which: str, lowest_pct: float, target: float = TARGET) -> None:
    """An attainment axis in % that is stretched towards 100, where promises are kept or broken.

    Args:
        axes: Where.
        which: "x" or "y".
        lowest_pct: The lowest value to be seen.
        target: Drawn as a dotted line.
    """
    low, ticks = next((row for row in _TICKS_PCT if lowest_pct >= row[0]), _TICKS_PCT[-1])
    axis: Axis = axes.xaxis if which == "x" else axes.yaxis
    set_scale, set_limits = (
        (axes.set_xscale, axes.set_xlim) if which == "x" else (axes.set_yscale, axes.set_ylim)
    )
    set_scale("function", functions=(_stretched, _unstretched))
    set_limits(low - 0.02 * (101 - low), 100.1)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FormatStrFormatter("%g"))
    line = axes.axvline if which == "x" else axes.axhline
    line(100 * target, color=GREY, linestyle=":", linewidth=1.2, zorder=1)


def _stretched(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    return -np.log10(np.maximum(101.0 - np.asarray(values, dtype=float), 0.5))


def _unstretched(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    return np.asarray(101.0 - 10.0 ** -np.asarray(values, dtype=float), dtype=np.float64)


def _check_rate(frame: pd.DataFrame) -> None:
    policies = frame[frame["policy"] != BEST_PAIR]  # whose clocks are others at each load
    others = [n for n in load_columns(policies, "policy") if n != "rate_rps"]
    if others:
        raise VoltanaError(
            f"this figure runs along rate_rps alone, and {others[0]} varies too: voltana report "
            "draws the rest"
        )
    for name in ("rate_rps", "energy_per_output_token_j"):
        if name not in frame:
            raise VoltanaError(f"no column {name} in the results: run the sweep again")


def _draw_policy(grid: npt.NDArray[Any], rows: pd.DataFrame, style: dict[str, Any]) -> None:
    rate, kept = rows["rate_rps"], rows["keeps_slo"]
    plot_kept(grid[0, 0], rate, rows["energy_j"] / 1e3, kept, style)
    worse = 100 * worse_attainment(rows)
    plot_kept(grid[0, 1], worse, rows["energy_per_output_token_j"], kept, style)
    plot_kept(grid[1, 0], rate, 100 * rows["ttft_attainment"], kept, style)
    plot_kept(grid[1, 1], rate, 100 * rows["itl_attainment"], kept, style)


def _finish(grid: npt.NDArray[Any], frame: pd.DataFrame, target: float) -> None:
    for place, x_label, y_label in (
        ((0, 0), "", "energy of the run (kJ)"),
        ((0, 1), "worse attainment (%)", "energy per token (J)"),
        ((1, 0), "rate (requests/s)", "TTFT attainment (%)"),
        ((1, 1), "rate (requests/s)", "ITL attainment (%)"),
    ):
        grid[place].set(xlabel=x_label, ylabel=y_label)
    stretch_attainment(grid[0, 1], "x", 100 * float(worse_attainment(frame).min()), target)
    for place, name in (((1, 0), "ttft_attainment"), ((1, 1), "itl_attainment")):
        stretch_attainment(grid[place], "y", 100 * float(frame[name].min()), target)
    grid[0, 0].set_ylim(bottom=0)
    grid[0, 1].set_ylim(bottom=0)
