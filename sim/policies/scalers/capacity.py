"""How many requests a second one instance serves within the promises, by a policy's own models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from voltana.sim.policies.base import DECODE, PREFILL, Phase, PolicyContext
from voltana.sim.policies.parts.fullest import FullestBatch
from voltana.sim.policies.scalers.base import Demand

_SPREAD: Final = 2.33
"""Deviations above a Poisson mean that 99 % of counts stay within."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What comes, as means over time."""

    rate_rps: float
    input_tokens: float
    """Mean prompt."""
    input_burst: float
    """Mean square of prompts over the square of their mean: 1 if all are alike."""
    output_tokens: float
    """Mean answer."""


class LoadMeter:
    """Means of the demand, exponentially weighted by the time that windows take.

    Until an answer has ended its length is taken to be its prompt's.

    Args:
        memory_s: Time constant of the rate; lengths are remembered ten times as long.
    """

    __slots__ = ("_inputs", "_memory_s", "_outputs", "_rate", "_squares")

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._rate = _Mean()
        self._inputs = _Mean()
        self._squares = _Mean()
        self._outputs = _Mean()

    def take(self, demand: Demand) -> Load | None:
        """Add a window; None as long as nothing has come at all."""
        window_s, memory_s = demand.window_s, self._memory_s
        self._rate.add(demand.requests / window_s, window_s, memory_s)
        if demand.requests:
            count = demand.requests
            self._inputs.add(demand.input_tokens / count, window_s, 10.0 * memory_s)
            self._squares.add(demand.squared_input_tokens / count, window_s, 10.0 * memory_s)
        if demand.finished_requests:
            mean = demand.finished_tokens / demand.finished_requests
            self._outputs.add(mean, window_s, 10.0 * memory_s)
        inputs = self._inputs.value
        if inputs == 0.0:
            return None
        return Load(
            rate_rps=self._rate.value,
            input_tokens=inputs,
            input_burst=max(self._squares.value / (inputs * inputs), 1.0),
            output_tokens=self._outputs.value or inputs,
        )


class _Mean:
    """The first value is taken whole."""

    __slots__ = ("_weight", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._weight = 0.0

    def add(self, value: float, window_s: float, memory_s: float) -> None:
        """As if each value had held for its window."""
        kept = self._weight * math.exp(-window_s / memory_s) if memory_s > 0 else 0.0
        new = 1.0 - math.exp(-window_s / memory_s) if memory_s > 0 else 1.0
        self.value = (kept * self.value + new * value) / (kept + new)
        self._weight = kept + new


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What one instance serves at a clock at most, and what it draws then."""

    rate_rps: float
    power_w: float


class Capacity:
    """Capacity of an instance by phase, clock and lengths of requests.

    A Poisson stream of mean m brings at most m + 2.33·√(s·m) in 99 % of windows, s being the burst
    of lengths. Prefill: a prompt waits for the batch before it and then for its own, so that a
    batch may take half of what TTFT leaves for prefill; with n prompts in the largest such batch, m
    is the mean that reaches n in 1 % of them. Decode: the fullest batch within the ITL promise ·
    (1 - headroom) and the KV cache, in the same way (Little's law: b requests run if b/T tokens
    come a second).

    Args:
        context: The models, the promises, the KV cache.
        headroom_frac: Part of the ITL promise kept free.
    """

    __slots__ = ("_context", "_fullest", "_limit_s")

    def __init__(self, context: PolicyContext, headroom_frac: float) -> None:
        self._context = context
        self._limit_s = context.slo_itl_s * (1.0 - headroom_frac)
        self._fullest: dict[int, FullestBatch] = {}

    def served(self, phase: Phase, clock_mhz: int, load: Load) -> Served:
        """The most, of that phase at that clock; a rate of 0 where the promise can't be kept."""
        if phase == PREFILL:
            return self._prefill(clock_mhz, load)
        return self._decode(clock_mhz, load)

    def _prefill(self, clock_mhz: int, load: Load) -> Served:
        c, tokens = self._context, load.input_tokens
        limit_s = 0.5 * c.prefill_budget_s
        low, high = 0, 1
        while high <= _MOST and self._prefill_s(clock_mhz, high, tokens) <= limit_s:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._prefill_s(clock_mhz, middle, tokens) <= limit_s
            low, high = (middle, high) if fits else (low, middle)
        if low == 0:
            return Served(rate_rps=0.0, power_w=0.0)
        mean = _mean_within(low, load.input_burst)
        batch = max(int(mean), 1)
        power_w = c.power.power_w(PREFILL, clock_mhz, batch, max(int(batch * tokens), 1))
        busy_s = self._prefill_s(clock_mhz, batch, tokens) * mean / batch
        share = min(busy_s / limit_s, 1.0)
        idle_w = c.power.idle_power_w(clock_mhz)
        return Served(rate_rps=mean / limit_s, power_w=idle_w + share * (power_w - idle_w))

    def _prefill_s(self, clock_mhz: int, batch: int, tokens: float) -> float:
        return self._context.predictor.predict_s(
            PREFILL, clock_mhz, batch, max(int(batch * tokens), 1)
        )

    def _decode(self, clock_mhz: int, load: Load) -> Served:
        c = self._context
        context_tokens = load.input_tokens + 0.5 * load.output_tokens
        if clock_mhz not in self._fullest:
            self._fullest[clock_mhz] = FullestBatch(c.predictor, clock_mhz)
        most = self._fullest[clock_mhz].requests(context_tokens, self._limit_s)
        most = min(most, int(c.kv_capacity_tokens / context_tokens))
        batch = int(_mean_within(most, 1.0))
        if batch < 1:
            return Served(rate_rps=0.0, power_w=0.0)
        tokens = max(int(batch * context_tokens), 1)
        time_s = c.predictor.predict_s(DECODE, clock_mhz, batch, tokens)
        if time_s > self._limit_s:
            return Served(rate_rps=0.0, power_w=0.0)
        power_w = c.power.power_w(DECODE, clock_mhz, batch, tokens)
        return Served(rate_rps=batch / time_s / load.output_tokens, power_w=power_w)


_MOST: Final = 4096
"""Prompts in a batch that are looked at."""


def _mean_within(most: int, burst: float) -> float:
    """The mean m with m + 2.33·√(burst·m) = most.

    Example:
        >>> round(_mean_within(100, 1.0), 2), _mean_within(100, 0.0)
        (79.26, 100.0)
    """
    spread = _SPREAD * math.sqrt(burst)
    root = 0.5 * (math.sqrt(spread * spread + 4.0 * most) - spread)
    return root * root
