"""An example of a policy of your own: a frequency controller in thirty lines.

It is no part of the list of policies. Name the module in place of a policy:

    voltana simulate --controller voltana.experiments.examples.own_policy:high=120
"""

from __future__ import annotations

from dataclasses import dataclass

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import Controller, InstanceState, PolicyContext
from voltana.sim.policies.parts.clocks import clock_at_least_mhz
from voltana.sim.policies.registry import Entry
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRampParameters:
    """Parameters of the load ramp; both defaults are ours."""

    low_requests: float = parameter(32.0, "up to this load the lowest listed clock", low=0)
    high_requests: float = parameter(192.0, "from this load on the top clock", low=1)


class LoadRamp(Controller):
    """The clock rises in a straight line with the number of requests on the instance.

    It knows neither promise nor model, only the load: what an operator may do by hand.
    """

    def __init__(self, parameters: LoadRampParameters, context: PolicyContext) -> None:
        if parameters.low_requests >= parameters.high_requests:
            raise VoltanaError(
                f"own_policy needs low < high, got {parameters.low_requests:g} and "
                f"{parameters.high_requests:g}: set both"
            )
        self._parameters = parameters
        self._clocks_mhz = context.clocks_mhz
        self._low_mhz = context.default_levels_mhz[0]
        self._top_mhz = context.clocks_mhz[-1]

    def decide(self, state: InstanceState) -> int:
        low, high = self._parameters.low_requests, self._parameters.high_requests
        load = state.num_running + state.num_waiting
        share = min(max((load - low) / (high - low), 0.0), 1.0)
        wanted_mhz = self._low_mhz + share * (self._top_mhz - self._low_mhz)
        return clock_at_least_mhz(self._clocks_mhz, wanted_mhz)


CONTROLLER = Entry(make=LoadRamp, parameters=LoadRampParameters)
