"""Prefill with a cache of prefixes, which shares the KV memory with the running batch.

The rules are those of SGLang's prefill server (`PrefillAdder.add_one_req`, `RadixCache.checkpoint`
and `release_kv_cache` of 0.5.23), with one page a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

from voltana.sim.config import SimConfig
from voltana.sim.engine.logs.exact import RunLog
from voltana.sim.engine.physics.track import GpuTrack
from voltana.sim.engine.prefill import PrefillInstance
from voltana.sim.engine.request import SimRequest
from voltana.sim.policies.answers import ControllerAnswers
from voltana.sim.policies.base import InstanceState
from voltana.sim.policies.parts.radix import Node, RadixCache
from voltana.sim.policies.requests import Prompt
from voltana.sim.records import InstanceRecord

SPARE_TOKENS: Final = 2
"""What SGLang sets aside for each request of a batch: the token that prefill makes, and a page."""


class CachingPrefillInstance(PrefillInstance):
    """As `PrefillInstance`, but what a prompt begins with may be there already.

    A request that joins a batch locks what it finds; it holds its prompt until the KV cache has
    gone to decode. Where the first in the queue does not fit beside what is locked, prefill rests.
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
        cache_tokens: int,
    ) -> None:
        """See the class.

        Args:
            config: As of `PrefillInstance`, and so are the others.
            log: Hears of found tokens too.
            state: Can count a prompt's cached tokens.
            answers: The controller.
            track: The GPUs.
            max_tokens: Budget of a batch.
            hand_over: Takes requests whose prompts are done.
            cache_tokens: KV memory of the instance.
        """
        super().__init__(
            config, log, state, answers, track, max_tokens=max_tokens, hand_over=hand_over
        )
        self.cache = RadixCache(cache_tokens)
        self._nodes: dict[int, Node] = {}
        """Where the tokens that a request has locked end, by its number."""
        self._most_requests = self._max_requests
        self._is_cut = False
        """Whether the first in the queue has been begun."""
        self._cached_tokens = 0
        self._computed_tokens = 0
        self._has_holding = True
        state.count_cached = self._count_cached

    def release(self, request: SimRequest, now_s: float) -> None:
        """Its KV cache has gone to decode: others may have the memory."""
        node = self._nodes.pop(request.request_id)
        self.cache.insert(_prompt(request), request.input_tokens)  # as SGLang does: it is used
        self.cache.unlock(node)
        if self._is_parked and self._queue and not self._holds(now_s):
            self._wake(now_s)

    def forget(self) -> None:
        self.cache.clear()

    def record(self) -> InstanceRecord:
        return dataclasses.replace(
            super().record(),
            cached_tokens=self._cached_tokens,
            computed_tokens=self._computed_tokens,
            evicted_tokens=self.cache.evicted_tokens,
        )

    def _holds(self, now_s: float) -> bool:
        """Also while the first in the queue has no room: a release lets it in."""
        if not self._queue or not self._finds_room(self._queue[0], 0):
            return True
        return self.answers.has_holding and super()._holds(now_s)

    def _form_batch(self, now_s: float) -> float:
        self._max_requests = self._admit()
        attention = super()._form_batch(now_s)
        self.cache.hold(self._batch_tokens)
        self._computed_tokens += self._batch_tokens
        return attention

    def _admit(self) -> int:
        """How many of the queue fit; they hold what they find."""
        budget, spoken_for, count = self._max_tokens, 0, 0
        for request in self._queue:
            if budget <= 0 or count == self._most_requests:
                break
            if not self._finds_room(request, spoken_for):
                break
            chunk = min(request.input_tokens - request.prefilled_tokens, budget)
            budget -= chunk
            spoken_for += chunk + SPARE_TOKENS
            goes_on = count == 0 and self._is_cut
            count += 1
            if self.cache.available_tokens <= spoken_for and not goes_on:
                break  # the next is not even looked at
        return count

    def _finds_room(self, request: SimRequest, spoken_for: int) -> bool:
        """Lock what is cached of a prompt if the rest fits; one that has begun goes on."""
        if request.request_id in self._nodes:
            return True
        cache, prompt_tokens = self.cache, request.input_tokens
        node = cache.match(_prompt(request), prompt_tokens - 1)  # one token makes the first output
        cache.lock(node)
        rest = prompt_tokens - node.end
        if rest + SPARE_TOKENS >= cache.available_tokens - spoken_for:
            cache.unlock(node)
            return False
        self._nodes[request.request_id] = node
        request.prefilled_tokens = node.end
        self._cached_tokens += node.end
        self.state.waiting_tokens -= node.end
        self.log.reuse(request, node.end)
        return True

    def _end(self, now_s: float) -> None:
        self.cache.held_tokens -= self._batch_tokens
        for request in self._batch:
            self._keep(request)
        super()._end(now_s)
        self._is_cut = bool(self._queue) and self._queue[0].request_id in self._nodes
        if self._is_cut:
            self._keep(self._queue[0])

    def _keep(self, request: SimRequest) -> None:
        """What it has computed so far is in the cache, and locked."""
        node = self.cache.insert(_prompt(request), request.prefilled_tokens)
        self.cache.lock(node)
        self.cache.unlock(self._nodes[request.request_id])
        self._nodes[request.request_id] = node

    def _count_cached(self, prompt: Prompt) -> int:
        return self.cache.count(prompt, prompt.ends[-1] - 1)


def _prompt(request: SimRequest) -> Prompt:
    prompt = request.prompt
    assert prompt is not None  # `simulate` refuses a cache without
    return prompt
