"""The controller's loop of one instance, without sockets: messages and times in, clocks out.

Two states. While the metrics are fresh the controller's word goes to the actuator. When they are
stale, the engine or the actuator is gone, or the controller has failed, the clock is unlocked (the
driver boosts: the promise is kept at the cost of energy) until a fresh record comes.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Sequence

from voltana.hwreplay.actuator.client import ActuatorLostError, ClockSetter
from voltana.hwreplay.agent.loop_record import LoopReport, SafeState, StaleLimits
from voltana.hwreplay.messages.batch_feed import BatchNotice, NoticeKind
from voltana.hwreplay.view.tracker import InstanceTracker
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.engines.sglang_metrics import IterationMetrics
from voltana.sim.policies.answers import ControllerAnswers
from voltana.sim.policies.base import (
    COLOCATED,
    PREFILL,
    UNLOCKED_MHZ,
    Controller,
    IdlePlan,
    Predictor,
)
from voltana.sim.policies.parts.mixed import predicted_s


class ControlLoop:
    """Asks one controller and writes to one actuator."""

    def __init__(
        self,
        controller: Controller,
        tracker: InstanceTracker,
        actuator: ClockSetter,
        *,
        predictor: Predictor,
        clocks_mhz: Sequence[int],
        limits: StaleLimits | None = None,
        decides_before: bool = False,
        now_s: float = 0.0,
    ) -> None:
        """Set the controller's initial clock.

        Args:
            controller: The very object that the simulator runs.
            tracker: Keeps the state that the controller reads.
            actuator: Sets the clock.
            predictor: Says how long an iteration should take.
            clocks_mhz: Supported clocks, ascending; the controller may ask for no other.
            limits: When metrics are stale.
            decides_before: Decide on the notice of a batch that is about to run; else on the record
                of one that has ended.
            now_s: The run's time.

        Raises:
            VoltanaError: The controller has no initial clock, or an unsupported one.
        """
        self.report = LoopReport()
        self.clock_changes: deque[tuple[float, int]] = deque()
        """(time in s, clock in MHz) of each confirmed change, for the owner to take away."""
        state = tracker.state
        self._where = f"{state.phase} {state.instance_id}"
        self._clocks_mhz = clocks_mhz
        self._tracker = tracker
        self._actuator: ClockSetter | None = actuator
        self._predictor = predictor
        self._limits = limits or StaleLimits()
        self._decides_before = decides_before
        self._has_plugin = False
        self._heard_s = now_s
        self._loaded_s: float | None = None
        self._waited_s = now_s
        """When the engine last had requests and nothing to compute."""
        self._router_s = -math.inf
        """When the router was last heard."""
        self._sequence: int | None = None
        self._plan_s: float | None = None
        self._plan: IdlePlan | None = None
        self._was_busy = False
        self._safe: SafeState | None = None
        self._num_refused = 0
        self.num_wishes = 0
        """Clocks asked for that were not the one asked for last."""
        self._wish_mhz = UNLOCKED_MHZ
        self.adopt(controller, now_s)

    def adopt(self, controller: Controller, now_s: float) -> None:
        """Ask this controller from now on, first for its initial clock; one that fails raises."""
        answers = ControllerAnswers(controller, self._clocks_mhz, self._where)
        clock_mhz = answers.initial_clock_mhz()
        self._controller, self._plan = answers, None
        if self._safe is None:
            self._write(clock_mhz, now_s)

    @property
    def is_safe(self) -> bool:
        """Whether the clock is unlocked for safety."""
        return self._safe is not None

    @property
    def safe_reason(self) -> str:
        """Why it is; empty while it is not."""
        return "" if self._safe is None else self._safe.reason

    @property
    def wish_mhz(self) -> int:
        """The clock that was asked for last."""
        return self._wish_mhz

    def repeat_wish(self, now_s: float) -> None:
        """Ask for that clock again: who stands before the actuator answers otherwise now."""
        self._write(self._wish_mhz, now_s)

    def attach(self, actuator: ClockSetter) -> None:
        """A new connection to the actuator, after the old one was lost."""
        self._actuator = actuator
        self._num_refused = 0
        self.report.counts["actuator_reconnected"] += 1
        self._end_safe(self._tracker.state.now_s)

    @property
    def has_actuator(self) -> bool:
        return self._actuator is not None

    @property
    def actuator_fd(self) -> int | None:
        """Readable when the actuator has answered."""
        return None if self._actuator is None else self._actuator.fileno()

    def on_notice(self, notice: BatchNotice, now_s: float, *, is_newest: bool = True) -> bool:
        """The plug-in announces a batch. True if a decision was made.

        Args:
            notice: What it says.
            now_s: The run's time.
            is_newest: False if another one waits: the controller sees it, the clock stays.
        """
        self._has_plugin = True
        self.report.counts["notices"] += 1
        if notice.kind == NoticeKind.HELLO:
            return False
        self._heard_s = now_s
        if notice.kind == NoticeKind.PREFILL:
            self._tracker.on_batch(notice.num_requests, notice.tokens, now_s, notice.num_waiting)
        else:
            self._tracker.on_steps(notice, now_s)
        self._was_busy = True
        return self._decides_before and self._decide(now_s, writes=is_newest)

    def on_record(self, record: IterationMetrics, *, is_newest: bool = True) -> bool:
        """The engine reports an iteration or rests. True if a decision was made.

        Args:
            record: What it says.
            is_newest: False if another one waits: the controller sees it, the clock stays.
        """
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
        self._was_busy = True
        is_decided = self._decide_after(now_s, writes=is_newest)
        self.settle(now_s)
        return is_decided

    def _decide_after(self, now_s: float, *, writes: bool) -> bool:
        """Decide on the iteration that has ended, unless its notice was decided on."""
        if self._decides_before:
            if self._has_plugin:
                return False
            self.report.counts["decided_late"] += 1
        state = self._tracker.state
        state.last_batch_size, state.last_tokens = state.ended_batch_size, state.ended_tokens
        state.last_queue_delay_s = state.ended_queue_delay_s
        return self._decide(now_s, writes=writes)

    def hear_router(self, now_s: float) -> None:
        """It has sent an event of this instance."""
        self._router_s = now_s

    def settle(self, now_s: float) -> None:
        """Ask for an idle plan when the instance has run out of work; call after each event."""
        state = self._tracker.state
        is_busy = state.is_busy or state.num_waiting > 0
        if self._was_busy and not is_busy:
            state.now_s = now_s
            self._plan = self._ask_idle_plan(now_s)
            self._plan_s = None if self._plan is None else now_s + self._plan.after_s
        self._was_busy = is_busy
        self._note_load(now_s)

    def tick(self, now_s: float) -> None:
        """Time passes: stale metrics, due idle plans, a heartbeat to the actuator."""
        self._tracker.observe(now_s)
        self._note_load(now_s)
        is_loaded = self._loaded_s is not None
        if not is_loaded and self._waits_by_right(now_s):
            self._waited_s = now_s
        silent_s = now_s - max(self._heard_s, self._waited_s, self._loaded_s or 0.0)
        if silent_s > self._limits.allowed_s(self._expected_s(), is_busy=is_loaded):
            self.go_safe(now_s, f"no metrics for {silent_s:.2f} s")
        if self._plan is not None and self._plan_s is not None and now_s >= self._plan_s:
            if not self.is_safe:
                self._write(self._plan.clock_mhz, now_s)
            self._plan = None
        self.beat(now_s)

    def beat(self, now_s: float) -> None:
        """Tell the actuator that we live; learn what it has done."""
        if self._actuator is None:
            return
        try:
            self._actuator.beat()
        except ActuatorLostError as error:
            self._lose_actuator(now_s, error)
            return
        self._follow_clock(now_s)

    def collect(self, now_s: float) -> None:
        """Take the actuator's answers."""
        if self._actuator is None:
            return
        try:
            self._actuator.collect()
        except ActuatorLostError as error:
            self._lose_actuator(now_s, error)
            return
        self._follow_clock(now_s)

    def go_safe(self, now_s: float, reason: str) -> None:
        """Unlock the clock until fresh metrics come."""
        if self._safe is not None:
            return
        self._safe = self.report.enter_safe(now_s, reason)
        self._plan = None
        self._write(UNLOCKED_MHZ, now_s)

    def close(self, now_s: float) -> None:
        """Give the clock back, and write down what the controller has learnt."""
        self.report.learnt = self._controller.controller.learnt()
        if self._actuator is not None:
            self._actuator.close()
            self._actuator = None
            self._follow_clock(now_s)

    def _decide(self, now_s: float, *, writes: bool) -> bool:
        self._plan = None
        try:
            clock_mhz = self._controller.decide(self._tracker.state)
        except VoltanaError as error:  # whatever a policy does, the clock must not stay
            self._fail(now_s, error)
            return False
        self._end_safe(now_s)
        self.report.counts["decisions"] += 1
        if writes:
            self._write(clock_mhz, now_s)
        return True

    def _ask_idle_plan(self, now_s: float) -> IdlePlan | None:
        try:
            return self._controller.on_idle(self._tracker.state)
        except VoltanaError as error:
            self._fail(now_s, error)
            return None

    def _fail(self, now_s: float, error: VoltanaError) -> None:
        if self._safe is None:
            sys.stderr.write(f"voltana: {error}\n")
        self.report.counts["controller_errors"] += 1
        self.go_safe(now_s, f"the controller failed: {error}")

    def _write(self, clock_mhz: int, now_s: float) -> None:
        if self._actuator is None:
            return
        if clock_mhz != self._wish_mhz:
            self._wish_mhz = clock_mhz
            self.num_wishes += 1
        try:
            self._actuator.set_clock(clock_mhz)
        except ActuatorLostError as error:
            self._lose_actuator(now_s, error)
            return
        self._follow_clock(now_s)

    def _follow_clock(self, now_s: float) -> None:
        """Take over the clock that the actuator has confirmed; a refusal leaves an unknown one."""
        actuator = self._actuator
        clock_mhz = UNLOCKED_MHZ if actuator is None else actuator.clock_mhz
        if clock_mhz != self._tracker.state.clock_mhz:
            self._tracker.on_clock(clock_mhz)
            self.clock_changes.append((now_s, clock_mhz))
        if actuator is not None and actuator.num_refused > self._num_refused:
            self.report.counts["refused"] += actuator.num_refused - self._num_refused
            self._num_refused = actuator.num_refused
            self.go_safe(now_s, f"the actuator refused a clock: {actuator.last_refusal}")

    def _lose_actuator(self, now_s: float, error: ActuatorLostError) -> None:
        """The actuator restores the clocks of a lost connection by itself."""
        assert self._actuator is not None
        self._actuator.close()
        self._actuator = None
        self._follow_clock(now_s)
        self.report.counts["actuator_lost"] += 1
        if self._safe is None:
            self._safe = self.report.enter_safe(now_s, str(error))

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

    def _note_load(self, now_s: float) -> None:
        """Since when the engine should be reporting iterations.

        A request at a prefill server may wait for its pair; a batch that was announced may not.
        """
        state = self._tracker.state
        is_loaded = state.num_running > 0 or state.chunk_tokens > 0
        if state.phase == PREFILL:
            is_loaded = self._has_plugin and self._tracker.is_announced
        if not is_loaded:
            self._loaded_s = None
        elif self._loaded_s is None:
            self._loaded_s = now_s

    def _waits_by_right(self, now_s: float) -> bool:
        """Whether requests are here and none can be computed: SGLang says nothing meanwhile.

        By the word of a router that lives: one that was killed takes its requests with it, and
        nobody would say that they have ended.

        Its heartbeats come only when no queue holds anything. Without the plug-in nobody tells
        whether a prefill server computes: its silence is believed as long as that of one at rest.
        """
        state = self._tracker.state
        if now_s - self._router_s > self._limits.router_s:
            return False
        return state.open_requests > 0 and (state.phase != PREFILL or self._has_plugin)

    def _expected_s(self) -> float:
        """Duration of the iteration that should be running: the last one's, or a bigger queue's."""
        state = self._tracker.state
        batch_size, tokens = state.last_batch_size, state.last_tokens
        if state.phase == COLOCATED:
            both_s = predicted_s(self._predictor, state, state.clock_mhz)
            return max(both_s, state.last_duration_s)
        if state.phase == PREFILL:
            tokens = max(tokens, min(state.waiting_tokens, self._tracker.max_prefill_tokens))
            batch_size = max(batch_size, int(tokens > 0))
        expected_s = 0.0
        if batch_size and tokens:
            expected_s = self._predictor.predict_s(state.phase, state.clock_mhz, batch_size, tokens)
        return max(expected_s, state.last_duration_s)
