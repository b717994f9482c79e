"""The best dynamic policy: many on one repeat, few on all, one with its knob turned.

Candidates are the policies at their defaults on the fleet of the best fixed clocks and on fleets of
one instance more of a phase. All are run on the first tuning repeat, the better ones on the others
(successive halving), and the knob of the best is searched as `frontier` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from voltana.experiments.frontier.contenders import Contender
from voltana.experiments.frontier.knob import COARSE, search_knob
from voltana.experiments.frontier.trial import Trial
from voltana.experiments.recommend.choose.desk import Desk, fleet_at
from voltana.experiments.recommend.choose.fixed import fleet_peak_w
from voltana.experiments.recommend.question import Question, Repeats
from voltana.sim.policies.spec import parse_spec

KEPT_ON: Final = 3
"""Candidates that go on from the first repeat to all."""
TURNED: Final = 1
"""Of those, how many have their knob searched."""
LEVELS: Final = 8
"""Clocks of a policy whose highest one a watt budget limits."""
_BY_LIST: Final = ("ecomin", "ecofreq")
"""Controllers that take the clocks they may choose as a list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicChoice:
    """A policy on a fleet."""

    contender: Contender
    counts: tuple[int, int]
    knob: str
    """Its value, or `default`."""
    trial: Trial
    """On the tuning repeats."""

    @property
    def name(self) -> str:
        """Controller and router."""
        return f"{self.contender.controller} + {self.contender.router}"


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    contender: Contender
    counts: tuple[int, int]
    limits: Mapping[str, str]
    """The controller with the clocks that the watts allow; empty if there is no limit."""

    def settings(self, position: float | None = None) -> dict[str, Any]:
        """Configuration keys, with the knob at its default or that far."""
        own = self.contender.plain if position is None else self.contender.at(position)
        found = {**own, "num_prefill": self.counts[0], "num_decode": self.counts[1]}
        for key, more in self.limits.items():
            text = str(found[key])
            found[key] = f"{text}{',' if ':' in text else ':'}{more}"
        return found


def find_dynamic(desk: Desk, repeats: Repeats, around: tuple[int, int]) -> DynamicChoice | None:
    """The dynamic policy of least energy that keeps the target; the nearest miss if none does.

    Args:
        desk: Where runs are made.
        repeats: On which is chosen.
        around: Prefill and decode instances of the best fixed clocks.

    Returns:
        It; None if no dynamic policy takes part.
    """
    target = desk.question.choice_target
    candidates = _candidates(desk.question, around)
    if not candidates:
        return None
    desk.ahead((c.settings(), repeats[:1]) for c in candidates)
    first = {c: desk.first(c.settings(), "default", repeats) for c in candidates}
    kept = _best(first, target, KEPT_ON)
    desk.ahead((c.settings(), repeats) for c in kept)
    whole = {c: desk.whole(c.settings(), "default", repeats) for c in kept}
    found = [
        DynamicChoice(contender=c.contender, counts=c.counts, knob="default", trial=t)
        for c, t in whole.items()
    ]
    found += [
        _turned(desk, candidate, repeats, target)
        for candidate in _best(whole, target, TURNED)
        if candidate.contender.knob
    ]
    keeping = [f for f in found if f.trial.keeps(target)]
    if keeping:
        return min(keeping, key=lambda f: f.trial.energy_j)
    return max(found, key=lambda f: f.trial.rank)


def _turned(desk: Desk, candidate: _Candidate, repeats: Repeats, target: float) -> DynamicChoice:
    contender = candidate.contender

    def attempt(position: float, on_all: bool) -> Trial:
        label = f"{contender.knob} {contender.value_text(position)}"
        settings = candidate.settings(position)
        if not on_all:
            return desk.first(settings, label, repeats)
        return desk.whole(settings, label, repeats)

    coarse = [i / (COARSE - 1) for i in range(COARSE)]
    desk.ahead((candidate.settings(p), repeats[:1]) for p in coarse)
    trial = search_knob(attempt, target)
    return DynamicChoice(
        contender=contender, counts=candidate.counts, knob=trial.label, trial=trial
    )


def _candidates(question: Question, around: tuple[int, int]) -> list[_Candidate]:
    moves = ((0, 0), (1, 0), (0, 1))
    counts = [(around[0] + p, around[1] + d) for p, d in moves]
    usable = [c for c in counts if min(c) >= 1 and sum(c) <= question.instances]
    return [
        _Candidate(contender, each, limits)
        for contender in question.contenders
        for each in usable
        if (limits := _limits(question, contender, each)) is not None
    ]


def _limits(
    question: Question, contender: Contender, counts: tuple[int, int]
) -> dict[str, str] | None:
    """What keeps a policy within the watts; None if nothing does."""
    if question.watts is None:
        return {}
    allowed = [
        clock_mhz for clock_mhz in question.clocks_mhz
        if fleet_peak_w(question, fleet_at(counts, clock_mhz)) <= question.watts
    ]  # fmt: skip
    if question.clocks_mhz[-1] in allowed:
        return {}
    spec = parse_spec(contender.settings["controller"])
    if spec.name not in _BY_LIST or "frequencies" in spec.arguments:
        return None
    if not allowed:
        return None
    steps = sorted({round(i * (len(allowed) - 1) / (LEVELS - 1)) for i in range(LEVELS)})
    return {"controller": "frequencies=" + "+".join(str(allowed[i]) for i in steps)}


def _best(trials: Mapping[_Candidate, Trial], target: float, count: int) -> Sequence[_Candidate]:
    """Those that keep the target by their energy, then the nearest misses."""

    def order(candidate: _Candidate) -> tuple[bool, float]:
        trial = trials[candidate]
        keeps = trial.keeps(target)
        return not keeps, trial.energy_j if keeps else -trial.rank

    return sorted(trials, key=order)[:count]
