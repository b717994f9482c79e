"""The live state of an instance that does both phases, from the router's word and the engine's.

A request waits until its prompt is computed, whole or chunk by chunk, and then decodes. What an
iteration computes is known when the plug-in announces it, else when its record has come.
"""

from __future__ import annotations

from collections.abc import Iterator

from voltana.hwreplay.messages.batch_feed import BatchNotice
from voltana.hwreplay.view.open_request import ARRIVING, QUEUED, RUNNING
from voltana.hwreplay.view.tracker import InstanceTracker
from voltana.profiles.engines.sglang_metrics import IterationMetrics
from voltana.sim.policies.base import WaitingRequest


class ColocatedTracker(InstanceTracker):
    """As `InstanceTracker`; `InstanceState` says what the fields mean where both are done."""

    _is_taken = False
    """Whether the prompts of the running iteration have been taken off the queue."""
    ended_chunk = 0, 0
    """Prompts of the iteration that has ended, and their new tokens."""
    _empty_s: float | None = None
    """When the engine's own queue was last seen empty; asked where no router speaks."""

    def on_assigned(
        self,
        request_id: int,
        arrival_s: float,
        input_tokens: int,
        output_tokens: int | None = None,
    ) -> None:
        super().on_assigned(request_id, arrival_s, input_tokens, output_tokens)
        self._count_waiting()
        self._follow_own_counts()

    def on_batch(
        self, num_requests: int, tokens: int, start_s: float, num_waiting: int = 0
    ) -> None:
        """Prompts alone are about to run: decoding stands."""
        state = self.state
        state.last_batch_size = state.last_tokens = 0
        self._count_running()
        self._take_chunk(num_requests, tokens, start_s)

    def on_steps(self, notice: BatchNotice, now_s: float) -> None:
        super().on_steps(notice, now_s)
        state = self.state
        state.num_running, state.kv_tokens = notice.num_requests, notice.tokens
        self._take_chunk(notice.chunk_requests, notice.chunk_tokens, now_s)

    def _end_iteration(self, record: IterationMetrics) -> None:
        state = self.state
        chunk = record.num_prefill_requests, record.sum_prefill_tokens
        if not self._is_taken:
            self._take_chunk(*chunk, record.start_s)
        self._is_taken, self.ended_chunk = False, chunk
        state.chunk_requests = state.chunk_tokens = 0
        state.effective_batch_size = 0.0
        state.ended_queue_delay_s = state.last_queue_delay_s
        decoded = record.num_decode_requests
        self.num_iterations += decoded > 0
        for request in self._open.values():
            if request.stage == ARRIVING:  # its prompt has ended: it decodes from the next one on
                self._join(request)
        state.ended_batch_size = state.last_batch_size = decoded
        state.ended_tokens = state.last_tokens = record.sum_decode_kv_tokens
        if self._has_router:
            self._count_running()
        else:
            state.num_running, state.num_waiting = decoded, record.queued_prefill_requests
            state.kv_tokens = record.sum_decode_kv_tokens + decoded
            state.waiting_tokens = record.queued_prefill_tokens
            self._expect_chunk(record)
        self._follow_own_counts()

    def _expect_chunk(self, record: IterationMetrics) -> None:
        """What the engine has queued is what it computes next, should no plug-in announce it."""
        state, now_s = self.state, record.received_s
        if self._empty_s is None or not record.queued_prefill_requests:
            self._empty_s = now_s
        state.chunk_requests = record.queued_prefill_requests
        state.chunk_tokens = min(record.queued_prefill_tokens, self.max_prefill_tokens)
        state.last_queue_delay_s = state.ended_queue_delay_s = self._longest_wait_s(now_s)

    def _longest_wait_s(self, now_s: float) -> float:
        """No prompt in the engine's queue has waited longer: it came after that was empty."""
        if self._has_router or self._empty_s is None:
            return 0.0
        return max(now_s - self._empty_s, 0.0)

    def _take_chunk(self, num_requests: int, tokens: int, start_s: float) -> None:
        """Take prompts off the queue in order of arrival; only the budget cuts the last one."""
        state, left, oldest_s = self.state, tokens, start_s
        most = self.max_prefill_tokens - state.last_batch_size
        waiting = [r for r in self._open.values() if r.stage == QUEUED][:num_requests]
        for request in waiting:
            if request.first_token_s is None:
                oldest_s = min(oldest_s, request.arrival_s)
            is_cut = request is waiting[-1] and left < request.left_tokens and tokens >= most
            done = left if is_cut else request.left_tokens
            left = max(left - done, 0)
            request.left_tokens -= done
            if not is_cut:
                request.stage = ARRIVING
        self._is_taken = True
        state.chunk_requests, state.chunk_tokens = num_requests, tokens
        state.effective_batch_size = float(num_requests)
        state.last_queue_delay_s = max(start_s - oldest_s, self._longest_wait_s(start_s))
        state.now_s = start_s
        self._count_waiting()
        self._follow_own_counts()

    def _count_running(self) -> None:
        self.state.num_running = sum(r.stage == RUNNING for r in self._open.values())
        self.state.kv_tokens = self._own_kv_tokens()

    def _count_waiting(self) -> None:
        state = self.state
        if not self._has_router:
            return
        waiting = [r for r in self._open.values() if r.stage == QUEUED]
        state.num_waiting = len(waiting)
        state.waiting_tokens = sum(r.left_tokens for r in waiting)

    def _follow_own_counts(self) -> None:
        state = self.state
        state.is_busy = state.num_running > 0 or state.chunk_tokens > 0 or state.num_waiting > 0

    def _rest(self) -> None:
        super()._rest()
        state = self.state
        self._is_taken, self._empty_s = False, state.now_s
        state.chunk_requests = state.chunk_tokens = state.last_batch_size = state.last_tokens = 0
        self._follow_own_counts()

    def _list_waiting(self) -> Iterator[WaitingRequest]:
        return (r.as_waiting(r.left_tokens) for r in self._open.values() if r.stage == QUEUED)
