"""Decode instance with a cache of prefixes: what it has is not sent to it again.

The rules are those of SGLang's decode server with `--disaggregation-decode-enable-radix-cache`
(`resume_retracted_reqs`, `pop_preallocated`, `process_prebuilt`, `release_kv_cache` of 0.5.23),
with one page a token.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from functools import partial

from voltana.sim.config import SimConfig
from voltana.sim.engine.decode import DecodeInstance, Start
from voltana.sim.engine.logs.exact import RunLog
from voltana.sim.engine.physics.track import GpuTrack
from voltana.sim.engine.request import SimRequest
from voltana.sim.engine.reuse.held import HeldPrefixes
from voltana.sim.policies.answers import ControllerAnswers
from voltana.sim.policies.base import InstanceState, WaitingRequest
from voltana.sim.policies.parts.radix import RadixCache
from voltana.sim.policies.requests import Prompt
from voltana.sim.records import InstanceRecord


def decode_kind(config: SimConfig) -> type[DecodeInstance]:
    """What decode instances of a run are."""
    return CachingDecodeInstance if config.decode_cache else DecodeInstance


class CachingDecodeInstance(DecodeInstance):
    """As `DecodeInstance`, but its memory keeps what no request uses until it is needed.

    So that prefill knows what it need not send, memory is taken before prefill may start, at a
    boundary and in order of arrival: what is found of the prompt is locked, and the rest of it is
    set aside. Whoever has arrived needs no room any more, but a place in the batch; when it joins,
    its prompt is in the tree. What it writes is its own until it has finished; then all of it is in
    the tree. One that is retracted leaves there what it joined with, and takes memory for all of
    its context when it resumes, before anybody new.

    `_held_tokens` is here what makes `kv_tokens + _held_tokens` the memory in use: contexts of
    running requests count each on its own, and what several share is in memory once.
    """

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
        """See the class.

        Args:
            config: As of `DecodeInstance`, and so are the others.
            log: Takes what becomes of requests.
            state: Can count a prompt's cached tokens.
            answers: The controller.
            track: The GPUs.
            max_running: Requests that the engine runs at once.
        """
        super().__init__(config, log, state, answers, track, max_running=max_running)
        self.cache = RadixCache(state.kv_capacity_tokens)
        self.held = HeldPrefixes(self.cache)
        self._line: deque[tuple[SimRequest, Start]] = deque()
        """Those that have no memory yet, and what begins when they have."""
        self._due: dict[int, SimRequest] = {}
        """Those that have memory and do not run, by number."""
        self._due_tokens = 0
        """Of their contexts, each on its own."""
        self._ready: deque[SimRequest] = deque()
        """Of them, those that only need a place in the batch; `waiting` has arrived since."""
        self._unrun: list[SimRequest] = []
        """Those that are over without having run, until the iteration has ended."""
        self._longest_tokens = 0
        """Of all requests that have ever had memory here, at their ends."""
        self._has_changed = False
        """Whether somebody came or went since the line was looked at."""
        self._unsent_tokens = 0
        state.count_cached = self._count_cached

    def forget(self) -> None:
        self.cache.clear()

    def record(self) -> InstanceRecord:
        self._take_running()
        return dataclasses.replace(
            super().record(),
            unsent_tokens=self._unsent_tokens,
            evicted_tokens=self.cache.evicted_tokens,
        )

    def before_prefill(self, request: SimRequest, start: Start) -> Start:
        return partial(self.at_boundary, partial(self._ask, request, start))

    def leave_out(self, request: SimRequest, now_s: float) -> None:
        """Its KV cache has come, and prefill has made the only token that was wanted."""
        if self._is_parked:
            self._end_unrun(request)
            self._look(now_s)
        else:
            self._unrun.append(request)
            self.at_boundary(_nothing, now_s)

    def park(self, now_s: float) -> None:
        super().park(now_s)
        self._look(now_s)  # who waited for room finds nobody here now

    def retract(self, request: SimRequest, now_s: float) -> None:
        super().retract(request, now_s)
        self.held.give_up(request, request.input_tokens + request.generated_tokens)
        self.cache.free(self._freed_tokens * self.state.num_running)
        self._settle()

    def has_room(self, kv_tokens: int) -> bool:
        """Whether somebody who waits may run at the next boundary, with so many tokens in use."""
        if self._retracted and not self._ready:
            return self._may_resume(kv_tokens)
        return self.state.num_running < self._most

    def join(self, request: SimRequest, context: int, now_s: float) -> None:
        self._set_aside(request, -1)
        super().join(request, context, now_s)
        self.held.keep_own(request, context)
        self._settle()

    def _ask(self, request: SimRequest, start: Start, now_s: float) -> None:
        self._line.append((request, start))
        self._num_asking += 1
        if self._is_parked:
            self._look(now_s)

    def _look(self, now_s: float) -> None:
        """Give memory to those in line, in order, as far as it goes."""
        while self._line and not self._retracted:
            request, start = self._line[0]
            node = self.cache.match(self.held.whole(request), request.input_tokens)
            if not self._fits(request):
                break
            self._line.popleft()
            self._num_asking -= 1
            self.held.lock(request, node)
            self.cache.hold(request.input_tokens - node.end)
            self._longest_tokens = max(
                self._longest_tokens, request.input_tokens + request.output_tokens
            )
            self._set_aside(request, 1)
            request.unsent_tokens = node.end
            self._unsent_tokens += node.end
            self._settle()
            start(now_s)
        self._has_changed = bool(self._retracted)

    def _fits(self, request: SimRequest) -> bool:
        """Whether the first in line may have memory."""
        cache, prompt = self.cache, self.held.whole(request)
        tokens = request.input_tokens
        here = self.state.num_running + len(self._due)
        fresh = tokens - cache.count(prompt, tokens, locked=True)
        used = cache.locked_tokens + cache.held_tokens
        reserve = self._reserve_tokens * (here + 1)
        if here and used + fresh + reserve > cache.capacity_tokens:
            return False
        return self._leaves_room(request)

    def _leaves_room(self, request: SimRequest) -> bool:
        """Whether anybody may still run to its end, if all other running ones are retracted."""
        most = self.state.kv_capacity_tokens - self._due_tokens - request.input_tokens
        longest = max(self._longest_tokens, request.input_tokens + request.output_tokens)
        if longest <= most:
            return True
        running = [r for r in self._join_order if r.is_running]
        ends = [r.input_tokens + r.output_tokens for r in running]
        due = (request, *self._due.values())
        ends += [r.output_tokens - r.generated_tokens for r in due]
        return max(ends) <= most

    def _resume(self) -> None:
        """Give retracted requests memory for all of their contexts, in order, as far as it goes."""
        while self._retracted and self._may_resume(self.state.kv_tokens):
            request = self._retracted.popleft()
            self.held.lock(request, self.cache.root)
            self.cache.hold(request.input_tokens + request.generated_tokens)
            self._set_aside(request, 1)
            self._ready.append(request)
            self._settle()

    def _may_resume(self, kv_tokens: int) -> bool:
        if not self._has_place():
            return False
        if self.state.num_running + len(self._ready) == 0:
            return True
        first = self._retracted[0]
        context = first.input_tokens + first.generated_tokens
        reserve = self._reserve_tokens * (self.state.num_running + len(self._due) + 1)
        used = kv_tokens + self._held_tokens
        return used + context + reserve <= self.state.kv_capacity_tokens

    def _has_place(self) -> bool:
        return self.state.num_running + len(self._ready) < self._most

    def _set_aside(self, request: SimRequest, sign: int) -> None:
        """It has memory and does not run: from now on, or (-1) no more."""
        if sign > 0:
            self._due[request.request_id] = request
        else:
            del self._due[request.request_id]
        self._due_tokens += sign * (request.input_tokens + request.generated_tokens)
        self._has_changed = True

    def _end_unrun(self, request: SimRequest) -> None:
        self._set_aside(request, -1)
        self.held.keep_own(request, request.input_tokens)
        self.held.let_go(request)
        self._settle()

    def _admit(self, now_s: float) -> None:
        state, ready = self.state, self._ready
        if state.num_waiting and self._has_admission:
            self._ask_admission()
        self._resume()
        self._look(now_s)
        if not self._retracted:
            ready += self.waiting
            self.waiting.clear()
        while ready and state.num_running < self._most:
            request = ready.popleft()
            context = request.input_tokens + request.generated_tokens
            state.num_waiting -= 1
            state.waiting_tokens -= context
            self.join(request, context, now_s)

    def _further_iterations(self, batch_size: int, tokens: int) -> int:
        if self._line and self._has_changed:
            return 0  # the first in line finds another cache, and perhaps room, at the next one
        return super()._further_iterations(batch_size, tokens)

    def _begin(self, now_s: float) -> None:
        super()._begin(now_s)
        self.held.begin_run(self._batch_size)

    def _make_room(self, now_s: float) -> None:
        self.cache.free(self.state.num_running)  # retraction comes after all that nobody uses
        super()._make_room(now_s)
        self._has_changed = True

    def _end(self, now_s: float) -> None:
        self.held.take(self.run.count, self._batch_size)
        super()._end(now_s)
        self._settle()
        for request in self._unrun:
            self._end_unrun(request)
        self._unrun.clear()

    def _leave(self, finished: list[SimRequest], now_s: float) -> None:
        for request in finished:
            self.held.keep_own(request, request.end_context_tokens)
            self.held.let_go(request)
        super()._leave(finished, now_s)

    def _take_running(self) -> None:
        if self.state.is_busy:
            self.held.take(self._shown + 1, self._batch_size)

    def _settle(self) -> None:
        """Work out `_held_tokens`, which a step of decode leaves as it is."""
        self._held_tokens = self.cache.locked_tokens + self.cache.held_tokens - self.state.kv_tokens

    def _count_cached(self, prompt: Prompt) -> int:
        self.state.refresh()
        self._take_running()
        return self.cache.count(prompt, prompt.ends[-1])

    def _list_waiting(self) -> list[WaitingRequest]:
        return [*(r.as_waiting() for r in self._ready), *super()._list_waiting()]


def _nothing(now_s: float) -> None:
    """Ends a run with the iteration that is running."""
