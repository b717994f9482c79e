"""Where the bound leaves room: the contest's varying loads beside a planner that knows arrivals.

python -m voltana.experiments.contest.room

takes each varying load of ShareGPT's lengths from results/contest.csv and prints Markdown: the best
static fleet under the default policy's router, the policy, the yardstick of
`voltana.experiments.contest.yardstick` on the same repeats, and the lower bound.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from voltana.experiments.contest.page import OUR_ROUTER, OURS, TARGET
from voltana.experiments.contest.run import contest_files, read_contest
from voltana.experiments.contest.yardstick import plan
from voltana.experiments.frontier.search import DEFAULT, STATIC_FLEET, Study
from voltana.experiments.frontier.study import load_names_of, read_study
from voltana.experiments.frontier.trial import Load
from voltana.experiments.runs import cached_profile, workload_of
from voltana.experiments.script import run_script
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config

VARYING: Final = ("contest-3", "contest-4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Mean energies of one load in kJ; NaN: nothing keeps the target."""

    load: str
    fleet_kj: float
    default_kj: float
    planner_kj: float
    bound_kj: float


def room_of(study: Study, load: Load, table: pd.DataFrame) -> Room:
    """One load's energies.

    Args:
        study: The contest's file.
        load: One of its loads.
        table: The contest's table.

    Raises:
        VoltanaError: The table does not hold the load.
    """
    lines = table[(table["load"] == load.name) & (table["router"] == OUR_ROUTER)]
    ours = lines[(lines["controller"] == OURS) & (lines["knob"] == DEFAULT)]
    if ours.empty:
        raise VoltanaError(f"results/contest.csv lacks {load.name}: voltana frontier --contest")
    default_kj = float(ours["energy_kj"].iloc[0])
    fleets = lines[(lines["controller"] == STATIC_FLEET) & (lines["attainment"] >= TARGET)]
    return Room(
        load=load.name,
        fleet_kj=float(fleets["energy_kj"].min()),
        default_kj=default_kj,
        planner_kj=float(np.mean([_planner_kj(study, load, r) for r in study.judging])),
        bound_kj=default_kj / float(ours["times_bound"].iloc[0]),
    )


def _planner_kj(study: Study, load: Load, repeat: Mapping[str, Any]) -> float:
    config = make_config({**study.base, **load.settings, **repeat})
    return plan(config, cached_profile(config.profile), workload_of(config)).energy_j / 1e3


def line(room: Room) -> str:
    """A row of the table: energies, then what is saved of the fleet's, in %."""
    energies = (room.fleet_kj, room.default_kj, room.planner_kj, room.bound_kj)
    saved = [_saved(energy_kj, room.fleet_kj) for energy_kj in energies[1:]]
    return f"| {' | '.join([room.load, *(f'{e:.1f}' for e in energies), *saved])} |"


def _saved(energy_kj: float, of_kj: float) -> str:
    return "–" if math.isnan(of_kj) else f"{100.0 * (1.0 - energy_kj / of_kj):.1f}"


HEAD: Final = (
    "| load | static fleet kJ | `ecomin` kJ | planner kJ | bound kJ "
    "| `ecomin` saves % | planner % | bound % |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description="Where the bound leaves room.")
    parser.add_argument("--load", action="append", help="only this load, repeatable")
    chosen = parser.parse_args(arguments).load
    table = read_contest()
    sys.stdout.write(HEAD + "\n")
    for path in contest_files():
        names = [n for n in load_names_of(path) if chosen is None or n in chosen]
        if names and path.stem.startswith(VARYING):
            study, _ = read_study(path, load_names=names)
            for load in study.loads:
                sys.stdout.write(line(room_of(study, load, table)) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    run_script(main)
