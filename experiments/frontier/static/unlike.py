"""The best static fleet where the cards of one phase are unlike: a clock and a number a kind.

A router shares a phase's requests among its cards by what it sees of them, and a clock changes
that, so that what a phase costs is no sum of what its kinds cost, as what a fleet costs is nearly
one of its phases (`voltana.experiments.frontier.static.like`). So nothing is ranked by sums here:

- Up to `EXHAUSTIVE` fleets all are run: the best is the best.
- Else each kind's number and clock is searched in turn with all others held, by the clocks at which
  its profile has tables and then by fewer and fewer steps around the best of them, until a round
  changes nothing (coordinate descent); then two clocks at a time move by some steps, until that
  changes nothing either. It begins at several fleets: all at their top clocks, all at middle ones,
  and each combination of one kind a phase in use (or ahead of the others, where all have to be in
  use). The best is the least that any of them ended at. Tests hold it against exhaustive grids, of
  closed forms and of real runs; a valley that no start leads to would be missed.

What is tried runs on the first repeat; what would be the best there, on all of them. A fleet that
misses the target is worse than one that keeps it, and the less so the less it misses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import prod
from typing import Final

from voltana.experiments.frontier.static.like import Side
from voltana.experiments.frontier.trial import Trial

EXHAUSTIVE: Final = 200
"""Fleets that are all run."""
_STEPS: Final = (6, 3, 1)
"""Around the best of a line, in supported clocks."""
_PAIR_STEPS: Final = (4, 1)
"""By which two clocks move together."""

Sides = tuple[Side, ...]
"""A side for each kind of card, those of prefill first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """What may be chosen for one kind of card of a phase."""

    counts: Sequence[int]
    """Instances in use, ascending; 0 if it may be out of use."""
    clocks_mhz: tuple[int, ...]
    knots_mhz: tuple[int, ...]
    """Clocks that are tried first."""
    quiet_mhz: int
    """Its clock while none is in use."""

    @property
    def sides(self) -> list[Side]:
        """All there are."""
        used = [Side(n, f) for n in self.counts if n for f in self.clocks_mhz]
        return [*([self.unused] if 0 in self.counts else []), *used]

    @property
    def unused(self) -> Side:
        """None in use."""
        return Side(0, self.quiet_mhz)

    def near(self, side: Side, step: int) -> list[Side]:
        """The same number at clocks so many steps below and above."""
        if not side.active:
            return []
        at = self.clocks_mhz.index(side.clock_mhz)
        found = [i for i in (at - step, at + step) if 0 <= i < len(self.clocks_mhz)]
        return [Side(side.active, self.clocks_mhz[i]) for i in found]


class UnlikeSearch:
    """Finds the static fleet of least energy; see the module's text.

    Args:
        attempt: Runs a fleet; with False on the first repeat alone. It remembers: asked for the
            same twice, it runs once.
        cards: Of prefill and of decode, what may be chosen for each kind.
        target: Attainment that every repeat has to reach.
        exhaustive: Up to so many fleets all are run.
    """

    def __init__(
        self,
        attempt: Callable[[Sides, bool], Trial],
        *,
        cards: tuple[Sequence[Cards], Sequence[Cards]],
        target: float,
        exhaustive: int = EXHAUSTIVE,
    ) -> None:
        self._attempt = attempt
        self._phases = cards
        self._cards = [*cards[0], *cards[1]]
        self._target = target
        self._exhaustive = exhaustive

    def find(self) -> Trial:
        """The best, on all repeats; the nearest miss if none keeps the target."""
        if prod(len(kind.sides) for kind in self._cards) <= self._exhaustive:
            every = filter(self._serves, product(*(kind.sides for kind in self._cards)))
            return min((self._attempt(fleet, True) for fleet in every), key=self._cost)
        ends = [self._descend(start) for start in self._starts()]
        return self._attempt(min(ends, key=lambda f: self._cost(self._attempt(f, True))), True)

    def _cost(self, trial: Trial) -> tuple[bool, float]:
        keeps = trial.keeps(self._target)
        return not keeps, trial.energy_j if keeps else -trial.rank

    def _serves(self, fleet: Sides) -> bool:
        """Whether an instance of each phase is in use."""
        split = len(self._phases[0])
        return all(any(side.active for side in part) for part in (fleet[:split], fleet[split:]))

    def _starts(self) -> Iterator[Sides]:
        def at(kind: Cards, clock_mhz: int) -> Side:
            return Side(kind.counts[-1], clock_mhz)

        yield tuple(at(kind, kind.clocks_mhz[-1]) for kind in self._cards)
        yield tuple(at(kind, kind.clocks_mhz[len(kind.clocks_mhz) // 2]) for kind in self._cards)
        for ahead in product(*(range(len(kinds)) for kinds in self._phases)):
            yield tuple(
                at(kind, kind.clocks_mhz[-1])
                if i == first
                else kind.unused
                if 0 in kind.counts
                else at(kind, kind.clocks_mhz[0])
                for first, kinds in zip(ahead, self._phases, strict=True)
                for i, kind in enumerate(kinds)
            )

    def _descend(self, fleet: Sides) -> Sides:
        before: Sides | None = None
        while fleet != before:
            before = fleet
            for i in range(len(fleet)):
                fleet = self._search_line(fleet, i)
            if fleet == before:
                fleet = self._move_pairs(fleet)
        return fleet

    def _search_line(self, fleet: Sides, i: int) -> Sides:
        """Along one kind's numbers and clocks."""
        kind = self._cards[i]
        knots = {*kind.knots_mhz, kind.clocks_mhz[0], kind.clocks_mhz[-1]}
        rough = [side for side in kind.sides if not side.active or side.clock_mhz in knots]
        fleet = self._best_of(fleet, [_with(fleet, i, side) for side in rough])
        for step in _STEPS:
            near = kind.near(fleet[i], step)
            fleet = self._best_of(fleet, [_with(fleet, i, side) for side in near])
        return fleet

    def _move_pairs(self, fleet: Sides) -> Sides:
        """Two clocks at a time, by some steps each."""
        for step, (i, j) in product(_PAIR_STEPS, combinations(range(len(fleet)), 2)):
            moves = product(*(self._cards[k].near(fleet[k], step) for k in (i, j)))
            found = self._best_of(fleet, [_with(_with(fleet, i, a), j, b) for a, b in moves])
            if found != fleet:
                return found
        return fleet

    def _first_cost(self, fleet: Sides) -> tuple[bool, float]:
        return self._cost(self._attempt(fleet, False))

    def _best_of(self, fleet: Sides, others: Sequence[Sides]) -> Sides:
        """The first, by cost on the first repeat, that costs less than the fleet on all of them."""
        here, least = self._first_cost(fleet), self._cost(self._attempt(fleet, True))
        misses = least[0]
        order = sorted((self._first_cost(f), f) for f in others if f != fleet and self._serves(f))
        for first, other in order:
            if first >= here and not misses:
                break
            cost = self._cost(self._attempt(other, True))
            if cost < least:
                fleet, least = other, cost
                if not cost[0]:
                    break
        return fleet


def _with(fleet: Sides, i: int, side: Side) -> Sides:
    return (*fleet[:i], side, *fleet[i + 1 :])
