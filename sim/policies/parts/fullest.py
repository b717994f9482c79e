"""The fullest batch worth running: where the stairs of a decode table leave the highest token rate.

Kernels and CUDA graphs pad a batch to its next size, so that one request more may cost a quarter
more time: the token rate b/T(b) is not monotone in b. Once a batch has crossed such a stair its
rate falls, it grows further, and no clock may bring it back. Requests beyond the fullest batch are
served sooner by waiting for a place than by joining.
"""

from __future__ import annotations

import math
from typing import Final

from voltana.sim.policies.base import DECODE, PolicyContext, Predictor

_MOST: Final = 4096
_EQUAL: Final = 1.0 - 1e-9
"""Rates that differ by less are equal but for rounding."""
_CONTEXT_STEP: Final = 32
"""Tokens; contexts are rounded up to it, so that few batches have to be searched."""
_ASIDE_STEP_S: Final = 1e-6
"""The same of prompts' time."""


class FullestBatch:
    """Batch of the highest token rate at one clock, among those that keep a time limit.

    Args:
        predictor: What is believed of iteration times.
        clock_mhz: The fastest clock there is to return with.
    """

    __slots__ = ("_clock_mhz", "_known", "_predictor")

    def __init__(self, predictor: Predictor, clock_mhz: int) -> None:
        self._predictor = predictor
        self._clock_mhz = clock_mhz
        self._known: dict[tuple[int, float, int], int] = {}

    @classmethod
    def of(cls, context: PolicyContext) -> FullestBatch:
        """At the profile's top clock; one for all policies of a run."""
        top_mhz = context.clocks_mhz[-1]
        return context.share("fullest batch", lambda: cls(context.predictor, top_mhz))

    def requests(self, context_tokens: float, limit_s: float, aside_s: float = 0.0) -> int:
        """The batch; the largest of equal ones, and at least one request.

        Args:
            context_tokens: Mean context of a request, in tokens.
            limit_s: Longest iteration, in predicted seconds.
            aside_s: What each request adds to it for work on prompts.
        """
        key = int(context_tokens) // _CONTEXT_STEP + 1, limit_s, math.ceil(aside_s / _ASIDE_STEP_S)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._search(
                key[0] * _CONTEXT_STEP, limit_s, key[2] * _ASIDE_STEP_S
            )
        return found

    def _search(self, context_tokens: int, limit_s: float, aside_s: float) -> int:
        best, best_rate = 1, 0.0
        for batch in range(1, _MOST + 1):
            time_s = self._predictor.predict_s(
                DECODE, self._clock_mhz, batch, batch * context_tokens
            )
            time_s += batch * aside_s
            if time_s > limit_s:
                break
            if batch >= best_rate * time_s * _EQUAL:
                best, best_rate = batch, batch / time_s
        return best
