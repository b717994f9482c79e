"""Clock, energy and time of one instance's GPUs: the physics under both phases.

A decision reaches the card `actuation_s` after it was taken; a change that lands inside an
iteration splits it: the part of the work still to be done runs at the new clock. Energy is the
exact integral of a piecewise constant power. A change may make a busy card stand still for a while,
at the power of the iteration that it holds up; at rest it holds up nobody.
"""

from __future__ import annotations

import math
from collections import deque

from profiles.step_model import Line, StepModel
from sim.engine.noise import BLOCK, IterationNoise
from sim.policies.base import IdlePlan, Phase
from sim.records import InstanceRecord


class GpuTrack:
    """Runs iterations and idle time of one instance against the profile's truth."""

    __slots__ = (
        "_busy_j", "_busy_s", "_clock_busy_s", "_clock_idle_s", "_first_busy_j", "_idle_j",
        "_idle_s", "_idle_since_s", "_last_busy_j", "_model", "_pending", "_phase", "_plan",
        "_plan_due_s", "_segments", "_stall_due_s", "_stall_s", "actuation_s", "clock_mhz",
        "energy_j", "noise", "num_clock_changes", "num_iterations", "power_w", "target_mhz",
    )  # fmt: skip

    def __init__(
        self,
        model: StepModel,
        phase: Phase,
        *,
        clock_mhz: int,
        actuation_s: float,
        stall_s: float = 0.0,
        noise: IterationNoise | None = None,
    ) -> None:
        self._model = model
        self._phase = phase
        self._stall_s = stall_s
        self._stall_due_s = 0.0
        """What changes at the start of the iteration to come have cost it."""
        self.noise = noise
        self.actuation_s = actuation_s
        self.clock_mhz = clock_mhz
        self.energy_j = 0.0
        """Energy counter: all settled time since the start of the run."""
        self.power_w = 0.0
        """Power of the segment entered last; for timelines."""
        self.num_clock_changes = 0
        self.num_iterations = 0
        self.target_mhz = clock_mhz
        """The clock asked for last."""
        self._pending: deque[tuple[float, int]] = deque()
        self._segments: list[tuple[float, float, float, int]] = []
        self._busy_j = self._idle_j = self._busy_s = self._idle_s = 0.0
        self._first_busy_j = self._last_busy_j = -1.0
        self._idle_since_s = 0.0
        self._plan: IdlePlan | None = None
        self._plan_due_s = math.inf
        self._clock_busy_s: dict[int, float] = {}
        self._clock_idle_s: dict[int, float] = {}

    def request_clock(self, now_s: float, clock_mhz: int) -> None:
        """Take a decision into the delay line, unless it is what was asked for last."""
        if clock_mhz != self.target_mhz:
            self.target_mhz = clock_mhz
            self._pending.append((now_s + self.actuation_s, clock_mhz))

    def begin_iteration(self, start_s: float, batch_size: float, tokens: int) -> float:
        """Lay out one iteration from `start_s`; returns the instant it ends."""
        if self._first_busy_j < 0:
            self._first_busy_j = self.energy_j
        if self._pending:
            self._apply_due(start_s)
        segments, noise = self._segments, self.noise
        if noise is not None and noise.sag_change_s <= start_s:
            noise.move_to(start_s)
        remaining = 1.0
        at_s = start_s
        while True:
            clock = self.clock_mhz
            time_s, self.power_w = self._model.time_and_power(
                self._phase, clock, batch_size, tokens
            )
            if noise is not None:
                time_s *= noise.slowness * noise.multipliers(clock, batch_size)[0][noise.at]
            work_s = at_s + self._stall_due_s
            self._stall_due_s = 0.0
            end_s = work_s + remaining * time_s
            if not self._pending or self._pending[0][0] >= end_s:
                segments.append((at_s, end_s, self.power_w, clock))
                break
            due_s, next_clock = self._pending.popleft()
            change_s = max(due_s, work_s)  # the commands of one card wait for each other
            segments.append((at_s, change_s, self.power_w, clock))
            remaining -= (change_s - work_s) / time_s
            at_s = change_s
            self._set_clock(next_clock)
        if noise is not None:
            noise.at += 1
            if noise.at == BLOCK:
                noise.refill()
        return end_s

    def begin_line(self, start_s: float, batch_size: int, tokens: int) -> Line | None:
        """The linear piece that a decode run from `start_s` is on.

        Returns:
            See `StepModel.decode_line`; None while a clock change is on its way, as it would
            split an iteration, or stalls this one. Noise aside.
        """
        if self._first_busy_j < 0:
            self._first_busy_j = self.energy_j
        if self._pending:
            self._apply_due(start_s)
            if self._pending or self._stall_due_s:
                return None
        return self._model.decode_line(self.clock_mhz, batch_size, tokens)

    def book_run(self, count: int, elapsed_s: float, energy_j: float) -> None:
        """Book `count` whole iterations at the present clock that together took that."""
        self._busy_s += elapsed_s
        self._busy_j += energy_j
        clock = self.clock_mhz
        self._clock_busy_s[clock] = self._clock_busy_s.get(clock, 0.0) + elapsed_s
        self._last_busy_j = self.energy_j = self._busy_j + self._idle_j
        self.num_iterations += count

    def settle_iteration(self, until_s: float) -> None:
        """Book the laid-out iteration's time and energy, up to `until_s` at most."""
        for start_s, end_s, power_w, clock in self._segments:
            elapsed_s = min(end_s, until_s) - start_s
            if elapsed_s > 0:
                self._busy_s += elapsed_s
                self._busy_j += power_w * elapsed_s
                self._clock_busy_s[clock] = self._clock_busy_s.get(clock, 0.0) + elapsed_s
        self._segments.clear()
        self._last_busy_j = self.energy_j = self._busy_j + self._idle_j
        self.num_iterations += 1

    def enter_idle(self, now_s: float, plan: IdlePlan | None) -> float:
        """The instance has run out of work; `plan` is decided later, if it stays so.

        Returns:
            When the clock, or what was asked for, changes next; infinity if it does not.
        """
        self._idle_since_s = now_s
        self._plan = plan
        self._plan_due_s = now_s + plan.after_s if plan else math.inf
        self.power_w = self._model.idle_power_w(self.clock_mhz)
        return self._next_idle_change_s()

    def settle_idle(self, now_s: float) -> float:
        """Book idle time up to `now_s`; returns as `enter_idle`."""
        if self._plan is not None and self._plan_due_s <= now_s:
            self.request_clock(self._plan_due_s, self._plan.clock_mhz)
            self._plan, self._plan_due_s = None, math.inf
        while self._pending and self._pending[0][0] <= now_s:
            change_s, clock = self._pending.popleft()
            self._book_idle(change_s)
            self._set_clock(clock)
            self._stall_due_s = 0.0
        self._book_idle(now_s)
        return self._next_idle_change_s()

    def record(self, phase: Phase, instance_id: int, num_retractions: int) -> InstanceRecord:
        """Freeze the totals."""
        window_j = self._last_busy_j - self._first_busy_j if self._first_busy_j >= 0 else 0.0
        return InstanceRecord(
            phase=phase,
            instance_id=instance_id,
            busy_s=self._busy_s,
            idle_s=self._idle_s,
            busy_energy_j=self._busy_j,
            idle_energy_j=self._idle_j,
            busy_window_energy_j=window_j,
            num_iterations=self.num_iterations,
            clock_busy_s=dict(self._clock_busy_s),
            clock_idle_s=dict(self._clock_idle_s),
            num_clock_changes=self.num_clock_changes,
            num_retractions=num_retractions,
        )

    def _next_idle_change_s(self) -> float:
        return min(self._plan_due_s, self._pending[0][0]) if self._pending else self._plan_due_s

    def _book_idle(self, until_s: float) -> None:
        elapsed_s = until_s - self._idle_since_s
        if elapsed_s <= 0:
            return
        self._idle_since_s = until_s
        clock = self.clock_mhz
        self.power_w = self._model.idle_power_w(clock)
        self._idle_s += elapsed_s
        self._idle_j += self.power_w * elapsed_s
        self.energy_j = self._busy_j + self._idle_j
        self._clock_idle_s[clock] = self._clock_idle_s.get(clock, 0.0) + elapsed_s

    def _apply_due(self, now_s: float) -> None:
        while self._pending and self._pending[0][0] <= now_s:
            self._set_clock(self._pending.popleft()[1])

    def _set_clock(self, clock_mhz: int) -> None:
        if clock_mhz != self.clock_mhz:
            self.clock_mhz = clock_mhz
            self.num_clock_changes += 1
            self._stall_due_s += self._stall_s
