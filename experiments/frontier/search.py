"""Energy at equal attainment: each policy at the least energy that still keeps the promises.

A policy's knob (`experiments.frontier.contenders`) is turned from safe to cheap: five positions
first, then bisection between the cheapest that reaches the target and the next one that does not.
Neither attainment nor energy need be monotone in the knob: all that has been tried counts, the
answer is the least energy among everything tried that reaches the target, and a policy that never
reaches it is reported so. Fixed clocks are searched as pairs: a coarse grid, then a pattern search
around the best pair, down to a few of the profile's steps. Attainment is that of all repeats
together; savings are taken repeat by repeat, on the same requests.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Final

import pandas as pd

from experiments.compare.policies import BEST_PAIR, STATIC_MAX
from experiments.frontier.contenders import Contender
from experiments.sweep.grid import Point
from experiments.sweep.run import FAILURES, POINTS, run_sweep, tidy
from profiles.errors import VoltanaError
from sim.config import make_config
from sim.policies.clocks import nearest_clock_mhz
from sim.results import read_json

ATTAINMENTS: Final = ("attainment", "ttft_attainment", "itl_attainment", "worse")
"""What can be held equal: see NOMENCLATURE.md; `worse` is the lower of TTFT's and ITL's."""
COARSE: Final = 5
"""Positions of the knob tried first."""
ROUNDS: Final = 4
"""Further rounds: the bracket shrinks to 1/64 of the range."""
_SCREENED: Final = 4
"""Static pairs tried on all repeats at a time, the least energy of the first repeat first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A name and the configuration keys of a load point, over those of the base."""

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What is to be compared, on what, at which attainment."""

    base: Mapping[str, Any]
    loads: Sequence[Load]
    contenders: Sequence[Contender]
    repeats: Sequence[Mapping[str, Any]]
    """Configuration keys of each: a seed, or a part of a trace."""
    clocks_mhz: tuple[int, ...]
    """All that static pairs may use, ascending."""
    coarse_mhz: tuple[int, ...]
    static_router: str = "round-robin"
    target: float = 0.99
    attainment: str = "attainment"

    def __post_init__(self) -> None:
        if self.attainment not in ATTAINMENTS:
            raise VoltanaError(
                f"attainment must be one of {', '.join(ATTAINMENTS)}, got {self.attainment!r}"
            )
        if not 0.0 < self.target <= 1.0:
            raise VoltanaError(f"target must be in (0, 1], got {self.target}")
        if not (self.loads and self.contenders and self.repeats):
            raise VoltanaError("a frontier needs a load, a policy and a repeat at least")

    def attained(self, runs: pd.DataFrame) -> float:
        """The attainment that is held equal, of all requests (ITL: gaps) of the runs together."""
        both = ("ttft_attainment", "itl_attainment")
        names = both if self.attainment == "worse" else (self.attainment,)
        return min(_pooled(runs, name) for name in names)


@dataclass(slots=True)
class Trial:
    """One setting of one policy, on some or all of the repeats."""

    settings: Mapping[str, Any]
    label: str
    """The knob's value or the pair of clocks."""
    repeats: int
    """How many of the repeats, from the first."""
    is_at_end: bool = False
    """Whether the knob stands at an end of its range: what lies beyond is not tried."""
    attainment: float = math.nan
    """Of all repeats together; NaN if one of them failed, which reaches no target."""
    error: str = ""
    """Why a run failed, if one did."""
    energy_j: float = math.nan
    """Mean over the repeats."""
    rows: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)

    @property
    def value(self) -> str:
        """The label, for the reader."""
        return f"{self.label} (end)" if self.is_at_end else self.label

    def reaches(self, target: float) -> bool:
        """Whether the repeats together attain the target."""
        return self.attainment >= target


class Search(ABC):
    """Proposes what to try next, and knows the best of what has been tried."""

    def __init__(self, name: str, repeats: int, target: float) -> None:
        self.name = name
        self.knob = ""
        """What is turned, for the reader."""
        self.tried: dict[Any, Trial] = {}
        self._repeats = repeats
        self._target = target

    @abstractmethod
    def propose(self) -> dict[Any, Trial]:
        """Trials to make now; none when the search has ended."""

    def complete(self) -> list[Trial]:
        """What was tried on all repeats."""
        return [t for t in self.tried.values() if t.repeats == self._repeats]

    def best(self) -> Trial | None:
        """The least energy that reaches the target; None if nothing does."""
        kept = [t for t in self.complete() if t.reaches(self._target)]
        return min(kept, key=lambda t: t.energy_j) if kept else None

    def nearest_miss(self) -> Trial:
        """What came closest to the target."""
        return max(self.complete(), key=lambda t: (t.attainment == t.attainment, t.attainment))

    def is_monotone(self) -> bool:
        """Whether attainment falls and energy falls from the safe end to the cheap one."""
        return True


