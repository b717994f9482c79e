"""A whole profiling run: clocks outside, points inside, within a time budget, resumable."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.device.gpu import ClockTimeoutError, Gpu
from voltana.profiles.device.lock import ClockSession
from voltana.profiles.engines.base import (
    Engine,
    EngineCrashError,
    NotHeldError,
    OutOfMemoryError,
    Phase,
    Point,
)
from voltana.profiles.measure.grid import design, next_refinement
from voltana.profiles.measure.journal import Journal
from voltana.profiles.measure.power import SampleGapError
from voltana.profiles.measure.progress import Progress, Standing
from voltana.profiles.measure.trial import Protocol, measure_idle_w, measure_point

MIN_POINTS: Final = 4
"""Of a phase and clock, whatever the budget: the corners of the grid."""
MAX_TRIES: Final = 3
"""Multiple of those that may fail on the way to them."""
MAX_CRASHES: Final = 2
"""Of the engine in a row: one may be the point's fault, two are the engine's."""


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


def measure_bare_idle(
    gpus: Sequence[Gpu], plan: Plan, session: ClockSession, log: Journal, progress: Progress
) -> None:
    """Idle power before the model is loaded; call before entering the engine.

    Args:
        gpus: The cards.
        plan: Which clocks.
        session: Locks them.
        log: Takes the result.
        progress: Shows it.
    """
    _measure_idle(gpus, plan, session, log, progress, is_loaded=False)


@dataclass(slots=True)
class Campaign:
    """Runs the plan; every result is in the journal as soon as it exists."""

    engine: Engine
    gpus: Sequence[Gpu]
    plan: Plan
    session: ClockSession
    log: Journal
    progress: Progress
    _start_s: float = field(default_factory=time.monotonic)
    _num_crashes: int = 0
    _taken_s: list[float] = field(default_factory=list)
    """Of each point that this run measured."""
    _engine_pids: frozenset[int] = frozenset()
    """The engine's processes as NVML numbers them, where they cannot be told by descent."""

    def run(self) -> None:
        """Idle power, the designed grid of each clock, then refinement while time is left.

        Raises:
            EngineCrashError: The engine cannot be kept alive.
            GpuBusyError: Another process has come onto a card.
        """
        self._engine_pids = self.session.unknown_pids()
        points = [point for phase in self.plan.phases for point in self._design(phase)]
        clocks_mhz = _measure_idle(
            self.gpus, self.plan, self.session, self.log, self.progress, is_loaded=True
        )
        planned = len(points) * len(clocks_mhz)
        self._tell_least(points, clocks_mhz)
        for number, clock_mhz in enumerate(clocks_mhz):
            share = (number + 1) / len(clocks_mhz)
            if lock_or_drop(self.session, self.plan, self.log, clock_mhz):
                self._at_clock(clock_mhz, points, planned, share * self.plan.budget_s)

    def _design(self, phase: Phase) -> list[Point]:
        return design(
            self.engine.facts,
            phase,
            max_batch_size=self.plan.max_batch_size,
            max_tokens=self.plan.max_tokens,
        )

    def _at_clock(
        self, clock_mhz: int, points: Sequence[Point], planned: int, deadline_s: float
    ) -> None:
        waiting = deque(self._interleaved(points))
        num_tried = 0
        while waiting:
            if self._elapsed_s() > deadline_s and not self._needs_more(clock_mhz, num_tried):
                return
            point = waiting.popleft()
            self._measure(clock_mhz, point, planned, deadline_s)
            num_tried += 1
            below = self._below(clock_mhz, point, waiting)
            if below is not None:  # the row's end cannot be held: the next one is its end now
                waiting.remove(below)
                waiting.appendleft(below)
        while self._elapsed_s() < deadline_s:
            refined = self._next_refinement(clock_mhz)
            if refined is None:
                return
            self._measure(clock_mhz, refined, planned, deadline_s)

    def _needs_more(self, clock_mhz: int, num_tried: int) -> bool:
        """Whether the ends of the grid are still missing: they are measured past the budget."""
        always = MIN_POINTS * len(self.plan.phases)
        num_held = sum(
            clock == clock_mhz and point.phase in self.plan.phases
            for clock, point in self.log.points
        )
        return num_held < always and num_tried < MAX_TRIES * always

    def _below(self, clock_mhz: int, point: Point, waiting: Sequence[Point]) -> Point | None:
        """The largest waiting point of a failed point's row with fewer tokens, if it failed."""
        if (clock_mhz, point) not in self.log.failures:
            return None
        row = [
            other
            for other in waiting
            if replace(other, tokens=point.tokens) == point and other.tokens < point.tokens
        ]
        return max(row, key=lambda other: other.tokens, default=None)

    def _measure(self, clock_mhz: int, point: Point, planned: int, deadline_s: float) -> None:
        if self.log.is_done(clock_mhz, point):
            return
        self._tell(clock_mhz, point, planned)
        self.session.check_free(self._engine_pids)
        begun_s = self._elapsed_s()
        try:
            trials = measure_point(
                self.engine,
                self.gpus,
                point,
                self.plan.protocol,
                locked_mhz=clock_mhz,
                deadline_s=self._start_s + deadline_s,
                pause_w=self._pause_w(clock_mhz, point),
                on_dropped=lambda reason: self.log.add_dropped(clock_mhz, reason, point),
            )
        except (OutOfMemoryError, NotHeldError) as error:
            self.log.add_failure(clock_mhz, point, str(error))
        except SampleGapError as error:
            self.log.add_failure(clock_mhz, point, str(error), is_final=False)
        except EngineCrashError as error:
            self.log.add_failure(clock_mhz, point, str(error), is_final=False)
            self._restart(error)
        else:
            self.log.add_point(clock_mhz, point, trials)
            self._num_crashes = 0
            self._taken_s.append(self._elapsed_s() - begun_s)

    def _pause_w(self, clock_mhz: int, point: Point) -> float | None:
        """Power between bursts of prefill: that of the loaded engine at rest, at this clock.

        Between stretches of decode the engine prefills and runs smaller batches: no known power.
        """
        powers_w = self.log.idle_w.get((clock_mhz, True)) if point.phase == "prefill" else None
        return statistics.median(powers_w) if powers_w else None

    def _restart(self, error: EngineCrashError) -> None:
        """Start the engine again after it died of `error`."""
        self._num_crashes += 1
        if self._num_crashes >= MAX_CRASHES:
            raise EngineCrashError(
                f"the engine must survive a point, it died at {MAX_CRASHES} in a row: {error}; "
                "finished points are kept, see its log and run the same command again"
            )
        self.progress.say(f"the engine died and is started again: {error}")
        try:
            self.engine.restart()
        except EngineCrashError as hopeless:
            raise EngineCrashError(f"{error}; {hopeless}") from None
        self._engine_pids = self.session.unknown_pids()

    def _tell_least(self, points: Sequence[Point], clocks_mhz: Sequence[int]) -> None:
        """Say it if the points that are always measured take longer than the budget."""
        done = {key for key in self.log.points if key[0] in clocks_mhz}
        always = min(MIN_POINTS * len(self.plan.phases), len(points))
        number = always * len(clocks_mhz) - len(done)
        least_s = number * self.plan.protocol.point_s
        if least_s > self.plan.budget_s:
            self.progress.say(
                f"the budget of {self.plan.budget_s:g} s is too short for the {number} points that "
                f"a profile needs: they are measured all the same, about {least_s:.0f} s; for less "
                "shorten --window, --warm-up or --trials"
            )

    def _tell(self, clock_mhz: int, point: Point, planned: int) -> None:
        done = len(self.log.points) + len(self.log.failures)
        planned = max(planned, done + 1)
        left_s = self.plan.budget_s - self._elapsed_s()
        is_over = left_s <= 0
        a_point_s = statistics.mean(self._taken_s or [self.plan.protocol.point_s])
        if is_over:
            held = sum(clock == clock_mhz for clock, _ in self.log.points)
            left_s = a_point_s * max(MIN_POINTS * len(self.plan.phases) - held, 1)
        elif self._taken_s:
            left_s = min(left_s, a_point_s * (planned - done))
        where = f"{clock_mhz} MHz" if clock_mhz else "clock left alone"
        label = f"{where}, {point.phase} batch {point.batch_size} tokens {point.tokens}"
        label += f" beside a chunk of {point.chunk_tokens}" if point.chunk_tokens else ""
        self.progress.at(
            Standing(
                num_done=done, num_planned=planned, left_s=left_s, is_over=is_over, label=label
            )
        )

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
        return time.monotonic() - self._start_s


