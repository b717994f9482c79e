"""The figure of a validation: distributions laid over each other, iterations, clocks."""

from __future__ import annotations

from typing import Any, Final

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from voltana.experiments.draw.plots import add_legend
from voltana.hwreplay.validate.validate import Validation, cdf
from voltana.profiles.draw.style import COLOURS, GREY, STYLE, WIDTH_IN
from voltana.sim.metrics import tpot_s, ttft_s
from voltana.sim.policies.base import DECODE, PREFILL
from voltana.sim.records import RunRecord

SIMULATED: Final = COLOURS[1]
OBSERVED: Final = COLOURS[2]
WIDE: Final = 30.0
"""Iteration times that differ by more than this are drawn on logarithmic axes."""


def validation_figure(simulated: RunRecord, observed: RunRecord, found: Validation) -> Figure:
    """CDFs of TTFT, ITL and TPOT; predicted against observed iterations; clock residency.

    Args:
        simulated: The simulated run.
        observed: The real one, of the same requests.
        found: How the two compare.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 8.0), layout="constrained")
        axes = figure.subplots(3, 2)
        shares = axes.flat[:3]
        for record, colour, label in (
            (simulated, SIMULATED, "simulated"),
            (observed, OBSERVED, "observed"),
        ):
            style = {"color": colour, "label": label, "linewidth": 1.4, "where": "post"}
            _step(shares[0], _known(ttft_s(record)), None, style)
            _step(shares[1], record.itl_s, record.itl_weight, style)
            _step(shares[2], _known(tpot_s(record)), None, style)
        for axis, name in zip(shares, ("TTFT", "ITL", "TPOT"), strict=True):
            axis.set_xlabel(f"{name} (ms)")
            axis.set_ylabel("share at or below")
            axis.set_ylim(0, 1.02)
        _residency(axes.flat[3], found)
        _scatter(axes.flat[4], found, PREFILL)
        _scatter(axes.flat[5], found, DECODE)
        add_legend(figure, axes[0, 0].get_lines())
    return figure


def _known(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return values[~np.isnan(values)]


def _step(
    axis: Axes,
    values: npt.NDArray[np.float64],
    counts: npt.NDArray[np.int64] | None,
    style: dict[str, Any],
) -> None:
    steps, fractions = cdf(values, counts)
    axis.step(1e3 * steps, fractions, **style)


def _scatter(axis: Axes, found: Validation, phase: str) -> None:
    axis.set_xlabel(f"observed {phase} (ms)")
    axis.set_ylabel("predicted (ms)")
    if found.points is None:
        return
    rows = found.points[found.points["phase"] == phase].dropna()
    rows = rows[(rows["observed_s"] > 0) & (rows["predicted_s"] > 0)]
    if rows.empty:
        return
    x, y = 1e3 * rows["observed_s"], 1e3 * rows["predicted_s"]
    axis.scatter(x, y, s=6, alpha=0.3, color=OBSERVED, linewidths=0)
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axis.plot(ends, ends, color=GREY, linestyle=":", linewidth=1)
    if ends[1] > WIDE * ends[0]:
        axis.set_xscale("log")
        axis.set_yscale("log")


def _residency(axis: Axes, found: Validation) -> None:
    sides = (("simulated", SIMULATED, -0.2), ("observed", OBSERVED, 0.2))
    keys = sorted(
        {
            (phase, int(clock))
            for side, _, _ in sides
            for phase, shares in found.residency[side].items()
            for clock in shares
        }
    )
    for side, colour, offset in sides:
        shares = [found.residency[side].get(p, {}).get(str(c), 0.0) for p, c in keys]
        axis.bar(np.arange(len(keys)) + offset, shares, width=0.4, color=colour)
    names = [f"{phase[0].upper()} {clock or 'unlocked'}" for phase, clock in keys]
    axis.set_xticks(np.arange(len(keys)), names, rotation=60, ha="right")
    axis.set_xlabel("phase, clock (MHz)")
    axis.set_ylabel("share of busy time")
