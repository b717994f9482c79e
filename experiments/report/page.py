"""Puts table, figures and provenance into one HTML file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import jinja2
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from voltana.experiments.compare.policies import KEEPS, SAVING
from voltana.experiments.report import charts
from voltana.experiments.report.collect import ID, RUN, Promises, Results, collect
from voltana.experiments.report.series import RunSeries, choose, series_of
from voltana.experiments.runs import cached_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_text
from voltana.sim.config import KEYS
from voltana.sim.results import BrokenFileError

HERE: Final = Path(__file__).parent
POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
)
"""Content security policy: the browser itself refuses any network access."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the summary table."""

    name: str
    heading: str
    scale: float = 1.0
    form: str = ""
    """Format of a number; empty for text."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of the summary table."""

    value: str
    """What it sorts by; empty for a number that does not exist."""
    shown: str
    is_number: bool = False
    is_code: bool = False


COLUMNS: Final = (
    Column(KEEPS, "keeps SLO"),
    Column("energy_j", "energy (kJ)", 1e-3, ",.1f"),
    Column(SAVING, "saving (%)", 1.0, ".1f"),
    Column("energy_per_output_token_j", "energy per token (J)", 1.0, ".4f"),
    Column("ttft_attainment", "TTFT attainment (%)", 100.0, ".2f"),
    Column("itl_attainment", "ITL attainment (%)", 100.0, ".2f"),
    Column("attainment", "both (%)", 100.0, ".2f"),
    Column("ttft_p99_s", "TTFT p99 (ms)", 1e3, ".1f"),
    Column("itl_p99_s", "ITL p99 (ms)", 1e3, ".1f"),
    Column("goodput_rps", "goodput (requests/s)", 1.0, ".2f"),
)


def write_report(
    directory: Path,
    out: Path,
    *,
    target: float,
    wanted: Sequence[str],
    with_series: bool = True,
    promises: Promises = (None, None),
) -> list[str]:
    """Write the report of a directory of results.

    Args:
        directory: A run, a folder of runs, a sweep or an experiment's results.
        out: The HTML file.
        target: Attainment that both TTFT and ITL must reach to keep the SLO.
        wanted: Beginnings of the ids of the runs whose time series are shown; empty chooses.
        with_series: Leave the time series out if false.
        promises: Of load generators' outputs, TTFT and ITL in s; None: of the runs beside them.

    Returns:
        One line for each time series that was asked for and cannot be shown.

    Raises:
        VoltanaError: There is nothing to report, or no run has a wanted id.
    """
    results = collect(directory, target=target, promises=promises)
    chosen = choose(results, wanted) if with_series else []
    runs, failures = _series(results, chosen)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(_page(results, runs, failures), out)
    return failures


def _series(results: Results, rows: Sequence[pd.Series[Any]]) -> tuple[list[RunSeries], list[str]]:
    runs, failures = [], []
    for row in rows:
        try:
            runs.append(series_of(results, row))
        except BrokenFileError:
            raise
        except VoltanaError as error:
            failures.append(str(error))
    return runs, failures


def _page(results: Results, runs: Sequence[RunSeries], failures: Sequence[str]) -> str:
    views = _views(results, runs)
    here = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return here.get_template("page.html.j2").render(
        results=results,
        target_pct=f"{100 * results.target:g}",
        summary=_summary(results),
        charts=[
            {"name": name, "title": title, "text": TEXTS[name], "views": views[name]}
            for name, title in TITLES.items()
            if name in views
        ],
        failures=failures,
        configuration=_configuration(results),
        profiles=_profiles(results),
        states_power=not results.table.get("is_power_measured", pd.Series([True])).all(),
        written=f"{datetime.now(tz=UTC):%Y-%m-%d %H:%M}",
        version=version("voltana"),
        policy=POLICY,
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        # within a script nothing is escaped: no text may end it
        data=json.dumps(views, separators=(",", ":")).replace("<", "\\u003c"),
    )


TITLES: Final = {
    "pareto": "Energy against SLO",
    "curves": "Energy and attainment against load",
    "series": "Time series",
    "residency": "Clock residency",
}
TEXTS: Final = {
    "pareto": """Left: the worse of TTFT and ITL attainment; down and right is better, the line is
        the Pareto front. Right: the worse of TTFT and ITL at p99, as a multiple of its SLO. Dotted
        is the promise: a point on its wrong side saves nothing at equal attainment.""",
    "curves": """Click a name in the legend to hide it, double-click to see it alone. Of the static
        pairs, the best one at each point.""",
    "series": """Drag to zoom, all rows together; double-click to go back. A gap in the clock is an
        unlocked clock.""",
    "residency": "Share of busy time that each phase spent at each clock.",
}


