"""One setting of one policy on some repeats, and the bench that runs it and keeps every run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pandas as pd

from voltana.experiments.compare.policies import ATTAINMENTS as BOTH
from voltana.experiments.sweep.executors import run_point
from voltana.experiments.sweep.grid import Point
from voltana.experiments.sweep.run import flat_summary
from voltana.experiments.sweep.store import FolderStore
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config

ATTAINMENTS: Final = ("attainment", "ttft_attainment", "itl_attainment", "worse")
"""What can be held equal: see NOMENCLATURE.md; `worse` is the lower of TTFT's and ITL's."""
POINTS: Final = "points"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A name and the configuration keys of a load point, over those of the base."""

    name: str
    settings: Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class Trial:
    """One setting of one policy and what its runs gave."""

    settings: Mapping[str, Any]
    label: str
    """The knob's value, or the clocks and instances."""
    attainments: tuple[float, ...] = ()
    """Of each repeat."""
    energies_j: tuple[float, ...] = ()
    rows: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    """Labels, configuration and numbers of each run."""
    error: str = ""
    """Why a run failed, if one did."""

    @property
    def worst_attainment(self) -> float:
        """Of the repeats; NaN if a run failed, which keeps no promise."""
        return min(self.attainments) if self.attainments and not self.error else math.nan

    @property
    def energy_j(self) -> float:
        """Mean over the repeats; NaN if a run failed."""
        if self.error or not self.energies_j:
            return math.nan
        return sum(self.energies_j) / len(self.energies_j)

    @property
    def rank(self) -> float:
        """Orders misses: the worst attainment, below all others if a run failed."""
        worst = self.worst_attainment
        return -1.0 if math.isnan(worst) else worst

    def keeps(self, target: float) -> bool:
        """Whether every repeat attains the target."""
        return self.worst_attainment >= target


class Bench:
    """Runs settings of one load on repeats; what has been run is not run again."""

    def __init__(
        self,
        base: Mapping[str, Any],
        load: Load,
        attainment: str,
        directory: Path,
    ) -> None:
        """Args: keys of all runs, the load, what is attained, where runs are kept."""
        self._base = base
        self._load = load
        self._attainment = attainment
        self._store = FolderStore(directory / POINTS)

    def run(
        self,
        settings: Mapping[str, Any],
        label: str,
        repeats: Sequence[Mapping[str, Any]],
        *,
        stop_below: float = -math.inf,
    ) -> Trial:
        """One trial.

        Args:
            settings: Configuration keys of the policy.
            label: For the reader.
            repeats: Configuration keys of each repeat.
            stop_below: The first repeat that attains less is the last one that is run.
        """
        trial = Trial(settings=settings, label=label)
        rows: list[dict[str, Any]] = []
        for repeat in repeats:
            values = {**self._base, **self._load.settings, **repeat, **settings}
            where = f"load {self._load.name!r}"
            point = Point(labels={}, config=make_config(values, where=where))
            try:
                summary = self._summary(point)
            except VoltanaError as error:
                trial.error = str(error)
                break
            rows.append({**point.config.as_dict(), **flat_summary(summary), "hash": point.key})
            kept = attained(rows[-1], self._attainment)
            trial.attainments += (kept,)
            trial.energies_j += (float(summary["energy_j"]),)
            if kept < stop_below:
                break
        trial.rows = pd.DataFrame(rows)
        return trial

    def _summary(self, point: Point) -> dict[str, Any]:
        if not self._store.has(point.key):
            outcome = run_point(point.config)
            if outcome.summary is None:
                raise VoltanaError(outcome.error or "the run gave nothing")
            self._store.put(point.key, outcome.summary)
        return self._store.get(point.key)


def attained(row: Mapping[str, Any], attainment: str) -> float:
    """Attainment of one run."""
    return min(float(row[name]) for name in _columns(attainment))


def pooled(rows: pd.DataFrame, attainment: str) -> float:
    """Attainment over all requests (ITL: all gaps) of several runs; NaN without a run."""
    if rows.empty:
        return math.nan
    return min(_pooled(rows, name) for name in _columns(attainment))


def _columns(attainment: str) -> tuple[str, ...]:
    return BOTH if attainment == "worse" else (attainment,)


def _pooled(rows: pd.DataFrame, name: str) -> float:
    weights = rows["gaps_total" if name == "itl_attainment" else "requests_total"]
    total = float(weights.sum())
    return float((rows[name] * weights).sum()) / total if total else 1.0
