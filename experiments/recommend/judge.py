"""The advice: what was chosen, judged on requests that the search has not seen.

Fixed clocks and the dynamic policy are judged at the asked load on all judging repeats, and on two
of them at other loads; the draws from the profile's errors play them in turn. What breaks its
promise when it is judged is chosen again with those repeats among those of the choice, and judged
on new ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from voltana.experiments.compare.draws import UNDECIDED, Drawn, Run, compare_drawn
from voltana.experiments.compare.intervals import Interval, saving_pct, t_interval
from voltana.experiments.frontier.fixed import Side
from voltana.experiments.frontier.trial import Trial, pooled
from voltana.experiments.recommend.desk import Desk, fleet_at, fleet_settings
from voltana.experiments.recommend.dynamic_choice import DynamicChoice, find_dynamic
from voltana.experiments.recommend.fixed_choice import (
    FixedChoice,
    FixedSearch,
    allows,
    fleet_of,
    fleet_peak_w,
    highest_allowed,
    label_of,
)
from voltana.experiments.recommend.question import LOADS, Question, Repeats
from voltana.profiles.common.errors import VoltanaError

AT_OTHER_LOADS: Final = 2
"""Judging repeats at loads other than the asked one."""
_KNEE_STEPS: Final = 6
"""Moves of both clocks, down and up, of the knee's curve."""
WORTH_PCT: Final = 1.0
"""Energy that dynamic control has to save beyond fixed clocks to be worth it. Ours."""
NOW, FIXED, DYNAMIC = "top clocks", "fixed clocks", "dynamic policy"
HOURS: Final = 24.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One way to run the fleet, and how it did."""

    name: str
    """`top clocks`, `fixed clocks` or `dynamic policy`."""
    setting: str
    """In words."""
    settings: Mapping[str, Any]
    """Configuration keys."""
    counts: tuple[int, int]
    router: str
    at_load: Mapping[float, Trial]
    """By times the asked load."""
    drawn: Sequence[Run] = ()
    """On each draw."""

    @property
    def asked(self) -> Trial:
        """At the asked load."""
        return self.at_load[1.0]

    def attainment(self, factor: float = 1.0) -> float:
        """Of all requests of the repeats at that load together; NaN if a run failed."""
        trial = self.at_load[factor]
        return float("nan") if trial.error else pooled(trial.rows, "attainment")

    @property
    def mean_w(self) -> float:
        """Energy over the time that the runs took, in W."""
        rows = self.asked.rows
        return float(rows["energy_j"].sum() / rows["makespan_s"].sum())

    @property
    def joules_per_request(self) -> Interval:
        """With its interval over the repeats."""
        return t_interval(list(self.asked.rows["energy_per_request_j"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Knee:
    """What a promise, or a number of GPUs, costs: fixed clocks on the first tuning repeat."""

    attainments: Sequence[tuple[float, float]]
    """Attainment and energy (J) of every fixed setting that was tried and is allowed."""
    by_gpus: Sequence[tuple[int, float, str]]
    """GPUs, energy (J), setting: the best found that keeps the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """All that is told."""

    question: Question
    now: Judged
    fixed: Judged
    dynamic: Judged | None
    knee: Knee
    fixed_choice: FixedChoice
    dynamic_choice: DynamicChoice | None
    drawn: Mapping[str, Drawn] = field(default_factory=dict)
    """`fixed clocks` against the top clocks, `dynamic policy` against fixed clocks."""
    rounds: int = 1
    """How often was chosen."""

    @property
    def ways(self) -> list[Judged]:
        """Every way that was judged."""
        return [w for w in (self.now, self.fixed, self.dynamic) if w is not None]

    def keeps(self, way: Judged, factor: float = 1.0) -> bool:
        """Whether it keeps the target at that load, all requests of the repeats together."""
        return way.attainment(factor) >= self.question.target

    def saving(self, way: Judged, other: Judged, factor: float = 1.0) -> Interval:
        """Energy that one way saves against another, in %, paired over the repeats.

        Args:
            way: What is asked about.
            other: What it is compared with.
            factor: Load at which both were judged, over the asked one.
        """
        mine, theirs = way.at_load[factor], other.at_load[factor]
        return saving_pct(mine.energies_j, theirs.energies_j)

    def kwh_a_day(self, way: Judged) -> float:
        """Of all GPUs that it uses; savings against the top clocks as energies have them."""
        base = self.now.mean_w * HOURS / 1e3
        return base * (1.0 - self.saving(way, self.now).mean / 100.0)

    @property
    def is_worth_it(self) -> str:
        """`yes`, `no` or `undecided`: is dynamic control worth it beyond fixed clocks?"""
        if self.dynamic is None or not self.keeps(self.dynamic):
            return "no"
        if not self.keeps(self.fixed):
            return "yes"
        saved = self.saving(self.dynamic, self.fixed)
        half = 0.0 if saved.half != saved.half else saved.half
        if saved.mean - half <= WORTH_PCT:
            return "no" if saved.mean + half <= WORTH_PCT or saved.mean <= 0.0 else UNDECIDED
        told = self.drawn.get(DYNAMIC)
        return UNDECIDED if told is not None and told.verdict == UNDECIDED else "yes"

    @property
    def best(self) -> Judged:
        """What is advised: the dynamic policy where it is worth it, else the fixed clocks."""
        return (
            self.dynamic if self.dynamic is not None and self.is_worth_it == "yes" else self.fixed
        )


