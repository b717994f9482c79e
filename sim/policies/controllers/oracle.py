"""The oracle: what a controller could do that knows the hardware and acts without delay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import (
    DECODE,
    UNLOCKED_MHZ,
    Controller,
    IdlePlan,
    InstanceState,
    PolicyContext,
)
from voltana.sim.policies.parts.clocks import cheapest_clock_mhz, clock_list
from voltana.sim.policies.spec import parameter

_STEPS: Final = 10
_SETTLED: Final = 1e-3
"""Steps towards the settled batch at most, and the relative change that ends them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleParameters:
    """Parameters of `oracle`; all defaults are ours."""

    headroom_frac: float = parameter(
        0.0, "part of the promise kept in reserve; an exact model needs none", low=0, high=0.9
    )
    frequencies_mhz: tuple[int, ...] = parameter((), "clocks considered, instead of all")


class Oracle(Controller):
    """Least energy among the clocks that keep the promise, by the true times and no actuation lag.

    It knows the profile's tables, which are the simulated hardware itself, whatever predictor the
    other policies believe; sees the batch about to run; and its clock is in force at once, whatever
    the actuation latency. So each iteration's time is known to the last digit.
    Decode: the token rate is given, so that a slower clock has a larger batch, the fixed point of
    b' = b·T(f, b')/T(now). Among clocks with T(f, b) and T(f, b') <= SLO·(1 - headroom) the least
    energy per token, which at a given rate is the least power. None fits, or requests wait: the
    top clock.
    Prefill: among clocks with delay + T <= limit, 2·T <= limit (who arrives during the batch waits
    for it), and delay of the oldest in the queue + T + (the queue at the top clock) <= limit, the
    least (P - idle)·T; else the top clock. limit = (TTFT - 2·ITL)·(1 - headroom): the first token
    waits for a decode iteration to end and for its own.
    Idle: at once the clock of least idle power.

    It knows no future arrivals and is greedy, so it is no lower bound; it shows what exactness and
    speed are worth to a rule like EcoMin's.

    Source: ours.
    """

    __slots__ = ("_itl_s", "_levels_mhz", "_park", "_top_mhz", "_truth", "_ttft_s")

    acts_at_once: ClassVar[bool] = True

    def __init__(self, parameters: OracleParameters, context: PolicyContext) -> None:
        if context.truth is None:
            raise VoltanaError(
                "oracle needs the hardware's true times, which only a simulation can show it"
            )
        self._truth = context.truth
        self._levels_mhz = clock_list(
            context.clocks_mhz,
            parameters.frequencies_mhz,
            context.clocks_mhz,
            "oracle: frequencies",
        )
        self._top_mhz = self._levels_mhz[-1]
        kept = 1.0 - parameters.headroom_frac
        self._itl_s = context.slo_itl_s * kept
        self._ttft_s = context.prefill_budget_s * kept
        park = min((UNLOCKED_MHZ, *self._levels_mhz), key=self._truth.idle_power_w)
        self._park = IdlePlan(after_s=0.0, clock_mhz=park)

    def initial_clock_mhz(self) -> int:
        return self._park.clock_mhz

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return self._park

    def decide(self, state: InstanceState) -> int:
        if state.num_running == 0:
            return self._park.clock_mhz
        return self._for_decode(state) if state.phase == DECODE else self._for_prefill(state)

    def _for_decode(self, state: InstanceState) -> int:
        if state.num_waiting > 0:
            return self._top_mhz
        now_s = self._truth.time_and_power(
            DECODE, state.clock_mhz, state.num_running, state.kv_tokens
        )[0]
        return cheapest_clock_mhz(
            self._levels_mhz,
            lambda f: self._settled_power_w(f, state.num_running, state.kv_tokens, now_s),
        )

    def _settled_power_w(self, clock_mhz: int, batch: int, tokens: int, now_s: float) -> float:
        """Power once the batch has settled; infinite if some iteration until then is too long."""
        growth, power_w = 1.0, math.inf
        for _ in range(_STEPS):
            settled = max(round(batch * growth), 1)
            time_s, power_w = self._truth.time_and_power(
                DECODE, clock_mhz, settled, max(tokens * growth, 1.0)
            )
            if time_s > self._itl_s:
                return math.inf
            before, growth = growth, time_s / now_s
            if abs(growth - before) < _SETTLED * before:
                break
        return power_w

    def _for_prefill(self, state: InstanceState) -> int:
        at, phase, tokens = self._truth.time_and_power, state.phase, state.kv_tokens
        batch = state.effective_batch_size or float(state.num_running)
        behind_s = 0.0
        if state.num_waiting > 0:
            oldest_s = max(state.now_s - r.arrival_s for r in state.list_waiting())
            # one prompt of all the tokens takes longer than any batch of them
            behind_s = oldest_s + at(phase, self._top_mhz, 1, max(state.waiting_tokens, 1))[0]

        def energy_j(clock_mhz: int) -> float:
            time_s, power_w = at(phase, clock_mhz, batch, tokens)
            if max(state.last_queue_delay_s, behind_s, time_s) + time_s > self._ttft_s:
                return math.inf
            return (power_w - self._truth.idle_power_w(clock_mhz)) * time_s

        return cheapest_clock_mhz(self._levels_mhz, energy_j)
