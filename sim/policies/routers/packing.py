"""Routers that place requests by predicted latency or energy."""

from __future__ import annotations

from dataclasses import dataclass

from sim.policies.base import DECODE, InstanceState, PolicyContext, RequestView, Router, States
from sim.policies.routers.simple import least
from sim.policies.spec import parameter


def predicted_itl_s(context: PolicyContext, state: InstanceState, added_tokens: int) -> float:
    """ITL at the top clock with one request of that many tokens more."""
    return context.predictor.predict_s(
        DECODE,
        context.clocks_mhz[-1],
        state.open_requests + 1,
        state.kv_load_tokens + added_tokens,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SloPackParameters:
    """Parameters of `slo-pack`."""

    headroom_frac: float = parameter(
        0.1, "part of the ITL promise kept free (ours: packers without it broke their SLO)",
        low=0, high=0.99,
    )  # fmt: skip


class SloPack(Router):
    """The fullest decode instance whose predicted ITL still keeps the promise with headroom.

    ITL(n + 1) <= (1 - headroom)·SLO at the top clock; if none does, the one with the fewest
    requests. Prefill: fewest open requests. Leaves instances idle at low load.

    Source: the llm-d energy-routing study of 2026, its policy slo_packing.
    """

    __slots__ = ("_context", "_limit_s")

    def __init__(self, parameters: SloPackParameters, context: PolicyContext) -> None:
        self._context = context
        self._limit_s = context.slo_itl_s * (1.0 - parameters.headroom_frac)

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        fits = [
            i
            for i, state in enumerate(decode)
            if predicted_itl_s(self._context, state, request.input_tokens) <= self._limit_s
        ]
        chosen = (
            max(fits, key=lambda i: (decode[i].open_requests, -i))
            if fits
            else least(decode, lambda s: s.open_requests)
        )
        return least(prefill, lambda s: s.open_requests), chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyHeadroomParameters:
    """Parameters of `latency-headroom`."""

    target_ratio: float = parameter(0.9, "part of the promise that headroom is counted from", low=0)
    mode: str = parameter(
        "spread", "pack: least headroom; spread: most", choices=("pack", "spread")
    )
    explore_frac: float = parameter(
        0.01, "requests sent to an instance without headroom although one has", low=0, high=1
    )


class LatencyHeadroom(Router):
    """By predicted headroom to the promise, target·SLO - predicted; pack or spread.

    99 % of requests go to instances with positive headroom if there is one. TTFT of a prefill
    instance is predicted as the time of all its queued tokens and this prompt in one batch.

    Source: the latency scorer of llm-d and the Gateway API inference extension; the two phases are
    picked separately here.
    """

    __slots__ = ("_context", "_explore", "_pack", "_target")

    def __init__(self, parameters: LatencyHeadroomParameters, context: PolicyContext) -> None:
        self._context = context
        self._target = parameters.target_ratio
        self._pack = parameters.mode == "pack"
        self._explore = parameters.explore_frac

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        c, tokens = self._context, request.input_tokens
        top = c.clocks_mhz[-1]
        ttft = [
            self._target * c.slo_ttft_s
            - c.predictor.predict_s(
                "prefill", top, s.num_waiting + s.num_running + 1,
                s.waiting_tokens + s.kv_tokens + tokens,
            )
            for s in prefill
        ]  # fmt: skip
        itl = [self._target * c.slo_itl_s - predicted_itl_s(c, s, tokens) for s in decode]
        return self._choose(ttft), self._choose(itl)

    def _choose(self, headroom_s: list[float]) -> int:
        positive = [i for i, h in enumerate(headroom_s) if h > 0]
        negative = [i for i, h in enumerate(headroom_s) if h <= 0]
        if not positive:
            return max(negative, key=lambda i: headroom_s[i])
        if negative and self._context.rng.random() < self._explore:
            return max(negative, key=lambda i: headroom_s[i])
        return (min if self._pack else max)(positive, key=lambda i: (headroom_s[i], -i))


@dataclass(frozen=True, slots=True, kw_only=True)
class MinDeltaEnergyParameters:
    """Parameters of `min-delta-energy`."""

    guard_s: float = parameter(0.003, "distance to the ITL promise that is kept", low=0)


class MinDeltaEnergy(Router):
    """The decode instance whose predicted power rises least by taking the request.

    Each instance is taken to run at the lowest of the profile's default levels with
    ITL <= SLO - guard. The rise is P·T·(1/T) = P after minus P before, as the token rate is given;
    one that would miss the promise at every level comes last. Ties: fewest requests.

    Source: VoltanaLLM's code, its authors' unused `_fadr_jiahuan`; guard of 3 ms as there.
    """

    __slots__ = ("_context", "_limit_s")

    def __init__(self, parameters: MinDeltaEnergyParameters, context: PolicyContext) -> None:
        self._context = context
        self._limit_s = context.slo_itl_s - parameters.guard_s

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        def rise(state: InstanceState) -> tuple[float, float, float]:
            n, load = state.open_requests, state.kv_load_tokens
            missed, after_w = self._at(n + 1, load + request.input_tokens)
            before_w = self._at(n, load)[1]
            return missed, after_w - before_w, n

        return least(prefill, lambda s: s.open_requests), least(decode, rise)

    def _at(self, batch_size: int, tokens: int) -> tuple[float, float]:
        """Excess over the limit (0 if kept) and power at the lowest level that keeps it."""
        c = self._context
        if batch_size == 0:
            return 0.0, c.power.idle_power_w(c.default_levels_mhz[0])
        tokens = min(max(tokens, 1), c.kv_capacity_tokens)
        excess_s = 0.0
        for clock in c.default_levels_mhz:
            excess_s = c.predictor.predict_s(DECODE, clock, batch_size, tokens) - self._limit_s
            if excess_s <= 0:
                return 0.0, c.power.power_w(DECODE, clock, batch_size, tokens)
        return excess_s, c.power.power_w(DECODE, c.default_levels_mhz[-1], batch_size, tokens)
