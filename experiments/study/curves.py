"""The figure of an experiment: a column of axes a panel, a row a measure, a curve a series.

Where there are many panels they are the rows, and measures the columns.
"""

from __future__ import annotations

import textwrap
from typing import Any, Final

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from voltana.experiments.compare.measures import Measure, find_measure
from voltana.experiments.draw.plots import add_legend, display_name, stretch_attainment
from voltana.experiments.study.suite import PANEL, Experiment, FigureSpec
from voltana.profiles.common.errors import VoltanaError, nearest
from voltana.profiles.draw.style import FONT_PT, STYLE, WIDTH_IN, legend_height_in, line_style

Styles = dict[Any, dict[str, Any]]
MOST_COLUMNS: Final = 3
"""More panels than this become rows."""
ROW_LETTERS: Final = 16
"""As many fit beside a row; longer labels are wrapped."""


def draw_experiment(experiment: Experiment, frame: pd.DataFrame) -> Figure:
    """Draw an experiment's results: means over seeds, bands from the lowest to the highest seed.

    Args:
        experiment: Says what is on the axes.
        frame: Tidy results with the column `panel`, see
            `voltana.experiments.study.suite.with_saving`.

    Raises:
        VoltanaError: The figure asks for a measure or column that does not exist.
    """
    spec = experiment.figure
    measures = [find_measure(name) for name in spec.rows]
    for wanted in (spec.x, spec.series):
        if wanted not in frame:
            raise VoltanaError(f"[figure] names {wanted!r}{nearest(wanted, frame.columns)}")
    panels = list(dict.fromkeys(frame[PANEL]))
    names = list(dict.fromkeys(frame[spec.series]))
    styles = {name: line_style(i) for i, name in enumerate(names)}
    panels_are_rows = len(panels) > MOST_COLUMNS
    rows, columns = len(measures), len(panels)
    if panels_are_rows:
        rows, columns = columns, rows
    with mpl.rc_context(STYLE):
        labels = [display_name(name) for name in names]
        height_in = (1.35 if panels_are_rows else 1.65) * rows + 0.8 + legend_height_in(labels)
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=_shared_x(panels_are_rows))
        by_measure = grid.T if panels_are_rows else grid
        for row, measure in zip(by_measure, measures, strict=True):
            _draw_row(row, measure, frame, panels, spec, styles)
        _label(grid, measures, panels, panels_are_rows=panels_are_rows)
        figure.supxlabel(spec.x_label)
        handles = [Line2D([], [], label=display_name(n), **styles[n]) for n in names]
        add_legend(figure, handles, "outside upper center")
    return figure


def _shared_x(panels_are_rows: bool) -> Any:  # noqa: ANN401 (matplotlib's word)
    return "row" if panels_are_rows else "col"


def _draw_row(
    row: npt.NDArray[Any],
    measure: Measure,
    frame: pd.DataFrame,
    panels: list[str],
    spec: FigureSpec,
    styles: Styles,
) -> None:
    """One measure in all panels; energies and powers share their axis from panel to panel."""
    values = measure.of(frame)
    is_of_one_kind = len(panels) <= MOST_COLUMNS
    for axes, panel in zip(row, panels, strict=True):
        inside = frame[PANEL] == panel
        _draw(axes, frame[inside].assign(_y=values[inside]), spec, styles)
        seen = values if is_of_one_kind else values[inside]
        if measure.is_percentage:
            stretch_attainment(axes, "y", float(seen.min()))
        elif measure.from_zero:
            axes.set_ylim(0, 1.05 * float(seen.max()))
        elif is_of_one_kind:
            room = 0.06 * max(float(seen.max() - seen.min()), 1e-9)
            axes.set_ylim(float(seen.min()) - room, float(seen.max()) + room)
        if is_of_one_kind and axes is not row[0]:
            axes.tick_params(labelleft=False)


def _draw(axes: Axes, part: pd.DataFrame, spec: FigureSpec, styles: Styles) -> None:
    """The curves of one panel; where x has no numbers, dots side by side that nothing joins."""
    order = list(dict.fromkeys(part[spec.x]))
    is_number = pd.api.types.is_numeric_dtype(part[spec.x])
    for i, (name, rows) in enumerate(part.groupby(spec.series, sort=False)):
        found = rows.groupby(spec.x, sort=is_number)["_y"].agg(["mean", "min", "max"])
        style = styles[name] | {"markersize": 4}
        if is_number:
            x: npt.NDArray[Any] = found.index.to_numpy(dtype=float) * spec.x_scale
        else:
            share = (i - (len(styles) - 1) / 2) / (len(styles) + 1)
            x = np.array([order.index(v) for v in found.index]) + share
            style |= {"linestyle": ""}
        axes.plot(x, found["mean"], clip_on=False, zorder=3, **style)
        if (found["max"] > found["min"]).any():
            if is_number:
                axes.fill_between(x, found["min"], found["max"], color=style["color"], alpha=0.15)
            else:
                axes.vlines(x, found["min"], found["max"], color=style["color"], linewidth=1)
    if is_number:
        spec_of = axes.get_subplotspec()
        columns = spec_of.get_geometry()[1] if spec_of is not None else 1
        bins = {1: 6, 2: 4}.get(columns, 3)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=bins, steps=[1, 2, 2.5, 5, 10]))
    else:
        axes.set_xticks(range(len(order)), [display_name(v) for v in order])
        axes.set_xlim(-0.6, len(order) - 0.4)
        axes.grid(visible=False, axis="x")


def _label(
    grid: npt.NDArray[Any],
    measures: list[Measure],
    panels: list[str],
    *,
    panels_are_rows: bool,
) -> None:
    """Titles above the columns, labels left of the rows, wrapped to the room that there is."""
    labels = [measure.label.replace(" (", "\n(") for measure in measures]
    rows, columns = (panels, labels) if panels_are_rows else (labels, panels)
    letters = int(WIDTH_IN / len(columns) / (0.0085 * FONT_PT))
    for axes, text in zip(grid[0], columns, strict=True):
        axes.set_title("\n".join(textwrap.fill(t, letters) for t in text.split("\n")))
    for axes, text in zip(grid[:, 0], rows, strict=True):
        wrapped = "\n".join(textwrap.fill(t, ROW_LETTERS) for t in text.split("\n"))
        axes.set_ylabel(text.replace(", ", ",\n") if panels_are_rows else wrapped)
    figure = grid[0, 0].figure
    if not panels_are_rows:
        figure.align_ylabels(grid[:, 0])
