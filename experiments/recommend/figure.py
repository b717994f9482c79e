"""The knee: what a promise costs, and what each GPU more costs or saves."""

from __future__ import annotations

from typing import Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from voltana.experiments.draw.plots import stretch_attainment
from voltana.experiments.recommend.advice import Advice
from voltana.profiles.draw.style import COLOURS, GREY, STYLE, WIDTH_IN

_HIGHEST: Final = 150.0
"""Energy in % up to which settings are shown."""


def knee_figure(advice: Advice) -> Figure:
    """Energy of fixed clocks against attainment and against the number of GPUs.

    All on the first tuning repeat, in percent of the advised fixed clocks' energy.
    """
    first = advice.fixed_choice.trial.energies_j[0]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 5.4), layout="constrained")
        above, below = figure.subplots(2, 1)
        _draw_attainments(above, advice, first)
        _draw_gpus(below, advice, first)
        for axes in (above, below):
            axes.set_ylabel("energy, advised = 100 (%)")
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def _draw_attainments(axes: Axes, advice: Advice, first_j: float) -> None:
    """All that was tried, but for what costs half as much again, and the front of it."""
    target = advice.question.target
    least = max(target - 30 * (1.0 - target), 0.0)
    tried = [(a, 100 * e / first_j) for a, e in advice.knee.attainments if a >= least]
    shown = [(a, e) for a, e in tried if e <= _HIGHEST]
    axes.plot([100 * a for a, _ in shown], [e for _, e in shown], color=GREY, marker=".",
              linestyle="", label="tried")  # fmt: skip
    front = [(a, e) for a, e in sorted(shown) if all(e <= f for b, f in shown if b >= a)]
    axes.step([100 * a for a, _ in front], [e for _, e in front], color=COLOURS[1], where="pre",
              label="least energy")  # fmt: skip
    axes.axvline(100 * target, color=COLOURS[0], linewidth=1, linestyle=":")
    kept = 100 * float(advice.fixed_choice.trial.rows["attainment"].iloc[0])
    axes.plot([kept], [100.0], color=COLOURS[2], marker="*", markersize=12, linestyle="",
              label="advised", clip_on=False)  # fmt: skip
    stretch_attainment(axes, "x", 100 * min([a for a, _ in shown] or [target]), target)
    axes.set_xlabel("requests that keep both promises (%)")
    axes.legend(loc="best")


def _draw_gpus(axes: Axes, advice: Advice, first_j: float) -> None:
    points = advice.knee.by_gpus
    axes.plot([g for g, _, _ in points], [100 * e / first_j for _, e, _ in points],
              color=COLOURS[3], marker="s", label="best found that keeps the target")  # fmt: skip
    used = sum(advice.fixed.counts) * advice.question.tensor_parallel
    axes.plot([used], [100.0], color=COLOURS[2], marker="*", markersize=12, linestyle="")
    axes.set_xticks([g for g, _, _ in points])
    axes.set_xlabel("GPUs in use")
    axes.legend(loc="best")
