"""Clock, energy and time of one instance's GPUs: the physics under both phases.

A decision reaches the card `actuation_s` after it was taken; a change that lands inside an
iteration splits it: the part of the work still to be done runs at the new clock. Energy is the
exact integral of power: `book` adds that of work, `settle_idle` that of rest. A change may make a
busy card stand still for a while, at the power of the iteration that it holds up; at rest it holds
up nobody.
"""

from __future__ import annotations

import math
from collections import deque

from voltana.profiles.step_model import StepModel
from voltana.sim.engine.physics.noise import IterationNoise
from voltana.sim.engine.physics.run import Run
from voltana.sim.engine.physics.warmth import WarmRun, Warmth
from voltana.sim.policies.base import DECODE, IdlePlan, Phase
from voltana.sim.records import InstanceRecord


class GpuTrack:
    """Runs iterations and idle time of one instance against the profile's truth."""

    __slots__ = (
        "_away", "_away_j", "_away_s", "_away_state_j", "_away_w", "_busy_j", "_busy_s",
        "_clock_busy_s", "_clock_idle_s", "_first_busy_j", "_idle_j", "_idle_s", "_idle_since_s",
        "_is_decode", "_last_busy_j", "_model", "_noise", "_pending", "_phase", "_pieces", "_plan",
        "_plan_due_s", "_stall_due_s", "_stall_s", "_warm_run", "_warmth", "actuation_s",
        "clock_mhz", "energy_j", "is_mixed", "num_clock_changes", "num_iterations",
        "num_wake_ups", "power_w", "run", "target_mhz",
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
        """See the class.

        Args:
            model: The truth about times and power.
            phase: Which of its tables.
            clock_mhz: The clock at first.
            actuation_s: Time from a decision to the clock's change.
            stall_s: For how long a change makes a busy instance stand still.
            noise: Multipliers of iteration times; None: the table's times exactly.
        """
        self._model = model
        self._phase = phase
        self._is_decode = phase == DECODE
        self._stall_s = stall_s
        self._stall_due_s = 0.0
        """What changes at the start of the iteration to come have cost it."""
        self._noise = noise
        self.actuation_s = actuation_s
        self.clock_mhz = clock_mhz
        self.energy_j = 0.0
        """Energy counter: all booked time since the start of the simulation."""
        self.power_w = 0.0
        """Power as of the last look, for timelines; in a split iteration that of its last piece."""
        self.num_clock_changes = 0
        self.num_iterations = 0
        self.target_mhz = clock_mhz
        """The clock asked for last."""
        self.run = Run()
        """The work begun last; booked when it has ended."""
        self.is_mixed = False
        """Whether the iteration to come is of both phases; see `MixedTrack`."""
        self._pieces: list[tuple[float, float, float, int]] = []
        """Start, end, power and clock of each part of a split iteration; else empty."""
        self._pending: deque[tuple[float, int]] = deque()
        self._busy_j = self._idle_j = self._busy_s = self._idle_s = 0.0
        self._first_busy_j = self._last_busy_j = -1.0
        self._idle_since_s = 0.0
        self.num_wake_ups = 0
        self._away = ""
        """The state out of service that it is in; empty in service."""
        self._away_w = self._away_j = 0.0
        self._away_s: dict[str, float] = {}
        self._away_state_j: dict[str, float] = {}
        """Time and energy out of service by state, beside busy and idle ones."""
        self._plan: IdlePlan | None = None
        self._plan_due_s = math.inf
        self._warmth: Warmth | None = None
        self._warm_run: WarmRun | None = None
        self._clock_busy_s: dict[int, float] = {}
        self._clock_idle_s: dict[int, float] = {}

    def warm(self, warmth: Warmth) -> None:
        """Let power follow the temperature from now, before the first iteration, on.

        It begins as it is after a long rest.
        """
        warmth.temperature_c = warmth.settled_c(self._model.rest_power_w(self.clock_mhz))
        self._warmth = warmth
        self.run = self._warm_run = WarmRun(warmth, self._pieces)

    def request_clock(self, now_s: float, clock_mhz: int) -> None:
        """Take a decision into the delay line, unless it is what was asked for last."""
        if clock_mhz != self.target_mhz:
            self.target_mhz = clock_mhz
            self._pending.append((now_s + self.actuation_s, clock_mhz))

    def begin(self, start_s: float, batch_size: float, tokens: int) -> Run:
        """Lay out one iteration.

        Args:
            start_s: When it begins.
            batch_size: Requests; in prefill the effective number of equal prompts.
            tokens: New tokens (prefill) or context tokens (decode) of the batch.

        Returns:
            A run of one iteration; `extend` makes it longer.
        """
        if self._first_busy_j < 0:
            self._first_busy_j = self.energy_j
        if self._pending:
            self._apply_due(start_s)
        noise, run, clock = self._noise, self.run, self.clock_mhz
        if noise is not None and noise.sag_change_s <= start_s:
            noise.move_to(start_s)
        run.start_s, run.count = start_s, 1
        if self._pending or self._stall_due_s or self.is_mixed:
            self._split(start_s, batch_size, tokens)
            return run
        if self._is_decode:
            size = int(batch_size)
            end_tokens, first_s, time_slope, power_w, power_slope = self._model.decode_line(
                clock, size, tokens
            )
            run.line_end_tokens = end_tokens
            run.step_s, run.step_w = time_slope * size, power_slope * size
        else:
            first_s, power_w = self._model.time_and_power(self._phase, clock, batch_size, tokens)
        run.first_s, run.first_w = first_s, power_w
        self.power_w = power_w
        if noise is not None:
            run.first_s *= noise.slowness
            run.step_s *= noise.slowness
            run.multipliers = noise.multipliers(clock, batch_size)
            run.at = noise.at
            first_s = run.first_s * run.multipliers[0][run.at]
        run.duration_s = run.lead_s = first_s
        if self._warmth is not None:
            self.power_w = run.power_w(0)
        return run

    def extend(self, further: int) -> None:
        """Let the run go on for so many iterations, as far as the noise stays what it is."""
        run, noise = self.run, self._noise
        count = run.count + further
        if noise is not None:
            count = min(count, noise.left)
            # an iteration that begins when a sag does, or later, is another matter
            if run.start_s + run.elapsed_s(count - 1) >= noise.sag_change_s:
                run.count = count
                count = run.ended_before(noise.sag_change_s) + 1
        run.count, run.duration_s = count, run.elapsed_s(count)

    def book(self, until_s: float = math.inf) -> None:
        """Add time and energy of the run: all of it, or up to an end of the simulation inside."""
        run = self.run
        count = run.count
        warmth = self._warmth
        if self._pieces:
            parts = [
                (
                    elapsed_s,
                    power_w * elapsed_s if warmth is None else warmth.spend(power_w, elapsed_s),
                    clock,
                )
                for start_s, end_s, power_w, clock in self._pieces
                if (elapsed_s := min(end_s, until_s) - start_s) > 0
            ]
            self._pieces.clear()
        elif until_s == math.inf:
            parts = [(run.duration_s, run.energy_j(count), self.clock_mhz)]
            if self._warm_run is not None:
                self._warm_run.settle()
        else:
            ended = run.ended_before(until_s)
            elapsed_s = until_s - run.start_s
            rest_j = run.part_j(ended, elapsed_s - run.elapsed_s(ended))
            parts = [(elapsed_s, run.energy_j(ended) + rest_j, self.clock_mhz)]
            count = ended + 1
        for elapsed_s, energy_j, clock in parts:
            self._busy_s += elapsed_s
            self._busy_j += energy_j
            self._clock_busy_s[clock] = self._clock_busy_s.get(clock, 0.0) + elapsed_s
        self._last_busy_j = self.energy_j = self._busy_j + self._idle_j + self._away_j
        self.num_iterations += count
        if self._noise is not None:
            self._noise.use(count)

    def enter_idle(self, now_s: float, plan: IdlePlan | None) -> float:
        """The instance has run out of work; `plan` is decided later, if it stays so.

        Returns:
            When the clock, or what was asked for, changes next; infinity if it does not.
        """
        self._idle_since_s = now_s
        self._plan = plan
        self._plan_due_s = now_s + plan.after_s if plan else math.inf
        # an instance that has not worked yet is at rest; after that it only waits
        model = self._model
        power_w = model.rest_power_w if self._first_busy_j < 0 else model.idle_power_w
        self.power_w = power_w(self.clock_mhz)
        if self._warmth is not None:
            self.power_w = self._warmth.power_w(self.power_w)
        return self._next_idle_change_s()

    def go_away(self, now_s: float, name: str, power_w: float) -> None:
        """Out of service from now on, at that power, until `go_away` or `come_back` says else.

        Args:
            now_s: The present; idle or away until then.
            name: Of the state, for the record.
            power_w: What it draws.
        """
        self.settle_idle(now_s)
        self._plan, self._plan_due_s = None, math.inf
        self._away, self._away_w = name, power_w
        self.power_w = power_w

    def come_back(self, now_s: float) -> None:
        """In service again; `enter_idle` follows."""
        self.settle_idle(now_s)
        self._away = ""
        self.num_wake_ups += 1

    def settle_idle(self, now_s: float) -> float:
        """Add idle time and energy up to `now_s`; returns as `enter_idle`."""
        if self._plan is not None and self._plan_due_s <= now_s:
            self.request_clock(self._plan_due_s, self._plan.clock_mhz)
            self._plan, self._plan_due_s = None, math.inf
        while self._pending and self._pending[0][0] <= now_s:
            change_s, clock = self._pending.popleft()
            self._add_idle(change_s)
            self._set_clock(clock)
            self._stall_due_s = 0.0
        self._add_idle(now_s)
        return self._next_idle_change_s()

    def record(self, phase: Phase, instance_id: int, num_retractions: int) -> InstanceRecord:
        """Freeze the totals.

        Args:
            phase: Of the instance.
            instance_id: Its index within the phase.
            num_retractions: How often it put a request back.
        """
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
            away_s=dict(self._away_s),
            away_energy_j=dict(self._away_state_j),
            num_wake_ups=self.num_wake_ups,
        )

    def _split(self, start_s: float, batch_size: float, tokens: int) -> None:
        """Lay out an iteration that clock changes cut into pieces, or hold up."""
        run, noise, pending, pieces = self.run, self._noise, self._pending, self._pieces
        remaining, at_s, energy_j = 1.0, start_s, 0.0
        while True:
            clock = self.clock_mhz
            if self.is_mixed:
                time_s, power_w = self.mixed_point(clock, batch_size, tokens)
            else:
                time_s, power_w = self._model.time_and_power(self._phase, clock, batch_size, tokens)
                if noise is not None:
                    time_s *= noise.slowness * noise.multipliers(clock, batch_size)[0][noise.at]
            work_s = at_s + self._stall_due_s
            self._stall_due_s = 0.0
            end_s = work_s + remaining * time_s
            is_last = not pending or pending[0][0] >= end_s
            if not is_last:  # the commands of one card wait for each other
                end_s = max(pending[0][0], work_s)
            pieces.append((at_s, end_s, power_w, clock))
            energy_j += power_w * (end_s - at_s)
            if is_last:
                break
            remaining -= (end_s - work_s) / time_s
            at_s = end_s
            self._set_clock(pending.popleft()[1])
        self.power_w = power_w
        run.first_s = run.lead_s = run.duration_s = end_s - start_s
        run.step_s = 0.0
        run.first_w, run.step_w = energy_j / run.first_s, 0.0
        run.line_end_tokens = float(tokens)
        run.multipliers = None
        if self._warmth is not None:
            self.power_w = run.power_w(0)

    def mixed_point(self, clock_mhz: int, batch_size: float, tokens: int) -> tuple[float, float]:
        """Time, noise included, and power at a clock of an iteration that is no table's.

        Args:
            clock_mhz: The clock.
            batch_size: As of `begin`, like `tokens`.
            tokens: Of the batch.
        """
        raise NotImplementedError

    def _next_idle_change_s(self) -> float:
        return min(self._plan_due_s, self._pending[0][0]) if self._pending else self._plan_due_s

    def _add_idle(self, until_s: float) -> None:
        elapsed_s = until_s - self._idle_since_s
        if elapsed_s <= 0:
            return
        self._idle_since_s = until_s
        if self._away:
            self._add_away(elapsed_s)
            return
        clock = self.clock_mhz
        model = self._model
        power_w = model.rest_power_w if self._first_busy_j < 0 else model.idle_power_w
        self.power_w = power_w(clock)
        self._idle_s += elapsed_s
        if self._warmth is None:
            self._idle_j += self.power_w * elapsed_s
        else:
            self._idle_j += self._warmth.spend(self.power_w, elapsed_s)
            self.power_w = self._warmth.power_w(self.power_w)
        self.energy_j = self._busy_j + self._idle_j + self._away_j
        self._clock_idle_s[clock] = self._clock_idle_s.get(clock, 0.0) + elapsed_s

    def _add_away(self, elapsed_s: float) -> None:
        name, energy_j = self._away, self._away_w * elapsed_s
        self._away_j += energy_j
        self._away_s[name] = self._away_s.get(name, 0.0) + elapsed_s
        self._away_state_j[name] = self._away_state_j.get(name, 0.0) + energy_j
        self.power_w = self._away_w
        self.energy_j = self._busy_j + self._idle_j + self._away_j

    def _apply_due(self, now_s: float) -> None:
        while self._pending and self._pending[0][0] <= now_s:
            self._set_clock(self._pending.popleft()[1])

    def _set_clock(self, clock_mhz: int) -> None:
        if clock_mhz != self.clock_mhz:
            self.clock_mhz = clock_mhz
            self.num_clock_changes += 1
            self._stall_due_s += self._stall_s
