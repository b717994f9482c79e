"""Decode that jumps over whole runs of equal iterations, exactly.

Between a join, a leave, a clock change and a knot of the table a batch is fixed and its context
grows by one token a request, so that iteration k of a run lasts first_s + k·step_s at
first_w + k·step_w: time, energy and token gaps have closed forms. A run ends where the next
request finishes, where the controller might decide anew (it says so: `steady_iterations`), where
the table's linear piece or the KV cache ends. A request that arrives inside a run cuts it at the
end of the iteration then running.

With noise iteration k has a multiplier of its own, known beforehand: the closed forms become
running sums over the block of numbers that it was drawn in, and a run ends with its block, or where
a sag begins or ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush

from sim.config import SimConfig
from sim.engine.decode import DecodeInstance
from sim.engine.log import RunLog
from sim.engine.noise import BLOCK, IterationNoise, Multipliers
from sim.engine.request import SimRequest
from sim.engine.track import GpuTrack
from sim.policies.answers import ControllerAnswers
from sim.policies.base import Controller, InstanceState, RunningRequest


class CoalescedDecode(DecodeInstance):
    """A `DecodeInstance` with the same results and fewer steps."""

    def __init__(
        self,
        config: SimConfig,
        log: RunLog,
        state: InstanceState,
        answers: ControllerAnswers,
        track: GpuTrack,
        *,
        max_running: int,
    ) -> None:
        super().__init__(config, log, state, answers, track, max_running=max_running)
        self.on_cut: Callable[[DecodeInstance, float], None] = _no_driver
        """The driver's: the running run ends earlier than `step` said, at this instant."""
        self.may_coalesce = (
            type(answers.controller).steady_iterations is not Controller.steady_iterations
        )
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
        self._multipliers: Multipliers | None = None
        """Of the block that the run's iterations lie in; None: there is no noise."""
        self._at = 0
        """Place in the block of the first iteration that is still to be booked."""

    def submit(self, request: SimRequest, now_s: float) -> None:
        super().submit(request, now_s)
        if self._left > 1:
            self._cut(now_s)

    def at_boundary(self, action: Callable[[float], None], now_s: float) -> None:
        super().at_boundary(action, now_s)
        if self._left > 1:
            self._cut(now_s)

    def _cut(self, now_s: float) -> None:
        """End the run with the iteration that runs now."""
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
        noise = self.track.noise
        if noise is not None:
            if noise.sag_change_s <= now_s:
                noise.move_to(now_s)
            self._first_s *= noise.slowness
            self._step_s *= noise.slowness
            self._multipliers = noise.multipliers(self.track.clock_mhz, batch_size)
            self._at = noise.at
        further = 0
        # a changed clock shows in the state when its first iteration has ended
        if self.may_coalesce and state.clock_mhz == self.track.clock_mhz:
            further = self._further_iterations(batch_size, tokens, end_tokens)
        self._left, self._seen, self._tokens = further + 1, 0, tokens
        if noise is not None and further:
            self._end_with_noise(now_s, noise)
        return now_s + self._elapsed_s(self._left)

    def _end_with_noise(self, now_s: float, noise: IterationNoise) -> None:
        """End the run with the block of multipliers, or with what begins before a sag changes."""
        self._left = min(self._left, BLOCK - noise.at)
        if now_s + self._elapsed_s(self._left - 1) >= noise.sag_change_s:
            self._left = self._ended_before(noise.sag_change_s) + 1

    def _further_iterations(self, batch_size: int, tokens: int, end_tokens: float) -> int:
        """How many iterations after this one are sure to lie on its line."""
        if self._decision_mhz != self.track.target_mhz:
            return 0
        # what a retraction has freed may let the next one in
        if self.state.num_waiting and self._has_room(tokens + batch_size):
            return 0
        # the next calls see this run's iterations: each the one to come, or the one before it
        seen_tokens = tokens if self._sees_next_batch else tokens - batch_size
        steady: Callable[[InstanceState, int, int], object] = self.controller.steady_iterations
        try:
            answer = steady(self.state, batch_size, seen_tokens)
        except Exception as error:  # noqa: BLE001 (a policy may raise anything)
            self.answers.fail("steady_iterations", error)
        if type(answer) is int and answer >= 0:  # as good as always: no call to check it
            further = answer
        else:
            further = self.answers.steady_iterations(answer)
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
        if since_s < first_s and self._multipliers is None:
            return 0
        # k·first + k(k-1)/2·step = since, in the form that does not cancel
        half = first_s - 0.5 * step_s
        root = math.sqrt(max(half * half + 2.0 * step_s * since_s, 0.0))
        count = min(max(int(2.0 * since_s / (half + root)), 0), self._left - 1)
        if self._multipliers is None:
            return count
        while count < self._left - 1 and self._elapsed_s(count + 1) <= since_s:
            count += 1
        while count > 0 and self._elapsed_s(count) > since_s:
            count -= 1
        return count

    def _elapsed_s(self, count: int) -> float:
        """What the first `count` iterations of the run last."""
        multipliers = self._multipliers
        if multipliers is None:
            return count * self._first_s + self._step_s * (0.5 * count * (count - 1))
        sums, k_sums = multipliers[1], multipliers[2]
        at = self._at
        total = sums[at + count] - sums[at]
        return total * self._first_s + self._step_s * (k_sums[at + count] - k_sums[at] - at * total)

    def _show(self, count: int) -> tuple[float, float]:
        """Let the state show that so many iterations of the run have ended; their time, energy."""
        first_s, step_s, first_w, step_w = self._first_s, self._step_s, self._first_w, self._step_w
        multipliers = self._multipliers
        last_s = first_s + (count - 1) * step_s
        if multipliers is None:  # sums of 1, k and k² over the iterations
            ones, pairs = float(count), 0.5 * count * (count - 1)
            squares = pairs * (2 * count - 1) / 3.0
        else:
            ones, pairs, squares = _sums(multipliers, self._at, count)
            last_s *= multipliers[0][self._at + count - 1]
        energy_j = ones * first_w * first_s + (first_w * step_s + step_w * first_s) * pairs
        energy_j += step_w * step_s * squares
        state, track, tokens = self.state, self.track, self._tokens
        batch_size = state.num_running
        state.energy_j = track.energy_j + energy_j
        state.kv_tokens = tokens + count * batch_size
        state.last_batch_size = state.ended_batch_size = batch_size
        state.last_tokens = state.ended_tokens = tokens + (count - 1) * batch_size
        state.last_duration_s = last_s
        track.power_w = first_w + count * step_w
        self._seen = count
        return ones * first_s + step_s * pairs, energy_j

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
        noise = track.noise
        if noise is not None:
            self._at = noise.at = noise.at + count
            if noise.at == BLOCK:
                noise.refill()

    def _log_gaps(self, count: int) -> None:
        log, batch_size, first_s, step_s = (
            self.log, self.state.num_running, self._first_s, self._step_s,
        )  # fmt: skip
        skipped = 0
        if self._joiners:
            gaps = batch_size - len(self._joiners)
            one_s = first_s
            if self._multipliers is not None:
                one_s *= self._multipliers[0][self._at]
            self._first_tokens(self._start_s + one_s)
            if gaps:
                log.gaps(one_s, 0.0, 1, gaps)
            if count == 1:
                return
            skipped = 1
        if self._multipliers is None:
            log.gaps(first_s + skipped * step_s, step_s, count - skipped, batch_size)
        else:
            at = self._at
            part = self._multipliers[0][at + skipped : at + count]
            log.noisy_gaps(first_s + skipped * step_s, step_s, batch_size, part)

    def _keep_rows(self, count: int) -> None:
        state, rows = self.state, self.iteration_rows
        start_s, tokens, clock = self._start_s, self._tokens, state.clock_mhz
        assert rows is not None
        for k in range(count):
            time_s, power_w = self._first_s + k * self._step_s, self._first_w + k * self._step_w
            if self._multipliers is not None:
                time_s *= self._multipliers[0][self._at + k]
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


def _sums(multipliers: Multipliers, at: int, count: int) -> tuple[float, float, float]:
    """Sums of m, k·m and k²·m over `count` multipliers from `at`, k from 0."""
    _, ones, pairs, squares = multipliers
    end = at + count
    total = ones[end] - ones[at]
    shifted = pairs[end] - pairs[at]
    twice = squares[end] - squares[at]
    return total, shifted - at * total, twice - at * (2.0 * shifted - at * total)


_SAME_INSTANT_S = 1e-12
"""Relative; sums of iteration times are rounded, so that equal instants may differ by this."""


def _no_driver(instance: DecodeInstance, now_s: float) -> None:
    raise AssertionError(f"decode {instance.state.instance_id} has no driver")
