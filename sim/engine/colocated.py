"""Colocated instance: prompts and decoding on the same GPUs, at one clock."""

from __future__ import annotations

import dataclasses

from voltana.sim.config import SimConfig
from voltana.sim.engine.decode import DecodeInstance
from voltana.sim.engine.logs.exact import RunLog
from voltana.sim.engine.physics.mixed import MixedTrack
from voltana.sim.engine.request import SimRequest
from voltana.sim.policies.answers import ControllerAnswers
from voltana.sim.policies.base import InstanceState, WaitingRequest
from voltana.sim.records import InstanceRecord


class ColocatedInstance(DecodeInstance):
    """Decodes as `DecodeInstance` does, and computes prompts in chunks in between or beside.

    Prefill makes the first token: at the end of the iteration that ends its prompt a request has
    it, and decodes from the next one on. What an iteration does is up to `colocated_order`:

    - "sglang": while a prompt may run, prompts alone; decoding stands.
    - "sglang-mixed": a chunk runs beside decoding, each running request taking a token of the
      budget. Where the cache has no room for a token each, decoding stands.
    - "vllm": as mixed, but decoding goes first: where the cache has no room, requests are put back
      before any prompt is looked at, and none is let in.

    KV cache: a prompt that begins needs room for all of it and `kv_reserve_tokens` for everybody.
    Who is retracted is decode's rule, under "vllm" the latest joiner, and it then comes back first.
    Its cache is dropped: prompt and tokens so far are a prompt to compute again.
    """

    def __init__(
        self,
        config: SimConfig,
        log: RunLog,
        state: InstanceState,
        answers: ControllerAnswers,
        track: MixedTrack,
        *,
        max_running: int,
        max_tokens: int,
    ) -> None:
        """See the class.

        Args:
            config: As of `DecodeInstance`, and so are the others.
            log: Takes what becomes of requests.
            state: What policies see.
            answers: The controller.
            track: The GPUs.
            max_running: Requests that the engine runs at once, prompts included.
            max_tokens: Budget of an iteration, a running request being one token of it.
        """
        super().__init__(config, log, state, answers, track, max_running=max_running)
        self._mixed = track
        self._max_tokens = max_tokens
        self._max_requests = config.max_prefill_requests
        self._stands = config.colocated_order in (None, "sglang")
        self._decodes_first = config.colocated_order == "vllm"
        self._first_token_here = False
        self._sees_next_batch = True
        self._has_holding = False
        self._partial: SimRequest | None = None
        """A prompt of which a part is computed; it goes on before all others."""
        self._ending: list[SimRequest] = []
        """Requests whose prompts end with the running iteration."""
        self._num_decoding = 0
        """Requests that the running iteration gives a token."""
        self._oldest_s = 0.0
        """Earliest arrival among those that the running iteration's chunk brings a first token."""
        self._token_s = 0.0
        """End of the latest iteration that decoded."""
        self._owed: dict[float, int] = {}
        """Running requests by the instant of their newest token."""
        self._has_late = False
        """Whether a running request has its newest token from before this run began."""
        self._computed_tokens = 0

    def record(self) -> InstanceRecord:
        return dataclasses.replace(super().record(), computed_tokens=self._computed_tokens)

    def has_room(self, kv_tokens: int) -> bool:
        """Whether the first in the queue may begin its prompt beside all who are here."""
        state = self.state
        here = state.num_running + self._num_begun
        if here == 0:
            return True
        if here >= self._most:
            return False
        needed = self._new_tokens((self._retracted or self.waiting)[0])
        reserve = self._reserve_tokens * (here + 1)
        return kv_tokens + self._held_tokens + needed + reserve <= state.kv_capacity_tokens

    def _new_tokens(self, request: SimRequest) -> int:
        """Memory that a prompt needs which begins now, beside what is in use."""
        return request.input_tokens + request.generated_tokens

    def least_far(self) -> SimRequest:
        if self._decodes_first:
            return next(r for r in reversed(self._join_order) if r.is_running)
        return super().least_far()

    def retract(self, request: SimRequest, now_s: float) -> None:
        newest_s = max(request.last_token_s, self._token_s)
        super().retract(request, now_s)
        request.last_token_s = newest_s
        self._owed[newest_s] -= 1
        # its newest token has yet to be computed too, and everything before it
        request.generated_tokens += 1
        self.state.waiting_tokens += 1
        request.prefilled_tokens = 0
        if self._decodes_first:
            self._retracted.appendleft(self._retracted.pop())

    def _forget_last_iteration(self) -> None:
        super()._forget_last_iteration()
        self.state.last_duration_s = 0.0

    def _begin(self, now_s: float) -> None:
        self._form_batch(now_s)
        state, track, run = self.state, self._mixed, self.run
        batch_size = self._batch_size = self._num_decoding
        tokens = self._batch_tokens = state.kv_tokens if batch_size else 0
        self._shown = self._reported = 0
        self._has_late = self._owed.get(now_s) != batch_size
        track.take_chunk(state.effective_batch_size, state.chunk_tokens)
        track.begin(now_s, batch_size, tokens)
        if (
            self.max_iterations > 1
            and not self._num_begun
            and run.line_end_tokens > tokens
            and self._decision_mhz == track.target_mhz
            and state.clock_mhz == track.clock_mhz
        ):
            further = self._further_iterations(batch_size, tokens)
            if further > 0:
                track.extend(further)

    def _form_batch(self, now_s: float) -> None:
        """Choose what runs, in the engine's order, and ask the controller."""
        state = self.state
        if state.num_waiting and self._has_admission:
            self._ask_admission()
        is_full = self._is_full()
        if is_full and self._decodes_first:
            self._make_room(now_s)
        self._form_chunk(now_s, admits=not (is_full and self._decodes_first))
        if is_full and not state.chunk_tokens:
            self._make_room(now_s)
            self._form_chunk(now_s, admits=False)
        stands = state.chunk_tokens > 0 and (self._stands or self._is_full())
        decoding = self._num_decoding = 0 if stands else state.num_running
        state.last_batch_size = decoding
        state.last_tokens = state.kv_tokens if decoding else 0
        self._ask_controller(now_s)
        if decoding:
            self._iteration += 1

    def _is_full(self) -> bool:
        """Whether one token more for each running request overflows the cache."""
        state = self.state
        used = state.kv_tokens + self._held_tokens + state.num_running
        return state.num_running > 0 and used > state.kv_capacity_tokens

    def _form_chunk(self, now_s: float, *, admits: bool) -> None:
        """Take prompts in order of arrival, as far as the budget and the cache go."""
        state = self.state
        budget = self._max_tokens - (0 if self._stands else state.num_running)
        attention, tokens, count = 0.0, 0, 0
        self._oldest_s = now_s
        while budget > tokens and state.num_waiting and count < self._max_requests:
            request = self._partial or self._take_next(admits)
            if request is None:
                break
            prefix = request.prefilled_tokens
            context = request.input_tokens + request.generated_tokens
            chunk = min(context - prefix, budget - tokens)
            attention += chunk * (chunk + 2 * prefix)
            tokens += chunk
            count += 1
            request.prefilled_tokens = prefix + chunk
            if request.last_token_s != request.last_token_s:  # NaN: it waits for its first
                self._oldest_s = min(self._oldest_s, request.arrival_s)
            if prefix + chunk < context:
                self._partial = request
                break
            self._partial = None
            state.num_waiting -= 1
            self._ending.append(request)
        self._computed_tokens += tokens
        state.waiting_tokens -= tokens
        state.chunk_requests, state.chunk_tokens = count, tokens
        state.effective_batch_size = tokens * tokens / attention if tokens else 0.0
        state.last_queue_delay_s = now_s - self._oldest_s

    def _take_next(self, admits: bool) -> SimRequest | None:
        """The first in the queue, if there is room; its prompt is under way from now on."""
        if not admits or not self.has_room(self.state.kv_tokens):
            return None
        request = (self._retracted or self.waiting).popleft()
        self._held_tokens += request.input_tokens + request.generated_tokens
        self._num_begun += 1
        return request

    def _end(self, now_s: float) -> None:
        state, run = self.state, self.run
        if self._num_decoding:
            super()._end(now_s)
            self._token_s = now_s
            self._owed = {now_s: state.num_running}
        else:
            state.last_duration_s = run.duration_s
            state.ended_batch_size = state.ended_tokens = 0
        state.ended_queue_delay_s = run.start_s - self._oldest_s
        state.chunk_requests = state.chunk_tokens = 0
        ending, self._ending = self._ending, []
        for request in ending:
            self._end_prompt(request, now_s)

    def _end_prompt(self, request: SimRequest, now_s: float) -> None:
        """Its prompt is computed, which makes a token: its first, or one after a long gap."""
        context = request.input_tokens + request.generated_tokens
        self._held_tokens -= context
        self._num_begun -= 1
        if context + 1 < request.input_tokens + request.output_tokens:
            self.join(request, context, now_s)
            self._owed[now_s] = self._owed.get(now_s, 0) + 1
            self._joiners.clear()
        elif request.last_token_s != request.last_token_s:
            self.log.first_token(request, now_s)
        if request.last_token_s == request.last_token_s:
            self.log.gaps(now_s - request.last_token_s, 0.0, 1, 1)
        request.last_token_s = now_s
        if not request.is_running:
            self.state.open_requests -= 1
            self.state.finished_requests += 1
            self.state.finished_tokens += request.output_tokens
            self.log.finish(request, now_s)

    def _report_gaps(self, ended: int) -> None:
        if self._has_late and ended and self._reported == 0:
            self._reported = 1
            end_s = self.run.start_s + self.run.lead_s
            for newest_s, count in self._owed.items():
                if count:
                    self.log.gaps(end_s - newest_s, 0.0, 1, count)
        super()._report_gaps(ended)

    def _list_waiting(self) -> list[WaitingRequest]:
        listed = super()._list_waiting()
        partial = self._partial
        if partial is None:
            return listed
        return [partial.as_waiting(partial.prefilled_tokens), *listed]
