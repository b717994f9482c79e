"""Reads what `voltana report` is pointed at: a run, several runs, a sweep or an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from voltana.experiments.compare.policies import (
    KEEPS,
    STATIC_MAX,
    TARGET,
    add_saving,
    is_static_pair,
    keeps_slo,
    labels_of,
    load_columns,
)
from voltana.experiments.study.suite import FigureSpec, list_experiments, read_experiment
from voltana.experiments.sweep.grid import CONFIGS as EXPERIMENTS
from voltana.experiments.sweep.run import (
    RESULTS,
    Residency,
    check_results,
    flat_summary,
    read_residency,
    read_results,
)
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.metrics import summarise
from voltana.sim.results import check_frames, read_json
from voltana.sim.workload.benchmarks import benchmark_file, read_benchmarks

SUMMARY: Final = "summary.json"
RUN: Final = "run"
ID: Final = "id"
_NEEDED: Final = (
    "energy_j", "energy_per_output_token_j", "ttft_attainment", "itl_attainment", "ttft_p99_s",
    "itl_p99_s", "slo_ttft_s", "slo_itl_s", "makespan_s", "wall_s",
)  # fmt: skip
"""Numbers that the report draws."""
_NAMES: Final = ("controller", "router")
_AXES: Final = {"rate_rps": "request rate (requests/s)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """One row a run, and what the rows have in common."""

    directory: Path
    title: str
    question: str | None
    """What the experiment asks, if the directory is one of the shipped experiments."""
    table: pd.DataFrame
    """Labels, configuration, the numbers of the summary, `id`, `keeps_slo` and, where there is a
    baseline, `saving_pct`."""
    series: str
    """Column that names what is compared: mostly the policy."""
    loads: tuple[str, ...]
    """Columns that make up a load point: only rows equal in these may be compared."""
    x: str | None
    """The one of `loads` that curves run along: the experiment's, or a numeric one."""
    x_label: str
    x_scale: float
    baseline: str | None
    target: float
    residency: Mapping[str, Residency]
    """By id: phase, clock in MHz, share of busy time."""
    run_directories: Mapping[str, Path]
    """By id; empty for a sweep, which keeps no rows."""

    @property
    def is_static_pair(self) -> pd.Series[bool]:
        """Rows that are one of the fixed clock pairs the policies are held against."""
        return is_static_pair(self.table, self.series)

    def load_points(self) -> list[tuple[str, pd.DataFrame]]:
        """Rows by load point, each with its name, in the order of the table."""
        if not self.loads:
            return [(self.load_name(self.table.iloc[0]), self.table)]
        groups = self.table.groupby(list(self.loads), sort=False, dropna=False)
        return [(self.load_name(rows.iloc[0]), rows) for _, rows in groups]

    def busiest(self) -> str | None:
        """The highest load, within the first panel, at which a policy keeps the SLO.

        The baseline counts only if no other policy keeps it anywhere; None if nothing does.
        """
        table = self.table
        for name in self.loads:
            if name != self.x:
                first = table[name].iloc[0]
                table = table[(table[name] == first) | (table[name].isna() & pd.isna(first))]
        kept = table[table[KEEPS] & ~self.is_static_pair.loc[table.index]]
        others = kept[kept[self.series].astype(str) != self.baseline]
        kept = kept if others.empty else others
        if kept.empty:
            return None
        if self.x is not None and pd.api.types.is_numeric_dtype(kept[self.x]):
            kept = kept[kept[self.x] == kept[self.x].max()]
        return self.load_name(kept.iloc[-1])

    def load_name(self, row: pd.Series[Any], *, without: str | None = None) -> str:
        """A row's load point in words."""
        if not self.loads:
            return "all runs"
        names = [name for name in self.loads if name != without]
        return ", ".join(_value_name(name, row[name]) for name in names)


Promises = tuple[float | None, float | None]
"""TTFT and ITL, in s; None where nobody said."""


def collect(
    directory: Path, *, target: float = TARGET, promises: Promises = (None, None)
) -> Results:
    """Read a directory of results.

    Args:
        directory: With `summary.json` it is a run, with `results.csv` a sweep or an experiment,
            else a folder whose sub-folders are runs, or a load generator's output, or a folder of
            both.
        target: Attainment that both TTFT and ITL must reach to keep the SLO.
        promises: Of load generators' outputs; by default those of the runs beside them.

    Raises:
        VoltanaError: It is none of these.
    """
    if (directory / SUMMARY).exists():
        return _of_runs(directory, [directory], [], target, promises)
    if (directory / RESULTS).exists():
        return _of_sweep(directory, target)
    runs = sorted(path.parent for path in directory.glob(f"*/{SUMMARY}"))
    if benchmark_file(directory) is not None:
        others = [directory]
    else:
        below = sorted(set(directory.glob("*")) - set(runs))
        others = [path for path in below if benchmark_file(path) is not None]
    if not runs and not others:
        raise VoltanaError(
            f"nothing to report in {directory}: it needs {SUMMARY} (a run), {RESULTS} (a sweep), "
            "run directories below it, or outputs of aiperf, guidellm or bench_serving"
        )
    return _of_runs(directory, runs, others, target, promises)


