"""Keeps one instance's `InstanceState` true from what a router knows and what its engine reports.

The router and the agent of an instance each hold one. Requests come and go by `on_assigned`,
`on_prefilled`, `on_first_token`, `on_tokens` and `on_finished`, whose order and completeness the
router vouches for; `on_iteration` brings the engine's own record, which overrules where both speak
of the same thing. Without an engine's records the router's counts alone still hold, and without
a router the engine's: then the queue is the engine's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from voltana.hwreplay.messages.batch_feed import BatchNotice
from voltana.hwreplay.messages.events import Event
from voltana.hwreplay.view.open_request import ARRIVING, QUEUED, RUNNING, OpenRequest, engine_queue
from voltana.profiles.engines.sglang_metrics import IterationMetrics, step_time_s
from voltana.sim.policies.base import PREFILL, InstanceState, Phase, RunningRequest, WaitingRequest


class InstanceTracker:
    """One instance's live state: the fields of `voltana.sim.policies.base.InstanceState`.

    A request at a decode instance counts as waiting, as in the simulator, once its prefill is done
    and the batch or the cache has no room for it: a KV transfer under way is no queue.
    """

    def __init__(
        self,
        phase: Phase,
        instance_id: int,
        *,
        kv_capacity_tokens: int,
        max_prefill_tokens: int,
        max_running_requests: int,
        kv_reserve_tokens: int = 0,
        length_oracle: bool = False,
    ) -> None:
        """Start with an idle, healthy, unlocked instance.

        Args:
            phase: What the instance does.
            instance_id: Index within its phase.
            kv_capacity_tokens: KV cache of the instance.
            max_prefill_tokens: Token budget of one prefill batch.
            max_running_requests: Most requests in a decode batch.
            kv_reserve_tokens: KV kept free per running request when a request joins.
            length_oracle: Show policies the true output lengths.
        """
        self.state = InstanceState(
            instance_id=instance_id, phase=phase, kv_capacity_tokens=kv_capacity_tokens
        )
        self.has_feed = False
        """Whether the engine has sent a record of an iteration."""
        self.num_iterations = 0
        self.last_record: IterationMetrics | None = None
        self._is_prefill = phase == PREFILL
        self._open: dict[int, OpenRequest] = {}
        """Requests here, in order of arrival."""
        self.max_prefill_tokens = max_prefill_tokens
        """Token budget of one prefill batch."""
        self._max_running = max_running_requests
        self._reserve_tokens = max(kv_reserve_tokens, 1)
        self._length_oracle = length_oracle
        self._has_router = False
        self._announced: deque[float] = deque()
        """Queueing delays (s) of the batches that were announced and have not ended."""
        self.state.list_waiting = lambda: list(self._list_waiting())
        self.state.list_running = lambda: list(self._list_running())

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._open

    @property
    def is_announced(self) -> bool:
        """Prefill: a batch was announced and has not ended."""
        return bool(self._announced)

    def arrival_s(self, request_id: int) -> float | None:
        """When a request that is here arrived; None of others."""
        request = self._open.get(request_id)
        return None if request is None else request.arrival_s

    def open_ids(self) -> list[int]:
        """Requests assigned here that have not left, in order of arrival."""
        return list(self._open)

    def on_assigned(
        self,
        request_id: int,
        arrival_s: float,
        input_tokens: int,
        output_tokens: int | None = None,
    ) -> None:
        """The router has chosen this instance; a decode instance's request is in prefill now.

        Args:
            request_id: Of the request.
            arrival_s: On the run's clock.
            input_tokens: Of its prompt.
            output_tokens: Its length, where the policy may know it.
        """
        self._hear_router()
        if request_id in self._open:
            return
        self._open[request_id] = OpenRequest(
            request_id, arrival_s, input_tokens, output_tokens, input_tokens
        )
        state = self.state
        state.open_requests = len(self._open)
        if self._is_prefill:
            state.num_waiting += 1
            state.waiting_tokens += input_tokens
            state.is_busy = True

    def on_prefilled(self, request_id: int) -> None:
        """Its prefill is done: it leaves a prefill instance and comes to a decode instance."""
        if self._is_prefill:
            self.on_finished(request_id)
            return
        request = self._open.get(request_id)
        if request is not None and request.stage == QUEUED:
            request.stage = ARRIVING
            self._count_waiting()

    def on_first_token(self, request_id: int, at_s: float) -> None:
        """The decode instance's stream has begun."""
        request = self._open.get(request_id)
        if request is None or self._is_prefill or request.first_token_s is not None:
            return
        request.first_token_s = at_s
        if request.stage != RUNNING:
            self._join(request)
            if not self.has_feed:
                self.state.num_running += 1
                self.state.kv_tokens += request.input_tokens
            self._count_waiting()
        self._follow_own_counts()

    def on_tokens(self, request_id: int, count: int) -> None:
        """The decode server has streamed `count` more tokens of a request, the first included."""
        request = self._open.get(request_id)
        if request is None or self.has_feed or self._is_prefill:
            return
        request.generated_tokens += count
        self.state.kv_tokens += count
        self._follow_own_counts()

    def on_finished(self, request_id: int) -> None:
        """It has left this instance, however it ended. Unknown requests are ignored."""
        request = self._open.pop(request_id, None)
        if request is None:
            return
        state = self.state
        state.open_requests = len(self._open)
        if self._is_prefill:
            if request.stage == QUEUED:
                state.num_waiting -= 1
                state.waiting_tokens -= request.left_tokens
            state.is_busy = state.num_waiting > 0 or state.num_running > 0
            return
        if request.stage == RUNNING:
            state.num_running = max(state.num_running - 1, 0)
            context = request.input_tokens + self._generated(request)
            state.kv_tokens = max(state.kv_tokens - context, 0)
        if not self._open:
            state.num_running = state.kv_tokens = 0
        self._count_waiting()
        self._follow_own_counts()

    def on_event(self, event: Event) -> None:
        """What the router says of a request at this instance."""
        if event.kind == "assigned":
            self.on_assigned(event.request_id, event.at_s, event.input_tokens, event.output_tokens)
        elif event.kind == "prefilled":
            self.on_prefilled(event.request_id)
        elif event.kind == "first_token":
            self.on_first_token(event.request_id, event.at_s)
        elif event.kind == "finished":
            self.on_finished(event.request_id)
        else:
            self.keep_only(frozenset(event.open_ids))

    def keep_only(self, request_ids: frozenset[int]) -> None:
        """Forget requests that the router no longer counts: their end was missed."""
        self._hear_router()
        for request_id in [r for r in self._open if r not in request_ids]:
            self.on_finished(request_id)

    def on_batch(
        self, num_requests: int, tokens: int, start_s: float, num_waiting: int = 0
    ) -> None:
        """Prefill: a batch is about to run (a plug-in says so before the engine's own record).

        Args:
            num_requests: In the batch.
            tokens: New tokens of the batch.
            start_s: When it starts.
            num_waiting: The engine's queue; counts where no router speaks.
        """
        if not self._has_router:
            self.state.num_waiting = num_waiting
        self._take_batch(num_requests, tokens, start_s)
        self._announced.append(self.state.last_queue_delay_s)
        self.state.now_s = start_s

    def on_steps(self, notice: BatchNotice, now_s: float) -> None:
        """A batch that decodes is about to run."""
        state = self.observe(now_s)
        state.last_batch_size, state.last_tokens = notice.num_requests, notice.tokens

    def on_iteration(self, record: IterationMetrics) -> None:
        """The engine's record of an iteration that has ended, or its idle heartbeat."""
        state = self.state
        state.now_s = record.received_s
        previous, self.last_record = self.last_record, record
        if record.is_heartbeat:
            self._rest()
            return
        self.has_feed = True
        self._end_iteration(record)
        state.last_duration_s = step_time_s(record, previous)

    def _end_iteration(self, record: IterationMetrics) -> None:
        state = self.state
        self.num_iterations += 1
        if self._is_prefill:
            self._end_prefill(record)
            state.ended_batch_size = record.num_prefill_requests
            state.ended_tokens = record.sum_prefill_tokens
        else:
            self._end_decode(record)
            state.ended_batch_size = state.last_batch_size
            state.ended_tokens = state.last_tokens

    def on_clock(self, clock_mhz: int) -> None:
        """The lock in force has changed; 0 is unlocked."""
        self.state.clock_mhz = clock_mhz

    def on_energy(self, energy_j: float) -> None:
        """The energy counter, from 0 at the start of the run."""
        self.state.energy_j = energy_j

    def on_health(self, *, is_healthy: bool) -> None:
        """Whether the instance answers."""
        self.state.is_healthy = is_healthy

    def observe(self, now_s: float) -> InstanceState:
        """The state, with the time of looking in it."""
        self.state.now_s = now_s
        return self.state

    def _end_prefill(self, record: IterationMetrics) -> None:
        state = self.state
        if self._announced:
            state.ended_queue_delay_s = self._announced.popleft()
        else:
            self._take_batch(record.num_prefill_requests, record.sum_prefill_tokens, record.start_s)
            state.ended_queue_delay_s = state.last_queue_delay_s
        state.num_running = 0
        state.kv_tokens = 0
        if not self._has_router:
            state.num_waiting = record.queued_prefill_requests
            state.waiting_tokens = record.queued_prefill_tokens
        state.is_busy = state.num_waiting > 0

    def _take_batch(self, num_requests: int, tokens: int, start_s: float) -> None:
        """Take a batch off the queue in order of arrival, as the engine does.

        All but the last prompt are done whole; the last is cut only if the budget is used up, as
        fewer tokens than a prompt has can also mean that the prefix cache had the rest.
        """
        state = self.state
        left = tokens
        oldest_s = start_s
        waiting = [r for r in self._open.values() if r.stage == QUEUED][:num_requests]
        for position, request in enumerate(waiting):
            oldest_s = min(oldest_s, request.arrival_s)
            is_cut = (
                position == num_requests - 1
                and left < request.left_tokens
                and tokens >= self.max_prefill_tokens
            )
            done = left if is_cut else request.left_tokens
            left = max(left - done, 0)
            request.left_tokens -= done
            state.waiting_tokens -= done
            if not is_cut:
                request.stage = RUNNING
                state.num_waiting -= 1
        state.last_batch_size = state.num_running = num_requests
        state.last_tokens = state.kv_tokens = tokens
        state.last_queue_delay_s = max(start_s - oldest_s, 0.0)
        state.is_busy = True

    def _end_decode(self, record: IterationMetrics) -> None:
        state = self.state
        known = sum(1 for r in self._open.values() if r.stage == RUNNING)
        for request in self._open.values():
            if known >= record.num_decode_requests:
                break
            if request.stage == ARRIVING:
                self._join(request)
                request.counted_at -= 1  # this iteration was its first
                known += 1
        state.last_batch_size = record.num_decode_requests
        state.last_tokens = record.sum_decode_kv_tokens
        state.num_running = record.num_decode_requests
        if self._has_router:
            state.num_running = min(state.num_running, len(self._open))
        is_known = state.num_running == record.num_decode_requests
        state.kv_tokens = (
            record.sum_decode_kv_tokens + record.num_decode_requests
            if is_known
            else self._own_kv_tokens()
        )
        self._count_waiting()
        if not self._has_router:
            state.num_waiting, state.waiting_tokens = engine_queue(
                record, state, self._max_running, self._reserve_tokens
            )
        state.is_busy = state.num_running > 0

    def _join(self, request: OpenRequest) -> None:
        """Into the decode batch; with an engine's records its tokens are counted by iteration."""
        request.stage = RUNNING
        request.counted_at = self.num_iterations

    def _generated(self, request: OpenRequest) -> int:
        if not self.has_feed or request.stage != RUNNING:
            return request.generated_tokens
        return request.generated_tokens + self.num_iterations - request.counted_at + 1

    def _own_kv_tokens(self) -> int:
        return sum(
            r.input_tokens + self._generated(r) for r in self._open.values() if r.stage == RUNNING
        )

    def _count_waiting(self) -> None:
        """Decode: who has come and finds no room."""
        state = self.state
        state.num_waiting = state.waiting_tokens = 0
        free = state.kv_capacity_tokens - state.kv_tokens
        for request in self._open.values():
            if request.stage != ARRIVING:
                continue
            reserve = self._reserve_tokens * (state.num_running + 1)
            has_slot = state.num_running < self._max_running
            has_room = state.num_running == 0 or request.input_tokens + reserve <= free
            if state.num_waiting or not (has_slot and has_room):
                state.num_waiting += 1
                state.waiting_tokens += request.input_tokens

    def _follow_own_counts(self) -> None:
        state = self.state
        if not self.has_feed and not self._is_prefill:
            state.last_batch_size = state.num_running
            state.last_tokens = state.kv_tokens
        if not self._is_prefill:
            state.is_busy = state.num_running > 0

    def _hear_router(self) -> None:
        """From the first word on, who is here is the router's to say."""
        if not self._has_router:
            self._has_router = True
            self.state.num_waiting = self.state.waiting_tokens = 0

    def _rest(self) -> None:
        state = self.state
        self._announced.clear()  # of batches whose records were lost
        state.num_running = 0
        state.kv_tokens = 0
        if not self._has_router:
            state.num_waiting = state.waiting_tokens = 0
        state.is_busy = self._is_prefill and state.num_waiting > 0
        if not self._is_prefill:
            self._count_waiting()

    def _list_waiting(self) -> Iterator[WaitingRequest]:
        stage = QUEUED if self._is_prefill else ARRIVING
        skipped = 0 if self._is_prefill else self._num_arriving() - self.state.num_waiting
        for request in self._open.values():
            if request.stage == stage:
                if skipped:
                    skipped -= 1
                    continue
                yield request.as_waiting(
                    request.left_tokens if self._is_prefill else request.input_tokens
                )

    def _num_arriving(self) -> int:
        return sum(1 for r in self._open.values() if r.stage == ARRIVING)

    def _list_running(self) -> Iterator[RunningRequest]:
        for request in self._open.values():
            if request.stage == RUNNING:
                generated = self._generated(request)
                yield request.as_running(generated, length_oracle=self._length_oracle)
