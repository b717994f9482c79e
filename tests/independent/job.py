"""One request of the second simulator, and what comes first at one instant."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from tests.independent.cache import Token

ARRIVAL, HANDOVER, DECODE = range(3)
"""Order of events at one instant."""


@dataclass(eq=False)
class Job:
    """One request."""

    arrival_s: float
    prompt: int
    wanted: int
    """Tokens to make."""
    done_prompt: int = 0
    steps: int = 0
    """Decode iterations so far; each wrote the keys and values of one token."""
    lost: int = 0
    """Tokens made before its cache was dropped, which it has to compute again like its prompt."""
    token_s: list[float] = field(default_factory=list)
    """When each token came out."""
    prefill: int = -1
    decode: int = -1
    is_rejected: bool = False
    tokens: Sequence[Hashable] = ()
    """What the prompt consists of; only a cache of prefixes asks."""
    said: Sequence[Hashable] = ()
    """The prompt and its answer."""
    next_turn: tuple[float, Job] | None = None
    """Seconds from its last token to the request that waited for it."""
    cached: int = 0
    """Tokens of the prompt that were there already."""
    is_cut: bool = False
    """A part of its prompt was in an earlier batch."""
    path: list[Token] | None = None
    """What it has locked in prefill's cache, or a colocated server's."""
    unsent: int = 0
    """Tokens of the prompt that decode had already."""

    @property
    def context(self) -> int:
        """Tokens in the KV cache of decode."""
        return self.prompt + self.lost + self.steps

    def lock(self, path: list[Token]) -> None:
        """Lock these tokens of a cache in place of those it has."""
        for token in path:
            token.locks += 1
        for token in self.path or ():
            token.locks -= 1
        self.path = path
