"""GreenLLM: its controller and its split of the prefill queues. Bins, band and lengths are ours.

Prefill takes the least energy that the queue allows, decode a band of clocks by token rate.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from voltana.sim.policies.base import (
    DECODE,
    Controller,
    IdlePlan,
    InstanceState,
    PolicyContext,
    RequestView,
    Router,
    States,
)
from voltana.sim.policies.parts.clocks import (
    busy_energy_j,
    cheapest_clock_mhz,
    clock_at_least_mhz,
    clocks_above_floor,
)
from voltana.sim.policies.parts.fitting import LowestFitting
from voltana.sim.policies.parts.latency import LatencyWindow
from voltana.sim.policies.routers.simple import least
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class GreenLlmParameters:
    """Parameters of `greenllm`."""

    coarse_s: float = parameter(0.2, "decode: time between two looks at the token rate", low=0.001)
    fine_s: float = parameter(0.02, "decode: time between two fine steps", low=0)
    step_mhz: float = parameter(15.0, "decode: fine step", low=1)
    slack_ratio: float = parameter(
        0.85, "decode: part of the promise below which the clock falls (ours)", low=0, high=1
    )
    bin_tokens_per_s: float = parameter(200.0, "decode: width of a bin of token rate (ours)", low=1)
    num_confirm: int = parameter(3, "decode: looks that must agree on a new bin", low=1)
    band_mhz: float = parameter(60.0, "decode: half width of a bin's band (ours)", low=0)
    window_s: float = parameter(5.0, "prefill: window of the arrival rate (ours)", low=0.01)
    idle_s: float = parameter(
        5.0, "idle time before the profile's lowest clock is locked (ours)", low=0
    )
    frequencies_mhz: tuple[int, ...] = parameter(
        (), "clocks to choose from; none: all from the phase's clock of least energy upwards (ours)"
    )


_QUANTILE: Final = 0.95
"""The source's p95 of the time between tokens."""


