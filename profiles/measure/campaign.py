"""A whole profiling run: clocks outside, points inside, within a time budget, resumable."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from profiles.device.gpu import Gpu
from profiles.device.lock import ClockSession
from profiles.engines.base import (
    Engine,
    EngineCrashError,
    NotHeldError,
    OutOfMemoryError,
    Phase,
    Point,
)
from profiles.errors import VoltanaError
from profiles.measure.grid import design, next_refinement
from profiles.measure.journal import Journal
from profiles.measure.trial import Protocol, measure_idle_w, measure_point

MIN_POINTS: Final = 4
"""Of a phase and clock, whatever the budget: the corners of the grid."""

Progress = Callable[[int, int, str], None]
"""(finished, planned, what comes next) after every point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure, and how long that may take."""

    clocks_mhz: tuple[int, ...] | None
    """Clocks to lock in turn; None leaves the clock alone (one clock, whatever it is)."""
    phases: tuple[Phase, ...]
    budget_s: float
    max_batch_size: int
    max_tokens: int
    protocol: Protocol


def measure_bare_idle(gpus: Sequence[Gpu], plan: Plan, session: ClockSession, log: Journal) -> None:
    """Idle power before the model is loaded; call before entering the engine."""
    for clock_mhz in _clocks(gpus, plan):
        if (clock_mhz, False) not in log.idle_w:
            _lock(session, plan, clock_mhz)
            power_w = measure_idle_w(gpus, plan.protocol)
            log.add_idle(clock_mhz, is_loaded=False, power_w=power_w)
    session.unlock()
    if (0, False) not in log.idle_w:
        log.add_idle(0, is_loaded=False, power_w=measure_idle_w(gpus, plan.protocol))


@dataclass(slots=True)
class Campaign:
    """Runs the plan; every result is in the journal as soon as it exists."""

    engine: Engine
    gpus: Sequence[Gpu]
    plan: Plan
    session: ClockSession
    log: Journal
    progress: Progress
    _start_ns: int = field(default_factory=time.monotonic_ns)

    def run(self) -> None:
        """Idle power, the designed grid of each clock, then refinement while time is left."""
        points = [point for phase in self.plan.phases for point in self._design(phase)]
        clocks_mhz = _clocks(self.gpus, self.plan)
        self._idle(clocks_mhz)
        planned = len(points) * len(clocks_mhz)
        for number, clock_mhz in enumerate(clocks_mhz):
            share = (number + 1) / len(clocks_mhz)
            self._at_clock(clock_mhz, points, planned, share * self.plan.budget_s)

    def _design(self, phase: Phase) -> list[Point]:
        return design(
            self.engine.facts,
            phase,
            max_batch_size=self.plan.max_batch_size,
            max_tokens=self.plan.max_tokens,
        )

    def _idle(self, clocks_mhz: Sequence[int]) -> None:
        for clock_mhz in clocks_mhz:
            if (clock_mhz, True) not in self.log.idle_w:
                _lock(self.session, self.plan, clock_mhz)
                power_w = measure_idle_w(self.gpus, self.plan.protocol)
                self.log.add_idle(clock_mhz, is_loaded=True, power_w=power_w)
        self.session.unlock()
        if (0, True) not in self.log.idle_w:
            power_w = measure_idle_w(self.gpus, self.plan.protocol)
            self.log.add_idle(0, is_loaded=True, power_w=power_w)

    def _at_clock(
        self, clock_mhz: int, points: Sequence[Point], planned: int, deadline_s: float
    ) -> None:
        _lock(self.session, self.plan, clock_mhz)
        always = MIN_POINTS * len(self.plan.phases)  # the ends of the grid, whatever the budget
        for number, point in enumerate(self._interleaved(points)):
            if number >= always and self._elapsed_s() > deadline_s:
                return
            self._measure(clock_mhz, point, planned, deadline_s)
        while self._elapsed_s() < deadline_s:
            refined = self._next_refinement(clock_mhz)
            if refined is None:
                return
            self._measure(clock_mhz, refined, planned, deadline_s)

    def _measure(self, clock_mhz: int, point: Point, planned: int, deadline_s: float) -> None:
        label = f"{clock_mhz} MHz {point.phase} batch {point.batch_size} tokens {point.tokens}"
        done = len(self.log.points) + len(self.log.failures)
        self.progress(done, max(planned, done + 1), label)
        if self.log.is_done(clock_mhz, point):
            return
        try:
            trials = measure_point(
                self.engine,
                self.gpus,
                point,
                self.plan.protocol,
                deadline_s=self._start_ns * 1e-9 + deadline_s,
            )
        except (OutOfMemoryError, NotHeldError, EngineCrashError) as error:
            self.log.add_failure(clock_mhz, point, str(error))
        else:
            self.log.add_point(clock_mhz, point, trials)

    def _interleaved(self, points: Sequence[Point]) -> list[Point]:
        """Phases in turn, so that a short budget covers both."""
        by_phase = [[p for p in points if p.phase == phase] for phase in self.plan.phases]
        longest = max(map(len, by_phase))
        return [row[i] for i in range(longest) for row in by_phase if i < len(row)]

    def _next_refinement(self, clock_mhz: int) -> Point | None:
        time_s = {
            point: statistics.median(trial.time_s for trial in trials)
            for (clock, point), trials in self.log.points.items()
            if clock == clock_mhz
        }
        failed = frozenset(point for clock, point in self.log.failures if clock == clock_mhz)
        return next_refinement(time_s, failed)

    def _elapsed_s(self) -> float:
        return (time.monotonic_ns() - self._start_ns) * 1e-9


def _clocks(gpus: Sequence[Gpu], plan: Plan) -> tuple[int, ...]:
    """The planned clocks, or 0 for "the one clock, left alone"."""
    if plan.clocks_mhz is None:
        return (0,)
    for clock_mhz in plan.clocks_mhz:
        known_mhz = gpus[0].supported_clocks_mhz()
        if clock_mhz not in known_mhz:
            raise VoltanaError(
                f"--frequencies must be clocks the card supports ({known_mhz[0]}..{known_mhz[-1]} "
                f"MHz in its steps), got {clock_mhz}: see nvidia-smi -q -d SUPPORTED_CLOCKS"
            )
    return plan.clocks_mhz


def _lock(session: ClockSession, plan: Plan, clock_mhz: int) -> None:
    if plan.clocks_mhz is not None:
        session.lock(clock_mhz)
