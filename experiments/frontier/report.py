"""What a frontier search found: one table a load, as text, CSV and Markdown, and a figure."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.box import SIMPLE_HEAD
from rich.table import Table

from experiments.compare.intervals import Interval, saving_pct, t_interval
from experiments.compare.policies import BEST_PAIR, STATIC_MAX
from experiments.draw.plots import add_legend, hollow, save, stretch_attainment
from experiments.frontier.bound import lower_bound
from experiments.frontier.search import Search, Study, Trial
from experiments.runs import cached_profile, workload_of
from experiments.show import render
from experiments.sweep.identity import bound_key
from profiles.files import write_csv, write_text
from profiles.measure.style import COLOURS, STYLE, WIDTH_IN, legend_height_in, line_style
from sim.config import KEYS, SimConfig, make_config
from sim.results import read_json, write_json

_GRAIN: Final = 200
"""Attainments of bounds are rounded down to half a percent: fewer bounds, each still one."""
NOT_REACHED: Final = "target not reached"
LEGEND: Final = (
    "vs max, vs pair: energy saved against static-max and the best static pair, paired by repeat, "
    "with 95 % intervals; x bound: energy over the lower bound; kept/kJ: requests that kept both "
    "promises per kJ"
)
HEADINGS: Final = (
    "policy", "knob", "attained %", "energy kJ", "vs max %", "vs pair %", "x bound", "kept/kJ",
    "note",
)  # fmt: skip


def frontier_table(
    study: Study, searches: Mapping[str, Sequence[Search]], directory: Path, jobs: int | None = None
) -> pd.DataFrame:
    """One row a load and policy, with savings where, and only where, attainments are equal.

    Columns: load, policy, knob, reached, attainment, energy_j ± energy_half_j, saving_max_pct and
    saving_pair_pct with half widths of the 95 % interval (paired by repeat), bound_ratio (energy
    over the lower bound of runs that attain as much), goodput_per_j, note. NaN where a number
    would not be a comparison at equal attainment.
    """
    chosen = {
        (load, search.name): search.best() or search.nearest_miss()
        for load, row in searches.items()
        for search in row
    }
    bounds = _bounds([t.rows for t in chosen.values() if len(t.rows)], directory, jobs)
    rows = []
    for load, searched in searches.items():
        references = {s.name: s.best() for s in searched if s.name in (STATIC_MAX, BEST_PAIR)}
        for search in searched:
            row = _row(search, chosen[load, search.name], references, bounds)
            rows.append({"load": load, **row})
    return pd.DataFrame(rows)


def _row(
    search: Search,
    trial: Trial,
    references: Mapping[str, Trial | None],
    bounds: Mapping[str, float],
) -> dict[str, Any]:
    """One policy at one load."""
    reached = search.best() is not None
    energies = [float(e) for e in trial.rows["energy_j"]] if len(trial.rows) else []
    energy = t_interval(energies)
    ratios = [e / bounds[k] for e, k in zip(energies, _keys(trial.rows), strict=True)]
    row: dict[str, Any] = {
        "policy": search.name, "reached": reached, "knob": f"{search.knob} {trial.value}".strip(),
        "attainment": trial.attainment, "energy_j": energy.mean, "energy_half_j": energy.half,
        "bound_ratio": t_interval(ratios).mean,
        "goodput_per_j": float(trial.rows["goodput_per_j"].mean()) if reached else math.nan,
        "note": _note(search, reached=reached),
    }  # fmt: skip
    for column, name in (("saving_max", STATIC_MAX), ("saving_pair", BEST_PAIR)):
        reference = references.get(name)
        saving = Interval(math.nan, math.nan)
        if reached and reference is not None and search.name != name:
            saving = saving_pct(energies, [float(e) for e in reference.rows["energy_j"]])
        row |= {f"{column}_pct": saving.mean, f"{column}_half_pct": saving.half}
    return row


def _note(search: Search, *, reached: bool) -> str:
    failed = [t for t in search.tried.values() if t.attainment != t.attainment]
    parts = [] if reached else [NOT_REACHED]
    if failed:
        error = next((t.error for t in failed if t.error), "")
        parts.append(f"{len(failed)} settings could not run" + (f": {error}" if error else ""))
    elif reached and not search.is_monotone():
        parts.append("not monotone in its knob")
    return "; ".join(parts)


def _keys(rows: pd.DataFrame) -> list[str]:
    """The bound that each run is held against: its workload and fleet, its own attainment."""
    if not len(rows):
        return []
    floors = (rows["attainment"] * _GRAIN + 1e-9).astype(int) / _GRAIN
    return [f"{h} {a:.3f}" for h, a in zip(rows["hash"], floors, strict=True)]


def _bounds(frames: Sequence[pd.DataFrame], directory: Path, jobs: int | None) -> dict[str, float]:
    """Bounds by key; kept in the directory by what they depend on, which is no policy."""
    store = directory / "bounds"
    store.mkdir(parents=True, exist_ok=True)
    wanted: dict[str, tuple[SimConfig, float]] = {}
    of_key: dict[str, str] = {}
    for frame in frames:
        for values, key in zip(frame.to_dict("records"), _keys(frame), strict=True):
            config = make_config({k: v for k, v in values.items() if k in KEYS and v == v})
            attainment = float(key.split()[1])
            of_key[key] = name = bound_key(config, attainment)
            if not (store / f"{name}.json").exists():
                wanted[name] = (config, attainment)
    with ProcessPoolExecutor(max_workers=jobs or os.cpu_count()) as pool:
        for name, energy_j in zip(wanted, pool.map(_bound_j, wanted.values()), strict=True):
            write_json({"energy_j": energy_j}, store / f"{name}.json")
    return {k: float(read_json(store / f"{n}.json")["energy_j"]) for k, n in of_key.items()}


def _bound_j(task: tuple[SimConfig, float]) -> float:
    config, attainment = task
    profile = cached_profile(config.profile)
    return lower_bound(config, profile, workload_of(config), attainment=attainment).energy_j


def table_rows(frame: pd.DataFrame) -> list[list[str]]:
    """The cells under `HEADINGS`, one list a row."""
    return [
        [
            str(r["policy"]),
            str(r["knob"]),
            f"{100 * r['attainment']:.2f}",
            _with_half(r["energy_j"] / 1e3, r["energy_half_j"] / 1e3),
            _with_half(r["saving_max_pct"], r["saving_max_half_pct"]),
            _with_half(r["saving_pair_pct"], r["saving_pair_half_pct"]),
            f"{r['bound_ratio']:.2f}",
            "–" if math.isnan(r["goodput_per_j"]) else f"{1e3 * r['goodput_per_j']:.1f}",
            str(r["note"]),
        ]
        for r in frame.to_dict("records")
    ]


def text_table(frame: pd.DataFrame, title: str) -> str:
    """For the terminal."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0), title_justify="left")
    for i, name in enumerate(HEADINGS):
        is_number = 2 <= i <= 7
        table.add_column(name, justify="right" if is_number else "left", no_wrap=0 < i < 8)
    for row in table_rows(frame):
        table.add_row(*row)
    return render(table)


