"""The best static fleet: n of N prefill and m of M decode instances in use, one clock a phase.

A phase's instances run on like cards; the two phases may have cards of two kinds. There are
thousands of static fleets (48 clocks a phase, 25 numbers of instances), and what one costs is
nearly a sum: of what its prefill side (n and a clock) costs and what its decode side costs, as
they share nothing but the requests that pass from one to the other. So each side is searched alone
first, the other side at the anchor (all instances, the top clock), on the first repeat:

- Fewer instances before more, until one more costs more again: a busy instance draws nearly the
  same power whatever its batch.
- For each number, the clocks at which the profile has tables: downwards as far as the target is
  kept (a lower clock lengthens every iteration), upwards until energy rises; then every third and
  every single clock around the best. Energy has one valley between those clocks.

With E(a, b) = E(a, anchor) + E(anchor, b) - E(anchor, anchor), all combinations of what the two
sides have tried are ranked, and run in that order, first on the first repeat, then, while they
keep the target, on the others. What runs show of E(a, b) against its sum corrects it, and the
search ends when the next in the order, corrected as favourably as any so far and by `_SLACK` more,
costs more than the best that keeps the target on each repeat. Where a combination fails, each of
its sides is tried beside the other's top clock: what fails there fails at lower clocks, too. A
pattern search over single clocks around the best ends it. Tests hold all this against
exhaustive grids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np

from voltana.experiments.frontier.trial import Trial

_SLACK: Final = 0.002
"""Part of the energy by which a combination may be cheaper than its ranking allows for."""
_RISE: Final = 1.03
"""Energy over the least of a side that ends the way upwards."""
_HOPELESS: Final = 0.05
"""Attainment below the target by which a lower clock, or one instance fewer, is not tried."""
_STEPS: Final = (6, 3, 1)
"""Of the pattern search around the best, in supported clocks."""
_QUICK_JOINT: Final = 12
"""Combinations that a quick search tries at most, once one has kept the target."""
_TOGETHER: Final = 2
"""Combinations whose first repeat is run ahead of them."""
_FINE: Final = 32
"""Clocks from which on a quick search bisects to two steps only, not to single ones."""
_REACH: Final = 2
"""How many steps that search looks in each direction."""


def counts_name(prefill: int, decode: int) -> str:
    """How many instances serve each phase, as people write it: 2P1D."""
    return f"{prefill}P{decode}D"


@dataclass(frozen=True, slots=True, order=True)
class Side:
    """One phase of a static fleet."""

    active: int
    clock_mhz: int


Fleet = tuple[Side, Side]
"""Prefill and decode."""
Clocks = tuple[tuple[int, ...], tuple[int, ...]]
"""Those of prefill's cards and those of decode's, in MHz, ascending."""
TryFleet = Callable[[Fleet, bool], Trial]
"""Runs a fleet, on all repeats or on the first one alone."""


class FleetSearch:
    """Finds the static fleet of least energy; see the module's text.

    Args:
        attempt: Runs a fleet; with False on the first repeat alone. It remembers: asked for the
            same twice, it runs once.
        clocks_mhz: Clocks allowed.
        knots_mhz: Those that each side tries first.
        counts: For prefill and decode the numbers of active instances allowed.
        target: Attainment that every repeat has to reach.
        is_quick: Clocks are bisected instead of tried by steps, a number of instances
            whose tables' clocks cost 3 % more than another number's is not looked at further,
            of the combinations the most promising dozen is tried, and what a side fails at is
            learned from the first repeat alone.
        ahead: Runs the first repeat of some fleets side by side, so that `attempt` knows them.
    """

    def __init__(
        self,
        attempt: TryFleet,
        *,
        clocks_mhz: Clocks,
        knots_mhz: Clocks,
        counts: tuple[Sequence[int], Sequence[int]],
        target: float,
        is_quick: bool = False,
        ahead: Callable[[Sequence[Fleet]], None] | None = None,
    ) -> None:
        self._ahead = ahead
        self._is_quick = is_quick
        self._steps = _STEPS[1:] if is_quick else _STEPS
        self._most_joint = _QUICK_JOINT if is_quick else None
        self._most_rise = _RISE if is_quick else float("inf")
        self._attempt = attempt
        self._clocks = clocks_mhz
        self._knots = [
            sorted({*knots, allowed[0], allowed[-1]} & set(allowed))
            for knots, allowed in zip(knots_mhz, clocks_mhz, strict=True)
        ]
        self._counts = counts
        self._target = target
        self._tops = clocks_mhz[0][-1], clocks_mhz[1][-1]
        self._anchor: Fleet = self._at_top(counts[0][-1], counts[1][-1])
        self._origin_j = 0.0
        self._sides: tuple[dict[Side, Trial], dict[Side, Trial]] = ({}, {})
        self._best: Trial | None = None
        self._best_fleet: Fleet | None = None
        self._nearest: Trial | None = None
        self._tried: set[Fleet] = set()
        self._too_low: dict[tuple[int, int], list[int]] = {}
        """By numbers of instances: the highest clock of each phase that is known to fail."""

    def find(self) -> Trial:
        """The best, on all repeats; the nearest miss if none keeps the target."""
        self._origin_j = self._attempt(self._anchor, False).energy_j
        for phase in (0, 1):
            self._search_side(phase)
        self._search_joint()
        if self._best_fleet is not None:
            self._polish()
        if self._best is not None:
            return self._best
        anchor = self._attempt(self._anchor, True)
        missed = [t for t in (self._nearest, anchor) if t is not None]
        return max(missed, key=lambda t: t.rank)

    def explore(self, phase: int) -> None:
        """Run what `find` asks of one side (0: prefill) alone, for runs that are kept."""
        self._origin_j = self._attempt(self._anchor, False).energy_j
        self._search_side(phase)

    @property
    def tried(self) -> tuple[dict[Side, Trial], dict[Side, Trial]]:
        """What each side has tried beside the anchor, on the first repeat."""
        return self._sides

    def _at_top(self, prefill: int, decode: int) -> Fleet:
        return Side(prefill, self._tops[0]), Side(decode, self._tops[1])

    def _side_trial(self, phase: int, side: Side) -> Trial:
        fleet = (side, self._anchor[1]) if phase == 0 else (self._anchor[0], side)
        trial = self._attempt(fleet, False)
        self._sides[phase][side] = trial
        return trial

    def _search_side(self, phase: int) -> None:
        least_j = float("inf")
        for active in self._counts[phase]:
            top = self._side_trial(phase, Side(active, self._tops[phase]))
            if not top.keeps(self._target - _HOPELESS):
                continue
            best = self._search_clocks(phase, active, self._most_rise * least_j)
            if best is None:
                continue
            if best.energy_j > least_j:
                return
            least_j = best.energy_j

    def _search_clocks(self, phase: int, active: int, most_j: float) -> Trial | None:
        """Try the knots, then what lies around the best of them; the best that keeps the target.

        If the best of the knots costs more than `most_j`, it is left at them.
        """
        knots, clocks = self._knots[phase], self._clocks[phase]
        middle = len(knots) // 2 - 1 if len(knots) > 2 else 0
        found: dict[int, Trial] = {}

        def best() -> tuple[int, Trial] | None:
            kept = [(t.energy_j, c) for c, t in found.items() if t.keeps(self._target)]
            return (min(kept)[1], found[min(kept)[1]]) if kept else None

        for clock in reversed(knots[: middle + 1]):
            found[clock] = self._side_trial(phase, Side(active, clock))
            if not found[clock].keeps(self._target - _HOPELESS):
                break
        for clock in knots[middle + 1 :]:
            found[clock] = self._side_trial(phase, Side(active, clock))
            known = best()
            if known is not None and found[clock].energy_j > _RISE * known[1].energy_j:
                break
        while self._is_quick:
            known = best()
            middles = () if known is None else self._middles(phase, known[0], found)
            if known is None or known[1].energy_j > most_j or not middles:
                return None if known is None else known[1]
            for clock in middles:
                found[clock] = self._side_trial(phase, Side(active, clock))
        for step in self._steps:
            known = best()
            if known is None:
                break
            at = clocks.index(known[0])
            for near in (at - step, at + step):
                if 0 <= near < len(clocks) and clocks[near] not in found:
                    found[clocks[near]] = self._side_trial(phase, Side(active, clocks[near]))
        known = best()
        return None if known is None else known[1]

    def _middles(self, phase: int, best_mhz: int, tried: Iterable[int]) -> list[int]:
        """Between the best clock and the tried ones next to it, if they are not as near already."""
        clocks = self._clocks[phase]
        at = clocks.index(best_mhz)
        grain = 2 if len(clocks) >= _FINE else 1
        others = [clocks.index(clock) - at for clock in tried]
        below = max((o for o in others if o < 0), default=0)
        above = min((o for o in others if o > 0), default=0)
        return [clocks[at + int(o / 2)] for o in (below, above) if abs(o) > grain]

    def _search_joint(self) -> None:
        options = [
            (a_trial.energy_j + b_trial.energy_j - self._origin_j, a, b)
            for (a, a_trial), (b, b_trial) in product(*(s.items() for s in self._sides))
            if a_trial.keeps(self._target) and b_trial.keeps(self._target)
        ]
        favour = 1.0
        tried = 0
        options.sort()
        for i, (predicted_j, a, b) in enumerate(options):
            if tried == self._most_joint and self._best is not None:
                return
            if self._best is not None and (
                predicted_j * favour * (1.0 - _SLACK) > self._best.energies_j[0]
            ):
                return
            if self._is_ruled_out(a, b):
                continue
            if self._ahead is not None and tried % _TOGETHER == 0:
                self._ahead([(a, b) for _, a, b in options[i : i + _TOGETHER]])
            tried += 1
            first = self._attempt((a, b), False)
            if first.energy_j == first.energy_j:
                favour = min(favour, first.energy_j / predicted_j)
            self._confirm((a, b), first)
            if not self._attempt((a, b), first.keeps(self._target)).keeps(self._target):
                self._blame(a, b)

    def _is_ruled_out(self, a: Side, b: Side) -> bool:
        """Whether one of the two cannot keep the target: not at its clock, or at no clock.

        A lower clock lengthens every iteration, so what fails beside the other side's top clock
        fails at all that is lower.
        """
        cell = (a.active, b.active)
        if cell not in self._too_low:
            fleet = self._at_top(*cell)
            is_hopeless = not self._attempt(fleet, not self._is_quick).keeps(self._target)
            self._too_low[cell] = [*self._tops] if is_hopeless else [0, 0]
        low = self._too_low[cell]
        return a.clock_mhz <= low[0] or b.clock_mhz <= low[1]

    def _blame(self, a: Side, b: Side) -> None:
        """Learn from a pair that failed which side fails whatever the other one does."""
        top, low = self._at_top(a.active, b.active), self._too_low[a.active, b.active]
        beside = ((a, top[1]), (top[0], b))
        if self._ahead is not None:
            self._ahead(beside)
        for phase, fleet in enumerate(beside):
            if not self._attempt(fleet, not self._is_quick).keeps(self._target):
                low[phase] = max(low[phase], fleet[phase].clock_mhz)

    def _confirm(self, fleet: Fleet, first: Trial) -> bool:
        """Try it on all repeats if the first one lets it be the best; whether it now is."""
        self._tried.add(fleet)
        if not first.keeps(self._target):
            return False
        best = self._best
        if best is not None and first.energies_j[0] > (1.0 + _SLACK) * best.energies_j[0]:
            return False
        trial = self._attempt(fleet, True)
        if not trial.keeps(self._target):
            if self._nearest is None or trial.rank > self._nearest.rank:
                self._nearest = trial
            return False
        if self._best is None or trial.energy_j < self._best.energy_j:
            self._best, self._best_fleet = trial, fleet
            return True
        return False

    def _polish(self) -> None:
        """Move both clocks to where their sum is less, by fewer and fewer steps."""
        for step in self._steps:
            moved = True
            while moved:
                moved = any(map(self._try_move, self._moves(step)))

    def _moves(self, step: int) -> list[Fleet]:
        """Fleets around the best whose sum is less, the least first."""
        assert self._best_fleet is not None
        reach = range(-_REACH * step, _REACH * step + 1, step)
        here_j = self._guess_j(self._best_fleet)
        found = []
        for moves in product(reach, repeat=2):
            a, b = map(self._moved, (0, 1), self._best_fleet, moves)
            if a is not None and b is not None and (a, b) not in self._tried:
                guess_j = self._guess_j((a, b))
                if guess_j < here_j and not self._is_ruled_out(a, b):
                    found.append((guess_j, (a, b)))
        return [fleet for _, fleet in sorted(found)]

    def _try_move(self, fleet: Fleet) -> bool:
        a, b = fleet
        if self._is_ruled_out(a, b):
            return False
        first = self._attempt(fleet, False)
        is_better = self._confirm(fleet, first)
        if not self._attempt(fleet, first.keeps(self._target)).keeps(self._target):
            self._blame(a, b)
        return is_better

    def _moved(self, phase: int, side: Side, by: int) -> Side | None:
        clocks = self._clocks[phase]
        at = clocks.index(side.clock_mhz) + by
        return Side(side.active, clocks[at]) if 0 <= at < len(clocks) else None

    def _guess_j(self, fleet: Fleet) -> float:
        """The sum of both sides, each between the clocks that were tried."""
        total_j = -self._origin_j
        for tried, side in zip(self._sides, fleet, strict=True):
            points = sorted(
                (s.clock_mhz, t.energy_j)
                for s, t in tried.items()
                if s.active == side.active and t.energy_j == t.energy_j
            )
            clocks, energies = zip(*points, strict=True)
            total_j += float(np.interp(side.clock_mhz, clocks, energies))
        return total_j