class KnobSearch(Search):
    """Bisection on a contender's knob; position 0 is safe, 1 cheap."""

    def __init__(self, contender: Contender, repeats: int, target: float) -> None:
        super().__init__(contender.name, repeats, target)
        self.knob = contender.knob
        self._contender = contender
        self._round = 0

    def propose(self) -> dict[float, Trial]:
        self._round += 1
        if self._round == 1:
            count = COARSE if self._contender.knob else 1
            positions = [i / max(count - 1, 1) for i in range(count)]
        elif self._round > 1 + ROUNDS or not self._contender.knob:
            positions = []
        else:
            positions = self._between()
        return {p: self._trial(p) for p in positions if p not in self.tried}

    def _between(self) -> list[float]:
        order = sorted(self.tried)
        best = self.best()
        if best is None:  # look around what came closest, once on each side
            at = order.index(next(p for p, t in self.tried.items() if t is self.nearest_miss()))
            return [] if self._round > 3 else _middles(order, (at - 1, at))
        at = order.index(next(p for p, t in self.tried.items() if t is best))
        sides = [at]
        if at + 1 < len(order) and self.tried[order[at + 1]].reaches(self._target):
            sides.append(at - 1)  # energy turns up again: the least may lie on either side
        return _middles(order, sides)

    def _trial(self, position: float) -> Trial:
        settings, has_knob = self._contender.at(position), bool(self._contender.knob)
        label = self._contender.value_text(position) if has_knob else ""
        return Trial(settings, label, self._repeats, is_at_end=has_knob and position in (0.0, 1.0))

    def is_monotone(self) -> bool:
        trials = [self.tried[p] for p in sorted(self.tried)]
        return all(
            b.attainment <= a.attainment + 0.002 and b.energy_j <= a.energy_j * 1.002
            for a, b in pairwise(trials)
        )


def _middles(order: list[float], after: Sequence[int]) -> list[float]:
    inner = [i for i in after if 0 <= i < len(order) - 1]
    return [0.5 * (order[i] + order[i + 1]) for i in inner]


class PairSearch(Search):
    """Fixed clocks: a coarse grid on the first repeat, the promising ones on all, then around."""

    def __init__(self, study: Study) -> None:
        super().__init__(BEST_PAIR, len(study.repeats), study.target)
        self._study = study
        self._step_mhz = max(_steps(study.coarse_mhz), default=0)
        self._least_mhz = min(_steps(study.clocks_mhz), default=1)
        self._is_coarse = True
        self._looked_at: list[tuple[int, int]] = []
        """Neighbours that were tried on the first repeat last."""

    def propose(self) -> dict[tuple[int, int, int], Trial]:
        if not self.tried:
            pairs = product(self._study.coarse_mhz, repeat=2)
            return {(p, d, 1): self._trial(p, d, 1) for p, d in pairs}
        if self._is_coarse:
            wanted = self._next_screened()
            if wanted:
                return {(p, d, self._repeats): self._trial(p, d) for p, d in wanted}
            self._is_coarse = False
        return self._around()

    def _next_screened(self) -> list[tuple[int, int]]:
        """The next pairs of the grid to try on all repeats; none once one of those has kept it.

        A pair that misses by far on the first repeat is passed over; one whose energy there is
        higher than that of a pair that kept the target comes later, and is never needed.
        """
        if self.best() is not None or self._repeats == 1:
            return []
        near = [(k, t) for k, t in self.tried.items() if k[2] == 1 and self._is_near(t)]
        near.sort(key=lambda item: item[1].energy_j)
        rest = [k[:2] for k, _ in near if (*k[:2], self._repeats) not in self.tried]
        if not near and not self.complete():  # nothing comes near: the fastest says how near
            top = self._study.coarse_mhz[-1]
            return [(top, top)]
        return rest[:_SCREENED]

    def _is_near(self, first: Trial) -> bool:
        """Whether a pair that did so on the first repeat may keep the target on all."""
        return first.attainment >= self._target - min(0.02, 1.01 - self._target)

    def _around(self) -> dict[tuple[int, int, int], Trial]:
        """Neighbours of the best pair: on the first repeat, then the better ones on all."""
        best = self.best()
        if best is None:
            return {}
        at = next(k for k, t in self.tried.items() if t is best)
        first_j = self.tried[*at[:2], 1].energy_j
        better = [
            pair for pair in self._looked_at
            if self._is_near(self.tried[*pair, 1]) and self.tried[*pair, 1].energy_j < first_j
            and (*pair, self._repeats) not in self.tried
        ]  # fmt: skip
        self._looked_at = []
        if better:
            return {(p, d, self._repeats): self._trial(p, d) for p, d in better}
        while not self._looked_at and self._step_mhz >= 4 * self._least_mhz:
            self._step_mhz //= 2
            for dp, dd in product((-self._step_mhz, 0, self._step_mhz), repeat=2):
                clocks = self._study.clocks_mhz
                p, d = nearest_clock_mhz(clocks, at[0] + dp), nearest_clock_mhz(clocks, at[1] + dd)
                if (p, d, 1) not in self.tried and (p, d) not in self._looked_at:
                    self._looked_at.append((p, d))
        return {(p, d, 1): self._trial(p, d, 1) for p, d in self._looked_at}

    def _trial(self, prefill_mhz: int, decode_mhz: int, repeats: int | None = None) -> Trial:
        settings = {
            "prefill_controller": f"static:f={prefill_mhz}",
            "decode_controller": f"static:f={decode_mhz}",
            "router": self._study.static_router,
        }
        return Trial(settings, f"{prefill_mhz}/{decode_mhz} MHz", repeats or self._repeats)


