"""KAIROS: the clock follows how full the KV cache is. The straight line is ours."""

from __future__ import annotations

from dataclasses import dataclass

from voltana.sim.policies.base import DECODE, Controller, IdlePlan, InstanceState, PolicyContext
from voltana.sim.policies.parts.clocks import clock_at_least_mhz, clocks_above_floor
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class KairosParameters:
    """Parameters of `kairos`."""

    protect_frac: float = parameter(
        0.75, "KV use above which the top clock protects the instance", low=0.01, high=1.0
    )
    floor_tokens_per_s: float = parameter(
        20.0, "tokens per second of one request below which the top clock is taken", low=0
    )
    hold_s: float = parameter(
        1.0, "time that the top clock then stays, lest it flaps (ours)", low=0
    )
    idle_s: float = parameter(
        5.0, "idle time before the profile's lowest clock is locked (ours)", low=0
    )
    frequencies_mhz: tuple[int, ...] = parameter(
        (), "clocks to choose from; none: all from the phase's clock of least energy upwards (ours)"
    )


class Kairos(Controller):
    """The clock rises with resident context over KV capacity; the top one when a stream starves.

    u = resident context tokens / capacity. f = lowest + (top - lowest)·u / protect, of the listed
    clocks, snapped up;
    u > protect: the top clock. Decode: one request's rate, 1 / last iteration's time, below
    `floor_tokens`: the top clock, for `hold_s` at least. Prefill counts its batch and its queue as
    context.

    Source: KAIROS, arXiv 2604.16682. The source says only that the level is monotone
    in u: the straight line, the hold and that it begins at the clock of least energy are ours. Its
    admission cap is the engine's matter and left out.
    """

    __slots__ = (
        "_capacity_tokens",
        "_clocks",
        "_held_until_s",
        "_parameters",
        "_park_mhz",
        "_phase",
    )

    def __init__(self, parameters: KairosParameters, context: PolicyContext) -> None:
        self._parameters = parameters
        self._clocks = clocks_above_floor(context, parameters.frequencies_mhz, "kairos")
        self._park_mhz = context.clocks_mhz[0]
        self._phase = context.phase
        self._held_until_s = float("-inf")
        self._capacity_tokens = max(context.kv_capacity_tokens, 1)

    def initial_clock_mhz(self) -> int:
        return self._clocks[0]

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return IdlePlan(after_s=self._parameters.idle_s, clock_mhz=self._park_mhz)

    def decide(self, state: InstanceState) -> int:
        p, low, top = self._parameters, self._clocks[0], self._clocks[-1]
        is_decode = self._phase == DECODE
        resident = state.kv_tokens if is_decode else state.last_tokens + state.waiting_tokens
        use = resident / self._capacity_tokens
        if is_decode and state.last_duration_s * p.floor_tokens_per_s > 1.0:
            self._held_until_s = state.now_s + p.hold_s
        if use > p.protect_frac or state.now_s < self._held_until_s:
            return top
        return clock_at_least_mhz(self._clocks, low + (top - low) * use / p.protect_frac)
