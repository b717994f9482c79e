"""Figures of one run over time, and of energy against the tightness of a promise."""

from __future__ import annotations

from typing import Final

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from voltana.experiments.compare.policies import (
    ATTAINMENTS,
    TARGET,
    best_pairs,
    is_static_pair,
    keeps_slo,
)
from voltana.experiments.draw.plots import (
    PHASE_COLOURS,
    add_legend,
    display_name,
    hollow,
    plot_kept,
)
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.draw.style import STYLE, WIDTH_IN, line_style
from voltana.sim.records import RunRecord

_ROWS: Final = (
    ("clock_mhz", "clock lock (MHz)"),
    ("batch_size", "batch (requests)"),
    ("power_w", "power (W)"),
)


def run_figure(record: RunRecord) -> Figure:
    """Clock, batch and power of one prefill and one decode instance over the run.

    Raises:
        VoltanaError: The run kept no time series.
    """
    if record.timeline is None:
        raise VoltanaError("the run kept no time series: set timeline_interval_s")
    frame = pd.DataFrame(dict(record.timeline))
    first = frame[frame["instance_id"] == 0]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 5.0), layout="constrained")
        grid = figure.subplots(len(_ROWS), 1, sharex=True)
        for axes, (column, label) in zip(grid, _ROWS, strict=True):
            for phase, (colour, _) in PHASE_COLOURS.items():
                rows = first[first["phase"] == phase]
                values = rows[column].replace(0, np.nan) if column == "clock_mhz" else rows[column]
                axes.step(
                    rows["time_s"], values, where="post", color=colour, linewidth=1.0,
                    label=f"{phase} 0",
                )  # fmt: skip
            axes.set_ylabel(label)
        grid[-1].set_xlabel("time (s)")
        add_legend(figure, grid[0].get_lines())
        figure.align_ylabels(grid)
    return figure


def energy_against_itl_slo(frame: pd.DataFrame, *, target: float = TARGET) -> Figure:
    """Energy of each policy against the ITL promise; hollow where the promise is broken.

    Args:
        frame: Result of a sweep over `slo_itl_s` with a policy axis and static pairs, of which the
            best one at each promise is drawn.
        target: Attainment that TTFT and ITL must both reach.
    """
    rows = best_of_pairs(frame, target=target)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 3.8), layout="constrained")
        axes = figure.subplots()
        handles = []
        for i, (policy, part) in enumerate(rows.groupby("policy", sort=False)):
            x, y = 1e3 * part["slo_itl_s"], part["energy_j"] / 1e3
            plot_kept(axes, x, y, part["keeps_slo"], line_style(i))
            handles.append(Line2D([], [], label=display_name(policy), **line_style(i)))
        axes.set(xlabel="promised ITL (ms)", ylabel="energy of the run (kJ)")
        axes.set_ylim(bottom=0)
        add_legend(figure, [*handles, hollow(f"hollow: below {100 * target:g} %")])
    return figure


def best_of_pairs(frame: pd.DataFrame, *, target: float = TARGET) -> pd.DataFrame:
    """Policies as they are, and the best static pair at each ITL promise; with `keeps_slo`.

    Raises:
        VoltanaError: The sweep has no static pairs.
    """
    is_pair = is_static_pair(frame)
    if not is_pair.any():
        raise VoltanaError("no static pairs in these results: give the sweep [static_pairs]")
    best = best_pairs(frame[is_pair], ["slo_itl_s"], target=target)
    joined = pd.concat([frame[~is_pair].assign(clocks=""), best], ignore_index=True)
    columns = ["slo_itl_s", "policy", "clocks", "energy_j", *ATTAINMENTS]
    return joined[columns].assign(keeps_slo=keeps_slo(joined, target))