def advise(desk: Desk) -> Advice:
    """Search, judge, and choose again where the choice fell.

    Raises:
        VoltanaError: Not one run of the advice ended.
    """
    question = desk.question
    tuning: Repeats = question.tuning
    judging: Repeats = question.judging
    rounds = 1
    advice, fell = _round(desk, tuning, judging, rounds)
    for fresh in question.reserves:
        if not fell:
            break
        rounds += 1
        tuning, judging = [*tuning, *judging], fresh
        advice, fell = _round(desk, tuning, judging, rounds)
    return _with_draws(desk, advice, judging)


def _round(desk: Desk, tuning: Repeats, judging: Repeats, rounds: int) -> tuple[Advice, bool]:
    """Choose on some repeats, judge on others; and whether a choice that kept to its rule fell."""
    strict = desk.question.choice_target
    search = FixedSearch(desk, tuning)
    fixed = search.find()
    dynamic = find_dynamic(desk, tuning, fixed.counts)
    advice = _judge(desk, search, fixed, dynamic, judging, rounds)
    fell = fixed.trial.keeps(strict) and not advice.keeps(advice.fixed)
    if dynamic is not None and advice.dynamic is not None:
        fell |= dynamic.trial.keeps(strict) and not advice.keeps(advice.dynamic)
    return advice, fell


def _judge(
    desk: Desk, search: FixedSearch, fixed: FixedChoice, dynamic: DynamicChoice | None,
    judging: Repeats, rounds: int,
) -> Advice:  # fmt: skip
    question = desk.question
    plans = [_plan_now(question, fixed), _plan_fixed(fixed)]
    plans += [_plan_dynamic(dynamic)] if dynamic is not None else []
    loads = [(factor, judging if factor == 1.0 else judging[:AT_OTHER_LOADS]) for factor in LOADS]
    desk.ahead(
        (plan["settings"] | question.at_load(factor), repeats)
        for plan in plans
        for factor, repeats in loads
    )
    ways = [
        Judged(
            **plan,
            at_load={
                factor: desk.trial(
                    plan["settings"] | question.at_load(factor), plan["setting"], repeats
                )
                for factor, repeats in loads
            },
        )
        for plan in plans
    ]
    for way in ways[1:]:
        if way.asked.error:
            raise VoltanaError(way.asked.error)
    return Advice(
        question=question, now=ways[0], fixed=ways[1],
        dynamic=ways[2] if len(ways) > 2 else None, knee=_knee(desk, search, fixed),
        fixed_choice=fixed, dynamic_choice=dynamic, rounds=rounds,
    )  # fmt: skip


def _plan_now(question: Question, fixed: FixedChoice) -> dict[str, Any]:
    """All GPUs at the highest clock, split as the fixed clocks split theirs."""
    share = fixed.counts[0] / sum(fixed.counts)
    prefill = min(max(round(share * question.instances), 1), question.instances - 1)
    counts = (prefill, question.instances - prefill)
    fleet = highest_allowed(question, counts)
    if fleet is None:  # not even at the lowest clock: as many as the advice uses
        counts, fleet = fixed.counts, fixed.fleet
    router = question.routers[0]
    return {
        "name": NOW, "settings": fleet_settings(fleet, router), "counts": counts, "router": router,
        "setting": f"{counts[0]}P{counts[1]}D at {fleet[0].clock_mhz} MHz",
    }  # fmt: skip


