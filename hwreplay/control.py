"""The controller's loop of one instance, without sockets: messages and times in, clocks out.

Two states. While the metrics are fresh the controller's word goes to the actuator. When they are
stale, the engine or the helper is gone, or the controller has failed, the clock is unlocked (the
driver boosts: the promise is kept at the cost of energy) until a fresh record comes.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from hwreplay.actuator.client import Actuator, ActuatorLostError
from hwreplay.batch_feed import BatchNotice, Kind
from hwreplay.metrics_feed import IterationMetrics
from hwreplay.tracker import InstanceTracker
from profiles.errors import VoltanaError
from sim.policies.base import DECODE, PREFILL, UNLOCKED_MHZ, Controller, IdlePlan, Predictor

BUCKETS_S: Final = tuple(float(f"{m}e{e}") for e in range(-5, 1) for m in (1, 2, 5))
"""Upper edges of the latency histogram: 10 µs to 5 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaleLimits:
    """How long the engine may be silent before its metrics count as stale."""

    num_iterations: float = 5.0
    """Under load: so many expected iterations after the one that runs, or records lost in a row."""
    least_s: float = 0.25
    """The allowance is never shorter: a busy machine is no dead engine."""
    most_s: float = 1.0
    """Nor longer."""
    dead_s: float = 5.0
    """At rest: the engine repeats a heartbeat every second."""

    def allowed_s(self, expected_s: float, *, is_busy: bool) -> float:
        """Longest silence that is believed.

        Args:
            expected_s: Duration of the iteration that should be running.
            is_busy: Whether one should be.

        Example:
            >>> StaleLimits().allowed_s(0.1, is_busy=True)
            0.6
        """
        if not is_busy:
            return self.dead_s
        grace_s = max(self.num_iterations * expected_s, self.least_s)
        return expected_s + min(grace_s, self.most_s)


class Latencies:
    """Durations of the loop, all kept: 8 bytes each."""

    def __init__(self) -> None:
        self._values_s = array("d")

    def add(self, value_s: float) -> None:
        """Count one."""
        self._values_s.append(value_s)

    def __len__(self) -> int:
        return len(self._values_s)

    def as_dict(self) -> dict[str, Any]:
        """Quantiles and a histogram: {"p99_s": …, "histogram": [[upper edge in s, count], …]}."""
        if not self._values_s:
            return {"num": 0}
        values = np.asarray(self._values_s)
        counts, _ = np.histogram(values, bins=[0.0, *BUCKETS_S, float("inf")])
        edges = [*BUCKETS_S, float("inf")]
        quantiles = {f"p{q}_s": float(np.quantile(values, q / 100)) for q in (50, 90, 99)}
        return {
            "num": len(values),
            **quantiles,
            "max_s": float(values.max()),
            "histogram": [[edge, int(n)] for edge, n in zip(edges, counts, strict=True) if n],
        }


@dataclass(slots=True)
class _Safe:
    """Why and when the clock was unlocked."""

    at_s: float
    reason: str
    until_s: float | None = None


@dataclass(slots=True)
class LoopReport:
    """What the loop did."""

    counts: Counter[str] = field(default_factory=Counter)
    latency: Latencies = field(default_factory=Latencies)
    """Record received to actuator written, decision included."""
    written: Latencies = field(default_factory=Latencies)
    """The same, of decisions that changed the clock."""
    notice: Latencies = field(default_factory=Latencies)
    """From the plug-in's sending to the actuator's writing."""
    safe: list[_Safe] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "counts": dict(self.counts),
            "loop_latency": self.latency.as_dict(),
            "loop_latency_written": self.written.as_dict(),
            "notice_latency": self.notice.as_dict(),
            "safe_states": [
                {"at_s": s.at_s, "until_s": s.until_s, "reason": s.reason} for s in self.safe
            ],
        }


