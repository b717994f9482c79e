"""A scaler whose plans are written down; tests name it by this module."""

from __future__ import annotations

from dataclasses import dataclass

from voltana.sim.policies.registry import Entry
from voltana.sim.policies.scalers.base import FleetView, Plan, Scaler, ScalerContext, Wanted
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class TableParameters:
    """Of `Table`."""

    plans: tuple[str, ...] = parameter((), "for each second, a letter an instance: a, p, s, x or l")
    base_mhz: int = parameter(0, "base clock of decode from the second plan on", low=0)
    period_s: float = parameter(1.0, "between two plans")
    switching: int = parameter(0, "cards with two roles", low=0)
    switch_s: float = parameter(0.0, "how long a switch takes", low=0.0)


LETTERS: dict[str, Wanted] = {
    "a": "awake",
    "p": "parked",
    "s": "asleep",
    "x": "stopped",
    "l": "lent",
}


class Table(Scaler):
    """Plans that are written down: "aasa" is one of 2P2D; the last one holds."""

    knows_kinds = True

    def __init__(self, parameters: TableParameters, context: ScalerContext) -> None:
        self.period_s = parameters.period_s
        self.num_switching, self.switch_s = parameters.switching, parameters.switch_s
        self._settings = parameters
        self._at = -1

    def plan(self, view: FleetView) -> Plan:
        plans = self._settings.plans
        self._at += 1
        words = [LETTERS[letter] for letter in plans[min(self._at, len(plans) - 1)]]
        count = len(view.prefill)
        return Plan(
            prefill=words[:count],
            decode=words[count:],
            decode_mhz=self._settings.base_mhz if self._at else 0,
        )


SCALER = Entry(make=Table, parameters=TableParameters)