def _plan_fixed(fixed: FixedChoice) -> dict[str, Any]:
    return {
        "name": FIXED, "settings": fleet_settings(fixed.fleet, fixed.router),
        "counts": fixed.counts, "router": fixed.router,
        "setting": f"{label_of(fixed.fleet)}, {fixed.router}",
    }  # fmt: skip


def _plan_dynamic(dynamic: DynamicChoice) -> dict[str, Any]:
    p, d = dynamic.counts
    knob = "" if dynamic.knob == "default" else f", {dynamic.knob}"
    return {
        "name": DYNAMIC, "settings": dict(dynamic.trial.settings), "counts": dynamic.counts,
        "router": dynamic.contender.router, "setting": f"{p}P{d}D, {dynamic.name}{knob}",
    }  # fmt: skip


def _knee(desk: Desk, search: FixedSearch, fixed: FixedChoice) -> Knee:
    """Of what the search has tried, and of one fleet more a number of GPUs."""
    question = desk.question
    width = question.tensor_parallel
    by_gpus = []
    for instances in range(2, question.instances + 1):
        fleet = next(search.fleets_of(instances), None)
        if instances == sum(fixed.counts):
            fleet = fixed.fleet
        if fleet is None:
            continue
        router = fixed.router if fleet == fixed.fleet else question.routers[0]
        trial = search.attempt(router, fleet, on_all=False)
        if trial.keeps(question.target):
            by_gpus.append((instances * width, trial.energies_j[0], label_of(fleet)))
    return Knee(attainments=_attainments(desk, search, fixed), by_gpus=by_gpus)


def _attainments(desk: Desk, search: FixedSearch, fixed: FixedChoice) -> list[tuple[float, float]]:
    """The chosen fleet with both clocks moved together: what more or less of a promise costs."""
    clocks = desk.question.clocks_mhz
    at = [clocks.index(side.clock_mhz) for side in fixed.fleet]
    step = max(1, len(clocks) // 24)
    fleets = []
    for move in range(-_KNEE_STEPS, _KNEE_STEPS + 1):
        near = [min(max(i + move * step, 0), len(clocks) - 1) for i in at]
        sides = [Side(side.active, clocks[i]) for side, i in zip(fixed.fleet, near, strict=True)]
        fleets.append((sides[0], sides[1]))
    allowed = [f for f in dict.fromkeys(fleets) if allows(desk.question, f)]
    first = desk.question.tuning[:1]
    desk.ahead((fleet_settings(f, fixed.router), first) for f in allowed)
    for fleet in allowed:
        search.attempt(fixed.router, fleet, on_all=False)
    fleets_tried = ((t, fleet_of(t)) for t in desk.screened)
    return [
        (t.worst_attainment, t.energies_j[0])
        for t, fleet in fleets_tried
        if fleet is not None and allows(desk.question, fleet)
    ]


def _with_draws(desk: Desk, advice: Advice, judging: Repeats) -> Advice:
    question = desk.question
    if not question.draws:
        return advice
    plays = [
        ({"profile_draw": k}, [judging[(k - 1) % len(judging)]])
        for k in range(1, question.draws + 1)
    ]
    desk.ahead(
        ({**way.settings, **more}, repeats) for way in advice.ways for more, repeats in plays
    )
    runs: dict[str, list[Run]] = {}
    for way in advice.ways:
        trials = [desk.trial({**way.settings, **m}, way.setting, r) for m, r in plays]
        failed = next((t.error for t in trials if t.error), "")
        if failed:
            raise VoltanaError(failed)
        runs[way.name] = [Run(t.energy_j, t.keeps(question.target)) for t in trials]
    found = {}
    for mine, other in ((FIXED, NOW), (DYNAMIC, FIXED)):
        if mine in runs:
            ways = {w.name: w for w in advice.ways}
            nominal = [Run(ways[n].asked.energy_j, advice.keeps(ways[n])) for n in (mine, other)]
            drawn = list(zip(runs[mine], runs[other], strict=True))
            found[mine] = compare_drawn((nominal[0], nominal[1]), drawn)
    return replace(advice, drawn=found)


def peak_w(advice: Advice, way: Judged) -> float:
    """The most that a way may draw at once, in W: fixed clocks at theirs, a policy at the top."""
    question = advice.question
    if way is advice.fixed:
        return fleet_peak_w(question, advice.fixed_choice.fleet)
    return fleet_peak_w(question, fleet_at(way.counts, question.clocks_mhz[-1]))
