"""The best fixed clocks on the best number of instances: frontier's search, over whole fleets.

An instance that is not used is not there: its GPU does other work or is switched off. So each side
of the search has one instance up to all but one, and a fleet of more GPUs or watts than there are
is no candidate, though one side of it may be tried beside all instances of the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Final

from voltana.experiments.frontier.static.fleets import profile_knots
from voltana.experiments.frontier.static.like import Fleet, FleetSearch, Side
from voltana.experiments.frontier.trial import Trial
from voltana.experiments.recommend.choose.desk import (
    PHASES,
    Desk,
    Means,
    fixed_clock_mhz,
    fleet_at,
)
from voltana.experiments.recommend.question import Question, Repeats
from voltana.experiments.runs import cached_profile
from voltana.profiles.common.errors import VoltanaError

MOST_KNOTS: Final = 4
"""Clocks that a side tries first; what lies between is bisected."""
_CLOSE: Final = 1.02
"""Energy over that of the best router from which another one is not looked at further."""
_MOVES: Final = (4, 2)
"""Steps, in supported clocks, by which another router's clocks are moved."""
_CAP_MOVES: Final = (16, 8, 4, 2)
"""The same of caps, on cards of at least `_FINE` clocks."""
_FINE: Final = 32
_FORBIDDEN_J: Final = 1e30
"""Energy of a fleet that draws too much: so much that any other is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedChoice:
    """A fleet of fixed clocks."""

    fleet: Fleet
    means: Means
    trial: Trial
    """On the tuning repeats."""

    @property
    def counts(self) -> tuple[int, int]:
        """Prefill and decode instances."""
        return self.fleet[0].active, self.fleet[1].active


def allows(question: Question, fleet: Fleet) -> bool:
    """Whether there are GPUs and watts for it."""
    return fits(question, fleet) and (
        question.watts is None or fleet_peak_w(question, fleet) <= question.watts
    )


def highest_allowed(question: Question, counts: tuple[int, int]) -> Fleet | None:
    """So many instances, all at the highest clock that there are watts for; None if at none."""
    fleets = (fleet_at(counts, clock_mhz) for clock_mhz in reversed(question.clocks_mhz))
    return next((fleet for fleet in fleets if allows(question, fleet)), None)


def fits(question: Question, fleet: Fleet) -> bool:
    """Whether there are GPUs for it."""
    return sum(side.active for side in fleet) <= question.instances


def fleet_peak_w(question: Question, fleet: Fleet) -> float:
    """The most that a fleet of fixed clocks draws at once, in W."""
    return sum(
        side.active * question.peak_w(phase, side.clock_mhz)
        for phase, side in zip(PHASES, fleet, strict=True)
    )


def try_fixed(
    desk: Desk, means: Means, repeats: Repeats, anchor: Fleet, fleet: Fleet, on_all: bool,
) -> Trial:  # fmt: skip
    """One fleet, on all tuning repeats or the first one.

    Args:
        desk: Runs it.
        means: How the fleet is held.
        repeats: On which is chosen.
        anchor: All instances at their top clock: one side may be tried beside the other of it.
        fleet: To be tried.
        on_all: Or on the first repeat alone.
    """
    question = desk.question
    beside = not on_all and (fleet[0] == anchor[0] or fleet[1] == anchor[1])
    if not (beside or fits(question, fleet)):
        return Trial(settings={}, label="", error="more GPUs than there are")
    settings, label = means.settings(question, fleet), means.label(question, fleet)
    if on_all:
        desk.ahead([(settings, repeats)])
        trial = desk.whole(settings, label, repeats)
    else:
        trial = desk.first(settings, label, repeats)
    if beside or allows(question, fleet):
        return trial
    return replace(trial, energies_j=(_FORBIDDEN_J,) * len(trial.energies_j))


def sum_mhz(fleet: Fleet) -> int:
    """Of both clocks."""
    return fleet[0].clock_mhz + fleet[1].clock_mhz


class FixedSearch:
    """Searches the fixed clocks of one question."""

    def __init__(self, desk: Desk, repeats: Repeats) -> None:
        """Args: where runs are made, and on which is chosen."""
        self._desk = desk
        self._repeats = repeats
        self._target = desk.question.choice_target
        self._clocks = desk.question.clocks_mhz
        most = desk.question.instances - 1
        self._anchor = fleet_at((most, most), self._clocks[-1])
        self.tried: tuple[dict[Side, Trial], dict[Side, Trial]] = ({}, {})

    def find(self) -> FixedChoice:
        """The fleet of least energy that keeps the target; the nearest miss if none does.

        Raises:
            VoltanaError: Not even all instances at their top clock could be run.
        """
        question = self._desk.question
        first, *others = map(Means, question.routers)
        every = range(1, question.instances)
        search = self._search(first, self._clocks, (every, every))
        self._desk.explore(search)
        best = self._choice(first, search.find())
        if best.trial.error:
            raise VoltanaError(best.trial.error)
        self.tried = search.tried
        for means in others:
            best = self._other_router(best, means)
        return best

    def in_caps(self, best: FixedChoice) -> FixedChoice | None:
        """The instances of the best clocks, in the power caps of least energy that keep the target.

        From what those clocks draw at most both caps are moved as clocks are, down first. None if
        not even the highest caps keep it.
        """
        means = Means(best.means.router, is_cap=True)
        fleet = self._kept(means, best.fleet, float("inf"))
        if fleet is None:
            return None
        fleet = self._down(means, fleet, _CAP_MOVES if len(self._clocks) >= _FINE else (2, 1))
        trial = self.attempt(means, fleet, on_all=True)
        return FixedChoice(fleet=fleet, means=means, trial=trial)

    def attempt(self, means: Means, fleet: Fleet, *, on_all: bool) -> Trial:
        """One fleet; what has been tried is known."""
        return try_fixed(self._desk, means, self._repeats, self._anchor, fleet, on_all)

    def fleets_of(self, instances: int) -> Iterator[Fleet]:
        """Fleets of that many instances, best first by what the sides spent on their own."""
        options = [
            (a_trial.energy_j + b_trial.energy_j, a, b)
            for (a, a_trial), (b, b_trial) in product(*(side.items() for side in self.tried))
            if a.active + b.active == instances
            and a_trial.keeps(self._target)
            and b_trial.keeps(self._target)
            and allows(self._desk.question, (a, b))
        ]
        for _, a, b in sorted(options):
            yield a, b

    def _other_router(self, best: FixedChoice, means: Means) -> FixedChoice:
        """The same instances under another router: clocks up until it keeps, then down."""
        first_j = best.trial.energies_j[0]
        if not self.attempt(means, best.fleet, on_all=False).energy_j < _CLOSE * first_j:
            return best
        fleet = self._kept(means, best.fleet, first_j)
        if fleet is None:
            return best
        fleet = self._down(means, fleet, _MOVES)
        trial = self.attempt(means, fleet, on_all=True)
        mine = FixedChoice(fleet=fleet, means=means, trial=trial)
        return mine if self._is_better(trial, best.trial) else best

    def _kept(self, means: Means, fleet: Fleet, most_j: float) -> Fleet | None:
        """From a fleet up, a clock at a time, to one that keeps; None if all of it costs too much.

        Args:
            means: How the fleet is held.
            fleet: To begin with.
            most_j: Energy on the first repeat from which it costs too much.
        """
        step = _MOVES[0]
        while not self.attempt(means, fleet, on_all=True).keeps(self._target):
            higher = [f for f in self._moves(fleet, step) if sum_mhz(f) > sum_mhz(fleet)]
            self._ahead(means, higher)
            tried = [(self.attempt(means, f, on_all=False), f) for f in higher]
            usable = [(t.rank, -t.energy_j, f) for t, f in tried if t.energy_j < most_j]
            if not usable:
                return None
            fleet = max(usable)[2]
        return fleet

    def _down(self, means: Means, fleet: Fleet, steps: Sequence[int]) -> Fleet:
        """Move one clock at a time while that saves and keeps the target."""
        trial = self.attempt(means, fleet, on_all=True)
        for step in steps:
            moved = True
            while moved:
                moved = False
                around = [*self._moves(fleet, step)]
                self._ahead(means, around)
                for near in around:
                    quick = self.attempt(means, near, on_all=False)
                    is_less = quick.energy_j < trial.energies_j[0]
                    if not (is_less and quick.keeps(self._target)):
                        continue
                    found = self.attempt(means, near, on_all=True)
                    if self._is_better(found, trial):
                        fleet, trial, moved = near, found, True
                        break
        return fleet

    def _ahead(self, means: Means, fleets: Sequence[Fleet]) -> None:
        question = self._desk.question
        settings = (means.settings(question, f) for f in fleets if fits(question, f))
        self._desk.ahead((s, self._repeats[:1]) for s in settings)

    def _moves(self, fleet: Fleet, step: int) -> Iterator[Fleet]:
        """One phase's clock so many steps lower or higher, decode first."""
        for phase, by in ((1, -step), (0, -step), (1, step), (0, step)):
            at = self._clocks.index(fleet[phase].clock_mhz) + by
            if 0 <= at < len(self._clocks):
                sides = list(fleet)
                sides[phase] = Side(fleet[phase].active, self._clocks[at])
                yield sides[0], sides[1]

    def _is_better(self, mine: Trial, other: Trial) -> bool:
        if mine.keeps(self._target) and other.keeps(self._target):
            return mine.energy_j < other.energy_j
        return mine.rank > other.rank

    def _choice(self, means: Means, trial: Trial) -> FixedChoice:
        fleet = fleet_of(trial)
        if fleet is None or not allows(
            self._desk.question, fleet
        ):  # nothing keeps the target: all there is, at top
            fleet, trial = self._all_at_top(means)
        return FixedChoice(fleet=fleet, means=means, trial=trial)

    def _all_at_top(self, means: Means) -> tuple[Fleet, Trial]:
        """The split of all instances, at the highest clock allowed, that misses least."""
        question = self._desk.question
        found = []
        for prefill in range(1, question.instances):
            fleet = highest_allowed(question, (prefill, question.instances - prefill))
            if fleet is not None:
                found.append((self.attempt(means, fleet, on_all=False).rank, fleet))
        _, fleet = max(found)
        return fleet, self.attempt(means, fleet, on_all=True)

    def _search(
        self, means: Means, clocks: tuple[int, ...], counts: tuple[range | tuple[int, ...], ...]
    ) -> FleetSearch:
        """A search whose anchor is its own largest fleet at its top clock."""
        anchor = fleet_at((counts[0][-1], counts[1][-1]), clocks[-1])
        attempt = partial(try_fixed, self._desk, means, self._repeats, anchor)
        profile = cached_profile(str(self._desk.question.base["profile"]))
        known = profile_knots(profile, clocks)
        step = max(1, -(-len(known) // MOST_KNOTS))
        return FleetSearch(
            attempt, clocks_mhz=(clocks, clocks), knots_mhz=(known[::step], known[::step]),
            counts=(counts[0], counts[1]), target=self._target, is_quick=True,
            ahead=partial(self._ahead, means),
        )  # fmt: skip


def fleet_of(trial: Trial) -> Fleet | None:
    """The fleet that a trial was of; None if its clocks are not fixed."""
    sides = []
    for phase in PHASES:
        clock_mhz = fixed_clock_mhz(trial.settings, phase)
        if clock_mhz is None:
            return None
        sides.append(Side(int(trial.settings[f"num_{phase}"]), clock_mhz))
    return sides[0], sides[1]
