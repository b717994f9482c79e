"""The report's interactive figures. Plotly draws them; every axis has its unit."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go
from matplotlib import colormaps
from matplotlib.colors import to_hex
from plotly.subplots import make_subplots

from voltana.experiments.compare.measures import MEASURES
from voltana.experiments.compare.policies import BEST_PAIR, KEEPS, SAVING, best_pairs
from voltana.experiments.draw.plots import COLOURS, PHASE_COLOURS
from voltana.experiments.report.collect import ID, Results
from voltana.experiments.report.series import RunSeries
from voltana.experiments.sweep.run import Residency

SYMBOLS: Final = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star")
DASHES: Final = ("solid", "dash", "dot", "dashdot")
GREY: Final = "#767676"
INK: Final = "#1a1a1a"
MAX_INSTANCES: Final = 4
"""More instances of a phase than this are drawn as their mean."""
MAX_DOTS: Final = 3000

PANELS: Final = (
    ("clock_mhz", "clock lock (MHz)"),
    ("batch_size", "batch (requests)"),
    ("num_waiting", "queue (requests)"),
    ("power_w", "power (W)"),
)
Styles = dict[str, dict[str, Any]]


def styles_of(results: Results) -> Styles:
    """Colour, symbol and dash of each series, the same in every figure."""
    named = results.table.loc[~results.is_static_pair, results.series].astype(str)
    styles = {
        name: {
            "colour": COLOURS[i % len(COLOURS)],
            "symbol": SYMBOLS[i % len(SYMBOLS)],
            "dash": DASHES[i // len(COLOURS) % len(DASHES)],
        }
        for i, name in enumerate(dict.fromkeys(named))
    }
    return styles | {BEST_PAIR: {"colour": GREY, "symbol": "x", "dash": "dot"}}


def pareto_front(energy: npt.ArrayLike, attainment: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Points that no other one beats: none has less energy at no lower attainment.

    Args:
        energy: Any unit, shape (n,).
        attainment: Higher is better, shape (n,).

    Example:
        >>> pareto_front([1.0, 2.0, 3.0], [0.5, 0.4, 0.9]).tolist()
        [True, False, True]
    """
    e, a = np.asarray(energy, dtype=float), np.asarray(attainment, dtype=float)
    beats = (e[:, None] <= e) & (a[:, None] >= a) & ((e[:, None] < e) | (a[:, None] > a))
    return np.asarray(~beats.any(axis=0))


def pareto(results: Results, rows: pd.DataFrame, styles: Styles) -> go.Figure:
    """Energy against the worse attainment, and against the worse tail over its SLO.

    Args:
        results: What is reported.
        rows: One row a run.
        styles: Colour and marker of each series.
    """
    rows = rows.assign(
        _kj=rows["energy_j"] / 1e3,
        _worse=100 * rows[["ttft_attainment", "itl_attainment"]].min(axis=1),
        _tail=np.fmax(
            rows["ttft_p99_s"] / rows["slo_ttft_s"], rows["itl_p99_s"] / rows["slo_itl_s"]
        ),
    )
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.04)
    for column, x in ((1, "_worse"), (2, "_tail")):
        for name, part in _by_series(results, rows):
            figure.add_trace(_dots(results, part, name, x, styles, column == 1), row=1, col=column)
    known = rows.dropna(subset=["_kj"])
    front = known[pareto_front(known["_kj"], known["_worse"])].sort_values("_worse")
    figure.add_trace(
        go.Scatter(
            x=front["_worse"], y=front["_kj"], mode="lines", name="Pareto front",
            line={"color": GREY, "width": 1.2, "shape": "vh"}, hoverinfo="skip",
        ),
        row=1, col=1,
    )  # fmt: skip
    figure.add_vline(x=100 * results.target, line={"color": GREY, "dash": "dot"}, row=1, col=1)
    figure.add_vline(x=1.0, line={"color": GREY, "dash": "dot"}, row=1, col=2)
    figure.update_xaxes(title_text="worse attainment (%)", row=1, col=1)
    figure.update_xaxes(title_text="worse p99 / its SLO", row=1, col=2)
    figure.update_yaxes(title_text="energy of the run (kJ)", row=1, col=1)
    return _finish(figure, height=460)


