"""The contest: every shipped frontier file, load after load, into one table that documents quote.

`results/contest.csv` holds a line a load, router, controller and knob (`table.COLUMNS`). A load
that is done is written at once, in the place of its lines of before; the runs themselves are kept
by their keys, so that the same command goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import pandas as pd

from voltana.experiments.frontier.search import search_frontier
from voltana.experiments.frontier.search_page import text_table
from voltana.experiments.frontier.study import load_names_of, read_study
from voltana.experiments.frontier.table import COLUMNS, frontier_table
from voltana.experiments.sweep.grid import CONFIGS
from voltana.profiles.common.binding import check_names
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_csv
from voltana.profiles.common.folders import claim
from voltana.sim.workload.fetch import MissingTraceError

CSV: Final = Path("results/contest.csv")
KEY: Final = ["workload", "fleet", "load"]


def contest_files() -> list[Path]:
    """The shipped files of the contest, in its order."""
    return sorted(CONFIGS.glob("contest-*.toml"))


def run_contest(
    out: Path,
    csv: Path,
    say: Callable[[str], None],
    *,
    only: Sequence[str] = (),
    jobs: int | None = None,
    files: Sequence[Path] | None = None,
) -> pd.DataFrame:
    """Run every load whose requests are there, and write the table after each.

    Args:
        out: Where runs and bounds are kept.
        csv: The table; lines of loads that are not run stay as they are.
        say: Takes what is to be printed.
        only: Names of loads; empty takes all.
        jobs: Processes.
        files: Frontier files; by default the shipped ones.

    Raises:
        VoltanaError: No load of such a name, or not one run of a load succeeded.
    """
    claim(out, "frontier")
    chosen = contest_files() if files is None else files
    order = [name for path in chosen for name in load_names_of(path)]
    check_names(only, order, "load", "the contest")
    left_out = []
    for path in chosen:
        names = [n for n in load_names_of(path) if not only or n in only]
        try:
            study, _ = read_study(path, load_names=names) if names else (None, "")
        except MissingTraceError as error:
            left_out += [f"{name} ({error})" for name in names]
            continue
        if study is None:
            continue
        for load, found in search_frontier(study, out, jobs=jobs):
            lines = frontier_table(study, found, out, jobs)
            write_contest(lines, csv, order)
            say(text_table(lines, f"{lines['workload'].iloc[0]}, {load.name}"))
    for line in left_out:
        say(f"left out for want of data: {line}")
    return read_contest(csv)


def write_contest(lines: pd.DataFrame, csv: Path, order: Sequence[str] = ()) -> None:
    """Replace the lines of a load; loads come in that order, others after them as they were.

    Args:
        lines: New lines; they replace those of the same load and policy.
        csv: The table, made if it is missing.
        order: Names of loads in the order that the table shall have.
    """
    if csv.exists():
        before = read_contest(csv)
        is_same = before[KEY].apply(tuple, axis=1).isin([*lines[KEY].apply(tuple, axis=1)])
        lines = pd.concat([t for t in (before[~is_same], lines) if len(t)], ignore_index=True)
    names = list(dict.fromkeys([*order, *lines["load"]]))
    lines = lines.sort_values("load", key=lambda loads: loads.map(names.index), kind="stable")
    csv.parent.mkdir(parents=True, exist_ok=True)
    write_csv(lines, csv, float_format="%.4f")


def read_contest(csv: Path = CSV) -> pd.DataFrame:
    """The table. Raises VoltanaError if it is not there or has other columns."""
    try:
        table = pd.read_csv(csv)
    except (OSError, ValueError) as error:
        raise VoltanaError(
            f"cannot read the contest's table {csv} ({type(error).__name__}): voltana frontier "
            "--contest writes it"
        ) from None
    if tuple(table.columns) != COLUMNS:
        raise VoltanaError(f"{csv} must have the columns {', '.join(COLUMNS)}")
    return table
