"""Routers that place requests by predicted latency or energy."""

from __future__ import annotations

from dataclasses import dataclass

from voltana.sim.policies.base import (
    DECODE,
    InstanceState,
    PolicyContext,
    RequestView,
    Router,
    States,
)
from voltana.sim.policies.parts.clocks import clock_list
from voltana.sim.policies.parts.dice import Dice
from voltana.sim.policies.parts.fitting import LowestFitting
from voltana.sim.policies.routers.ecoroute import reference_levels, slowest_emptiest
from voltana.sim.policies.routers.simple import least
from voltana.sim.policies.spec import parameter


def predicted_itl_s(context: PolicyContext, state: InstanceState, added_tokens: int) -> float:
    """ITL at the top clock with one request more.

    Args:
        context: The predictor and the clocks.
        state: A decode instance.
        added_tokens: Context of the new request.

    Returns:
        Predicted time of an iteration, in s.
    """
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

    99 % of requests go to instances with positive headroom if there is one. In prefill the promise
    is what that of TTFT leaves for prefill, and the prediction the time of all queued tokens and
    this prompt in one batch.

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
            self._target * c.prefill_budget_s
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
    """Parameters of `min-delta-energy`: the source's."""

    balance_requests: int = parameter(
        64, "while every instance has fewer requests than this, loads are balanced", low=0
    )
    guard_s: float = parameter(0.003, "distance to the ITL promise that is kept", low=0)
    frequencies_mhz: tuple[int, ...] = parameter(
        (), "clock levels of the what-if; by default the reference's five, or five of the profile"
    )


class MinDeltaEnergy(Router):
    """The decode instance whose energy an iteration rises least by taking the request.

    While every decode instance has fewer open requests than `balance`: the lowest clock, then the
    fewest requests. Else, for each instance, the lowest level that keeps ITL <= SLO - guard with
    this request added; an instance without one is left out. Among the others the least
    E(that level, n + 1, load + prompt) - E(clock in force, n, load), with E = P·T of one iteration,
    0 for an empty one; the first of equals. If all are left out: the shortest last iteration.
    Prefill: at random.

    Source: VoltanaLLM v0.1, `_fadr_jiahuan` of echo_lb_new.py, which its release never calls. Its
    energy table is not published: E is the predictor's time and the profile's power here. Where
    all are left out its search takes in the prefill instances by mistake; ours does not.
    """

    __slots__ = ("_balance", "_context", "_dice", "_fitting", "_top_mhz")

    def __init__(self, parameters: MinDeltaEnergyParameters, context: PolicyContext) -> None:
        self._context = context
        self._balance = parameters.balance_requests
        levels_mhz = clock_list(
            context.clocks_mhz,
            parameters.frequencies_mhz,
            reference_levels(context),
            "min-delta-energy: frequencies",
        )
        limit_s = context.slo_itl_s - parameters.guard_s
        self._fitting = LowestFitting(context.predictor, DECODE, levels_mhz, limit_s)
        self._top_mhz = context.clocks_mhz[-1]
        self._dice = Dice(context.rng)

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        prefill_at = self._dice.below(len(prefill))
        return prefill_at, self._route_decode(request.input_tokens, decode)

    def _route_decode(self, input_tokens: int, decode: States) -> int:
        if max(state.open_requests for state in decode) < self._balance:
            return slowest_emptiest(decode, self._top_mhz)
        rises = {
            at: rise_j
            for at, state in enumerate(decode)
            if (rise_j := self._rise_j(state, input_tokens)) is not None
        }
        if not rises:
            return least(decode, lambda s: s.last_duration_s)
        return min(rises, key=lambda at: rises[at])

    def _rise_j(self, state: InstanceState, input_tokens: int) -> float | None:
        """Energy of an iteration with the request less that of one without; None: none keeps it."""
        count, load = state.open_requests, state.kv_load_tokens
        clock_mhz = self._fitting.fitting_mhz(count + 1, load + input_tokens)
        if clock_mhz is None:
            return None
        after_j = self._energy_j(clock_mhz, count + 1, load + input_tokens)
        now_mhz = state.clock_or_top_mhz(self._top_mhz)
        return after_j - (self._energy_j(now_mhz, count, load) if count else 0.0)

    def _energy_j(self, clock_mhz: int, batch_size: int, tokens: int) -> float:
        c, point = self._context, (clock_mhz, batch_size, max(tokens, 1))
        return c.power.power_w(DECODE, *point) * c.predictor.predict_s(DECODE, *point)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastAddedPowerParameters:
    """Parameters of `least-added-power`."""

    guard_s: float = parameter(0.003, "distance to the ITL promise that is kept (ours)", low=0)


class LeastAddedPower(Router):
    """The decode instance whose predicted power rises least by taking the request.

    Each instance is taken to run at the lowest of the profile's default levels with
    ITL <= SLO - guard. What rises is power, not the energy of an iteration, as the token rate is
    given; an idle instance costs the step from idle power. One that would miss the promise at every
    level comes last. Ties: fewest requests. Prefill: fewest open requests.

    Source: ours, begun from `min-delta-energy`: it packs at any load, has no balancing, and
    compares watts.
    """

    __slots__ = ("_context", "_fitting", "_limit_s")

    def __init__(self, parameters: LeastAddedPowerParameters, context: PolicyContext) -> None:
        self._context = context
        self._limit_s = context.slo_itl_s - parameters.guard_s
        self._fitting = LowestFitting(
            context.predictor, DECODE, context.default_levels_mhz, self._limit_s
        )

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
        point = self._fitting.clock_mhz(batch_size, tokens), batch_size, tokens
        excess_s = c.predictor.predict_s(DECODE, *point) - self._limit_s
        return max(excess_s, 0.0), c.power.power_w(DECODE, *point)
