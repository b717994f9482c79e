"""A controller that only holds requests: `tests.sim.engine.holding:most=2,hold=0.5,enough=3`."""

from __future__ import annotations

from dataclasses import dataclass

from voltana.sim.policies.base import Controller, InstanceState, PolicyContext
from voltana.sim.policies.registry import Entry
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldingParameters:
    most_requests: int = parameter(1000, "decode batch", low=0)
    hold_s: float = parameter(0.0, "longest wait at rest", low=0)
    enough_requests: int = parameter(1000, "prompts with which prefill begins at once", low=1)


class Holding(Controller):
    """The top clock, always."""

    def __init__(self, parameters: HoldingParameters, context: PolicyContext) -> None:
        self._settings = parameters
        self._top_mhz = context.clocks_mhz[-1]

    def decide(self, state: InstanceState) -> int:
        return self._top_mhz

    def initial_clock_mhz(self) -> int:
        return self._top_mhz

    def admit_up_to(self, state: InstanceState) -> int:
        return self._settings.most_requests

    def hold_s(self, state: InstanceState) -> float:
        return self._settings.hold_s if state.num_waiting < self._settings.enough_requests else 0.0

    def steady_iterations(self, state: InstanceState, batch_size: int, tokens: int) -> int:
        return 1000


CONTROLLER = Entry(make=Holding, parameters=HoldingParameters)