def _pooled(runs: pd.DataFrame, attainment: str) -> float:
    weights = runs["gaps_total" if attainment == "itl_attainment" else "requests_total"]
    total = float(weights.sum())
    return float((runs[attainment] * weights).sum()) / total if total else 1.0


def _steps(clocks_mhz: Sequence[int]) -> list[int]:
    return [b - a for a, b in pairwise(clocks_mhz)]


def search_frontier(
    study: Study, directory: Path, *, jobs: int | None = None
) -> dict[str, list[Search]]:
    """Try, round after round, all that the searches of all loads propose.

    Args:
        study: What to compare.
        directory: Of the runs, as `experiments.sweep.run.run_sweep` keeps them: what has been
            run is not run again, so that an interrupted search goes on where it stopped.
        jobs: Processes.

    Returns:
        By name of the load: the searches of static-max, the best static pair and each contender.

    Raises:
        VoltanaError: Not one run of a round succeeded.
    """
    searches = {load.name: make_searches(study) for load in study.loads}
    points: list[Point] = []
    while True:
        proposed = [
            (load, search, key, trial)
            for load in study.loads
            for search in searches[load.name]
            for key, trial in search.propose().items()
        ]
        if not proposed:
            return searches
        for load, search, key, trial in proposed:
            points += _points(study, load, search, trial)
            search.tried[key] = trial
        frame, errors = _run(points, directory, jobs)
        ran = set(frame["hash"])
        points = [p for p in points if p.key in ran]  # a failure would fail again
        groups = dict(iter(frame.groupby(["load", "policy", "value"], sort=False)))
        for load, search, _, trial in proposed:
            name = (load.name, search.name, trial.label)
            _fill(study, trial, groups.get(name))
            trial.error = errors.get(name, "")


def _fill(study: Study, trial: Trial, rows: pd.DataFrame | None) -> None:
    """Take a trial's repeats out of its rows, if all of them have run."""
    if rows is None:
        return
    rows = rows[rows["repeat"].astype(int) < trial.repeats]
    rows = rows.drop_duplicates("repeat").sort_values("repeat", key=_numbers)
    if len(rows) == trial.repeats:
        trial.rows = rows
        trial.attainment = study.attained(rows)
        trial.energy_j = float(rows["energy_j"].mean())


def make_searches(study: Study) -> list[Search]:
    """The searches of one load: static-max, the best static pair, each contender."""
    repeats, target = len(study.repeats), study.target
    top = Contender(
        name=STATIC_MAX, settings={"controller": "static", "router": study.static_router},
        knob="", safe=0.0, cheap=0.0,
    )  # fmt: skip
    knobs = [KnobSearch(c, repeats, target) for c in (top, *study.contenders)]
    return [knobs[0], PairSearch(study), *knobs[1:]]


def _points(study: Study, load: Load, search: Search, trial: Trial) -> list[Point]:
    made = []
    for index, repeat in enumerate(study.repeats[: trial.repeats]):
        values = {**study.base, **load.settings, **repeat, **trial.settings}
        labels = {
            "load": load.name, "policy": search.name, "value": trial.label, "repeat": str(index),
        }  # fmt: skip
        made.append(Point(labels=labels, config=make_config(values, where=f"load {load.name!r}")))
    return made


def _run(
    points: list[Point], directory: Path, jobs: int | None
) -> tuple[pd.DataFrame, dict[tuple[str, str, str], str]]:
    """All points, and the first error of each load, policy and value that could not run.

    One that lies outside the profiled grid, say, is left out.
    """
    try:
        return run_sweep(points, directory, jobs=jobs, kind="frontier"), {}
    except VoltanaError:
        frame = tidy(points, directory / POINTS)
        if frame.empty:
            raise
        failures = read_json(directory / FAILURES)
        errors: dict[tuple[str, str, str], str] = {}
        for point in points:
            if point.key in failures:
                name = (point.labels["load"], point.labels["policy"], point.labels["value"])
                errors.setdefault(name, str(failures[point.key]["error"]))
        return frame, errors


def _numbers(column: pd.Series[Any]) -> pd.Series[int]:
    return column.astype(int)
