"""Figures from tidy results. Colour-blind-safe, every axis with its unit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure

from experiments.compare import TARGET, load_columns
from profiles.errors import VoltanaError

COLOURS: Final = (
    "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999",
)  # fmt: skip
"""Okabe and Ito's palette, distinguishable with every common colour-vision deficiency."""
MARKERS: Final = "osD^vPX*"
STYLE: Final[dict[Any, Any]] = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "voltana",
}


def energy_vs_slo(frame: pd.DataFrame, *, target: float = TARGET) -> Figure:
    """Energy and attainment against request rate, and the two against each other.

    Args:
        frame: Result of `experiments.compare.compare`.
        target: Attainment drawn as the line to stay above.

    Raises:
        VoltanaError: Something else than rate and policy varies.
    """
    others = [n for n in load_columns(frame, "policy") if n != "rate_rps"]
    if others or "rate_rps" not in frame:
        raise VoltanaError(
            f"this figure runs along rate_rps alone, and {others[0] if others else 'it'} "
            f"{'varies too' if others else 'is not in the results'}: voltana report draws the rest"
        )
    if "energy_per_output_token_j" not in frame:
        raise VoltanaError("no energy_per_output_token_j in the results: run the sweep again")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 6.2), layout="constrained")
        axes = figure.subplots(2, 2)
        for i, (policy, rows) in enumerate(frame.groupby("policy", sort=False)):
            style: dict[str, Any] = {
                "color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)],
                "markersize": 5, "linewidth": 1.4, "label": str(policy),
            }  # fmt: skip
            _draw_policy(axes, rows, style)
        _finish(axes, target)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write PNG and SVG; the same figure gives the same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.png", directory / f"{name}.svg"]
    with mpl.rc_context(STYLE):
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _draw_policy(grid: npt.NDArray[Any], rows: pd.DataFrame, style: dict[str, Any]) -> None:
    rate = rows["rate_rps"]
    worse = 100 * rows[["ttft_attainment", "itl_attainment"]].min(axis=1)
    grid[0, 0].plot(rate, rows["energy_j"] / 1e3, **style)
    grid[0, 1].plot(worse, rows["energy_per_output_token_j"], **style)
    grid[1, 0].plot(rate, 100 * rows["ttft_attainment"], **style)
    grid[1, 1].plot(rate, 100 * rows["itl_attainment"], **style)


def _finish(grid: npt.NDArray[Any], target: float) -> None:
    for place, x_label, y_label in (
        ((0, 0), "request rate (requests/s)", "energy of the run (kJ)"),
        ((0, 1), "worse of TTFT and ITL attainment (%)", "energy per output token (J)"),
        ((1, 0), "request rate (requests/s)", "TTFT attainment (% of requests)"),
        ((1, 1), "request rate (requests/s)", "ITL attainment (% of token gaps)"),
    ):
        grid[place].set_xlabel(x_label)
        grid[place].set_ylabel(y_label)
    grid[0, 1].axvline(100 * target, color="#999999", linestyle=":", linewidth=1)
    for place in ((1, 0), (1, 1)):
        grid[place].axhline(100 * target, color="#999999", linestyle=":", linewidth=1)
        low, _ = grid[place].get_ylim()
        grid[place].set_ylim(min(low, 100 * target - 1), 100.5)
    grid[0, 0].set_ylim(bottom=0)
