"""What a frontier search found, for readers: text, Markdown, CSV, a figure, and rows to report."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
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

from voltana.experiments.draw.plots import add_legend, hollow, save, stretch_attainment
from voltana.experiments.frontier.search import DEFAULT, STATIC_MAX, Found, Study
from voltana.experiments.frontier.static.unlike import EXHAUSTIVE
from voltana.experiments.frontier.table import carries, keeps
from voltana.experiments.show import render
from voltana.experiments.sweep.run import RESULTS
from voltana.profiles.common.files import write_csv, write_text
from voltana.profiles.common.markdown import markdown_table
from voltana.profiles.draw.style import STYLE, WIDTH_IN, legend_height_in, line_style

HEADINGS: Final = (
    "router", "controller", "knob", "tuned %", "kept %", "energy kJ", "vs max %", "vs pair %",
    "x bound",
)  # fmt: skip
LEGEND: Final = (
    "tuned: worst tuning repeat; kept: all requests of the judging repeats, which energies and "
    "savings are of; vs max: energy saved against static-max under the first router; vs pair: "
    "against the best static fleet under the same router, paired by repeat, with 95 % intervals; "
    "x bound: energy over the lower bound. A saving is left out where the target is not kept."
)
OF_UNLIKE: Final = (
    " Cards within a phase are unlike: fixed clocks and numbers are of each kind, joined by + in "
    "the order of its first instance. The best static fleets are those of all if there are at most "
    f"{EXHAUSTIVE}, else the best that coordinate descent ended at from several starts."
)


def table_rows(frame: pd.DataFrame) -> list[list[str]]:
    """The cells under `HEADINGS`, one list a row."""
    return [
        [
            str(r["router"]),
            str(r["controller"]),
            str(r["knob"]),
            _number(100 * r["tuning_attainment"], 2),
            _number(100 * r["attainment"], 2),
            _with_half(r["energy_kj"], r["ci_kj"]),
            _number(r["saving_vs_static_max_pct"], 1),
            _with_half(r["saving_vs_best_pair_same_router_pct"], r["ci_pct"]),
            _number(r["times_bound"], 2),
        ]
        for r in frame.to_dict("records")
    ]


def text_table(frame: pd.DataFrame, title: str) -> str:
    """For the terminal."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0), title_justify="left")
    for i, name in enumerate(HEADINGS):
        table.add_column(name, justify="right" if i > 2 else "left", no_wrap=i > 2)
    for row in table_rows(frame):
        table.add_row(*row)
    return render(table)


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _with_half(mean: float, half: float) -> str:
    return _number(mean, 1) if math.isnan(half) else f"{mean:.1f} ± {half:.1f}"


def pareto_figure(study: Study, found: Mapping[str, Sequence[Found]]) -> Figure:
    """Energy against attainment on the judging repeats, a panel a load.

    Filled: what was chosen, and kept the target. Hollow: what did not keep it, and defaults. What
    attains far less than the target is left out.
    """
    loads = list(found)
    columns = 1 if len(loads) in (1, 3) else 2
    lines = -(-len(loads) // columns)
    controllers = list(dict.fromkeys(f.controller for row in found.values() for f in row))
    styles = {name: line_style(i) | {"linestyle": ""} for i, name in enumerate(controllers)}
    with mpl.rc_context(STYLE):
        height_in = 2.3 * lines + 0.8 + legend_height_in([*controllers, ""])
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes, load in zip_longest(grid.flat, loads):
            if load is None:
                axes.remove()
                continue
            _draw_load(axes, study, found[load], styles)
            axes.set_title(textwrap.fill(load, 26 if columns == 2 else 60))
        figure.supylabel("energy of the run (kJ)")
        figure.supxlabel(f"{study.attainment} (%)".replace("_", " "))
        handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
        add_legend(figure, [*handles, hollow("hollow: default, or misses")], "outside upper center")
    return figure


def _draw_load(
    axes: Axes, study: Study, found: Sequence[Found], styles: Mapping[str, Mapping[str, Any]]
) -> None:
    least = study.target - 10 * (1.0 - study.target)
    lowest, energies = study.target, []
    for each in found:
        if each.judged.error or each.judged.rows.empty:
            continue
        attained = float(each.judged.rows[_column(study)].mean())
        if attained < least:
            continue
        lowest = min(lowest, attained)
        energies.append(each.judged.energy_j / 1e3)
        is_filled = keeps(study, each) and (each.knob != DEFAULT or each.tuned is not None)
        axes.plot([100 * attained], energies[-1:], markersize=6 if is_filled else 4, clip_on=False,
                  **dict(styles[each.controller])
                  | ({} if is_filled else {"markerfacecolor": "none"}))  # fmt: skip
    stretch_attainment(axes, "x", 100 * lowest, study.target)
    if energies:
        axes.set_ylim(0.85 * min(energies), 1.04 * max(energies))


def _column(study: Study) -> str:
    return "attainment" if study.attainment == "worse" else study.attainment


def report_rows(found: Mapping[str, Sequence[Found]]) -> pd.DataFrame:
    """The judged runs as `voltana report` reads them: a row a load, policy and seed.

    What was chosen, not what was tried; the parts of a trace count as the seeds that they carry.
    """
    frames = []
    for load, row in found.items():
        for each in row:
            rows = each.judged.rows.copy()
            if rows.empty:
                continue
            is_top = each.controller == STATIC_MAX
            policy = STATIC_MAX if is_top and each.router == row[0].router else each.name
            rows.insert(0, "policy", policy)
            rows.insert(0, "load", load)
            frames.append(rows)
    frame = pd.concat(frames, ignore_index=True)
    frame["controller"] = frame["controller"].fillna("")
    return frame.drop(columns=[name for name in _OF_POLICIES if name in frame])


_OF_POLICIES: Final = (
    "trace_start_s", "duration_s", "prefill_controller", "decode_controller", "active_prefill",
    "active_decode", "active_colocated", "aim_ratio", "max_running_requests", "prefill_profiles",
    "decode_profiles",
)  # fmt: skip
"""Configuration keys that would make load points out of policies, or of parts of a trace."""


def write_frontier(
    study: Study,
    found: Mapping[str, Sequence[Found]],
    frame: pd.DataFrame,
    out: Path,
    question: str,
) -> list[str]:
    """Write frontier.csv, frontier.md, results.csv and the figure; returns what to print.

    Args:
        study: What was asked.
        found: By load, what was found for each policy.
        frame: The same as a table, a row a load and policy.
        out: Folder of the files.
        question: Put above everything; empty for none.
    """
    write_csv(frame, out / "frontier.csv")
    write_csv(report_rows(found), out / RESULTS)
    said, parts = [], [question] if question else []
    for load, row in found.items():
        rows = frame[frame["load"] == load]
        title = f"{load}: least energy at {study.attainment} >= {100 * study.target:g} %"
        said.append(text_table(rows, title))
        parts.append(
            f"**{title}**\n\n{markdown_table(HEADINGS, table_rows(rows), numbers=range(3, 9))}"
        )
        if not carries(study, row):
            said.append(f"{load}: overload, the top clock itself misses the target")
        errors = {f.judged.error for f in row} - {""}
        said += [f"{load}: some settings could not run: {error}" for error in sorted(errors)]
    legend = LEGEND + (OF_UNLIKE if any(len(kinds) > 1 for kinds in study.kinds) else "")
    write_text("\n\n".join([*parts, legend]) + "\n", out / "frontier.md")
    paths = save(pareto_figure(study, found), out, "frontier")
    files = [*paths, out / "frontier.csv", out / "frontier.md"]
    return [*said, legend, " ".join(map(str, files))]
