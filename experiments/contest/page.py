"""The contest's page: tables between two marks of docs/contest.md, and its figure, from the CSV."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from voltana.experiments.contest.run import KEY, read_contest
from voltana.experiments.draw.plots import add_legend, save
from voltana.experiments.frontier.search import (
    DEFAULT,
    REFERENCES,
    STATIC_FLEET,
    STATIC_MAX,
    STATIC_PAIR,
)
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_text
from voltana.profiles.common.markdown import markdown_table
from voltana.profiles.draw.style import COLOURS, GREY, STYLE, WIDTH_IN, legend_height_in

PAGE: Final = "contest.md"
FIGURE: Final = "contest-shares"
BEGIN: Final = "<!-- contest: begin, written by voltana frontier --contest --docs docs -->"
END: Final = "<!-- contest: end -->"
OURS: Final = "ecomin, 8 levels"
OUR_ROUTER: Final = "consolidate"
BASE_ROUTER: Final = "round-robin"
TARGET: Final = 0.99
PARTS: Final = ("clock", "router", "controller")


def write_page(csv: Path, docs: Path) -> list[Path]:
    """Put what the CSV says between the marks of the page and the README, and draw the figure.

    Raises:
        VoltanaError: The page lacks its marks, or there is no table.
    """
    table = read_contest(csv)
    pages = ((docs / PAGE, page_text(table)), (docs.parent / "README.md", readme_text(table)))
    for page, block in pages:
        write_text(replaced(page.read_text(encoding="utf-8"), block, str(page)), page)
    return [*(page for page, _ in pages), _save(shares_figure(table), docs / "figures")]


def _save(figure: Figure, directory: Path) -> Path:
    path, drawing = save(figure, directory, FIGURE)
    drawing.unlink()  # pages show the PNG
    return path


def replaced(page: str, block: str, name: str = PAGE) -> str:
    """The page with that block between its marks. Raises VoltanaError if it has no marks.

    Args:
        page: Its text.
        block: Markdown to put in.
        name: Of the page, for the message.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise VoltanaError(f"{name} must hold the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{block}\n{END}{after}"


def readme_text(table: pd.DataFrame) -> str:
    """The README's table and sentence, whose every number is the table's.

    Of the default policy, `ecomin` with the router `consolidate`, load by load.
    """
    is_ours = (table["controller"] == OURS) & (table["knob"] == DEFAULT)
    lines = table[is_ours & (table["router"] == OUR_ROUTER)]
    saving = lines["saving_vs_best_pair_same_router_pct"]
    rows = [
        (str(r["load"]), str(r["fleet"]), f"{100 * r['attainment']:.1f}", _pair_cell(r))
        for r in lines.to_dict("records")
    ]
    heads = ("load", "fleet", "requests kept %", "energy saved %")
    kept = int((lines["attainment"] >= TARGET).sum())
    better = int((saving - lines["ci_pct"] > 0).sum())
    worse = int((saving + lines["ci_pct"] < 0).sum())
    return f"""{markdown_table(heads, rows)}

That is `ecomin` + `{OUR_ROUTER}` at its default knob against the best static fleet under the same
router, paired by repeat, with 95 % intervals. It keeps the target at {kept} of {len(lines)} loads;
beyond the interval it saves at {better} of them and costs more at {worse}."""


def _pair_cell(line: Mapping[Hashable, Any]) -> str:
    saving = float(line["saving_vs_best_pair_same_router_pct"])
    return "–" if math.isnan(saving) else f"{saving:.1f} ± {line['ci_pct']:.1f}"


def page_text(table: pd.DataFrame) -> str:
    """The three tables."""
    return f"""**What saves how much.** Energy saved against static-max under {BASE_ROUTER}, in %:

{_shares_table(table)}

**Every controller at its default knob, under `consolidate`.** Requests that keep both promises, in
%, and where that is 99 or more, energy saved against the best static fleet under the same router:

{_defaults_table(table)}

{_pairs_text(table)}

**Choices that kept the target on each tuning repeat and fell below it on the judging repeats:**

{_fallen_table(table)}
"""


def shares(table: pd.DataFrame) -> pd.DataFrame:
    """Of each load what clock, router and controller save, in % of static-max under round-robin.

    Columns: workload, fleet, load, fixed (the best static fleet under round-robin), routed (the
    best under any router) with its router and knob, chosen (the best policy with a chosen knob)
    with its lines of the table; NaN where nothing keeps the target.
    """
    rows = []
    for key, lines in table.groupby(KEY, sort=False):
        saving = lines["saving_vs_static_max_pct"]
        fleets = lines[lines["controller"] == STATIC_FLEET]
        fixed = saving[fleets.index[fleets["router"] == BASE_ROUTER]]
        policies = lines[~lines["controller"].isin(REFERENCES) & (lines["knob"] != DEFAULT)]
        row: dict[str, Any] = dict(zip(KEY, key, strict=True))
        row["fixed"] = float(fixed.max()) if len(fixed) else math.nan
        row["routed"], row["routed_line"] = _best(fleets)
        row["chosen"], row["chosen_line"] = _best(policies)
        top = lines[(lines["controller"] == STATIC_MAX) & (lines["router"] == BASE_ROUTER)]
        row["top"] = top.iloc[0]
        rows.append(row)
    return pd.DataFrame(rows)


def _best(lines: pd.DataFrame) -> tuple[float, pd.Series[Any] | None]:
    kept = lines[lines["saving_vs_static_max_pct"].notna()]
    if kept.empty:
        return math.nan, None
    best = kept.sort_values("saving_vs_static_max_pct", kind="stable").iloc[-1]
    return float(best["saving_vs_static_max_pct"]), best


def _shares_table(table: pd.DataFrame) -> str:
    heads = ("load", "static-max kJ", "clock", "clock + router", "best static fleet",
             "with controller", "policy",
             "controller alone", "× bound")  # fmt: skip
    rows = []
    for row in shares(table).to_dict("records"):
        top, routed, chosen = row["top"], row["routed_line"], row["chosen_line"]
        rows.append(
            (
                f"{row['workload']}, {row['fleet']}, {row['load']}",
                f"{top['energy_kj']:.1f} ± {top['ci_kj']:.1f}" + _fell(top),
                _cell(row["fixed"]),
                _cell(row["routed"]),
                "–" if routed is None else f"{routed['router']}, {routed['knob']}",
                _cell(row["chosen"]),
                "–" if chosen is None else _policy(chosen),
                "–" if chosen is None else _alone(chosen),
                "–" if chosen is None else f"{chosen['times_bound']:.2f}",
            )
        )
    return markdown_table(heads, rows)


def _alone(line: pd.Series[Any]) -> str:
    saving = line["saving_vs_best_pair_same_router_pct"]
    return "no pair keeps it" if math.isnan(saving) else f"{saving:.1f} ± {line['ci_pct']:.1f}"


def _policy(line: pd.Series[Any]) -> str:
    return f"{line['controller']} + {line['router']}, {line['knob']}"


def _fell(line: pd.Series[Any]) -> str:
    kept = line["attainment"]
    return "" if kept >= TARGET else f" (keeps {100 * kept:.1f} %)"


def _defaults_table(table: pd.DataFrame, router: str = OUR_ROUTER) -> str:
    is_policy = ~table["controller"].isin(REFERENCES)
    lines = table[(table["knob"] == DEFAULT) & (table["router"] == router) & is_policy]
    names = list(dict.fromkeys(lines["controller"]))
    rows = []
    for key, of_load in lines.groupby(KEY, sort=False):
        cells_by_name = {line["controller"]: _default_cell(line) for _, line in of_load.iterrows()}
        cells = [cells_by_name.get(name, "") for name in names]
        rows.append((", ".join(map(str, key)), *cells))
    return markdown_table(("load", *names), rows)


def _pairs_text(table: pd.DataFrame) -> str:
    """What the default saves against the pair that most would take: of the means, not paired."""
    told = []
    for _, lines in table[table["router"] == OUR_ROUTER].groupby(KEY, sort=False):
        ours = lines[(lines["controller"] == OURS) & (lines["knob"] == DEFAULT)]
        pair = lines[lines["controller"] == STATIC_PAIR]
        fleet = lines[lines["controller"] == STATIC_FLEET]
        has_limit = fleet["knob"].str.contains("at most").any()  # it is better with one
        if has_limit and not pair["knob"].str.contains("at most").any():
            saved = 1.0 - ours["energy_kj"].iloc[0] / pair["energy_kj"].iloc[0]
            told.append(f"{ours['load'].iloc[0]}: {100 * saved:.1f}{_fell(pair.iloc[0])}")
    return f"""Where the best static fleet limits its decode batch, `ecomin` at its default saves,
against the *pair* chosen without a limit, all instances in use, in % of the means (in brackets what
that pair keeps where it fell): {"; ".join(told)}."""


def _default_cell(line: pd.Series[Any]) -> str:
    kept = f"{100 * line['attainment']:.1f}"
    saving = line["saving_vs_best_pair_same_router_pct"]
    return kept if math.isnan(saving) else f"{kept}: {saving:.1f} ± {line['ci_pct']:.1f}"


def _fallen_table(table: pd.DataFrame) -> str:
    fallen = table[(table["tuning_attainment"] >= TARGET) & (table["attainment"] < TARGET)]
    fallen = fallen[fallen["controller"] != STATIC_PAIR]  # the fleet's line says it
    if fallen.empty:
        return "none."
    rows = [
        (f"{r['workload']}, {r['fleet']}, {r['load']}", f"{r['controller']} + {r['router']}",
         str(r["knob"]), f"{100 * r['tuning_attainment']:.2f}", f"{100 * r['attainment']:.2f}")
        for r in fallen.to_dict("records")
    ]  # fmt: skip
    heads = ("load", "policy", "knob", "worst tuning repeat %", "fell to %")
    return markdown_table(heads, rows)


def _cell(value: float) -> str:
    return "misses" if math.isnan(value) else f"{value:.1f}"


def shares_figure(table: pd.DataFrame) -> Figure:
    """Bars of what clock, router and controller save, a bar a load, on top of one another.

    Where no static fleet keeps the target under round-robin the first part is the router's and
    the clock's together. A controller that saves nothing more has no part.
    """
    found = shares(table).iloc[::-1]
    colours = dict(zip(PARTS, (GREY, COLOURS[1], COLOURS[2]), strict=True))
    with mpl.rc_context(STYLE):
        names = [*PARTS, "ecomin, default knob"]
        height_in = 0.27 * len(found) + 0.9 + legend_height_in(names)
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        axes = figure.subplots()
        labels = [str(load) for load in found["load"]]
        for y, row in enumerate(found.to_dict("records")):
            left = 0.0
            for part, upto in zip(PARTS, (row["fixed"], row["routed"], row["chosen"]), strict=True):
                if not math.isnan(upto) and upto > left:
                    axes.barh(y, upto - left, left=left, height=0.62, color=colours[part])
                    left = upto
            default = _default_saving(table, row)
            if not math.isnan(default):
                axes.plot([default], [y], linestyle="", marker="D", markersize=5,
                          color=COLOURS[0], markerfacecolor="white", clip_on=False)  # fmt: skip
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel("energy saved (%)")
        axes.set_axisbelow(True)
        axes.set_xlim(left=0)
        handles = [
            Line2D([], [], linestyle="", marker="s", markersize=8, color=colours[p], label=p)
            for p in PARTS
        ]
        mark = Line2D([], [], linestyle="", marker="D", markersize=5, color=COLOURS[0],
                      markerfacecolor="white", label=names[-1])  # fmt: skip
        add_legend(figure, [*handles, mark], "outside upper center")
    return figure


def _default_saving(table: pd.DataFrame, row: Mapping[Hashable, Any]) -> float:
    is_load = (table[KEY] == [row[name] for name in KEY]).all(axis=1)
    is_ours = (table["controller"] == OURS) & (table["router"] == OUR_ROUTER)
    lines = table[is_load & (table["knob"] == DEFAULT) & is_ours]
    return float(lines["saving_vs_static_max_pct"].max()) if len(lines) else math.nan
