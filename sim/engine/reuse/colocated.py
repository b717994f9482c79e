"""Colocated instance with a cache of prefixes: what was asked and answered stays while it may.

The rules are those of SGLang's scheduler with its radix cache (`get_new_batch_prefill`,
`checkpoint_kv_cache`, `release_kv_cache` and `release_req` of 0.5.23), with one page a token.
"""

from __future__ import annotations

import dataclasses

from voltana.sim.config import SimConfig
from voltana.sim.engine.colocated import ColocatedInstance
from voltana.sim.engine.logs.exact import RunLog
from voltana.sim.engine.physics.mixed import MixedTrack
from voltana.sim.engine.request import SimRequest
from voltana.sim.engine.reuse.held import HeldPrefixes
from voltana.sim.policies.answers import ControllerAnswers
from voltana.sim.policies.base import InstanceState
from voltana.sim.policies.parts.radix import RadixCache
from voltana.sim.policies.requests import Prompt
from voltana.sim.records import InstanceRecord


def colocated_kind(config: SimConfig) -> type[ColocatedInstance]:
    """What colocated instances of a run are."""
    return CachingColocatedInstance if config.colocated_cache else ColocatedInstance


class CachingColocatedInstance(ColocatedInstance):
    """As `ColocatedInstance`, but its memory keeps what no request uses until it is needed.

    A request locks what it finds of its prompt, and its whole prompt once that is computed. What it
    writes in decode is its own until it has finished; then all of it but the last token, whose keys
    and values nobody has computed, is in the tree. One that is retracted leaves its prompt there.

    `_held_tokens` is here what makes `kv_tokens + _held_tokens` the memory in use: contexts of
    running requests count each on its own, and what several share is in memory once.
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
            config: As of `ColocatedInstance`, and so are the others.
            log: Hears of found tokens too.
            state: Can count a prompt's cached tokens.
            answers: The controller.
            track: The GPUs.
            max_running: Requests that the engine runs at once.
            max_tokens: Budget of an iteration.
        """
        super().__init__(
            config, log, state, answers, track, max_running=max_running, max_tokens=max_tokens
        )
        self.cache = RadixCache(state.kv_capacity_tokens)
        self.held = HeldPrefixes(self.cache)
        self._to_compute = 0
        """Tokens of prompts under way that no iteration has taken yet."""
        self._cached_tokens = 0
        state.count_cached = self._count_cached

    def forget(self) -> None:
        self.cache.clear()

    def record(self) -> InstanceRecord:
        self._take_running()
        return dataclasses.replace(
            super().record(),
            cached_tokens=self._cached_tokens,
            evicted_tokens=self.cache.evicted_tokens,
        )

    def retract(self, request: SimRequest, now_s: float) -> None:
        super().retract(request, now_s)
        self.held.give_up(request, request.input_tokens + request.generated_tokens - 1)
        self.cache.free(self._freed_tokens * self.state.num_running)
        self._settle()

    def _new_tokens(self, request: SimRequest) -> int:
        context = super()._new_tokens(request)
        return context - self.cache.count(self.held.whole(request), context - 1, locked=True)

    def _begin(self, now_s: float) -> None:
        super()._begin(now_s)
        self.held.begin_run(self._num_decoding)

    def _make_room(self, now_s: float) -> None:
        self.cache.free(self.state.num_running)  # retraction comes after all that nobody uses
        super()._make_room(now_s)

    def _form_chunk(self, now_s: float, *, admits: bool) -> None:
        super()._form_chunk(now_s, admits=admits)
        tokens = self.state.chunk_tokens
        self._to_compute -= tokens
        self.cache.hold(tokens)

    def _take_next(self, admits: bool) -> SimRequest | None:
        state, line = self.state, self._retracted or self.waiting
        if not admits or state.num_running + self._num_begun >= self._most:
            return None
        first = line[0]
        context = first.input_tokens + first.generated_tokens
        # who has no room has used what it found all the same; one token makes the next output
        node = self.cache.match(self.held.whole(first), context - 1)
        request = super()._take_next(admits)
        if request is None:
            return None
        self.held.lock(request, node)
        request.prefilled_tokens = node.end
        self._to_compute += context - node.end
        state.waiting_tokens -= node.end
        self._cached_tokens += node.end
        if request.retractions == 0:
            self.log.reuse(request, node.end)
        self._settle()
        return request

    def _end(self, now_s: float) -> None:
        self.held.take(self.run.count, self._num_decoding)
        tokens = self.state.chunk_tokens
        self.cache.held_tokens -= tokens
        for request in self._ending:
            self.held.keep(request, request.prefilled_tokens)
            if request.prefilled_tokens + 1 == request.input_tokens + request.output_tokens:
                self.held.let_go(request)
        super()._end(now_s)
        if self._partial is not None and tokens:
            self.held.keep(self._partial, self._partial.prefilled_tokens)
        self._settle()

    def _leave(self, finished: list[SimRequest], now_s: float) -> None:
        for request in finished:
            self.held.keep_own(request, request.end_context_tokens)
            self.held.let_go(request)
        super()._leave(finished, now_s)

    def _take_running(self) -> None:
        if self.state.is_busy:
            self.held.take(self._shown + 1, self._num_decoding)

    def _settle(self) -> None:
        """Work out `_held_tokens`, which a step of decode leaves as it is."""
        cache = self.cache
        used = cache.locked_tokens + cache.held_tokens + self._to_compute
        self._held_tokens = used - self.state.kv_tokens

    def _count_cached(self, prompt: Prompt) -> int:
        self.state.refresh()
        self._take_running()
        return self.cache.count(prompt, prompt.ends[-1] - 1)
