"""What a profile looks like: the fit of its predictor, and three plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from voltana.profiles.catalog import Profile
from voltana.profiles.common.files import write_csv, write_figure
from voltana.profiles.draw.style import STYLE, WIDTH_IN, line_style
from voltana.profiles.ecopred import fit_report

POINT: Final = ["frequency_mhz", "batch_size", "tokens"]
CONTEXT_TOKENS: Final = 512
"""Context per request at which decode is drawn, or the nearest that was measured."""
LIMIT: Final = float(np.log(2.0))
"""A batch size that was measured at no context within a factor of 2 is left out of a line."""
MIN_CONTEXT_TOKENS: Final = 2
"""A context of 1 is the far edge of a table; drawn on a log scale it would fill the figure."""
MAX_LINES: Final = 6
MIN_POINTS: Final = 2
"""With fewer points no figure is drawn."""
MIN_R2: Final = 0.9
MAX_MAPE_PCT: Final = 10.0
"""Ours: the shipped profiles' fits have an R2 of 0.975 and more, a MAPE of 3.2 % and less."""
MAX_NAMED: Final = 4
MIN_RANGE: Final = 0.01
"""A power that varies less than this fraction has no contours worth drawing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written, and what was not."""

    paths: list[Path]
    left_out: list[str]
    """A line for each figure that would have shown a single point."""