def markdown_table(frame: pd.DataFrame) -> str:
    """For a document."""
    rows = [list(HEADINGS), ["---"] * 2 + ["---:"] * 6 + ["---"], *table_rows(frame)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _with_half(mean: float, half: float) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:.1f}" if math.isnan(half) else f"{mean:.1f} ± {half:.1f}"


def pareto_figure(
    study: Study, searches: Mapping[str, Sequence[Search]], frame: pd.DataFrame
) -> Figure:
    """Energy against attainment, a panel a load: filled what was chosen, hollow what was tried.

    What attains far less than the target is left out.
    """
    loads = list(searches)
    columns = 1 if len(loads) in (1, 3) else 2
    lines = -(-len(loads) // columns)
    with mpl.rc_context(STYLE):
        names = [search.name for search in searches[loads[0]]]
        styles = {name: line_style(i) for i, name in enumerate(names)}
        height_in = 2.3 * lines + 0.8 + legend_height_in([*names, "", ""])
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes, load in zip_longest(grid.flat, loads):
            if load is None:
                axes.remove()
                continue
            _draw_load(axes, study, searches[load], frame[frame["load"] == load], styles)
            axes.set_title(textwrap.fill(load, 26 if columns == 2 else 60))
        figure.supylabel("energy of the run (kJ)")
        figure.supxlabel(f"{study.attainment} (%)".replace("_", " "))
        handles = [
            Line2D([], [], label=name, **(styles[name] | {"linestyle": ""})) for name in names
        ]
        handles += [
            hollow("hollow: other settings"),
            Line2D([], [], color=COLOURS[0], linestyle="--", linewidth=1, label="lower bound"),
        ]
        add_legend(figure, handles, "outside upper center")
    return figure


def _draw_load(
    axes: Axes,
    study: Study,
    searched: Sequence[Search],
    frame: pd.DataFrame,
    styles: Mapping[str, Mapping[str, Any]],
) -> None:
    least_attainment = study.target - 10 * (1.0 - study.target)
    lowest, energies = study.target, []
    for search in searched:
        trials = sorted(search.complete(), key=lambda t: t.energy_j)
        shown = [t for t in trials if t.attainment >= least_attainment]
        if not shown:  # an empty line, not clipped, would count as a point at the corner
            continue
        x, y = [100 * t.attainment for t in shown], [t.energy_j / 1e3 for t in shown]
        lowest = min([lowest, *(t.attainment for t in shown)])
        energies += y
        style = dict(styles[search.name])
        if search.name in (BEST_PAIR, STATIC_MAX):
            style["linestyle"] = ""
        axes.plot(x, y, linewidth=0.8, markersize=4, markerfacecolor="none", clip_on=False, **style)
        best = search.best()
        if best is not None:
            axes.plot([100 * best.attainment], [best.energy_j / 1e3], markersize=7, clip_on=False,
                      zorder=3, **(style | {"linestyle": ""}))  # fmt: skip
    bound = frame[frame["reached"]]
    if len(bound):
        least = float((bound["energy_j"] / bound["bound_ratio"]).min()) / 1e3
        axes.axhline(least, color=COLOURS[0], linestyle="--", linewidth=1)
        energies.append(least)
    stretch_attainment(axes, "x", 100 * lowest, study.target)
    if energies:
        axes.set_ylim(0.85 * min(energies), 1.04 * max(energies))


def write_frontier(
    study: Study,
    searches: Mapping[str, Sequence[Search]],
    frame: pd.DataFrame,
    out: Path,
    question: str,
) -> list[str]:
    """Write frontier.csv, frontier.md and the figure into `out`; returns what to print."""
    write_csv(frame, out / "frontier.csv")
    said, parts = [], [question] if question else []
    for load in searches:
        rows = frame[frame["load"] == load]
        title = f"{load}: least energy at {study.attainment} >= {100 * study.target:g} %"
        said.append(text_table(rows, title))
        parts.append(f"**{title}**\n\n{markdown_table(rows)}")
        if not bool(rows.loc[rows["policy"] == STATIC_MAX, "reached"].all()):
            said.append(f"{load}: overload, the top clock itself misses the target")
    write_text("\n\n".join([*parts, LEGEND]) + "\n", out / "frontier.md")
    paths = save(pareto_figure(study, searches, frame), out, "frontier")
    files = [*paths, out / "frontier.csv", out / "frontier.md"]
    return [*said, LEGEND, " ".join(map(str, files))]
