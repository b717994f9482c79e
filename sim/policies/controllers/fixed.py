"""Controllers that never look: a clock lock for the whole run, and the driver's own governor."""

from __future__ import annotations

from dataclasses import dataclass

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import (
    PREFILL,
    UNLOCKED_MHZ,
    Controller,
    InstanceState,
    PolicyContext,
)
from voltana.sim.policies.parts.clocks import require_clock
from voltana.sim.policies.parts.fitting import FOREVER
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticParameters:
    """Parameters of `static`."""

    f_mhz: tuple[int, ...] = parameter(
        (), "clock to lock, or one for each instance of the phase; the profile's top if not given"
    )


class Static(Controller):
    """Lock one clock before the run and leave it there, busy or idle.

    `static` alone locks the top clock: the "static-max" every saving is counted against. Several
    clocks, f=1005+1410, are those of the phase's instances in order: one each, for unlike cards.

    Source: the baseline of every paper on the subject.
    """

    __slots__ = ("_clock_mhz",)
    colocates = True

    def __init__(self, parameters: StaticParameters, context: PolicyContext) -> None:
        clocks_mhz = context.clocks_mhz
        wanted_mhz = parameters.f_mhz or clocks_mhz[-1:]
        if len(wanted_mhz) > 1:
            there = context.num_prefill if context.phase == PREFILL else context.num_decode
            if len(wanted_mhz) != there:
                raise VoltanaError(
                    f"static: f must be one clock, or one for each of the {there} {context.phase} "
                    f"instances, got {len(wanted_mhz)}: {'+'.join(map(str, wanted_mhz))}"
                )
            wanted_mhz = wanted_mhz[context.instance_id :]
        self._clock_mhz = require_clock(clocks_mhz, wanted_mhz[0], "static: f")

    def decide(self, state: InstanceState) -> int:
        return self._clock_mhz

    def initial_clock_mhz(self) -> int:
        return self._clock_mhz

    def steady_iterations(self, state: InstanceState, batch_size: int, tokens: int) -> int:
        return FOREVER


@dataclass(frozen=True, slots=True, kw_only=True)
class NoParameters:
    """For a policy without parameters."""


class Base(Controller):
    """Lock the base clock that the fleet's scaler has chosen; the top clock as long as none has.

    Source: tier 1 of DualScale, arXiv 2602.18755, without its tier 2.
    """

    __slots__ = ("_top_mhz",)
    colocates = True

    def __init__(self, parameters: NoParameters, context: PolicyContext) -> None:
        self._top_mhz = context.clocks_mhz[-1]

    def decide(self, state: InstanceState) -> int:
        return state.base_mhz or self._top_mhz

    def initial_clock_mhz(self) -> int:
        return self._top_mhz

    def steady_iterations(self, state: InstanceState, batch_size: int, tokens: int) -> int:
        return FOREVER


class Boost(Controller):
    """Never lock: the driver runs its top clock when busy and sinks to its idle clock when not.

    Source: NVIDIA's driver; what a GPU does out of the box.
    """

    __slots__ = ()
    colocates = True

    def __init__(self, parameters: NoParameters, context: PolicyContext) -> None:
        pass

    def decide(self, state: InstanceState) -> int:
        return UNLOCKED_MHZ

    def steady_iterations(self, state: InstanceState, batch_size: int, tokens: int) -> int:
        return FOREVER
