"""throttLL'eM: project the batch to its end, and lower the clock as far as every promise holds."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from voltana.sim.policies.base import (
    DECODE,
    Controller,
    IdlePlan,
    InstanceState,
    PolicyContext,
    RunningRequest,
)
from voltana.sim.policies.parts.clocks import clocks_above_floor, first_clock_mhz
from voltana.sim.policies.spec import parameter

_SLACK_S: Final = 1e-9
"""Rounding of a sum of times is not a missed deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottllmParameters:
    """Parameters of `throttllm`; the source's predictor error and safety factor are not known."""

    predicted_tokens: int = parameter(
        256, "output length expected of a request whose length no oracle tells (ours)", low=1
    )
    max_tokens: int = parameter(
        2048, "length expected of a request that has outrun its prediction (ours)", low=1
    )
    safety_ratio: float = parameter(1.0, "factor on predicted lengths (ours)", low=1.0)
    e2e_s: float | None = parameter(
        None, "promise from arrival to last token; none: TTFT + (length - 1) x ITL", low=0.001
    )
    idle_s: float = parameter(
        5.0, "idle time before the profile's lowest clock is locked (ours)", low=0
    )
    frequencies_mhz: tuple[int, ...] = parameter(
        (), "clocks to choose from; none: all from the phase's clock of least energy upwards (ours)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Iterations of a projection between two departures: one batch, a context that grows."""

    num_iterations: int
    batch_size: int
    first_tokens: int
    last_tokens: int
    deadline_s: float
    """The earliest deadline of the requests that leave at its end."""


class Throttllm(Controller):
    """The lowest clock whose projected iterations keep the ITL and every request's deadline.

    Decode, whenever the batch has changed or a request has outrun its length: the scoreboard gives
    batch B[k] and context KV[k] of every iteration k to come, from each request's tokens so far
    and its length: the true one with a length oracle, else `predicted_tokens`·safety, and
    `max_tokens` once outrun. A clock is feasible if T(f, B[k], KV[k]) <= ITL promise for all k, and
    the sum of T up to each departure ends before that request's deadline, arrival + e2e. The
    lowest feasible clock by binary search; the top one if none is, if a request is lost (late even
    at the top clock), or if requests wait (their admission is the engine's here, and a fast batch
    makes room).
    Prefill: the lowest clock with delay + T within what the TTFT promise leaves for prefill, and
    the same for the oldest that waits behind it, with T of the whole queue on top; the source runs
    both phases on one instance, so this rule is ours.

    Source: throttLL'eM, arXiv 2408.05235. Its admission control, which keeps a request
    queued that would break the projection, is the engine's matter and missing here: near
    saturation the batch outgrows what was projected. Its switch cost of about 200 ms is the
    driver's actuation latency.
    """

    __slots__ = (
        "_clocks", "_context", "_decision_mhz", "_expected_kv", "_next_departure", "_parameters",
        "_seen_running", "_seen_waiting",
    )  # fmt: skip

    def __init__(self, parameters: ThrottllmParameters, context: PolicyContext) -> None:
        self._parameters = parameters
        self._context = context
        self._clocks = clocks_above_floor(context, parameters.frequencies_mhz, "throttllm")
        self._decision_mhz = self._clocks[-1]
        self._seen_running = self._seen_waiting = -1
        self._expected_kv = -1
        self._next_departure = 0

    def initial_clock_mhz(self) -> int:
        return self._clocks[-1]

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return IdlePlan(after_s=self._parameters.idle_s, clock_mhz=self._context.clocks_mhz[0])

    def decide(self, state: InstanceState) -> int:
        if self._context.phase == DECODE:
            if self._has_changed(state):
                self._decision_mhz = self._for_decode(state)
        elif state.last_batch_size > 0:
            self._decision_mhz = self._for_prefill(state)
        return self._decision_mhz

    def _has_changed(self, state: InstanceState) -> bool:
        """Whether the projection of the last call no longer describes the batch."""
        running, waiting, kv_tokens = state.num_running, state.num_waiting, state.kv_tokens
        same = (running, waiting, kv_tokens) == (
            self._seen_running, self._seen_waiting, self._expected_kv,
        )  # fmt: skip
        self._seen_running, self._seen_waiting = running, waiting
        self._expected_kv = kv_tokens + running
        self._next_departure -= 1
        return not same or self._next_departure <= 0

    def _for_decode(self, state: InstanceState) -> int:
        top_mhz = self._clocks[-1]
        segments = self.project(state.list_running(), state.kv_tokens)
        self._next_departure = segments[0].num_iterations if segments else 0

        def fits(clock: int) -> bool:
            return self._is_feasible(clock, segments, state.now_s)

        if state.num_waiting > 0 or not fits(top_mhz):
            return top_mhz
        return self._clocks[bisect_left(self._clocks[:-1], True, key=fits)]

    def project(self, running: Sequence[RunningRequest], kv_tokens: int) -> list[Segment]:
        """The scoreboard: the batch from now on as requests leave it, none joining."""
        ends = sorted(
            ((self._left_tokens(r), r.input_tokens + r.generated_tokens, self._deadline_s(r))
             for r in running),
        )  # fmt: skip
        segments: list[Segment] = []
        batch, tokens, done, at = len(ends), kv_tokens, 0, 0
        while at < len(ends):
            left, deadline_s = ends[at][0], ends[at][2]
            count = left - done
            last = tokens + (count - 1) * batch
            leaving = 0
            freed = 0
            while at < len(ends) and ends[at][0] == left:
                deadline_s = min(deadline_s, ends[at][2])
                freed += ends[at][1] + left
                leaving += 1
                at += 1
            segments.append(
                Segment(
                    num_iterations=count, batch_size=batch, first_tokens=tokens, last_tokens=last,
                    deadline_s=deadline_s,
                )
            )  # fmt: skip
            tokens = max(last + batch - freed, 0)
            batch -= leaving
            done = left
        return segments

    def _length_tokens(self, request: RunningRequest) -> int:
        if request.output_tokens is not None:
            return request.output_tokens
        p = self._parameters
        predicted = round(p.predicted_tokens * p.safety_ratio)
        if request.generated_tokens < predicted:
            return predicted
        return max(p.max_tokens, request.generated_tokens + 1)

    def _left_tokens(self, request: RunningRequest) -> int:
        return max(self._length_tokens(request) - request.generated_tokens, 1)

    def _deadline_s(self, request: RunningRequest) -> float:
        c, e2e_s = self._context, self._parameters.e2e_s
        if e2e_s is None:
            e2e_s = c.slo_ttft_s + (self._length_tokens(request) - 1) * c.slo_itl_s
        return request.arrival_s + e2e_s

    def _is_feasible(self, clock_mhz: int, segments: Sequence[Segment], now_s: float) -> bool:
        predict_s, slo_s = self._context.predictor.predict_s, self._context.slo_itl_s
        # where every iteration may take the whole promise, no deadline can be missed
        loosest_s, is_loose = now_s, True
        for s in segments:
            loosest_s += s.num_iterations * slo_s
            is_loose &= loosest_s <= s.deadline_s
        at_s = now_s
        for s in segments:
            last_s = predict_s(DECODE, clock_mhz, s.batch_size, s.last_tokens)
            if last_s > slo_s:
                return False
            if is_loose:
                continue
            first_s = predict_s(DECODE, clock_mhz, s.batch_size, s.first_tokens)
            at_s += 0.5 * (first_s + last_s) * s.num_iterations
            if at_s > s.deadline_s + _SLACK_S:
                return False
        return True

    def _for_prefill(self, state: InstanceState) -> int:
        c = self._context
        oldest_s = 0.0
        if state.num_waiting > 0:
            waiting = state.list_waiting()
            oldest_s = max((state.now_s - r.arrival_s for r in waiting), default=0.0)

        def fits(clock: int) -> bool:
            predict_s = c.predictor.predict_s
            time_s = predict_s(c.phase, clock, state.last_batch_size, state.last_tokens)
            if state.last_queue_delay_s + time_s > c.prefill_budget_s:
                return False
            if state.num_waiting == 0:
                return True
            behind_s = predict_s(c.phase, clock, state.num_waiting, state.waiting_tokens)
            return oldest_s + time_s + behind_s <= c.prefill_budget_s

        return first_clock_mhz(self._clocks, fits)