class ControlLoop:
    """Asks one controller and writes to one actuator."""

    def __init__(
        self,
        controller: Controller,
        tracker: InstanceTracker,
        actuator: Actuator,
        *,
        predictor: Predictor,
        limits: StaleLimits | None = None,
        decides_before_decode: bool = False,
    ) -> None:
        """Set the controller's initial clock.

        Args:
            controller: The very object that the simulator runs.
            tracker: Keeps the state that the controller reads.
            actuator: Sets the clock.
            predictor: Says how long an iteration should take.
            limits: When metrics are stale.
            decides_before_decode: Decide on the plug-in's notice in decode too.
        """
        self.report = LoopReport()
        self.clock_changes: deque[tuple[float, int]] = deque()
        """(time in s, clock in MHz) of each confirmed change, for the owner to take away."""
        self._controller = controller
        self._tracker = tracker
        self._actuator: Actuator | None = actuator
        self._predictor = predictor
        self._limits = limits or StaleLimits()
        self._decides_on_notice = tracker.state.phase == PREFILL or decides_before_decode
        self._has_plugin = False
        self._heard_s = 0.0
        self._sequence: int | None = None
        self._plan_s: float | None = None
        self._plan: IdlePlan | None = None
        self._was_busy = False
        self._safe: _Safe | None = None
        self._write(controller.initial_clock_mhz(), 0.0)

    @property
    def is_safe(self) -> bool:
        """Whether the clock is unlocked for safety."""
        return self._safe is not None

    def attach(self, actuator: Actuator) -> None:
        """A new connection to the helper, after the old one was lost."""
        self._actuator = actuator
        self.report.counts["actuator_reconnected"] += 1
        self._end_safe(self._tracker.state.now_s)

    @property
    def has_actuator(self) -> bool:
        return self._actuator is not None

    def on_notice(self, notice: BatchNotice, now_s: float) -> bool:
        """The plug-in announces a batch. True if a decision was made."""
        self._has_plugin = True
        self.report.counts["notices"] += 1
        if notice.kind == Kind.HELLO:
            return False
        self._heard_s = now_s
        if notice.kind == Kind.PREFILL:
            self._tracker.on_batch(notice.num_requests, notice.tokens, now_s)
        else:
            state = self._tracker.observe(now_s)
            state.last_batch_size, state.last_tokens = notice.num_requests, notice.tokens
        self._mark_busy()
        return self._decides_on_notice and self._decide(now_s)

    def on_record(self, record: IterationMetrics) -> bool:
        """The engine reports an iteration or rests. True if a decision was made."""
        now_s = record.received_s
        lost = self._count_lost(record.sequence)
        self._heard_s = now_s
        self._tracker.on_iteration(record)
        if record.is_heartbeat:
            self.report.counts["heartbeats"] += 1
            self._end_safe(now_s)
            self.settle(now_s)
            return False
        self.report.counts["records"] += 1
        if lost > self._limits.num_iterations:
            self.go_safe(now_s, f"{lost} records lost")
            return False
        self._mark_busy()
        if self._has_plugin and self._decides_on_notice:
            self.settle(now_s)
            return False
        is_decided = self._decide(now_s)
        self.settle(now_s)
        return is_decided

    def settle(self, now_s: float) -> None:
        """Ask for an idle plan when the instance has run out of work; call after each event."""
        state = self._tracker.state
        is_busy = state.is_busy or state.num_waiting > 0
        if self._was_busy and not is_busy:
            state.now_s = now_s
            self._plan = self._controller.on_idle(state)
            self._plan_s = None if self._plan is None else now_s + self._plan.after_s
        self._was_busy = is_busy

    def tick(self, now_s: float) -> None:
        """Time passes: stale metrics, due idle plans, a heartbeat to the helper."""
        self._tracker.observe(now_s)
        silent_s = now_s - self._heard_s
        if silent_s > self._limits.allowed_s(self._expected_s(), is_busy=self._is_loaded()):
            self.go_safe(now_s, f"no metrics for {silent_s:.2f} s")
        if self._plan is not None and self._plan_s is not None and now_s >= self._plan_s:
            if not self.is_safe:
                self._write(self._plan.clock_mhz, now_s)
            self._plan = None
        self.beat(now_s)

    def beat(self, now_s: float) -> None:
        """Tell the helper that we live; learn what it has done."""
        if self._actuator is None:
            return
        try:
            self._actuator.beat()
        except ActuatorLostError:
            self._lose_actuator(now_s)
            return
        self._follow_clock(now_s)

    def go_safe(self, now_s: float, reason: str) -> None:
        """Unlock the clock until fresh metrics come."""
        if self._safe is not None:
            return
        self._safe = _Safe(now_s, reason)
        self._plan = None
        self.report.safe.append(self._safe)
        self._write(UNLOCKED_MHZ, now_s)

    def close(self) -> None:
        """Give the clock back."""
        if self._actuator is not None:
            self._actuator.close()
            self._actuator = None

    def _decide(self, now_s: float) -> bool:
        state = self._tracker.state
        self._plan = None
        try:
            clock_mhz = self._controller.decide(state)
        except VoltanaError as error:
            self.report.counts["controller_errors"] += 1
            self.go_safe(now_s, f"the controller failed: {error}")
            return False
        self._end_safe(now_s)
        self.report.counts["decisions"] += 1
        self._write(clock_mhz, now_s)
        return True

    def _write(self, clock_mhz: int, now_s: float) -> None:
        if self._actuator is None:
            return
        try:
            self._actuator.set_clock(clock_mhz)
        except ActuatorLostError:
            self._lose_actuator(now_s)
            return
        self._follow_clock(now_s)

    def _follow_clock(self, now_s: float) -> None:
        """Take over the clock that the actuator has confirmed."""
        clock_mhz = UNLOCKED_MHZ if self._actuator is None else self._actuator.clock_mhz
        if clock_mhz != self._tracker.state.clock_mhz:
            self._tracker.on_clock(clock_mhz)
            self.clock_changes.append((now_s, clock_mhz))

    def _lose_actuator(self, now_s: float) -> None:
        """The helper restores the clocks of a lost connection by itself."""
        assert self._actuator is not None
        self._actuator.close()
        self._actuator = None
        self._follow_clock(now_s)
        self.report.counts["actuator_lost"] += 1
        if self._safe is None:
            self._safe = _Safe(now_s, "the actuator is gone")
            self.report.safe.append(self._safe)

    def _end_safe(self, now_s: float) -> None:
        if self._safe is not None and self._actuator is not None:
            self._safe.until_s = now_s
            self._safe = None

    def _count_lost(self, sequence: int) -> int:
        """Records lost before this one; a restarted engine counts from 0 and has lost none."""
        last, self._sequence = self._sequence, sequence
        lost = 0 if last is None or sequence <= last else sequence - last - 1
        self.report.counts["lost_records"] += lost
        return lost

    def _mark_busy(self) -> None:
        self._was_busy = True

    def _is_loaded(self) -> bool:
        state = self._tracker.state
        if state.phase == DECODE:
            return state.num_running > 0
        return state.is_busy or state.num_waiting > 0

    def _expected_s(self) -> float:
        """Duration of the iteration that should be running, at the lowest clock in doubt."""
        state = self._tracker.state
        predicted_s = 0.0
        if state.last_batch_size and state.last_tokens:
            predicted_s = self._predictor.predict_s(
                state.phase, state.clock_mhz, state.last_batch_size, state.last_tokens
            )
        return max(predicted_s, state.last_duration_s)
