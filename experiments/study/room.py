"""Where the bound leaves room: the contest's varying loads beside a planner that knows arrivals.

python -m experiments.study.room --out results/room

takes each varying load from results/contest.csv and prints Markdown: the best static pair without
a limit on its batch (where the chosen one falls, the least decode clock beside its prefill clock
that keeps the target on the judging repeats, in hindsight), the best static fleet, the default
policy, the yardstick of `experiments.frontier.yardstick` and the lower bound, all on the same
repeats and under the same router. What has been run is kept.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from experiments.frontier.contest import contest_files, read_contest
from experiments.frontier.contest_page import OUR_ROUTER, OURS, TARGET
from experiments.frontier.search import DEFAULT, STATIC_FLEET, STATIC_PAIR, Study
from experiments.frontier.study import read_study
from experiments.frontier.trial import Bench, Load, Trial, pooled
from experiments.frontier.yardstick import plan
from experiments.runs import cached_profile, workload_of
from profiles.errors import VoltanaError
from sim.config import make_config
from sim.workload.fetch import MissingTraceError

VARYING: Final = ("contest-3", "contest-4", "contest-5", "contest-6")


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Mean energies of one load in kJ; NaN: nothing keeps the target."""

    load: str
    pair_kj: float
    pair: str
    fleet_kj: float
    default_kj: float
    planner_kj: float
    bound_kj: float


def room_of(study: Study, load: Load, table: pd.DataFrame, out: Path) -> Room:
    """One load's energies.

    Args:
        study: The contest's file.
        load: One of its loads.
        table: The contest's table.
        out: Where runs are kept.

    Raises:
        VoltanaError: The table does not hold the load.
    """
    lines = table[(table["load"] == load.name) & (table["router"] == OUR_ROUTER)]
    ours = lines[(lines["controller"] == OURS) & (lines["knob"] == DEFAULT)]
    if ours.empty:
        raise VoltanaError(f"results/contest.csv lacks {load.name}: voltana frontier --contest")
    default_kj = float(ours["energy_kj"].iloc[0])
    fleets = lines[(lines["controller"] == STATIC_FLEET) & (lines["attainment"] >= TARGET)]
    pair_kj, pair = _pair(study, load, lines, out)
    return Room(
        load=load.name,
        pair_kj=pair_kj,
        pair=pair,
        fleet_kj=float(fleets["energy_kj"].min()),
        default_kj=default_kj,
        planner_kj=float(np.mean([_planner_kj(study, load, r) for r in study.judging])),
        bound_kj=default_kj / float(ours["times_bound"].iloc[0]),
    )


def _planner_kj(study: Study, load: Load, repeat: Mapping[str, Any]) -> float:
    config = make_config({**study.base, **load.settings, **repeat})
    return plan(config, cached_profile(config.profile), workload_of(config)).energy_j / 1e3


def _pair(study: Study, load: Load, lines: pd.DataFrame, out: Path) -> tuple[float, str]:
    """The best pair without a limit; where the chosen one falls, the least clock that does not."""
    chosen = lines[lines["controller"] == STATIC_PAIR].iloc[0]
    if chosen["attainment"] >= TARGET:
        return float(chosen["energy_kj"]), str(chosen["knob"])
    found = re.match(r"(\d+)/(\d+) MHz", str(chosen["knob"]))
    if found is None:
        raise VoltanaError(f"results/contest.csv: {chosen['knob']!r} is no pair of clocks")
    prefill, fallen = int(found[1]), int(found[2])
    bench = Bench(study.base, load, study.attainment, out)
    clocks = [clock for clock in study.clocks_mhz if clock > fallen]
    best: tuple[float, str] = (float("nan"), "none")
    while clocks:  # a higher clock shortens every iteration
        middle = len(clocks) // 2
        trial = _run_pair(bench, study, prefill, clocks[middle])
        if pooled(trial.rows, study.attainment) >= TARGET and len(trial.rows) == len(study.judging):
            best = trial.energy_j / 1e3, f"{prefill}/{clocks[middle]} MHz, hindsight"
            clocks = clocks[:middle]
        else:
            clocks = clocks[middle + 1 :]
    return best


def _run_pair(bench: Bench, study: Study, prefill_mhz: int, decode_mhz: int) -> Trial:
    settings = {
        "prefill_controller": f"static:f={prefill_mhz}",
        "decode_controller": f"static:f={decode_mhz}",
        "router": OUR_ROUTER,
        "metrics": "sketch",
    }
    # one repeat that misses more than all of them together may
    hopeless = 1.0 - len(study.judging) * (1.0 - TARGET)
    return bench.run(settings, f"{decode_mhz}", study.judging, stop_below=hopeless)


def _cells(room: Room) -> tuple[str, ...]:
    energies = (room.pair_kj, room.fleet_kj, room.default_kj, room.planner_kj, room.bound_kj)
    return (
        room.load,
        room.pair,
        *(f"{energy_kj:.1f}" for energy_kj in energies),
        _saved(room.default_kj, room.pair_kj),
        *(_saved(e, room.fleet_kj) for e in (room.default_kj, room.planner_kj, room.bound_kj)),
    )


def _saved(energy_kj: float, of_kj: float) -> str:
    return "–" if math.isnan(of_kj) else f"{100.0 * (1.0 - energy_kj / of_kj):.1f}"


def markdown(rooms: Sequence[Room]) -> str:
    """The table: savings in % of the pair's and of the fleet's energy."""
    heads = ("load", "pair, no limit", "pair kJ", "fleet kJ", "`ecomin` kJ", "planner kJ",
             "bound kJ", "`ecomin` saves of the pair", "of the fleet", "planner, of the fleet",
             "bound, of the fleet")  # fmt: skip
    rows = [heads, ("---", "---", *("---:",) * 9), *(_cells(room) for room in rooms)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Where the bound leaves room.")
    parser.add_argument("--out", type=Path, default=Path("results/room"))
    out = parser.parse_args(arguments).out
    table, rooms = read_contest(), []
    for path in contest_files():
        if not path.stem.startswith(VARYING):
            continue
        try:
            study, _ = read_study(path)
        except MissingTraceError as error:
            sys.stderr.write(f"left out: {path.stem} ({error})\n")
            continue
        for load in study.loads:
            rooms.append(room_of(study, load, table, out))
            sys.stderr.write(f"{rooms[-1]}\n")
    sys.stdout.write(markdown(rooms) + "\n")


if __name__ == "__main__":
    try:
        main()
    except VoltanaError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None
