"""Decode that jumps over whole runs of equal iterations, exactly.

Between a join, a leave, a clock change and a knot of the table a batch is fixed and its context
grows by one token a request, so that iteration k of a run lasts first_s + k·step_s at
first_w + k·step_w: time, energy and token gaps have closed forms. A run ends where the next
request finishes, where the controller might decide anew (it says so: `steady_iterations`), where
the table's linear piece or the KV cache ends. A request that arrives inside a run cuts it at the
end of the iteration then running.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush

from profiles.step_model import StepModel
from sim.config import SimConfig
from sim.engine.decode import DecodeInstance
from sim.engine.log import RunLog
from sim.engine.request import SimRequest
from sim.policies.base import Controller, InstanceState, RunningRequest


class CoalescedDecode(DecodeInstance):
    """A `DecodeInstance` with the same results and fewer steps."""

    def __init__(
        self,
        config: SimConfig,
        log: RunLog,
        state: InstanceState,
        controller: Controller,
        truth: StepModel,
        *,
        max_running: int,
    ) -> None:
        super().__init__(config, log, state, controller, truth, max_running=max_running)
        self.on_cut: Callable[[DecodeInstance, float], None] = _no_driver
        """The driver's: the running run ends earlier than `step` said, at this instant."""
        self.may_coalesce = type(controller).steady_iterations is not Controller.steady_iterations
        self._finish_order: list[int] = []
        """Heap of the keys of `_finishing`, with some that are gone."""
        self._left = 0
        """Iterations of the run still to be booked; 0 when the track holds a single one."""
        self._seen = 0
        """How many of those the state already shows as ended, because somebody looked."""
        self._tokens = 0
        """Context of the batch in the first of them."""
        self._first_s = self._step_s = 0.0
        self._first_w = self._step_w = 0.0

    def submit(self, request: SimRequest, now_s: float) -> None:
        super().submit(request, now_s)
        if self._left > 1:
            further = self._ended_before(now_s)
            if further + 1 < self._left:
                self._left = further + 1
                self.on_cut(self, self._start_s + self._elapsed_s(self._left))

    def sync(self, now_s: float) -> None:
        if self._left > 1:
            count = self._ended_before(now_s)
            if count != self._seen:
                self._show(count)
        else:
            super().sync(now_s)

    def refresh(self, now_s: float) -> None:
        if self.state.is_busy:
            self.sync(now_s)
        else:
            super().refresh(now_s)

    def catch_up(self, now_s: float) -> None:
        self.refresh(now_s)
        self._book_seen()

    def settle(self, now_s: float) -> None:
        if self._left > 0:  # the run of the simulation ends inside this one
            count = self._ended_before(now_s)
            if count:
                self._book(count)
            elapsed_s = now_s - self._start_s
            self.track.book_run(1, elapsed_s, elapsed_s * self._first_w)
            self.state.energy_j = self.track.energy_j
        else:
            super().settle(now_s)

    def _begin(self, now_s: float) -> float:
        self._form_batch(now_s)
        state = self.state
        batch_size, tokens = state.num_running, state.kv_tokens
        line = self.track.begin_line(now_s, batch_size, tokens)
        if line is None:
            self._left = 0
            return self.track.begin_iteration(now_s, batch_size, tokens)
        end_tokens, self._first_s, time_slope, self._first_w, power_slope = line
        self.track.power_w = self._first_w
        self._step_s, self._step_w = time_slope * batch_size, power_slope * batch_size
        further = 0
        # a changed clock shows in the state when its first iteration has ended
        if self.may_coalesce and state.clock_mhz == self.track.clock_mhz:
            further = self._further_iterations(batch_size, tokens, end_tokens)
        self._left, self._seen, self._tokens = further + 1, 0, tokens
        return now_s + self._elapsed_s(self._left)

    def _further_iterations(self, batch_size: int, tokens: int, end_tokens: float) -> int:
        """How many iterations after this one are sure to lie on its line."""
        if self._decision_mhz != self.track.target_mhz:
            return 0
        # the next calls see this run's iterations: each the one to come, or the one before it
        seen_tokens = tokens if self._sees_next_batch else tokens - batch_size
        further = self.controller.steady_iterations(self.state, batch_size, seen_tokens)
        if further == 0:
            return 0
        order = self._finish_order
        while order[0] not in self._finishing:
            heappop(order)
        further = min(further, order[0] - self._iteration, int(end_tokens - tokens) // batch_size)
        if batch_size > 1:
            room = (self.state.kv_capacity_tokens - tokens) // batch_size - 1
            if room < further:
                return max(room, 0)
        return further

    def _finish_iteration(self, now_s: float) -> None:
        if self._left == 0:
            super()._finish_iteration(now_s)
            return
        self._book(self._left)
        self._iteration -= 1  # none is running
        finished = self._finishing.pop(self._iteration, None)
        if finished is not None:
            self._leave(finished, now_s)

    def _ended_before(self, now_s: float) -> int:
        """Iterations of the run that have ended, never its last.

        One that ends at this very instant is yet to: decode comes last, so that a router still
        sees it run, a joiner joins at its end, and a run's limit cuts it.
        """
        first_s, step_s = self._first_s, self._step_s
        since_s = now_s - self._start_s - _SAME_INSTANT_S * max(1.0, now_s)
        if since_s < first_s:
            return 0
        # k·first + k(k-1)/2·step = since, in the form that does not cancel
        half = first_s - 0.5 * step_s
        root = math.sqrt(max(half * half + 2.0 * step_s * since_s, 0.0))
        return min(int(2.0 * since_s / (half + root)), self._left - 1)

    def _elapsed_s(self, count: int) -> float:
        """What the first `count` iterations of the run last."""
        return count * self._first_s + self._step_s * (0.5 * count * (count - 1))

    def _show(self, count: int) -> tuple[float, float]:
        """Let the state show that so many iterations of the run have ended; their time, energy."""
        first_s, step_s, first_w, step_w = self._first_s, self._step_s, self._first_w, self._step_w
        pairs = 0.5 * count * (count - 1)
        energy_j = count * first_w * first_s + (first_w * step_s + step_w * first_s) * pairs
        energy_j += step_w * step_s * pairs * (2 * count - 1) / 3.0
        state, track, tokens = self.state, self.track, self._tokens
        batch_size = state.num_running
        state.energy_j = track.energy_j + energy_j
        state.kv_tokens = tokens + count * batch_size
        state.last_batch_size = state.ended_batch_size = batch_size
        state.last_tokens = state.ended_tokens = tokens + (count - 1) * batch_size
        state.last_duration_s = first_s + (count - 1) * step_s
        track.power_w = first_w + count * step_w
        self._seen = count
        return count * first_s + step_s * pairs, energy_j

    def _book_seen(self) -> None:
        if self._seen:
            self._book(self._seen)

    def _book(self, count: int) -> None:
        """Book whole iterations from the front of the run."""
        if self.iteration_rows is not None:
            self._keep_rows(count)
        self._log_gaps(count)
        state, track = self.state, self.track
        elapsed_s, energy_j = self._show(count)
        track.book_run(count, elapsed_s, energy_j)
        state.energy_j = track.energy_j
        state.clock_mhz = track.clock_mhz
        self._has_record = True
        self._iteration += count
        self._left -= count
        self._seen = 0
        self._tokens = state.kv_tokens
        self._first_s += count * self._step_s
        self._first_w = track.power_w
        self._start_s += elapsed_s

    def _log_gaps(self, count: int) -> None:
        log, batch_size, first_s, step_s = (
            self.log, self.state.num_running, self._first_s, self._step_s,
        )  # fmt: skip
        if self._joiners:
            gaps = batch_size - len(self._joiners)
            self._first_tokens(self._start_s + first_s)
            if gaps:
                log.gaps(first_s, 0.0, 1, gaps)
            if count == 1:
                return
            first_s += step_s
            count -= 1
        log.gaps(first_s, step_s, count, batch_size)

    def _keep_rows(self, count: int) -> None:
        state, rows = self.state, self.iteration_rows
        start_s, tokens, clock = self._start_s, self._tokens, state.clock_mhz
        assert rows is not None
        for k in range(count):
            time_s, power_w = self._first_s + k * self._step_s, self._first_w + k * self._step_w
            rows.append(
                (state.phase, state.instance_id, start_s, time_s, state.num_running, tokens,
                 clock, power_w * time_s)
            )  # fmt: skip
            start_s += time_s
            tokens += state.num_running
            clock = self.track.clock_mhz

    def _list_running(self) -> list[RunningRequest]:
        self._book_seen()  # for the tokens that they have
        return super()._list_running()

    def _file(self, request: SimRequest) -> None:
        filed = self._finishing.get(request.finish_iteration)
        if filed is None:
            self._finishing[request.finish_iteration] = [request]
            heappush(self._finish_order, request.finish_iteration)
        else:
            filed.append(request)


_SAME_INSTANT_S = 1e-12
"""Relative; sums of iteration times are rounded, so that equal instants may differ by this."""


def _no_driver(instance: DecodeInstance, now_s: float) -> None:
    raise AssertionError(f"decode {instance.state.instance_id} has no driver")