def write_report(profile: Profile, directory: Path) -> Written:
    """Write `fit_report.csv`, `energy_u.png`, `latency_steps.png`, `power_surface.png`.

    A figure that would show one point is left out, and removed if an earlier run drew it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    fit_path = directory / "fit_report.csv"
    write_csv(fit_report(profile.fitted), fit_path, float_format="%.5g")
    written = Written(paths=[fit_path], left_out=[])
    at_context = decode_at_context(profile.decode, CONTEXT_TOKENS)
    tops = [_top_clock(_medians(table)) for table in (profile.prefill, profile.decode)]
    figures = {
        "energy_u.png": (_energy_figure, len(at_context)),
        "latency_steps.png": (_latency_figure, at_context["batch_size"].nunique()),
        "power_surface.png": (_power_figure, max(map(len, tops))),
    }
    for name, (draw, num_points) in figures.items():
        path = directory / name
        if num_points < MIN_POINTS:
            path.unlink(missing_ok=True)
            written.left_out.append(f"no {path}: it would show one point, measure more of them")
            continue
        with mpl.rc_context(STYLE):
            write_figure(draw(profile), path)
        written.paths.append(path)
    return written


def poor_fits(profile: Profile) -> list[str]:
    """One line if policies should not trust the predictor that was fitted to this profile.

    Returns:
        The phases and clocks at which a fit is poor, with its figures; empty if all are good.
    """
    found = fit_report(profile.fitted)
    poor = found[(found["r2"] < MIN_R2) | (found["mape_pct"] > MAX_MAPE_PCT)]
    if poor.empty:
        return []
    texts = [
        f"{row.phase} at {row.frequency_mhz} MHz: R2 {row.r2:.2f}, MAPE {row.mape_pct:.0f} %"
        for row in poor.itertuples()
    ]
    shown, more = texts[:MAX_NAMED], len(texts) - MAX_NAMED
    return [
        "the predictor fits poorly, policies will misjudge times "
        f"(good is R2 >= {MIN_R2:g} and MAPE <= {MAX_MAPE_PCT:g} %): {'; '.join(shown)}"
        + (f"; and {more} more in fit_report.csv" if more > 0 else "")
        + ": raise --budget or --window, or simulate with --set predictor=table"
    ]


def _medians(table: pd.DataFrame) -> pd.DataFrame:
    return table.groupby(POINT)[["time_s", "power_w"]].median().reset_index()


def decode_at_context(decode: pd.DataFrame, context_tokens: int) -> pd.DataFrame:
    """Of each clock and batch size the decode point nearest to the context, medians of trials.

    A batch size that was measured at no context within a factor of 2 is left out.

    Args:
        decode: A profile's table.
        context_tokens: Of a request; the nearest one that was measured counts.

    Returns:
        Rows in ascending clock and batch size, with `energy_j` of a token.
    """
    rows = _medians(decode)
    context = rows["tokens"] / rows["batch_size"]
    target = context.iloc[(context - context_tokens).abs().argmin()]
    off = (np.log(context) - np.log(target)).abs()
    nearest = off.groupby([rows["frequency_mhz"], rows["batch_size"]]).idxmin()
    found: pd.DataFrame = rows.loc[nearest[(off.loc[nearest] <= LIMIT).to_numpy()]]
    energy_j = found["time_s"] * found["power_w"] / found["batch_size"]
    return found.assign(energy_j=energy_j).reset_index(drop=True)


def _some(values: Sequence[int]) -> list[int]:
    """At most `MAX_LINES` of them, the ends included."""
    ordered = sorted(values)
    picks = np.linspace(0, len(ordered) - 1, min(MAX_LINES, len(ordered)))
    return [ordered[round(index)] for index in picks]


def _energy_figure(profile: Profile) -> Figure:
    """Energy per output token against the clock, relative to the top clock: the U.

    With one clock there is no U; then the energy itself, against batch size.
    """
    rows = decode_at_context(profile.decode, CONTEXT_TOKENS)
    figure = Figure(figsize=(WIDTH_IN, 4), layout="constrained")
    axes = figure.subplots()
    if rows["frequency_mhz"].nunique() == 1:
        axes.plot(rows["batch_size"], rows["energy_j"], **line_style(1))
        axes.set(xlabel="batch size", ylabel="energy per output token (J)")
        axes.set_title(f"{profile.name}, {_clock_text(rows)}")
        axes.set_ylim(bottom=0)
        return figure
    steps = 2 ** np.arange(0, 12, 2)
    known = sorted(int(batch) for batch in rows["batch_size"].unique())
    batches = {min(known, key=lambda size: abs(size - step)) for step in steps}
    for i, batch in enumerate(_some(sorted(batches))):
        part = rows[rows["batch_size"] == batch]
        relative = part["energy_j"].to_numpy() / part["energy_j"].iloc[-1]
        axes.plot(part["frequency_mhz"], relative, label=str(batch), **line_style(i))
    axes.set(xlabel="clock (MHz)", ylabel="energy per token (top clock = 1)")
    axes.set_title(f"{profile.name}\ndecode at a context of {_context_text(rows)}")
    axes.legend(title="batch size")
    return figure


def _latency_figure(profile: Profile) -> Figure:
    """Decode iteration time against batch size: the steps."""
    rows = decode_at_context(profile.decode, CONTEXT_TOKENS)
    figure = Figure(figsize=(WIDTH_IN, 4), layout="constrained")
    axes = figure.subplots()
    for i, clock in enumerate(_some([int(clock) for clock in rows["frequency_mhz"].unique()])):
        part = rows[rows["frequency_mhz"] == clock]
        axes.plot(part["batch_size"], 1e3 * part["time_s"], label=f"{clock} MHz", **line_style(i))
    axes.set(xlabel="batch size", ylabel="decode iteration (ms)")
    axes.set_title(f"{profile.name}\ndecode at a context of {_context_text(rows)}")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _power_figure(profile: Profile) -> Figure:
    """Power at the top clock, over tokens and batch size; dots are the points measured."""
    figure = Figure(figsize=(WIDTH_IN, 7), layout="constrained")
    left, right = figure.subplots(2, 1)
    prefill, decode = (_top_clock(_medians(t)) for t in (profile.prefill, profile.decode))
    _surface(figure, left, prefill, prefill["tokens"])
    left.set(title="prefill", ylabel="tokens of the batch")
    context = decode["tokens"] / decode["batch_size"]
    inside = context >= MIN_CONTEXT_TOKENS
    _surface(figure, right, decode[inside], context[inside])
    right.set(title="decode", ylabel="context of a request (tokens)")
    figure.suptitle(f"{profile.name}, {_clock_text(prefill)}")
    return figure


def _surface(figure: Figure, axes: Axes, rows: pd.DataFrame, height: pd.Series[float]) -> None:
    x, y = np.log2(rows["batch_size"].to_numpy(float)), np.log2(height.to_numpy(float))
    power_w = rows["power_w"].to_numpy(float)
    has_area = len(np.unique(x)) > 1 and len(np.unique(y)) > 1 and len(x) > 3
    if has_area and np.ptp(power_w) > MIN_RANGE * power_w.mean():
        surface = axes.tricontourf(x, y, power_w, levels=12, cmap="viridis")
        axes.plot(x, y, ".", color="white", markersize=1.5, alpha=0.6)
        figure.colorbar(surface, ax=axes, label="power (W)")
    else:
        low, high = 0.9 * power_w.min(), 1.1 * power_w.max()
        dots = axes.scatter(x, y, c=power_w, cmap="viridis", vmin=low, vmax=high)
        figure.colorbar(dots, ax=axes, label="power (W)")
    axes.set_xlabel("batch size")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axis.set_major_formatter(FuncFormatter(lambda power, _: f"{2.0**power:g}"))


def _top_clock(rows: pd.DataFrame) -> pd.DataFrame:
    found: pd.DataFrame = rows[rows["frequency_mhz"] == rows["frequency_mhz"].max()]
    return found


def _clock_text(rows: pd.DataFrame) -> str:
    return f"{rows['frequency_mhz'].max()} MHz"


def _context_text(rows: pd.DataFrame) -> str:
    context = rows["tokens"] / rows["batch_size"]
    low, high = round(context.min()), round(context.max())
    return f"{low} tokens" if low == high else f"{low} to {high} tokens"
