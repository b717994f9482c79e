"""The advice: what was chosen, judged on requests that the search has not seen.

What was chosen is judged at the asked load on all judging repeats, and on one or two of them at
other loads; the draws from the profile's errors play them in turn. What breaks its
promise when it is judged is chosen again with those repeats among those of the choice, and judged
on new ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from voltana.experiments.compare.draws import Drawn, Run, compare_drawn
from voltana.experiments.frontier.static.like import Side, counts_name
from voltana.experiments.recommend.advice import (
    CAPS,
    DYNAMIC,
    FIXED,
    NOW,
    Advice,
    Judged,
    Knee,
)
from voltana.experiments.recommend.choose.desk import Desk, Means
from voltana.experiments.recommend.choose.dynamic import DynamicChoice, find_dynamic
from voltana.experiments.recommend.choose.fixed import (
    FixedChoice,
    FixedSearch,
    allows,
    fleet_of,
    highest_allowed,
)
from voltana.experiments.recommend.question import Question, Repeats, duration_s
from voltana.profiles.common.errors import VoltanaError

AT_LOAD: Final = {0.8: 2, 1.0: None, 1.2: 2, 1.5: 1}
"""Times the asked load: judging repeats that are played there; None: all."""
DRAWN: Final = 0.6
"""Part of a judging repeat that is played on each draw from the profile's errors."""
_KNEE_STEPS: Final = 4
"""Moves of both clocks, down and up, of the knee's curve."""


def advise(desk: Desk) -> Advice:
    """Search, judge, and choose again where the choice fell.

    Raises:
        VoltanaError: Not one run of the advice ended.
    """
    question = desk.question
    question.profile.truth()  # before processes are forked, each of which would build it
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
    caps = search.in_caps(fixed) if desk.question.is_capped else None
    dynamic = find_dynamic(desk, tuning, fixed.counts)
    ways, knee = _judge(desk, [
        _plan_now(desk.question, fixed), _plan_set_once(FIXED, fixed),
        *([] if caps is None else [_plan_set_once(CAPS, caps)]),
        *([] if dynamic is None else [_plan_dynamic(dynamic)]),
    ], judging), _knee(desk, search, fixed)  # fmt: skip
    advice = Advice(
        question=desk.question, now=ways[NOW], fixed=ways[FIXED], caps=ways.get(CAPS),
        dynamic=ways.get(DYNAMIC), knee=knee, fixed_choice=fixed, caps_choice=caps,
        dynamic_choice=dynamic, rounds=rounds,
    )  # fmt: skip
    chosen = ((fixed, advice.fixed), (caps, advice.caps), (dynamic, advice.dynamic))
    fell = any(
        choice.trial.keeps(strict) and not advice.keeps(way)
        for choice, way in chosen
        if choice is not None and way is not None
    )
    return advice, fell


def _judge(
    desk: Desk, plans: Sequence[Mapping[str, Any]], judging: Repeats
) -> Mapping[str, Judged]:
    """Each way by its name, played on the judging repeats and at the other loads."""
    question = desk.question
    loads = [(factor, judging[:count]) for factor, count in AT_LOAD.items()]
    desk.ahead(
        (plan["settings"] | question.at_load(factor), repeats)
        for plan in plans
        for factor, repeats in loads
    )
    ways = {}
    for plan in plans:
        at_load = {
            factor: desk.trial(
                plan["settings"] | question.at_load(factor), plan["setting"], repeats
            )
            for factor, repeats in loads
        }
        ways[plan["name"]] = Judged(**plan, at_load=at_load)
        if plan["name"] != NOW and at_load[1.0].error:
            raise VoltanaError(at_load[1.0].error)
    return ways


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
        "name": NOW, "settings": Means(router).settings(question, fleet), "counts": counts,
        "router": router,
        "setting": f"{counts_name(*counts)} at {fleet[0].clock_mhz} MHz",
    }  # fmt: skip


def _plan_set_once(name: str, choice: FixedChoice) -> dict[str, Any]:
    return {
        "name": name, "settings": dict(choice.trial.settings), "counts": choice.counts,
        "router": choice.means.router, "setting": f"{choice.trial.label}, {choice.means.router}",
    }  # fmt: skip


def _plan_dynamic(dynamic: DynamicChoice) -> dict[str, Any]:
    knob = "" if dynamic.knob == "default" else f", {dynamic.knob}"
    return {
        "name": DYNAMIC, "settings": dict(dynamic.trial.settings), "counts": dynamic.counts,
        "router": dynamic.contender.router,
        "setting": f"{counts_name(*dynamic.counts)}, {dynamic.name}{knob}",
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
        means = fixed.means if fleet == fixed.fleet else Means(question.routers[0])
        trial = search.attempt(means, fleet, on_all=False)
        if trial.keeps(question.target):
            by_gpus.append((instances * width, trial.energies_j[0], trial.label))
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
    desk.ahead((fixed.means.settings(desk.question, f), first) for f in allowed)
    for fleet in allowed:
        search.attempt(fixed.means, fleet, on_all=False)
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
        ({"profile_draw": k}, [{**repeat, "duration_s": DRAWN * duration_s(question)}])
        for k in range(1, question.draws + 1)
        for repeat in [judging[(k - 1) % len(judging)]]
    ]
    # all ways of a draw one after the other: a process holds few drawn profiles
    desk.ahead(
        ({**way.settings, **more}, repeats) for more, repeats in plays for way in advice.ways
    )
    ways: dict[str, Judged] = {}
    for way in advice.ways:
        trials = [desk.trial({**way.settings, **m}, way.setting, r) for m, r in plays]
        failed = next((t.error for t in trials if t.error), "")
        if failed:
            raise VoltanaError(failed)
        ways[way.name] = replace(way, drawn=trials)
    advice = replace(
        advice, now=ways[NOW], fixed=ways[FIXED], caps=ways.get(CAPS), dynamic=ways.get(DYNAMIC)
    )
    pairs = [(way, advice.still if way.name == DYNAMIC else advice.now) for way in advice.ways[1:]]
    return replace(advice, drawn={way.name: _compared(advice, way, o) for way, o in pairs})


def _compared(advice: Advice, way: Judged, other: Judged) -> Drawn:
    """One way against another on the profile as it stands and on each draw."""
    target = advice.question.target
    nominal = [Run(each.asked.energy_j, advice.keeps(each)) for each in (way, other)]
    drawn = [
        (Run(a.energy_j, a.keeps(target)), Run(b.energy_j, b.keeps(target)))
        for a, b in zip(way.drawn, other.drawn, strict=True)
    ]
    return compare_drawn((nominal[0], nominal[1]), drawn)