def _of_runs(
    directory: Path, runs: Sequence[Path], others: Sequence[Path], target: float, promises: Promises
) -> Results:
    rows, residency = [], {}
    for path in runs:
        check_frames(path)
        settings, summary = _table(path / "settings.json"), _table(path / SUMMARY)
        plain = {k: v for k, v in settings.items() if not isinstance(v, dict | list)}
        rows.append({RUN: path.name, **plain, **flat_summary(summary), ID: path.name})
        residency[path.name] = summary.get("clock_residency", {})
    ttft_s, itl_s = _promises(rows, others, promises)
    for path in others:
        for each in read_benchmarks(path):
            record = each.record(ttft_s, itl_s)
            rows.append({RUN: each.name, **record.settings, **flat_summary(summarise(record)),
                         ID: each.name})  # fmt: skip
    table = pd.DataFrame(rows)
    check_results(table, directory / SUMMARY, _NEEDED)
    return _results(
        directory, table, RUN, target,
        figure=None, question=None, residency=residency,
        run_directories={path.name: path for path in runs},
    )  # fmt: skip


def _promises(
    rows: Sequence[Mapping[str, Any]], others: Sequence[Path], given: Promises
) -> tuple[float, float]:
    """What load generators' outputs are judged by: as given, or as all runs beside them have it."""
    found = []
    for key, value in zip(("slo_ttft_s", "slo_itl_s"), given, strict=True):
        of_runs = {row[key] for row in rows if key in row}
        if others and value is None and len(of_runs) != 1:
            option = f"--{key.removesuffix('_s').replace('_', '-')}-ms"
            raise VoltanaError(
                f"{others[0]} tells no promise, and the runs beside it "
                f"{'differ in theirs' if of_runs else 'are none'}: give {option}"
            )
        found.append(value if value is not None else next(iter(of_runs), float("nan")))
    return found[0], found[1]


def _table(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise VoltanaError(f"{path} is no table of keys: is it a run directory?")
    return found


def _of_sweep(directory: Path, target: float) -> Results:
    table = read_results(directory).rename(columns={"hash": ID})
    check_results(table, directory / RESULTS, _NEEDED)
    missing = [name for name in (ID, *_NAMES) if name not in table]
    if missing:
        raise VoltanaError(f"{directory / RESULTS} has no column {missing[0]}: is it of a sweep?")
    question, figure = _experiment(directory.name)
    series = figure.series if figure and figure.series in table else None
    if series is None:
        table, series = _series(table)
    return _results(
        directory, table, series, target,
        figure=figure, question=question, residency=read_residency(directory, table[ID]),
        run_directories={},
    )  # fmt: skip


def _experiment(name: str) -> tuple[str | None, FigureSpec | None]:
    """Question and figure of the shipped experiment that the directory is named after."""
    stem = name.removesuffix("-quick")
    if stem not in list_experiments():
        return None, None
    found = read_experiment(EXPERIMENTS / f"{stem}.toml")
    return found.question, found.figure


def _series(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The column to compare: the policy axis, another free axis, or the policies as configured."""
    labels = labels_of(table)
    if labels:
        return table, "policy" if "policy" in labels else labels[-1]
    return table.assign(policy=table["controller"] + " + " + table["router"]), "policy"


def _results(
    directory: Path,
    table: pd.DataFrame,
    series: str,
    target: float,
    *,
    figure: FigureSpec | None,
    question: str | None,
    residency: Mapping[str, Residency],
    run_directories: Mapping[str, Path],
) -> Results:
    loads = () if series == RUN else load_columns(table, series, figure.x if figure else None)
    wanted = figure.baseline if figure and figure.baseline else STATIC_MAX
    baseline = wanted if wanted in set(table[series].astype(str)) else None
    table = table.assign(**{KEEPS: keeps_slo(table, target)})
    if baseline is not None:
        table = add_saving(table, loads, series, baseline)
    x = _horizontal(table, loads, figure)
    is_asked = figure is not None and figure.x == x
    return Results(
        directory=directory, title=directory.resolve().name, question=question, table=table,
        series=series, loads=loads, x=x, baseline=baseline, target=target, residency=residency,
        x_label=figure.x_label if figure and is_asked else _AXES.get(str(x), str(x)),
        x_scale=figure.x_scale if figure and is_asked else 1.0,
        run_directories=run_directories,
    )  # fmt: skip


def _horizontal(table: pd.DataFrame, loads: Sequence[str], figure: FigureSpec | None) -> str | None:
    if figure and figure.x in loads:
        return figure.x
    numeric = [n for n in loads if pd.api.types.is_numeric_dtype(table[n])]
    return next((n for n in ("rate_rps", *numeric) if n in numeric), None)


def _value_name(name: str, value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return {"panel": text, "rate_rps": f"{text} requests/s"}.get(name, f"{name} {text}")