def lock_or_drop(session: ClockSession, plan: Plan, log: Journal, clock_mhz: int) -> bool:
    """Lock a clock of the plan; one that the cards do not reach in time is recorded.

    Args:
        session: Locks the cards.
        plan: What is measured.
        log: Takes the reason.
        clock_mhz: To be locked.

    Returns:
        Whether the cards are at it; always where the clock is left alone.
    """
    if plan.clocks_mhz is None:
        return True
    try:
        session.lock(clock_mhz)
    except ClockTimeoutError as error:
        log.add_dropped(clock_mhz, str(error))
        return False
    return True


def _measure_idle(
    gpus: Sequence[Gpu],
    plan: Plan,
    session: ClockSession,
    log: Journal,
    progress: Progress,
    *,
    is_loaded: bool,
) -> list[int]:
    """Idle power at every clock, and at none; returns the clocks that were reached."""
    progress.say(f"idle power {'with' if is_loaded else 'without'} the model is measured")
    reached = []
    for clock_mhz in _clocks(gpus, plan):
        is_known = (clock_mhz, is_loaded) in log.idle_w
        if is_known or lock_or_drop(session, plan, log, clock_mhz):
            reached.append(clock_mhz)
        if not is_known and clock_mhz in reached:
            power_w = measure_idle_w(gpus, plan.protocol)
            log.add_idle(clock_mhz, is_loaded=is_loaded, power_w=power_w)
    session.unlock()
    if (0, is_loaded) not in log.idle_w:
        log.add_idle(0, is_loaded=is_loaded, power_w=measure_idle_w(gpus, plan.protocol))
    return reached


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
