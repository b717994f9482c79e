"""The figure of an experiment: a column of axes a panel, a row a measure, a curve a series.

One panel alone lies down: its measures stand side by side.
"""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.measures import Measure, find_measure
from experiments.plots import COLOURS, MARKERS, STYLE
from experiments.suite import PANEL, Experiment, FigureSpec
from profiles.errors import VoltanaError, nearest


def draw_experiment(experiment: Experiment, frame: pd.DataFrame) -> Figure:
    """Draw an experiment's results.

    Args:
        experiment: Says what is on the axes.
        frame: Tidy results with the column `panel`, see `experiments.suite.with_saving`.

    Raises:
        VoltanaError: The figure asks for a measure or column that does not exist.
    """
    spec = experiment.figure
    measures = [find_measure(name) for name in spec.rows]
    for wanted in (spec.x, spec.series):
        if wanted not in frame:
            raise VoltanaError(f"[figure] names {wanted!r}{nearest(wanted, frame.columns)}")
    panels = list(dict.fromkeys(frame[PANEL]))
    styles = _styles(frame, spec)
    flat = len(panels) == 1
    with mpl.rc_context(STYLE):
        size = _size(len(panels), len(measures))
        figure = Figure(figsize=size, layout="constrained")
        rows, columns = (1, len(measures)) if flat else (len(measures), len(panels))
        grid = figure.subplots(rows, columns, squeeze=False, sharex="col")
        if flat:  # the one panel lies down: its measures side by side
            grid = grid.T
        for column, panel in enumerate(panels):
            part = frame[frame[PANEL] == panel]
            for row, measure in enumerate(measures):
                _draw(grid[row][column], part, spec, measure, styles)
        _label(grid, spec, measures, panels)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", frameon=False,
            ncols=_legend_columns(labels, size[0]),
        )  # fmt: skip
    return figure


def _size(num_panels: int, num_measures: int) -> tuple[float, float]:
    """Inches: panels are narrower where there are many."""
    if num_panels == 1:
        return 3.1 * num_measures, 3.3
    width = 3.1 if num_panels <= 3 else 2.4
    return max(width * num_panels, 4.2), 2.1 * num_measures + 0.8


def _legend_columns(labels: list[str], width_in: float) -> int:
    """As many columns as fit at about 0.075 inch a character."""
    longest_in = 0.6 + 0.075 * max(len(label) for label in labels)
    return max(1, min(len(labels), int(width_in / longest_in)))


def _styles(frame: pd.DataFrame, spec: FigureSpec) -> dict[Any, dict[str, Any]]:
    """Colour and marker of each series, the same in every panel."""
    return {
        name: {
            "color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4, "linewidth": 1.3, "label": _text(name),
            "linestyle": "-" if i < len(COLOURS) else "--",
        }
        for i, name in enumerate(dict.fromkeys(frame[spec.series]))
    }  # fmt: skip


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _draw(
    axes: Axes, part: pd.DataFrame, spec: FigureSpec, measure: Measure, styles: dict[Any, Any]
) -> None:
    order = list(dict.fromkeys(part[spec.x]))
    is_number = pd.api.types.is_numeric_dtype(part[spec.x])
    for name, rows in part.assign(_y=measure.of(part)).groupby(spec.series, sort=False):
        mean = rows.groupby(spec.x, sort=False)["_y"].agg(["mean", "min", "max"])
        if is_number:
            mean = mean.sort_index()
            x: npt.NDArray[Any] = mean.index.to_numpy(dtype=float) * spec.x_scale
        else:
            x = np.array([order.index(v) for v in mean.index])
        axes.plot(x, mean["mean"], **styles[name])
        if (mean["max"] > mean["min"]).any():
            axes.fill_between(x, mean["min"], mean["max"], color=styles[name]["color"], alpha=0.15)
    if not is_number:
        axes.set_xticks(range(len(order)), [_text(v) for v in order], rotation=20, ha="right")
    if measure.is_percentage:
        axes.set_ylim(-3, 103)


def _label(
    grid: npt.NDArray[Any], spec: FigureSpec, measures: list[Measure], panels: list[str]
) -> None:
    for row, measure in enumerate(measures):
        grid[row, 0].set_ylabel(measure.label, fontsize=8)
        if measure.from_zero:
            for axes in grid[row]:
                axes.set_ylim(bottom=0)
    for column, panel in enumerate(panels):
        grid[0, column].set_title(panel, fontsize=9)
        for axes in grid[:, column] if len(panels) == 1 else grid[-1:, column]:
            axes.set_xlabel(spec.x_label, fontsize=8 if len(panels) > 3 else 9)