def _views(results: Results, runs: Sequence[RunSeries]) -> dict[str, list[dict[str, Any]]]:
    """By chart: each choice of its drop-down with its figure."""
    styles = charts.styles_of(results)
    points = results.load_points()
    busiest = results.busiest()
    views: dict[str, list[dict[str, Any]]] = {}
    if len(results.table) > 1:
        views["pareto"] = [
            _view(name, charts.pareto(results, rows, styles), is_first=name == busiest)
            for name, rows in points
        ]
    if results.x is not None:
        views["curves"] = [
            _view(name, charts.curves(results, rows, styles)) for name, rows in _panels(results)
        ]
    if runs:
        views["series"] = [_view(run.label, charts.timeline(run), run.note) for run in runs]
    bars = [(name, _residency(results, rows)) for name, rows in points]
    shown = [
        _view(name, charts.residency(found), is_first=name == busiest)
        for name, found in bars
        if found
    ]
    if shown:
        views["residency"] = shown
    return views


def _view(
    label: str, figure: go.Figure, note: str = "", *, is_first: bool = False
) -> dict[str, Any]:
    drawn = json.loads(figure.to_json())
    return {"label": label, "figure": drawn, "note": note, "is_first": is_first}


def _panels(results: Results) -> list[tuple[str, pd.DataFrame]]:
    """Rows by what a curve does not run along."""
    others = [name for name in results.loads if name != results.x]
    if not others:
        return [("all runs", results.table)]
    groups = results.table.groupby(others, sort=False, dropna=False)
    return [(results.load_name(rows.iloc[0], without=results.x), rows) for _, rows in groups]


def _residency(results: Results, rows: pd.DataFrame) -> list[tuple[str, Any]]:
    named = rows[~results.is_static_pair.loc[rows.index]].drop_duplicates(results.series)
    return [
        (str(row[results.series]), results.residency[row[ID]])
        for _, row in named.iterrows()
        if results.residency.get(row[ID])
    ]


def _summary(results: Results) -> dict[str, Any]:
    """The columns and rows of the summary table."""
    names = [n for n in dict.fromkeys([*results.loads, results.series, "seed"]) if n]
    table = results.table
    if "seed" not in table or table["seed"].nunique() < 2:
        names = [n for n in names if n != "seed"]
    numeric = {n for n in names if pd.api.types.is_numeric_dtype(table[n])}
    columns = [Column(n, _heading(n), form="g" if n in numeric else "") for n in names]
    columns += [c for c in COLUMNS if c.name in table]
    columns += [] if results.series == RUN else [Column(ID, "id")]
    rows = [
        {
            "classes": " ".join(n for n, on in (("misses", not row[KEEPS]), ("pair", pair)) if on),
            "cells": [_cell(row[c.name], c) for c in columns],
        }
        for (_, row), pair in zip(table.iterrows(), results.is_static_pair, strict=True)
    ]
    return {"columns": columns, "rows": rows, "num_pairs": int(results.is_static_pair.sum())}


def _heading(name: str) -> str:
    return {"rate_rps": "rate (requests/s)"}.get(name, name)


def _cell(value: Any, column: Column) -> Cell:  # noqa: ANN401 (a cell of a frame)
    """What is shown, and what it sorts by."""
    if column.form:
        number = float(value) * column.scale
        if not math.isfinite(number):
            return Cell("", "–", is_number=True)
        return Cell(repr(number), f"{number:{column.form}}", is_number=True)
    text = ("yes" if value else "no") if column.name == KEEPS else str(value)
    is_code = column.name == ID
    return Cell(text, text[:8] if is_code else text, is_code=is_code)


def _configuration(results: Results) -> list[tuple[str, str, str]]:
    """Each key with the values that the runs have, and its meaning."""
    rows = []
    for key, meaning in KEYS.items():
        if key not in results.table:
            continue
        values = list(dict.fromkeys(results.table[key].dropna().astype(str)))
        text = "none" if not values else ", ".join(values[:8]) + (", …" if len(values) > 8 else "")
        rows.append((key, text, meaning))
    return rows


def _profiles(results: Results) -> list[dict[str, Any]]:
    """Where the numbers of each profile come from, or why that cannot be told."""
    found: list[dict[str, Any]] = []
    names = results.table["profile"].dropna().unique() if "profile" in results.table else ()
    for name in map(str, names):
        try:
            profile = cached_profile(name)
        except VoltanaError as error:
            found.append({"name": name, "error": str(error)})
            continue
        rows = [
            (quantity, p.status, p.source, p.uncertainty)
            for quantity, p in profile.meta.provenance.items()
        ]
        found.append({"name": name, "error": "", "rows": rows, "hash": profile.content_hash})
    return found
