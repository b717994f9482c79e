"""Prefill instance: a first-come-first-served queue, batched up to a token budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from voltana.sim.config import SimConfig
from voltana.sim.engine.instance import Instance
from voltana.sim.engine.logs.exact import RunLog
from voltana.sim.engine.physics.track import GpuTrack
from voltana.sim.engine.request import SimRequest
from voltana.sim.policies.answers import ControllerAnswers
from voltana.sim.policies.base import InstanceState, WaitingRequest


class PrefillInstance(Instance):
    """Runs prompts in arrival order; a prompt that overruns the budget is cut into chunks.

    A batch of unequal prompts is looked up at its effective batch size T² / Σ c·(c + 2p), with T
    the new tokens of the batch, c those of one request and p the part of its prompt done before:
    attention work is quadratic, so this is the number of equal prompts with the same work.
    """

    def __init__(
        self,
        config: SimConfig,
        log: RunLog,
        state: InstanceState,
        answers: ControllerAnswers,
        track: GpuTrack,
        *,
        max_tokens: int,
        hand_over: Callable[[SimRequest, float], None],
    ) -> None:
        """See the class.

        Args:
            config: The run's configuration.
            log: Takes what becomes of requests.
            state: What policies see of this instance; it is kept here.
            answers: The controller, its answers checked.
            track: The GPUs.
            max_tokens: Budget of a batch.
            hand_over: Takes each request whose prompt is done, and the time.
        """
        super().__init__(config, log, state, answers, track)
        self._queue: deque[SimRequest] = deque()
        self._expected: dict[int, SimRequest] = {}
        """They count as waiting and may not start yet."""
        self._batch: list[SimRequest] = []
        """Requests whose prompts end with the running iteration."""
        self._oldest_s = 0.0
        """Earliest arrival in the running batch."""
        self._max_tokens = max_tokens
        self._max_requests = config.max_prefill_requests
        self._sees_next_batch = config.prefill_metrics == "before"
        self._has_record = False
        self._is_held = False
        """At rest with requests in the queue, because the controller waits for more."""
        self._num_holds = 0
        self._hand_over = hand_over
        state.list_waiting = self._list_waiting

    def submit(self, request: SimRequest, now_s: float) -> None:
        """A request has arrived."""
        self.state.num_waiting += 1
        self.state.waiting_tokens += request.input_tokens
        self._enqueue(request, now_s)

    def expect(self, request: SimRequest) -> None:
        """A request has arrived that may not start before `admit`."""
        self.state.num_waiting += 1
        self.state.waiting_tokens += request.input_tokens
        self._expected[request.request_id] = request
        self._num_expected += 1

    def admit(self, request: SimRequest, now_s: float) -> None:
        """It may start now."""
        del self._expected[request.request_id]
        self._num_expected -= 1
        self._enqueue(request, now_s)

    def _enqueue(self, request: SimRequest, now_s: float) -> None:
        self._queue.append(request)
        if self._is_parked and not (self._has_holding and self._holds(now_s)):
            self._wake(now_s)

    def _holds(self, now_s: float) -> bool:
        """Whether the queue waits for more; the first to say so sets the latest start."""
        self.state.now_s = now_s
        hold_s = self.answers.hold_s(self.state)
        was_held, self._is_held = self._is_held, hold_s > 0.0
        if self._is_held and not was_held:
            self._num_holds += 1
            number = self._num_holds
            self.call_at(now_s + hold_s, lambda at_s: self._release(number, at_s))
        return self._is_held

    def _release(self, number: int, now_s: float) -> None:
        if self._is_held and number == self._num_holds:
            self._is_held = False
            self._wake(now_s)

    def _forget_last_iteration(self) -> None:
        self._has_record = False

    def _begin(self, now_s: float) -> None:
        attention = self._form_batch(now_s)
        state = self.state
        effective_batch = self._batch_tokens * self._batch_tokens / attention
        state.effective_batch_size = effective_batch
        if not self._sees_next_batch and self._has_record:
            self._ask_controller(now_s)
        state.last_batch_size = self._batch_size
        state.last_tokens = self._batch_tokens
        state.last_queue_delay_s = now_s - self._oldest_s
        if self._sees_next_batch:
            self._ask_controller(now_s)
        self.track.begin(now_s, effective_batch, self._batch_tokens)

    def _form_batch(self, now_s: float) -> float:
        """Take requests off the queue; returns Σ c·(c + 2p)."""
        budget = self._max_tokens
        self._batch = []
        self._batch_size = 0
        attention = 0.0
        oldest_s = now_s
        while self._queue and budget > 0 and self._batch_size < self._max_requests:
            request = self._queue[0]
            prefix = request.prefilled_tokens
            chunk = min(request.input_tokens - prefix, budget)
            attention += chunk * (chunk + 2 * prefix)
            budget -= chunk
            request.prefilled_tokens = prefix + chunk
            oldest_s = min(oldest_s, request.arrival_s)
            self._batch_size += 1
            if request.prefilled_tokens < request.input_tokens:
                break
            self._batch.append(self._queue.popleft())
        tokens = self._max_tokens - budget
        self._batch_tokens = tokens
        self._oldest_s = oldest_s
        state = self.state
        state.num_waiting -= len(self._batch)
        state.num_running = self._batch_size
        state.waiting_tokens -= tokens
        state.kv_tokens = tokens
        return attention

    def _end(self, now_s: float) -> None:
        state, start_s = self.state, self.run.start_s
        state.last_duration_s = now_s - start_s
        state.ended_batch_size = self._batch_size
        state.ended_tokens = self._batch_tokens
        state.ended_queue_delay_s = start_s - self._oldest_s
        state.num_running = 0
        state.kv_tokens = 0
        self._has_record = True
        for request in self._batch:
            state.open_requests -= 1
            self._hand_over(request, now_s)
        self._batch = []

    def _list_waiting(self) -> list[WaitingRequest]:
        return [r.as_waiting(r.prefilled_tokens) for r in (*self._queue, *self._expected.values())]
