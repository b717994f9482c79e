"""A controller with a programming error, of the kind that no rule words; any worker imports it."""

from __future__ import annotations

from voltana.sim.policies.base import Controller, InstanceState, PolicyContext
from voltana.sim.policies.controllers.fixed import NoParameters
from voltana.sim.policies.registry import Entry


class Faulty(Controller):
    """Raises at its first decision."""

    def __init__(self, parameters: NoParameters, context: PolicyContext) -> None: ...

    def decide(self, state: InstanceState) -> int:
        raise KeyError(state.phase, "two\nlines")


CONTROLLER = Entry(make=Faulty, parameters=NoParameters)