class GreenLlm(Controller):
    """Prefill: least energy with the queue in the bound; decode: a band by token rate, fine steps.

    Prefill, each batch: load rho(f) = tokens arriving per second · T(f) / tokens of the batch. Of
    the clocks with rho < 1 and max(delay so far, W) + T within what the TTFT promise leaves for
    prefill, W = rho·T / (2(1 - rho)) being the mean wait of M/D/1, the one with the least
    P·T - idle·T, which is busy energy plus idle energy of the time that remains; the top clock if
    there is none.
    Decode, every 200 ms: the bin of the token rate; a bin seen three times in a row sets the band
    around the lowest clock whose predicted step holds the ITL promise at that bin's batch
    (Little: rate · SLO). Every 20 ms: p95 ITL of the last 200 ms > SLO: f + 15 MHz; < slack·SLO:
    f - 15 MHz; clamped to the band, snapped up to a supported clock.

    Source: GreenLLM, arXiv 2508.16449. Its queue formula, slack ratio, bins and band
    table are not published in what we saw, and that no clock is below that of least energy is ours;
    its quadratic latency and cubic power are the profile's
    predictor and power model here. The queues split by length are the router `length-split`.
    """

    __slots__ = (
        "_arrived", "_band_mhz", "_bin", "_candidate", "_clocks", "_coarse_at_s", "_context",
        "_fine_at_s", "_fitting", "_parameters", "_seen", "_tokens", "_wanted_mhz", "_window",
    )  # fmt: skip

    def __init__(self, parameters: GreenLlmParameters, context: PolicyContext) -> None:
        clocks = clocks_above_floor(context, parameters.frequencies_mhz, "greenllm")
        self._clocks = clocks
        self._parameters = parameters
        self._context = context
        self._fitting = LowestFitting(context.predictor, DECODE, clocks, context.slo_itl_s)
        self._wanted_mhz = float(clocks[-1])
        self._band_mhz = (float(clocks[0]), float(clocks[-1]))
        self._bin = self._candidate = -1
        self._seen = 0
        self._tokens = 0
        self._coarse_at_s = self._fine_at_s = 0.0
        self._window = LatencyWindow(parameters.coarse_s, _QUANTILE)
        self._arrived: deque[tuple[float, int]] = deque()

    def initial_clock_mhz(self) -> int:
        return self._clocks[-1]

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return IdlePlan(after_s=self._parameters.idle_s, clock_mhz=self._context.clocks_mhz[0])

    def decide(self, state: InstanceState) -> int:
        if state.last_batch_size == 0:
            return self._clocks[-1]
        return self._for_decode(state) if state.phase == DECODE else self._for_prefill(state)

    def _for_prefill(self, state: InstanceState) -> int:
        c, batch, tokens = self._context, state.last_batch_size, max(state.last_tokens, 1)
        rate_per_s = self._token_rate_per_s(state)

        def energy_j(clock_mhz: int) -> float:
            time_s = c.predictor.predict_s(c.phase, clock_mhz, batch, tokens)
            load = rate_per_s * time_s / tokens
            if load >= 1.0:
                return math.inf
            wait_s = max(state.last_queue_delay_s, load * time_s / (2.0 * (1.0 - load)))
            if wait_s + time_s > c.prefill_budget_s:
                return math.inf
            return busy_energy_j(c, clock_mhz, batch, tokens)

        return cheapest_clock_mhz(self._clocks, energy_j)

    def _token_rate_per_s(self, state: InstanceState) -> float:
        """Prompt tokens a second over the last window, the queue counted as arrived.

        A run that is younger than the window is all of it; at its very start the rate is unknown,
        and taken for too high.
        """
        window_s = min(self._parameters.window_s, state.now_s)
        if window_s <= 0.0:
            return math.inf
        self._arrived.append((state.now_s, state.last_tokens))
        while self._arrived[0][0] < state.now_s - window_s:
            self._arrived.popleft()
        arrived = sum(tokens for _, tokens in self._arrived) + state.waiting_tokens
        return arrived / window_s

    def _for_decode(self, state: InstanceState) -> int:
        p, now_s = self._parameters, state.now_s
        self._window.add(state, DECODE)
        self._tokens += state.last_batch_size
        elapsed_s = now_s - self._coarse_at_s
        if elapsed_s >= p.coarse_s:
            self._look_at_rate(self._tokens / elapsed_s, state)
            self._coarse_at_s, self._tokens = now_s, 0
        p95_s = self._window.quantile_s()
        if now_s - self._fine_at_s >= p.fine_s and p95_s is not None:
            self._fine_at_s = now_s
            if p95_s > self._context.slo_itl_s:
                self._wanted_mhz += p.step_mhz
            elif p95_s < p.slack_ratio * self._context.slo_itl_s:
                self._wanted_mhz -= p.step_mhz
        low, high = self._band_mhz
        self._wanted_mhz = min(max(self._wanted_mhz, low), high)
        return clock_at_least_mhz(self._clocks, self._wanted_mhz)

    def _look_at_rate(self, rate_per_s: float, state: InstanceState) -> None:
        p = self._parameters
        rate_bin = int(rate_per_s / p.bin_tokens_per_s)
        self._seen = self._seen + 1 if rate_bin == self._candidate else 1
        self._candidate = rate_bin
        if rate_bin == self._bin or self._seen < p.num_confirm:
            return
        self._bin = rate_bin
        clocks, context = self._clocks, self._context
        batch = max(math.ceil((rate_bin + 1) * p.bin_tokens_per_s * context.slo_itl_s), 1)
        tokens = min(
            batch * state.last_tokens // state.last_batch_size, max(context.kv_capacity_tokens, 1)
        )
        centre_mhz = self._fitting.clock_mhz(batch, tokens)
        self._band_mhz = (
            max(centre_mhz - p.band_mhz, clocks[0]),
            min(centre_mhz + p.band_mhz, clocks[-1]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSplitParameters:
    """Parameters of `length-split`."""

    long_tokens: int = parameter(1024, "prompts of at least this length are long (ours)", low=1)
    share_frac: float = parameter(
        0.5, "part of the prefill instances kept for long prompts (ours)", low=0, high=1
    )


class LengthSplit(Router):
    """Short and long prompts queue at different prefill instances, so that short ones never wait.

    The last round(share·n) prefill instances, at least one and never all, take the long prompts,
    the others the short ones; within a group the fewest queued tokens, then the fewest requests. A
    lone prefill instance takes both. Decode: fewest open requests.

    Source: GreenLLM, arXiv 2508.16449.
    """

    __slots__ = ("_parameters",)

    def __init__(self, parameters: LengthSplitParameters, context: PolicyContext) -> None:
        self._parameters = parameters

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        num, first = len(prefill), 0
        if num > 1:
            num_long = min(max(round(self._parameters.share_frac * num), 1), num - 1)
            if request.input_tokens >= self._parameters.long_tokens:
                first = num - num_long
            else:
                num -= num_long
        group = prefill[first:num]
        at = least(group, lambda s: (s.waiting_tokens, s.open_requests))
        return first + at, least(decode, lambda s: s.open_requests)
