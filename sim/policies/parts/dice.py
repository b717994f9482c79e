"""Uniform integers from a seeded generator, drawn in blocks: one at a time costs microseconds."""

from __future__ import annotations

import numpy as np

_BLOCK = 256


class Dice:
    """Draws integers below a bound.

    Args:
        rng: Used for nothing else; for one bound the numbers are those of `rng.integers` calls.
    """

    __slots__ = ("_blocks", "_rng")

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._blocks: dict[int, list[int]] = {}

    def below(self, bound: int) -> int:
        """Uniform in 0 … bound - 1."""
        if bound == 1:
            return 0
        block = self._blocks.get(bound)
        if not block:
            block = self._rng.integers(bound, size=_BLOCK)[::-1].tolist()
            self._blocks[bound] = block
        return block.pop()
