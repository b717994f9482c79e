"""Does splitting the phases save energy? Colocated fleets against split ones, at equal attainment.

python -m voltana.experiments.study.disaggregation --out results/disaggregation

searches every fleet of experiments/configs/disaggregation.toml, whose loads are called
"load: fleet". Of each kind of fleet and control the one of least energy on the tuning seeds that
keeps the target there is judged on the others, against the best colocated fleet of one static
clock, seed by seed. Prints Markdown; what has been run is kept and not run again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from voltana.experiments.compare.intervals import saving_pct
from voltana.experiments.frontier.search import (
    DEFAULT,
    STATIC_CLOCK,
    STATIC_FLEET,
    Found,
    Study,
    search_frontier,
)
from voltana.experiments.frontier.study import read_study
from voltana.experiments.frontier.trial import ATTAINMENTS, pooled
from voltana.experiments.script import run_script
from voltana.experiments.sweep.grid import CONFIGS
from voltana.profiles.common.binding import parse_settings
from voltana.profiles.common.markdown import markdown_table

CONFIG: Final = CONFIGS / "disaggregation.toml"
BETWEEN: Final = ": "
"""Between a load and a fleet, in the name of a search's load."""
KINDS: Final = (
    ("together, a static clock", "C", STATIC_FLEET),
    ("apart, one static clock", "D", STATIC_CLOCK),
    ("apart, a static clock a phase", "D", STATIC_FLEET),
    ("together, `ecomin`", "C", "ecomin"),
    ("apart, `ecomin`", "D", "ecomin"),
)
"""Name, what its fleets are called, and the control that is searched; the first is the measure."""


def best(study: Study, found: Iterable[Found], fleets: str, controller: str) -> Found | None:
    """The choice of the tuning seeds among fleets of one kind; None if none keeps the target there.

    Args:
        study: What was searched.
        found: Of one load, all fleets.
        fleets: "C" or "D".
        controller: Which control.
    """
    kept = [
        f
        for f in found
        if f.controller == controller
        and f.knob != DEFAULT
        and f.tuned is not None
        and f.tuned.keeps(study.choice_target)
        and fleets in f.load.partition(BETWEEN)[2]
    ]
    return min(kept, key=lambda f: f.tuned.energy_j if f.tuned else math.inf, default=None)


def rows_of(study: Study, load: str, found: Sequence[Found]) -> list[tuple[str, ...]]:
    """A row a kind.

    Args:
        study: What was searched.
        load: Its name.
        found: All fleets of the load.
    """
    chosen = {name: best(study, found, *which) for name, *which in KINDS}
    measure = chosen[KINDS[0][0]]
    rows: list[tuple[str, ...]] = []
    for name, each in chosen.items():
        if each is None:
            rows.append((load, name, "none keeps it", "", "", ""))
            continue
        kept = pooled(each.judged.rows, study.attainment)
        saved = ""
        if measure is not None and each is not measure:
            of = saving_pct(each.judged.energies_j, measure.judged.energies_j)
            saved = f"{of.mean:.1f} ± {of.half:.1f}"
        fleet = each.load.partition(BETWEEN)[2]
        energy_kj = each.judged.energy_j / 1e3
        rows.append((load, name, f"{fleet}, {each.knob}", f"{energy_kj:.1f}",
                     f"{100 * kept:.2f}", saved))  # fmt: skip
    return rows


def table(study: Study, out: Path, jobs: int | None) -> str:
    """The table, as Markdown."""
    groups: dict[str, list[Found]] = {}
    for load, found in search_frontier(study, out, jobs=jobs):
        groups.setdefault(load.name.partition(BETWEEN)[0], []).extend(found)
    heads = ("load", "fleet", "chosen", "energy kJ", "it keeps %", "saves %")
    rows = [row for name in sorted(groups) for row in rows_of(study, name, groups[name])]
    return markdown_table(heads, rows, numbers=range(3, len(heads)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Phases apart or together, at equal attainment.")
    parser.add_argument("--out", type=Path, default=Path("results/disaggregation"))
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--attainment", choices=ATTAINMENTS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--jobs", type=int)
    chosen = parser.parse_args(arguments)
    settings: dict[str, Any] = dict(parse_settings(chosen.set))
    study, _ = read_study(chosen.config, settings=settings, attainment=chosen.attainment)
    sys.stdout.write(table(study, chosen.out, chosen.jobs) + "\n")


if __name__ == "__main__":
    run_script(main)
