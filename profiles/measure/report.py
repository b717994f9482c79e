"""What a profile looks like: the fit of its predictor, and three plots."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from profiles.catalog import Profile
from profiles.ecopred import fit_report

POINT = ["frequency_mhz", "batch_size", "tokens"]


def write_report(profile: Profile, directory: Path) -> list[Path]:
    """Write `fit_report.csv`, `energy_u.png`, `latency_steps.png`, `power_surface.png`."""
    directory.mkdir(parents=True, exist_ok=True)
    fit_path = directory / "fit_report.csv"
    fit_report(profile.fitted).to_csv(fit_path, index=False, float_format="%.5g")
    figures = {
        "energy_u.png": _energy_figure(profile),
        "latency_steps.png": _latency_figure(profile),
        "power_surface.png": _power_figure(profile),
    }
    with mpl.rc_context({"figure.dpi": 120}):
        for name, figure in figures.items():
            figure.savefig(directory / name)
    return [fit_path, *(directory / name for name in figures)]


def _medians(table: pd.DataFrame) -> pd.DataFrame:
    return table.groupby(POINT)[["time_s", "power_w"]].median().reset_index()


def _energy_figure(profile: Profile) -> Figure:
    """Energy per output token against the clock, one line a batch size: the U."""
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    medians = _medians(profile.decode)
    for batch, part in medians.groupby("batch_size"):
        per_token_j = part["time_s"] * part["power_w"] / part["batch_size"]
        line = per_token_j.groupby(part["frequency_mhz"]).median()
        axes.plot(line.index, line.to_numpy(), marker="o", label=str(batch))
    axes.set(xlabel="clock (MHz)", ylabel="energy per output token (J)", title=profile.name)
    axes.legend(title="batch size", fontsize="x-small", ncols=2)
    return figure


def _latency_figure(profile: Profile) -> Figure:
    """Decode iteration time against batch size at the shortest context: the steps."""
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    medians = _medians(profile.decode)
    context = medians["tokens"] / medians["batch_size"]
    shortest = medians[context == context.min()]
    for clock, part in shortest.groupby("frequency_mhz"):
        axes.plot(part["batch_size"], 1e3 * part["time_s"], marker=".", label=f"{clock} MHz")
    axes.set(xlabel="batch size", ylabel="decode iteration (ms)", title=profile.name)
    axes.legend()
    return figure


def _power_figure(profile: Profile) -> Figure:
    """Power over batch size and tokens at the top clock, both phases."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (phase, table) in zip(
        axes, (("prefill", profile.prefill), ("decode", profile.decode)), strict=True
    ):
        medians = _medians(table)
        top = medians[medians["frequency_mhz"] == medians["frequency_mhz"].max()]
        shown = axis.scatter(top["batch_size"], top["tokens"], c=top["power_w"], cmap="viridis")
        axis.set(xlabel="batch size", ylabel="tokens", title=phase, xscale="log", yscale="log")
        figure.colorbar(shown, ax=axis, label="power (W)")
    return figure
