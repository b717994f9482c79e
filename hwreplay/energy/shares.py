"""Divides the energy of one instance among the requests in its batches.

Between two readings of the meter an instance ran some passes and rested in between. Its energy of
that time is divided by time: rest takes its idle power (the profile's, at most what there is), the
passes take what is left, each by its length, and a pass is divided among its requests: equally in
decode, by new tokens in prefill. Nothing is lost: requests, rest and others, whom this router has
not sent, add up to the meter.

Readings and records come late and in any order. A stretch of time is settled once the engine has
spoken of its end, or nobody is there any more, or `LAG_S` later.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from voltana.profiles.engines.sglang_metrics import IterationMetrics, step_time_s
from voltana.sim.policies.base import PREFILL, Phase

LAG_S: Final = 2.0
"""An idle engine speaks once a second."""
SLACK_S: Final = 0.5
"""A record may be heard so much later than its pass's tokens, which came another way."""
QUIET_S: Final = 0.1
"""So long after the last request has left, the record of its last pass has come too."""
STILL_S: Final = 1.0
"""A counter that has not moved for so long is taken at its word; cards' move every 20 to 100 ms."""

KEPT_S: Final = 60.0
"""Passes are kept so long for a reading."""


@dataclass(slots=True, eq=False)
class Stay:
    """A request at an instance, and its share so far."""

    request_id: int
    since_s: float
    left_tokens: int
    """Of its prompt: not in a pass yet."""
    until_s: float | None = None
    energy_j: float = 0.0
    is_told: bool = False
    """Its energy has been told: what is found later is nobody's, so that all told adds up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    start_s: float
    end_s: float
    shares: Sequence[tuple[Stay, float]]
    """With `others` they add up to 1."""
    others: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stretch:
    start_s: float
    end_s: float
    energy_j: float
    clock_mhz: int


class InstanceShares:
    """One instance's energy and who used it."""

    def __init__(
        self, phase: Phase, idle_power_w: Callable[[int], float], max_prefill_tokens: int
    ) -> None:
        """Start without a request or a reading.

        Args:
            phase: What the instance does.
            idle_power_w: Power in W between two passes at a clock in MHz.
            max_prefill_tokens: Token budget of a prefill batch: only a full one cuts a prompt.
        """
        self.requests_j = self.others_j = self.idle_j = 0.0
        self.settled_s = -math.inf
        """Everything up to here has been divided."""
        self.read_s: float | None = None
        """When the meter was last read."""
        self._is_prefill = phase == PREFILL
        self._idle_power_w = idle_power_w
        self._budget_tokens = max_prefill_tokens
        self._stays: dict[int, Stay] = {}
        self._last_j = 0.0
        self._heard_s = -math.inf
        self._previous: IterationMetrics | None = None
        self._passes: deque[_Pass] = deque()
        self._stretches: deque[_Stretch] = deque()

    def arrive(self, request_id: int, at_s: float, input_tokens: int) -> Stay:
        """A request is here from now on: in prefill it queues, in decode it may run.

        Args:
            request_id: Of the request.
            at_s: On the run's clock.
            input_tokens: Of its prompt.
        """
        stay = self._stays.get(request_id)
        if stay is None:
            stay = self._stays[request_id] = Stay(request_id, at_s, input_tokens)
        stay.until_s, stay.left_tokens = None, input_tokens  # it may come a second time
        return stay

    def leave(self, request_id: int, at_s: float) -> None:
        """It is gone; the record of its last pass may still be on its way."""
        stay = self._stays.get(request_id)
        if stay is not None and stay.until_s is None:
            stay.until_s = at_s

    def on_record(self, record: IterationMetrics) -> None:
        """A pass has ended, or the engine says that it rests."""
        previous, self._previous = self._previous, record
        self._heard_s = record.received_s
        start_s = record.received_s - step_time_s(record, previous)
        oldest_s = start_s - SLACK_S
        gone = [s.request_id for s in self._stays.values() if (s.until_s or start_s) < oldest_s]
        for request_id in gone:
            del self._stays[request_id]
        if record.is_heartbeat:
            return
        if self._is_prefill:
            shares, others = self._share_prompts(record)
        else:
            shares, others = self._share_tokens(record)
        self._passes.append(
            _Pass(start_s=start_s, end_s=record.received_s, shares=shares, others=others)
        )
        while self._passes[0].end_s < record.received_s - KEPT_S:
            self._passes.popleft()  # nobody reads the meter

    def on_reading(self, at_s: float, energy_j: float, clock_mhz: int) -> None:
        """The meter's count so far; one that has fallen is a new meter's and began at 0.

        Args:
            at_s: When it was read, on the run's clock.
            energy_j: The count.
            clock_mhz: In force; 0 is unlocked.
        """
        if self.read_s is not None and at_s <= self.read_s:
            return
        start_s = self.read_s
        gained_j = energy_j if energy_j < self._last_j else energy_j - self._last_j
        if start_s is not None and gained_j == 0 and at_s - start_s < STILL_S:
            return
        self.read_s, self._last_j = at_s, energy_j
        if start_s is None:  # what came before the first reading was nobody's that is known
            self.idle_j += gained_j
            self.settled_s = at_s
        else:
            self._stretches.append(
                _Stretch(start_s=start_s, end_s=at_s, energy_j=gained_j, clock_mhz=clock_mhz)
            )

    def settle(self, now_s: float) -> bool:
        """Divide every stretch whose passes are all known by now; returns whether one was."""
        settled_s = self.settled_s
        while self._stretches:
            end_s = self._stretches[0].end_s
            if self._heard_s < end_s and now_s - end_s < LAG_S and not self._is_quiet(now_s):
                break
            self._divide(self._stretches.popleft())
            self.settled_s = end_s
        return self.settled_s > settled_s

    def _is_quiet(self, now_s: float) -> bool:
        """Whether no request is here of whose passes more could be heard."""
        return all(
            stay.until_s is not None and now_s - stay.until_s > QUIET_S
            for stay in self._stays.values()
        )

    def _divide(self, stretch: _Stretch) -> None:
        overlaps = [
            (one, min(one.end_s, stretch.end_s) - max(one.start_s, stretch.start_s))
            for one in self._passes
            if one.start_s < stretch.end_s and one.end_s > stretch.start_s
        ]
        busy_s = sum(overlap_s for _, overlap_s in overlaps)
        idle_j = stretch.energy_j
        if busy_s > 0:
            rest_s = max(stretch.end_s - stretch.start_s - busy_s, 0.0)
            idle_j = min(self._idle_power_w(stretch.clock_mhz) * rest_s, stretch.energy_j)
        self.idle_j += idle_j
        for one, overlap_s in overlaps:
            energy_j = (stretch.energy_j - idle_j) * overlap_s / busy_s
            self.others_j += energy_j * one.others
            for stay, share in one.shares:
                if stay.is_told:
                    self.others_j += energy_j * share
                else:
                    self.requests_j += energy_j * share
                    stay.energy_j += energy_j * share
        while self._passes and self._passes[0].end_s <= stretch.end_s:
            self._passes.popleft()

    def _share_prompts(self, record: IterationMetrics) -> tuple[list[tuple[Stay, float]], float]:
        """The oldest prompts that wait; only a full batch cuts its last one."""
        number, left = record.num_prefill_requests, record.sum_prefill_tokens
        waiting = [stay for stay in self._stays.values() if stay.left_tokens > 0][:number]
        is_full = left >= self._budget_tokens
        done: list[tuple[Stay, int]] = []
        for stay in waiting:
            is_cut = is_full and len(done) == number - 1 and left < stay.left_tokens
            tokens = max(left, 1) if is_cut else stay.left_tokens
            done.append((stay, tokens))
            stay.left_tokens -= tokens
            left = max(left - tokens, 0)
        known = len(done) / number
        total = sum(tokens for _, tokens in done)
        return [(stay, known * tokens / total) for stay, tokens in done], 1.0 - known

    def _share_tokens(self, record: IterationMetrics) -> tuple[list[tuple[Stay, float]], float]:
        """As many requests as the batch had: who left first goes out first, then who came last."""
        number = record.num_decode_requests
        here = [stay for stay in self._stays.values() if stay.since_s < record.received_s]
        if len(here) > number:
            here.sort(key=lambda stay: (-(stay.until_s or math.inf), stay.since_s))
            del here[number:]
        return [(stay, 1.0 / number) for stay in here], 1.0 - len(here) / number
