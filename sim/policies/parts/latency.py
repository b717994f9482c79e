"""Measured latency over the last seconds: what controllers without a model look at."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from itertools import accumulate
from typing import Final

from voltana.sim.policies.base import DECODE, InstanceState

_ROUNDING: Final = 1e-9
"""Of a product of quantile and weight, in requests."""


class LatencyWindow:
    """A quantile of the latency of the last seconds, each iteration weighted by its requests.

    Args:
        window_s: How far back it looks.
        quantile: Which quantile, within (0, 1].
    """

    __slots__ = ("_quantile", "_samples", "_window_s")

    def __init__(self, window_s: float, quantile: float) -> None:
        self._window_s = window_s
        self._quantile = quantile
        self._samples: deque[tuple[float, float, int]] = deque()

    def add(self, state: InstanceState, phase: str) -> None:
        """Add the iteration that has ended: its duration, in prefill with its queueing delay."""
        if state.last_duration_s <= 0:
            return
        latency_s = state.last_duration_s + (0 if phase == DECODE else state.ended_queue_delay_s)
        self.put(state.now_s, latency_s, max(state.ended_batch_size, 1))

    def put(self, now_s: float, latency_s: float, requests: int) -> None:
        """Add a latency of so many requests.

        Args:
            now_s: When it was over.
            latency_s: How long it was.
            requests: Its weight.
        """
        self._samples.append((now_s, latency_s, requests))
        while self._samples[0][0] < now_s - self._window_s:
            self._samples.popleft()

    def quantile_s(self) -> float | None:
        """By nearest rank; None before the first sample."""
        if not self._samples:
            return None
        ordered = sorted((latency, weight) for _, latency, weight in self._samples)
        reached = list(accumulate(weight for _, weight in ordered))
        return ordered[bisect_left(reached, self._quantile * reached[-1] - _ROUNDING)][0]
