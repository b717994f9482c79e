"""How many requests a second one instance serves within the promises, by a policy's own models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

from voltana.sim.policies.base import COLOCATED, DECODE, PREFILL, Phase, PolicyContext
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

    A colocated instance at the rate r works on prompts for the share r·p of its time, p being the
    time of one prompt in such a batch, and decodes in the rest, so that the mean gap of b requests
    with n gaps each is T + b·p/n: beside it or while decoding stands, the two times add up. Its
    fullest batch is the one within the promise so; the rate is no more than prompts' queue allows.
    A single gap with prompts in it is longer than the mean.

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
        if phase == COLOCATED:
            return self._colocated(clock_mhz, load)
        return (self._prefill if phase == PREFILL else self._decode)(clock_mhz, load)

    def _prefill(self, clock_mhz: int, load: Load) -> Served:
        prompts = self._prompts(clock_mhz, load)
        if prompts is None:
            return _NONE
        share = min(prompts.rate_rps * prompts.one_s, 1.0)
        idle_w = self._context.power.idle_power_w(clock_mhz)
        power_w = idle_w + share * (prompts.power_w - idle_w)
        return Served(rate_rps=prompts.rate_rps, power_w=power_w)

    def _prompts(self, clock_mhz: int, load: Load) -> _Prompts | None:
        """The most that may come; None if not even one keeps the promise."""
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
            return None
        mean = _mean_within(low, load.input_burst)
        batch = max(int(mean), 1)
        return _Prompts(
            rate_rps=mean / limit_s,
            one_s=self._prefill_s(clock_mhz, batch, tokens) / batch,
            power_w=c.power.power_w(PREFILL, clock_mhz, batch, max(int(batch * tokens), 1)),
        )

    def _prefill_s(self, clock_mhz: int, batch: int, tokens: float) -> float:
        return self._context.predictor.predict_s(
            PREFILL, clock_mhz, batch, max(int(batch * tokens), 1)
        )

    def _decode(self, clock_mhz: int, load: Load) -> Served:
        batch = self._batch(clock_mhz, load, 0.0)
        if batch < 1:
            return _NONE
        time_s = self._step_s(clock_mhz, load, batch)
        rate_rps = batch / time_s / load.output_tokens
        return Served(rate_rps=rate_rps, power_w=self._step_w(clock_mhz, load, batch))

    def _colocated(self, clock_mhz: int, load: Load) -> Served:
        prompts = self._prompts(clock_mhz, load)
        if prompts is None:
            return _NONE
        one_s, gaps = prompts.one_s, max(load.output_tokens - 1.0, 1.0)

        def rate_rps(batch: int) -> float:
            return batch / (self._step_s(clock_mhz, load, batch) * gaps + batch * one_s)

        high = self._batch(clock_mhz, load, one_s / gaps)
        if high < 1:
            return _NONE
        batch = 1
        while batch < high:
            middle = (batch + high + 1) // 2
            fits = rate_rps(middle) <= prompts.rate_rps
            batch, high = (middle, high) if fits else (batch, middle - 1)
        rate = min(rate_rps(batch), prompts.rate_rps)
        share, step_w = rate * one_s, self._step_w(clock_mhz, load, batch)
        return Served(rate_rps=rate, power_w=step_w + share * (prompts.power_w - step_w))

    def _batch(self, clock_mhz: int, load: Load, aside_s: float) -> int:
        """The mean of requests that decode at most; 0 if the promise can't be kept.

        Args:
            clock_mhz: Of the instance.
            load: Lengths of requests.
            aside_s: What each of them adds to an iteration for prompts.
        """
        context_tokens = _context_tokens(load)
        fullest = self._fullest.get(clock_mhz)
        if fullest is None:
            fullest = FullestBatch(self._context.predictor, clock_mhz)
            self._fullest[clock_mhz] = fullest
        most = fullest.requests(context_tokens, self._limit_s, aside_s)
        most = min(most, int(self._context.kv_capacity_tokens / context_tokens))
        batch = int(_mean_within(most, 1.0))
        if batch < 1:
            return 0
        return (
            batch if self._step_s(clock_mhz, load, batch) + batch * aside_s <= self._limit_s else 0
        )

    def _step_s(self, clock_mhz: int, load: Load, batch: int) -> float:
        tokens = max(int(batch * _context_tokens(load)), 1)
        return self._context.predictor.predict_s(DECODE, clock_mhz, batch, tokens)

    def _step_w(self, clock_mhz: int, load: Load, batch: int) -> float:
        tokens = max(int(batch * _context_tokens(load)), 1)
        return self._context.power.power_w(DECODE, clock_mhz, batch, tokens)


def _context_tokens(load: Load) -> float:
    """Mean context of a request that decodes."""
    return load.input_tokens + 0.5 * load.output_tokens


class _Prompts(NamedTuple):
    """What one instance prefills at most."""

    rate_rps: float
    one_s: float
    """Time of one prompt in a batch of the mean size."""
    power_w: float
    """While such a batch runs."""


_NONE: Final = Served(rate_rps=0.0, power_w=0.0)
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
