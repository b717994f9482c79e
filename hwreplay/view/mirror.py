"""What a router believes to be in an instance's cache of prefixes, from what it has sent there."""

from __future__ import annotations

from voltana.sim.config import SimConfig
from voltana.sim.policies.base import COLOCATED, DECODE, PREFILL, Phase
from voltana.sim.policies.parts.radix import RadixCache
from voltana.sim.policies.requests import Prompt


class PrefixMirror:
    """A tree as the engine has it, with prompts alone: the router does not read answers.

    The least recently used goes when prompts fill the instance's memory; what the running batch
    takes of that is not known here, so that the mirror may hold what the engine has lost.
    """

    def __init__(self, capacity_tokens: int) -> None:
        """Empty; of an instance without a cache, with a memory of 0, it stays so."""
        self._cache = RadixCache(capacity_tokens)
        self._expected: dict[int, Prompt] = {}
        """Prompts that are being computed, by request."""

    def count(self, prompt: Prompt) -> int:
        """Tokens that need not be computed; the last one always is."""
        return self._cache.count(prompt, prompt.ends[-1] - 1)

    def expect(self, request_id: int, prompt: Prompt | None) -> None:
        """A request has been sent there; nothing is known of a prompt that is a text."""
        if prompt is not None and self._cache.capacity_tokens:
            self._expected[request_id] = prompt

    def keep(self, request_id: int) -> None:
        """Its prompt is computed."""
        prompt = self._expected.pop(request_id, None)
        if prompt is not None:
            self._cache.insert(prompt, prompt.ends[-1])
            self._cache.free(0)

    def forget(self, request_id: int) -> None:
        """It has left, computed or not."""
        self._expected.pop(request_id, None)

    def clear(self) -> None:
        """The server may have ended: one that comes back begins with nothing."""
        self._cache.clear()


def cache_tokens(config: SimConfig, phase: Phase, kv_capacity_tokens: int) -> int:
    """Memory that an instance's cache of prefixes may fill; 0 where it has none.

    Args:
        config: Says which caches are on.
        phase: Of the instance.
        kv_capacity_tokens: KV cache of one that decodes.
    """
    is_on = {DECODE: config.decode_cache, COLOCATED: config.colocated_cache}
    if phase == PREFILL:
        return config.prefix_cache_tokens or 0
    return kv_capacity_tokens if is_on[phase] else 0
