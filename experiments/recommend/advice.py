"""The advice, as data: each way to run the fleet, how it did, and what follows from that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from voltana.experiments.compare.draws import UNDECIDED, Drawn
from voltana.experiments.compare.intervals import Interval, saving_pct, t_interval
from voltana.experiments.frontier.trial import Trial, pooled
from voltana.experiments.recommend.choose.desk import PHASES, fixed_cap_w, fixed_clock_mhz
from voltana.experiments.recommend.choose.dynamic import DynamicChoice
from voltana.experiments.recommend.choose.fixed import FixedChoice, highest_allowed
from voltana.experiments.recommend.question import Question

WORTH_PCT: Final = 1.0
"""Energy that dynamic control has to save beyond fixed clocks to be worth it. Ours."""
NOW, FIXED, CAPS, DYNAMIC = "top clocks", "fixed clocks", "power caps", "dynamic policy"
HOURS: Final = 24.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One way to run the fleet, and how it did."""

    name: str
    """`top clocks`, `fixed clocks`, `power caps` or `dynamic policy`."""
    setting: str
    """In words."""
    settings: Mapping[str, Any]
    """Configuration keys."""
    counts: tuple[int, int]
    router: str
    at_load: Mapping[float, Trial]
    """By times the asked load."""
    drawn: Sequence[Trial] = ()
    """On each draw from the profile's errors, each on one of the judging repeats in turn."""

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
    caps: Judged | None = None
    caps_choice: FixedChoice | None = None
    """Its clocks are those at which the profile's worst draw is the cap."""
    drawn: Mapping[str, Drawn] = field(default_factory=dict)
    """What is set once against the top clocks, `dynamic policy` against the better of that."""
    rounds: int = 1
    """How often was chosen."""

    @property
    def ways(self) -> list[Judged]:
        """Every way that was judged."""
        found = (self.now, self.fixed, self.caps, self.dynamic)
        return [w for w in found if w is not None]

    @property
    def still(self) -> Judged:
        """The better of what is set once: fixed clocks, or power caps if those save for sure."""
        caps = self.caps
        if caps is None or not self.keeps(caps):
            return self.fixed
        if not self.keeps(self.fixed):
            return caps
        saved = self.saving(caps, self.fixed)
        return caps if saved.mean > saved.half else self.fixed

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
        if not self.keeps(self.still):
            return "yes"
        saved = self.saving(self.dynamic, self.still)
        half = 0.0 if saved.half != saved.half else saved.half
        if saved.mean - half <= WORTH_PCT:
            return "no" if saved.mean + half <= WORTH_PCT or saved.mean <= 0.0 else UNDECIDED
        told = self.drawn.get(DYNAMIC)
        return UNDECIDED if told is not None and told.verdict == UNDECIDED else "yes"

    @property
    def best(self) -> Judged:
        """What is advised: the dynamic policy where it is worth it, else what is set once."""
        return (
            self.dynamic if self.dynamic is not None and self.is_worth_it == "yes" else self.still
        )


def top_clock_mhz(advice: Advice, way: Judged) -> int:
    """The highest clock that a way may choose: that of the profile, or what the watts allow."""
    fleet = highest_allowed(advice.question, way.counts)
    return advice.question.clocks_mhz[-1] if fleet is None else fleet[0].clock_mhz


def peak_w(advice: Advice, way: Judged) -> float:
    """The most that a way may draw at once, in W: at its clocks, its caps or its highest clock."""
    question = advice.question
    total_w = 0.0
    for phase, count in zip(PHASES, way.counts, strict=True):
        clock_mhz = fixed_clock_mhz(way.settings, phase) or top_clock_mhz(advice, way)
        each_w = fixed_cap_w(way.settings, phase) or question.peak_w(phase, clock_mhz)
        total_w += count * each_w
    return total_w
