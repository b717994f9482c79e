"""A controller with hysteresis: what it decides depends on the clock in force."""

from __future__ import annotations

from voltana.sim.policies.base import Controller, InstanceState, PolicyContext
from voltana.sim.policies.controllers.fixed import NoParameters
from voltana.sim.policies.registry import Entry

RISES_ABOVE, FALLS_BELOW = 100, 50
"""Requests."""


class Sticky(Controller):
    """Top clock above 100 requests, lowest below 50; in between the clock stays."""

    def __init__(self, parameters: NoParameters, context: PolicyContext) -> None:
        self._clocks_mhz = context.clocks_mhz

    def decide(self, state: InstanceState) -> int:
        if state.num_running > RISES_ABOVE:
            return self._clocks_mhz[-1]
        return self._clocks_mhz[0] if state.num_running < FALLS_BELOW else state.clock_mhz


CONTROLLER = Entry(make=Sticky, parameters=NoParameters)
