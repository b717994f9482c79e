"""A request's energy over all instances that it was at, known a moment after its end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from voltana.hwreplay.clock import RunClock
from voltana.hwreplay.energy.shares import InstanceShares, Stay
from voltana.hwreplay.messages.agent_reports import AgentReport
from voltana.hwreplay.view.context import PolicySource
from voltana.hwreplay.view.tracker import InstanceTracker
from voltana.profiles.engines.sglang_metrics import IterationMetrics
from voltana.sim.policies.base import PREFILL, Phase

FRESH_S: Final = 3.0
"""A meter that was not read for so long is gone: nobody waits for it."""
WAIT_S: Final = 5.0
"""Longest time from a request's end to its bill."""
TRY_S: Final = 0.05
"""Between two looks at all bills that wait, where no meter has moved."""
Told = Callable[[float | None], None]
"""Told the joules; None where no meter counts."""


@dataclass(slots=True)
class _Bill:
    stays: list[tuple[InstanceShares, Stay]] = field(default_factory=list)
    ended_s: float | None = None
    told: list[Told] = field(default_factory=list)

    @property
    def energy_j(self) -> float:
        return sum(stay.energy_j for _, stay in self.stays)


class Bills:
    """The energy of requests in flight, and of those that have just ended."""

    def __init__(self, source: PolicySource, clock: RunClock) -> None:
        """Start with no request.

        Args:
            source: Makes trackers; its profile has the idle power.
            clock: The run's.
        """
        self._source = source
        self._clock = clock
        self._truth = source.profile.truth(extrapolate=True)
        self.instances: dict[tuple[Phase, int], InstanceShares] = {}
        self._bills: dict[int, _Bill] = {}
        self._ended: dict[int, _Bill] = {}
        self._tried_s = -math.inf

    def make_tracker(self, phase: Phase, instance_id: int) -> InstanceTracker:
        """An instance's state that tells the bills who comes and goes."""
        config, engine = self._source.config, self._source.profile.meta.engine
        budget = config.max_prefill_tokens or engine.max_prefill_tokens
        shares = InstanceShares(phase, self._truth.idle_power_w, budget)
        self.instances[phase, instance_id] = shares
        tracker = self._source.track_by(_BookedTracker, phase, instance_id)
        tracker.shares, tracker.bills, tracker.clock = shares, self, self._clock
        return tracker

    def arrive(self, shares: InstanceShares, request_id: int, input_tokens: int) -> None:
        """A request is at an instance now.

        Args:
            shares: The instance's.
            request_id: Of the request.
            input_tokens: Of its prompt.
        """
        stay = shares.arrive(request_id, self._clock.now_s(), input_tokens)
        bill = self._bills.setdefault(request_id, _Bill())
        if all(known is not stay for _, known in bill.stays):
            bill.stays.append((shares, stay))

    def on_report(self, report: AgentReport) -> None:
        """A reading of a meter has come: settle what can be, and tell what is known."""
        shares = self.instances[report.phase, report.instance_id]
        if report.energy_j is not None and report.energy_at_s is not None:
            shares.on_reading(report.energy_at_s, report.energy_j, report.clock_mhz)
        now_s = self._clock.now_s()
        if not shares.settle(now_s) and now_s - self._tried_s < TRY_S:
            return  # an agent reports each change of its clock, far more often than its meter moves
        self._tried_s = now_s
        for request_id, bill in list(self._ended.items()):
            self._try(request_id, bill, now_s)

    def close(self, request_id: int, told: Told) -> None:
        """A request has ended: tell its energy once it is known, now if no meter counts."""
        now_s = self._clock.now_s()
        bill = self._bills.get(request_id)
        if bill is None:
            told(None)
            return
        if bill.ended_s is None:
            bill.ended_s = now_s
            self._ended[request_id] = bill
            for shares, stay in bill.stays:
                shares.leave(stay.request_id, now_s)
        bill.told.append(told)
        self._try(request_id, bill, now_s)

    @property
    def num_waiting(self) -> int:
        """Requests that have ended and whose energy is not known yet."""
        return len(self._ended)

    def flush(self) -> None:
        """Tell of all that still wait that their energy is not known: the router ends."""
        for bill in list(self._ended.values()):
            for listener in bill.told:
                listener(None)

    def forget(self, request_id: int) -> None:
        """Nobody asks for this one any more."""
        self._bills.pop(request_id, None)
        self._ended.pop(request_id, None)

    def _try(self, request_id: int, bill: _Bill, now_s: float) -> None:
        assert bill.ended_s is not None
        has_meter = any(
            shares.read_s is not None and now_s - shares.read_s < FRESH_S
            for shares, _ in bill.stays
        )
        is_known = all(shares.settled_s >= (stay.until_s or now_s) for shares, stay in bill.stays)
        if has_meter and not is_known and now_s - bill.ended_s < WAIT_S:
            return
        self._ended.pop(request_id, None)
        for _, stay in bill.stays:
            stay.is_told = True
        told, bill.told = bill.told, []
        for listener in told:
            listener(bill.energy_j if has_meter else None)


class _BookedTracker(InstanceTracker):
    """An instance's state whose requests have bills."""

    shares: InstanceShares
    bills: Bills
    clock: RunClock

    def on_assigned(
        self,
        request_id: int,
        arrival_s: float,
        input_tokens: int,
        output_tokens: int | None = None,
    ) -> None:
        super().on_assigned(request_id, arrival_s, input_tokens, output_tokens)
        if self.state.phase == PREFILL:
            self.bills.arrive(self.shares, request_id, input_tokens)

    def on_prefilled(self, request_id: int) -> None:
        super().on_prefilled(request_id)
        if self.state.phase != PREFILL:
            self.bills.arrive(self.shares, request_id, 0)

    def on_finished(self, request_id: int) -> None:
        super().on_finished(request_id)
        self.shares.leave(request_id, self.clock.now_s())

    def on_iteration(self, record: IterationMetrics) -> None:
        super().on_iteration(record)
        self.shares.on_record(record)
