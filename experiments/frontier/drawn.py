"""What a search found, judged again on draws from the profile's stated errors.

Knobs and clocks are those of the nominal profile: nobody knows the card better when they are
chosen. Draw k plays judging repeat k, beginning again after the last one, so that the draws vary
the requests, too. Every policy is held against the best static fleet under its own router; that
fleet, and fixed clocks, against static-max under it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from voltana.experiments.compare.draws import Run, compare_drawn
from voltana.experiments.frontier.search import (
    REFERENCES,
    STATIC_FLEET,
    STATIC_MAX,
    Found,
    Study,
)
from voltana.experiments.frontier.table import keeps
from voltana.experiments.frontier.trial import POINTS, attained
from voltana.experiments.show import render
from voltana.experiments.sweep.grid import Point
from voltana.experiments.sweep.run import run_or_raise
from voltana.experiments.sweep.store import FolderStore
from voltana.sim.config import SimConfig, make_config

COLUMNS: Final = (
    "load", "router", "controller", "knob", "against", "draws", "saving_pct", "saving_low_pct",
    "saving_high_pct", "chance", "kept", "verdict",
)  # fmt: skip
"""Savings: the median and the 2.5 and 97.5 % quantiles over the draws. `chance`: share of the draws
in which it beats what it is held against. `kept`: share in which it keeps the target."""


@dataclass(frozen=True, slots=True)
class _Pair:
    mine: Found
    other: Found


def configs_of(study: Study, found: Found, draws: int) -> list[SimConfig]:
    """Judged settings on profiles drawn from the stated errors.

    Args:
        study: Loads, base configuration, judging repeats.
        found: A policy of one of its loads.
        draws: How many; draw k takes the judging repeat k in turn.
    """
    load = next(x for x in study.loads if x.name == found.load)
    return [
        make_config(
            {
                **study.base,
                **load.settings,
                **study.judging[(k - 1) % len(study.judging)],
                **found.judged.settings,
                "profile_draw": k,
            }
        )
        for k in range(1, draws + 1)
    ]


def drawn_table(
    study: Study, found: Sequence[Found], directory: Path, draws: int, jobs: int | None = None
) -> pd.DataFrame:
    """One row a policy of one load, under `COLUMNS`.

    Args:
        study: What was compared.
        found: Of one load, as `search_frontier` yields them.
        directory: Of the search; runs are kept beside its own.
        draws: How many.
        jobs: Processes.

    Raises:
        VoltanaError: The profile states no errors, or a run failed.
    """
    pairs = [p for f in found if not f.judged.error and (p := _pair(found, f)) is not None]
    points = {
        id(f): [Point(labels={}, config=c) for c in configs_of(study, f, draws)]
        for pair in pairs
        for f in (pair.mine, pair.other)
    }
    store = FolderStore(directory / POINTS)
    run_or_raise((p for row in points.values() for p in row), store, jobs=jobs)

    def runs(each: Found) -> list[Run]:
        summaries = [store.get(p.key) for p in points[id(each)]]
        return [
            Run(float(s["energy_j"]), _attained(s, study.attainment) >= study.target)
            for s in summaries
        ]

    rows = []
    for pair in pairs:
        nominal = [Run(f.judged.energy_j, keeps(study, f)) for f in (pair.mine, pair.other)]
        drawn = compare_drawn(
            (nominal[0], nominal[1]), list(zip(runs(pair.mine), runs(pair.other), strict=True))
        )
        low, middle, high = drawn.saving_pct
        values = (
            pair.mine.load, pair.mine.router, pair.mine.controller, pair.mine.knob,
            pair.other.controller, draws, middle, low, high, drawn.chance, drawn.kept,
            drawn.verdict,
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return pd.DataFrame(rows, columns=[*COLUMNS])


def drawn_text(frame: pd.DataFrame, title: str) -> str:
    """For the terminal."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0), title_justify="left")
    names = ("router", "controller", "knob", "against", "saving % [95 %]", "chance", "kept")
    for i, name in enumerate((*names, "verdict")):
        table.add_column(name, justify="right" if 3 < i < 7 else "left", no_wrap=i > 3)
    for r in frame.to_dict("records"):
        saving = f"{r['saving_pct']:.1f} [{r['saving_low_pct']:.1f}, {r['saving_high_pct']:.1f}]"
        table.add_row(
            str(r["router"]), str(r["controller"]), str(r["knob"]), str(r["against"]), saving,
            f"{100 * r['chance']:.0f} %", f"{100 * r['kept']:.0f} %", str(r["verdict"]),
        )  # fmt: skip
    return render(table)


def _pair(found: Sequence[Found], mine: Found) -> _Pair | None:
    """It and what it is held against; None for static-max itself."""
    if mine.controller == STATIC_MAX:
        return None
    wanted = STATIC_MAX if mine.controller in REFERENCES else STATIC_FLEET
    others = [f for f in found if (f.controller, f.router) == (wanted, mine.router)]
    usable = [f for f in others if not f.judged.error]
    return _Pair(mine, usable[-1]) if usable else None


def _attained(summary: dict[str, Any], attainment: str) -> float:
    kept = {k: 1.0 if v is None else v for k, v in summary.items() if "attainment" in k}
    return attained(kept, attainment)
