"""The least energy of a policy with a knob: screened on the first repeat, chosen on all of them.

Five positions from safe to cheap, then the middles on both sides of the best one, round after
round. Neither attainment nor energy need be monotone in the knob: all that has been tried counts.
What is cheapest on the first repeat and keeps the target there is tried on all, in the order of
its energy, until one keeps it on every repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from voltana.experiments.frontier.trial import Trial

COARSE: Final = 5
"""Positions tried first."""
ROUNDS: Final = 3
"""Further rounds: the bracket shrinks to 1/32 of the range."""
Try = Callable[[float, bool], Trial]
"""Runs a position, on all repeats or on the first one alone."""


def search_knob(attempt: Try, target: float, *, has_knob: bool = True) -> Trial:
    """The trial on all repeats that keeps the target with the least energy found.

    Args:
        attempt: Takes a position in [0, 1] (0: safe, 1: cheap) and whether all repeats are wanted.
        target: Attainment that each repeat has to reach.
        has_knob: Without one there is a single position.

    Returns:
        It, or what came closest if nothing keeps the target.
    """
    positions = [i / (COARSE - 1) for i in range(COARSE)] if has_knob else [0.0]
    screened = {p: attempt(p, False) for p in positions}
    for _ in range(ROUNDS if has_knob else 0):
        for position in _middles(screened, target):
            screened[position] = attempt(position, False)
    order = sorted(
        (p for p, t in screened.items() if t.keeps(target)), key=lambda p: screened[p].energy_j
    )
    tried: list[Trial] = []
    for position in order:
        trial = attempt(position, True)
        if trial.keeps(target):
            return trial
        tried.append(trial)
    safest = max(screened, key=lambda p: screened[p].rank)
    return max([*tried, attempt(safest, True)], key=lambda t: t.rank)


def _middles(screened: dict[float, Trial], target: float) -> list[float]:
    """Between the best position and its neighbours; the best is the nearest miss if none keeps."""
    order = sorted(screened)
    kept = [p for p in order if screened[p].keeps(target)]
    if kept:
        best = min(kept, key=lambda p: screened[p].energy_j)
    else:
        best = max(order, key=lambda p: screened[p].rank)
    at = order.index(best)
    sides = [i for i in (at - 1, at) if 0 <= i < len(order) - 1]
    return [0.5 * (order[i] + order[i + 1]) for i in sides]
