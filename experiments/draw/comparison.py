"""Two profiles beside each other: the folder that a comparison leaves, and its figure."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from voltana.experiments.compare.profiles import ProfileComparison, at_context, note_text
from voltana.experiments.draw.plots import save
from voltana.profiles.common.files import write_csv, write_text
from voltana.profiles.common.folders import claim
from voltana.profiles.draw.style import COLOURS, STYLE


def write_comparison(found: ProfileComparison, directory: Path) -> list[Path]:
    """Write `note.md`, `shape.csv`, `points.csv` and the figure it shows."""
    claim(directory, "comparison")
    figures = save(_figure(found), directory, "comparison")
    tables = {
        "shape.csv": pd.DataFrame([asdict(s) for s in found.shapes]),
        "points.csv": found.points,
    }
    for name, table in tables.items():
        write_csv(table, directory / name, float_format="%.6g")
    note = directory / "note.md"
    write_text(note_text(found), note)
    return [note, *figures, *(directory / name for name in tables)]


def _figure(found: ProfileComparison) -> Figure:
    points = found.points.dropna()
    decode = at_context(points[points["phase"] == "decode"])
    prefill = points[(points["phase"] == "prefill")]
    prefill = prefill[prefill["batch_size"] == prefill["batch_size"].min()]
    time_scale = {s.phase: s.scale for s in found.shapes if s.quantity == "time_s"}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        _pair(left, found, decode, "batch_size", "time_s", time_scale["decode"])
        left.set(xlabel="batch (requests)", ylabel="decode iteration (ms)")
        _pair(middle, found, prefill, "tokens", "time_s", time_scale["prefill"])
        middle.set(
            xlabel="prompt (tokens)", ylabel="prefill iteration (ms)", xscale="log", yscale="log"
        )
        _pair(right, found, decode, "batch_size", "power_w", 1.0)
        right.set(xlabel="batch (requests)", ylabel="decode power (W)")
        for axes in (left, right):
            axes.set_ylim(bottom=0)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _pair(
    axes: Axes, found: ProfileComparison, rows: pd.DataFrame, x: str, y: str, scale: float
) -> None:
    """Ours, and theirs times the scale: what is left between them is the shape."""
    unit = 1e3 if y == "time_s" else 1.0
    ordered = rows.sort_values(x)
    label = f"{found.theirs.name}, times scaled to it"
    axes.plot(ordered[x], unit * ordered[y], "o", ms=3.5, color=COLOURS[2], label=found.ours.name)
    axes.plot(ordered[x], unit * scale * ordered[f"{y}_theirs"], color=COLOURS[1], label=label)
