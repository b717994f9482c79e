"""Puts table, figures and provenance into one HTML file."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from experiments.compare.policies import KEEPS, SAVING
from experiments.report import charts
from experiments.report.collect import ID, RUN, Results, collect
from experiments.report.series import RunSeries, choose, series_of
from experiments.runs import cached_profile
from profiles.errors import VoltanaError
from profiles.files import write_text
from sim.config import KEYS
from sim.results import BrokenFileError

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
    directory: Path, out: Path, *, target: float, wanted: Sequence[str], with_series: bool = True
) -> list[str]:
    """Write the report of a directory of results.

    Args:
        directory: A run, a folder of runs, a sweep or an experiment's results.
        out: The HTML file.
        target: Attainment that both TTFT and ITL must reach to keep the SLO.
        wanted: Beginnings of the ids of the runs whose time series are shown; empty chooses.
        with_series: Leave the time series out if false.

    Returns:
        One line for each time series that was asked for and cannot be shown.

    Raises:
        VoltanaError: There is nothing to report, or no run has a wanted id.
    """
    results = collect(directory, target=target)
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
    sections = [
        _head(results),
        _summary(results),
        *(_chart(name, views[name]) for name in TITLES if name in views),
        "".join(f'<p class="soft">No time series: {html.escape(f)}.</p>' for f in failures),
        _configuration(results),
        _provenance(results),
    ]
    data = json.dumps(views, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width">\n'
        f"<title>voltana: {html.escape(results.title)}</title>\n"
        f"<style>{(HERE / 'page.css').read_text(encoding='utf-8')}</style></head>\n"
        f"<body>{''.join(sections)}\n"
        f'<script type="application/json" id="views">{data}</script>\n'
        f"<script>{get_plotlyjs()}</script>\n"
        f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>\n</body></html>\n"
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


def _head(results: Results) -> str:
    count = len(results.table)
    question = f"<p>{html.escape(results.question)}</p>" if results.question else ""
    saving = (
        f"Savings are counted against {html.escape(results.baseline)} at the same load. "
        if results.baseline
        else ""
    )
    return (
        f"<h1>{html.escape(results.title)}</h1>{question}"
        f'<p class="soft">{count} run{"s" * (count > 1)}. {saving}A run keeps the SLO if TTFT '
        f"and ITL attainment both reach {100 * results.target:g} %; a saving counts only there.</p>"
    )


def _summary(results: Results) -> str:
    names = [n for n in dict.fromkeys([*results.loads, results.series, "seed"]) if n]
    table = results.table
    if "seed" not in table or table["seed"].nunique() < 2:
        names = [n for n in names if n != "seed"]
    numeric = {n for n in names if pd.api.types.is_numeric_dtype(table[n])}
    columns = [Column(n, _heading(n), form="g" if n in numeric else "") for n in names]
    columns += [c for c in COLUMNS if c.name in table]
    columns += [] if results.series == RUN else [Column(ID, "id")]
    head = "".join(_header(c) for c in columns)
    rows = "".join(
        _row(results, row, columns, is_pair)
        for (_, row), is_pair in zip(table.iterrows(), results.is_static_pair, strict=True)
    )
    count = int(results.is_static_pair.sum())
    pairs = (
        f'<label><input type="checkbox" id="pairs"> show the {count} runs of static pairs</label>'
        if count
        else ""
    )
    return (
        f"<h2>Summary</h2><p>Click a heading to sort.</p>"
        f'<div class="controls"><label>Filter <input type="search" id="search"></label>{pairs}'
        f'</div><div class="scroll"><table id="summary"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _heading(name: str) -> str:
    return {"rate_rps": "rate (requests/s)"}.get(name, name)


def _header(column: Column) -> str:
    kind = ' class="number"' if column.form else ""
    return f'<th scope="col"{kind}><button>{html.escape(column.heading)}</button></th>'


def _row(results: Results, row: pd.Series[Any], columns: Sequence[Column], is_pair: bool) -> str:
    classes = [name for name, on in (("misses", not row[KEEPS]), ("pair", is_pair)) if on]
    cells = "".join(_cell(row[c.name], c) for c in columns)
    return f'<tr class="{" ".join(classes)}">{cells}</tr>'


def _cell(value: Any, column: Column) -> str:  # noqa: ANN401 (a cell of a frame)
    if column.form:
        number = float(value) * column.scale
        if not math.isfinite(number):
            return '<td class="number" data-value="">–</td>'
        return f'<td class="number" data-value="{number!r}">{number:{column.form}}</td>'
    text = ("yes" if value else "no") if column.name == KEEPS else str(value)
    shown = f"<code>{html.escape(text[:8])}</code>" if column.name == ID else html.escape(text)
    return f'<td data-value="{html.escape(text)}">{shown}</td>'


def _chart(name: str, views: list[dict[str, Any]]) -> str:
    choices = "".join(
        f"<option{' selected' if view['is_first'] else ''}>{html.escape(view['label'])}</option>"
        for view in views
    )
    label = "run" if name == "series" else "load"
    choose_one = (
        f'<label>{label} <select data-chart="{name}">{choices}</select></label>'
        if len(views) > 1
        else f"<span>{html.escape(views[0]['label'])}</span>"
    )
    return (
        f'<h2>{TITLES[name]}</h2><p>{TEXTS[name]}</p><div class="controls">{choose_one}'
        f'<span class="soft" id="{name}-note"></span></div><div id="{name}"></div>'
    )


def _configuration(results: Results) -> str:
    rows = []
    for key, meaning in KEYS.items():
        if key not in results.table:
            continue
        values = list(dict.fromkeys(results.table[key].dropna().astype(str)))
        text = "none" if not values else ", ".join(values[:8]) + (", …" if len(values) > 8 else "")
        rows.append((f"<code>{key}</code>", html.escape(text), html.escape(meaning)))
    return "<h2>Configuration</h2>" + _plain_table(("key", "value", "meaning"), rows)


def _provenance(results: Results) -> str:
    intro = (
        f"<h2>Provenance</h2><p>Written {datetime.now(tz=UTC):%Y-%m-%d %H:%M} UTC by voltana "
        f"{version('voltana')} from <code>{html.escape(str(results.directory))}</code>. "
        f"Simulated numbers are as good as the profile below them.</p>"
    )
    parts = [intro]
    if "is_power_measured" in results.table and not results.table["is_power_measured"].all():
        parts.append("<p>Power of a replayed run is a stated constant here, not a measurement.</p>")
    names: list[Any] = []
    if "profile" in results.table:
        names = list(results.table["profile"].dropna().unique())
    for name in names:
        parts.append(f"<h3>{html.escape(str(name))}</h3>")
        try:
            profile = cached_profile(str(name))
        except VoltanaError as error:
            parts.append(f"<p>{html.escape(str(error))}</p>")
            continue
        rows = [
            (html.escape(quantity), p.status, html.escape(p.source), html.escape(p.uncertainty))
            for quantity, p in profile.meta.provenance.items()
        ]
        parts.append(_plain_table(("quantity", "status", "source", "uncertainty"), rows))
        parts.append(f"<p class='soft'>SHA-256 <code>{profile.content_hash}</code></p>")
    return "".join(parts)


def _plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope='col'>{h}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
