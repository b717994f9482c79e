"""DualScale's coarse tier: instances and base clock by integer programming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from voltana.profiles.states import LOW_STATES, LowState
from voltana.sim.policies.base import AWAKE, DECODE, PREFILL, Phase
from voltana.sim.policies.parts.clocks import levels_of
from voltana.sim.policies.scalers.base import FleetView, Plan, Scaler, ScalerContext, keep
from voltana.sim.policies.scalers.capacity import Capacity, Load, LoadMeter, Served
from voltana.sim.policies.scalers.load import LOW
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class DualScaleParameters:
    """Parameters of `dualscale`."""

    period_s: float = parameter(300.0, "time between two placements", low=0.1)
    reserve_frac: float = parameter(0.2, "load is taken to be this much more (ours)", low=0.0)
    headroom_frac: float = parameter(0.1, "part of the ITL promise kept free (ours)", high=0.9)
    num_levels: int = parameter(8, "clocks considered, spread over the profile's", low=1)
    frequencies_mhz: tuple[int, ...] = parameter((), "clocks considered, instead of num_levels")
    low: str = parameter("stopped", "what the others are", choices=LOW)


class DualScale(Scaler):
    """The number of instances and the base clock of each phase that serve the load at least power.

    An integer program over (phase, clock): n instances at that clock serve n·R(clock) and draw
    n·P(clock) at it; those that are left draw what their state does. Least power, such that each
    phase serves the last window's rate · (1 + reserve), takes one clock, and has no more instances
    than there are; under a power budget the sum stays below it, too. Without a solution all serve
    at the top clock. The base clock is what the controller `base` runs at; with another controller
    the number of instances alone is followed.

    R is `voltana.sim.policies.scalers.capacity`; tensor parallelism is not a choice here, as all
    instances of a fleet are there already.

    Source: DualScale, arXiv 2602.18755 (tier 1, every five minutes).
    """

    def __init__(self, parameters: DualScaleParameters, context: ScalerContext) -> None:
        self.period_s = parameters.period_s
        self._context = context
        self._low: LowState = LOW_STATES[LOW.index(parameters.low)]
        self._reserve = 1.0 + parameters.reserve_frac
        self._levels_mhz = levels_of(
            context.policy, parameters.frequencies_mhz, parameters.num_levels, "dualscale"
        )
        self._capacity = Capacity(context.policy, parameters.headroom_frac)
        self._meter = LoadMeter(0.0)

    def plan(self, view: FleetView) -> Plan:
        load = self._meter.take(view.demand)
        top_mhz = self._levels_mhz[-1]
        found = None
        if load is not None:
            found = self._solve(load, {PREFILL: len(view.prefill), DECODE: len(view.decode)})
        if found is None:
            return Plan(
                prefill=[AWAKE] * len(view.prefill), decode=[AWAKE] * len(view.decode),
                prefill_mhz=top_mhz, decode_mhz=top_mhz,
            )  # fmt: skip
        (num_prefill, prefill_mhz), (num_decode, decode_mhz) = found
        return Plan(
            prefill=keep(view.prefill, num_prefill, self._low),
            decode=keep(view.decode, num_decode, self._low),
            prefill_mhz=prefill_mhz,
            decode_mhz=decode_mhz,
        )

    def _solve(
        self, load: Load, there: dict[Phase, int]
    ) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Number and clock of each phase; None if no placement serves the load."""
        phases: tuple[Phase, Phase] = (PREFILL, DECODE)
        served = {
            phase: [self._capacity.served(phase, f, load) for f in self._levels_mhz]
            for phase in phases
        }
        counts = place(
            [served[phase] for phase in phases],
            [there[phase] for phase in phases],
            load.rate_rps * self._reserve,
            low_w=self._context.states.of(self._low).power_w,
            budget_w=self._context.budget_w,
        )
        if counts is None:
            return None
        chosen = [
            next((n, f) for n, f in zip(row, self._levels_mhz, strict=True) if n) for row in counts
        ]
        return chosen[0], chosen[1]


def place(
    served: Sequence[Sequence[Served]],
    there: Sequence[int],
    rate_rps: float,
    *,
    low_w: float,
    budget_w: float | None = None,
) -> list[list[int]] | None:
    """The integer program: instances by phase and clock.

    Args:
        served: By phase and clock, what one instance serves and draws.
        there: Instances of each phase.
        rate_rps: That each phase must serve.
        low_w: What one draws that does not serve.
        budget_w: What all may draw together.

    Returns:
        Instances by phase and clock, at one clock a phase and one instance at least; None if
        no placement serves the rate within the budget.
    """
    num_phases, num_clocks = len(served), len(served[0])
    size = num_phases * num_clocks
    above_w = np.array([s.power_w - low_w for row in served for s in row])
    rates = np.array([s.rate_rps for row in served for s in row])
    most = np.repeat(np.array(there, dtype=np.float64), num_clocks) * (rates > 0)
    phase = np.kron(np.eye(num_phases), np.ones(num_clocks))
    zeros, counts = np.zeros((num_phases, size)), np.eye(size)
    rows = [  # variables: instances by (phase, clock), then whether that clock is taken
        LinearConstraint(np.hstack([phase * rates, zeros]), lb=rate_rps),
        LinearConstraint(np.hstack([zeros, phase]), lb=1, ub=1),
        LinearConstraint(np.hstack([counts, -np.diag(most)]), ub=0),
        LinearConstraint(np.hstack([counts, -np.eye(size)]), lb=0),
    ]
    if budget_w is not None:
        left_w = budget_w - low_w * sum(there)
        rows.append(LinearConstraint(np.hstack([above_w, np.zeros(size)])[None, :], ub=left_w))
    solved = milp(
        np.hstack([above_w, np.zeros(size)]),
        constraints=rows,
        bounds=Bounds(0, np.hstack([most, np.ones(size)])),
        integrality=np.ones(2 * size, dtype=np.int64),
    )
    if solved.x is None:
        return None
    found: list[list[int]] = np.rint(solved.x[:size]).astype(int).reshape(num_phases, -1).tolist()
    return found
