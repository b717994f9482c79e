"""What a learner sees at an arrival, the same in training and in service.

For every decode instance, in order: open requests / 256, KV tokens in use or queued / capacity,
clock / top clock (unlocked is 1), 1 if busy; then, once: prompt tokens / 1024 and the recent
arrival rate / 50 per s. All without unit, near [0, 1], clipped at 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from voltana.sim.policies.base import InstanceState, RequestView

REQUESTS_SCALE: Final = 256.0
PROMPT_SCALE_TOKENS: Final = 1024.0
RATE_SCALE_RPS: Final = 50.0
PER_INSTANCE: Final = 4
SHARED: Final = 2
LIMIT: Final = 10.0

Float32Array = npt.NDArray[np.float32]


class RateMeter:
    """Recent arrival rate: exponentially forgotten count over the forgotten time.

    Args:
        window_s: Time constant of forgetting.
    """

    __slots__ = ("_count", "_last_s", "_time_s", "_window_s")

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._count = self._time_s = 0.0
        self._last_s: float | None = None

    def arrive(self, now_s: float) -> float:
        """Count an arrival; the rate in requests/s, 0 at the first one."""
        if self._last_s is not None:
            gap_s = now_s - self._last_s
            keep = math.exp(-gap_s / self._window_s)
            self._time_s = self._time_s * keep + self._window_s * (1.0 - keep)
            self._count = self._count * keep + 1.0
        self._last_s = now_s
        return self._count / self._time_s if self._time_s > 0 else 0.0


def size(num_decode: int) -> int:
    """Length of an observation of that many decode instances."""
    return PER_INSTANCE * num_decode + SHARED


def observe(
    request: RequestView, decode: Sequence[InstanceState], rate_rps: float, top_mhz: int
) -> Float32Array:
    """The observation of the module. Shape (4·instances + 2,).

    Args:
        request: The request that has just arrived.
        decode: Decode instances, in the order of the policy.
        rate_rps: Recent arrival rate, requests/s.
        top_mhz: The profile's top clock.
    """
    values: list[float] = []
    for state in decode:
        values += (
            state.open_requests / REQUESTS_SCALE,
            state.kv_load_tokens / max(state.kv_capacity_tokens, 1),
            state.clock_or_top_mhz(top_mhz) / top_mhz,
            float(state.is_busy),
        )
    values += (request.input_tokens / PROMPT_SCALE_TOKENS, rate_rps / RATE_SCALE_RPS)
    return np.clip(np.array(values, dtype=np.float32), 0.0, LIMIT)