def curves(results: Results, rows: pd.DataFrame, styles: Styles) -> go.Figure:
    """Energy, saving and both attainments along the horizontal axis, a line a series.

    Args:
        results: What is reported.
        rows: One row a run.
        styles: Colour and marker of each series.
    """
    names = ["energy", *(["saving"] if SAVING in rows else []), "ttft", "itl"]
    measures = [MEASURES[name] for name in names]
    figure = make_subplots(
        rows=2, cols=2, shared_xaxes=True, horizontal_spacing=0.09, vertical_spacing=0.06
    )
    is_number = pd.api.types.is_numeric_dtype(rows[results.x])
    for i, measure in enumerate(measures):
        place = {"row": i // 2 + 1, "col": i % 2 + 1}
        for name, part in _curve_rows(results, rows):
            y = measure.of(part).groupby(part[results.x], sort=is_number).mean()
            style = styles[name]
            figure.add_trace(
                go.Scatter(
                    x=y.index * results.x_scale if is_number else y.index,
                    y=y, name=name, legendgroup=name, showlegend=i == 0,
                    mode="lines+markers",
                    line={"color": style["colour"], "dash": style["dash"], "width": 1.8},
                    marker={"symbol": style["symbol"], "size": 7},
                ),
                **place,
            )  # fmt: skip
        figure.update_yaxes(title_text=measure.label.replace(" (", "<br>("), **place)
        if measure.is_percentage:
            figure.add_hline(100 * results.target, line={"color": GREY, "dash": "dot"}, **place)
        if i + 2 >= len(measures):
            figure.update_xaxes(title_text=results.x_label, showticklabels=True, **place)
    return _finish(figure, height=600)


def timeline(run: RunSeries) -> go.Figure:
    """Clock, batch, queue, power and TTFT of one run; they zoom together."""
    panels = [(c, label) for c, label in PANELS if c in run.timeline]
    total = len(panels) + (run.ttft is not None)
    figure = make_subplots(rows=total, cols=1, shared_xaxes=True, vertical_spacing=0.025)
    for name, frame, style in _instances(run.timeline):
        for row, (column, _) in enumerate(panels, start=1):
            values = frame[column].astype(float)
            if column == "clock_mhz":  # 0 is no lock: a gap, not a clock
                values = values.where(values > 0)
            figure.add_trace(
                go.Scatter(
                    x=frame["time_s"].round(4), y=values.round(2), name=name, legendgroup=name,
                    showlegend=row == 1, mode="lines",
                    line={"width": 1.3, "shape": "hv", **style},
                ),
                row=row, col=1,
            )  # fmt: skip
    for row, (_, label) in enumerate(panels, start=1):
        figure.update_yaxes(title_text=label, fixedrange=True, row=row, col=1)
    figure.update_yaxes(range=_clock_range(run.timeline), tickformat="d", row=1, col=1)
    if run.ttft is not None:
        _add_ttft(figure, run, total)
    figure.update_xaxes(range=(0, float(run.timeline["time_s"].max())))
    figure.update_xaxes(title_text="time (s)", row=total, col=1)
    return _finish(figure, height=150 * total + 90, hover="x")


def residency(rows: list[tuple[str, Residency]]) -> go.Figure:
    """Share of busy time at each clock, a bar a run and phase."""
    clocks = sorted({int(c) for _, phases in rows for shares in phases.values() for c in shares})
    ramp = colormaps["viridis_r"]
    bars = [(name, phase) for name, phases in rows for phase in phases]
    by_name = dict(rows)
    figure = go.Figure()
    for i, clock in enumerate(clocks):
        share = [100 * by_name[name][phase].get(str(clock), 0.0) for name, phase in bars]
        colour = to_hex(ramp(0.08 + 0.9 * i / max(len(clocks) - 1, 1))) if clock else "#dddddd"
        figure.add_trace(
            go.Bar(
                y=[f"{name} · {phase}" for name, phase in bars], x=share, orientation="h",
                name=f"{clock} MHz" if clock else "unlocked",
                marker={"color": colour, "line": {"color": "white", "width": 0.5}},
                hovertemplate="%{y}: %{x:.2f} %",
            )
        )  # fmt: skip
    figure.update_layout(barmode="stack", showlegend=True, legend={"traceorder": "normal"})
    figure.update_xaxes(title_text="share of busy time (%)", range=[0, 100])
    figure.update_yaxes(autorange="reversed", automargin=True)
    return _finish(figure, height=130 + 26 * len(bars))


def _clock_range(frame: pd.DataFrame) -> tuple[float, float] | None:
    """Some room around the locks, so that a fixed clock is a line on a readable axis."""
    locks = frame.loc[frame["clock_mhz"] > 0, "clock_mhz"]
    return None if locks.empty else (float(locks.min()) - 60, float(locks.max()) + 60)


def _by_series(results: Results, rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Rows of each series, the static pairs together under one name."""
    is_pair = results.is_static_pair.loc[rows.index]
    named = rows[~is_pair].groupby(rows[results.series].astype(str), sort=False)
    parts = [(str(name), part) for name, part in named]
    return [*parts, *([("static pairs", rows[is_pair])] if is_pair.any() else [])]


def _curve_rows(results: Results, rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Rows of each curve; of the static pairs the best one at each point."""
    parts = [(name, part) for name, part in _by_series(results, rows) if name != "static pairs"]
    pairs = rows[results.is_static_pair.loc[rows.index]]
    if len(pairs) and results.x is not None:
        best = best_pairs(pairs, [results.x], series=results.series, target=results.target)
        parts.append((BEST_PAIR, best))
    return parts


def _dots(
    results: Results, rows: pd.DataFrame, name: str, x: str, styles: Styles, is_first: bool
) -> go.Scatter:
    style = styles.get(name, styles[BEST_PAIR])
    is_pair = name not in styles
    hover = rows[results.series].astype(str) + "<br>" + rows[ID].astype(str).str[:8]
    kept = np.where(rows[KEEPS], "keeps the SLO", "does not keep the SLO")
    return go.Scatter(
        x=rows[x], y=rows["_kj"], name=name, legendgroup=name, showlegend=is_first,
        mode="markers", text=hover + "<br>" + kept,
        hovertemplate="%{text}<br>%{y:.1f} kJ, %{x:.2f}<extra></extra>",
        marker={
            "color": style["colour"], "symbol": style["symbol"], "size": 6 if is_pair else 11,
            "opacity": 0.55 if is_pair else 1.0,
        },
    )  # fmt: skip


def _instances(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame, dict[str, str]]]:
    """Each instance's samples with its line style; the mean of a phase with many instances."""
    found = []
    for phase, colours in PHASE_COLOURS.items():
        part = frame[frame["phase"] == phase]
        ids = sorted(part["instance_id"].unique())
        if len(ids) > MAX_INSTANCES:
            mean = part.drop(columns=["phase", "instance_id"]).groupby("time_s", as_index=False)
            found.append((f"{phase}, mean of {len(ids)}", mean.mean(), {"color": colours[0]}))
            continue
        for i, number in enumerate(ids):
            style = {"color": colours[i % 2], "dash": DASHES[i // 2]}
            found.append((f"{phase} {number}", part[part["instance_id"] == number], style))
    return found


def _add_ttft(figure: go.Figure, run: RunSeries, row: int) -> None:
    assert run.ttft is not None
    step = -(-len(run.ttft) // MAX_DOTS)
    dots = run.ttft.iloc[::step]
    name = "request" if step == 1 else f"request (1 of {step})"
    figure.add_trace(
        go.Scatter(
            x=dots["arrival_s"].round(4), y=(1e3 * dots["ttft_s"]).round(2), mode="markers",
            name=name, marker={"color": INK, "size": 3, "opacity": 0.5},
        ),
        row=row, col=1,
    )  # fmt: skip
    figure.add_hline(
        1e3 * run.slo_ttft_s, line={"color": GREY, "dash": "dot"}, row=row, col=1,
        annotation_text="SLO", annotation_position="top right",
    )  # fmt: skip
    figure.update_yaxes(title_text="TTFT (ms)", fixedrange=True, row=row, col=1)


def _finish(figure: go.Figure, *, height: int, hover: str = "closest") -> go.Figure:
    figure.update_layout(
        template=None, height=height, hovermode=hover, dragmode="zoom",
        paper_bgcolor="white", plot_bgcolor="white",
        font={"family": "system-ui, Segoe UI, Helvetica, Arial, sans-serif", "size": 12,
              "color": INK},
        margin={"l": 70, "r": 20, "t": 40, "b": 50},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
    )  # fmt: skip
    figure.update_xaxes(gridcolor="#ececec", zeroline=False, linecolor="#999999", ticks="outside")
    figure.update_yaxes(gridcolor="#ececec", zeroline=False, linecolor="#999999", ticks="outside")
    return figure
