"""DualScale's coarse tier: instances and base clock by integer programming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from voltana.profiles.states import LOW_STATES, LowState
from voltana.sim.policies.base import AWAKE, COLOCATED, DECODE, PREFILL, Phase, States
from voltana.sim.policies.parts.clocks import levels_of
from voltana.sim.policies.scalers.base import (
    FleetView,
    Kind,
    Plan,
    Scaler,
    ScalerContext,
    Wanted,
    keep,
)
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

    Where a phase has instances of several kinds (one GPU each beside two, A100 beside H100), the
    kind is chosen with the clock: a phase serves with instances of one kind, the others leave
    service. R is `voltana.sim.policies.scalers.capacity`, by the kind's models.

    Source: DualScale, arXiv 2602.18755 (tier 1, every five minutes). There a pool of GPUs is cut
    anew into instances of another tensor parallelism; here those of each are there already, on
    GPUs of their own, and what is not chosen draws what its state does.
    """

    knows_kinds = True

    def __init__(self, parameters: DualScaleParameters, context: ScalerContext) -> None:
        self.period_s = parameters.period_s
        self._budget_w = context.budget_w
        self._low: LowState = LOW_STATES[LOW.index(parameters.low)]
        self._reserve = 1.0 + parameters.reserve_frac
        num_all: dict[Phase, int] = {
            PREFILL: context.policy.num_prefill,
            DECODE: context.policy.num_decode,
        }
        if context.policy.phase == COLOCATED:
            num_all = {COLOCATED: context.policy.num_decode}
        self._groups: dict[Phase, list[_Group]] = {}
        for phase, num in num_all.items():
            alike = Kind(instances=tuple(range(num)), policy=context.policy, states=context.states)
            kinds = context.kinds.get(phase, [alike])
            self._groups[phase] = [_Group(kind, parameters) for kind in kinds]
        self._meter = LoadMeter(0.0)

    def plan(self, view: FleetView) -> Plan:
        load = self._meter.take(view.demand)
        found = None if load is None else self._solve(load)
        if found is None:
            tops = [max(g.levels_mhz[-1] for g in of) for of in self._groups.values()]
            return Plan(
                prefill=[AWAKE] * len(view.prefill), decode=[AWAKE] * len(view.decode),
                prefill_mhz=tops[0], decode_mhz=tops[-1],
            )  # fmt: skip
        prefill, decode = found[0], found[-1]  # one phase of a colocated fleet
        return Plan(
            prefill=self._kept(view.prefill, prefill) if view.prefill else [],
            decode=self._kept(view.decode, decode),
            prefill_mhz=prefill.clock_mhz,
            decode_mhz=decode.clock_mhz,
        )

    def _kept(self, states: States, chosen: _Choice) -> list[Wanted]:
        """The chosen number of the kind awake, all others low."""
        wanted: list[Wanted] = [self._low] * len(states)
        own = chosen.group.kind.instances
        kept = keep([states[i] for i in own], chosen.num_awake, self._low)
        for index, state in zip(own, kept, strict=True):
            wanted[index] = state
        return wanted

    def _solve(self, load: Load) -> list[_Choice] | None:
        """What each phase serves with; None if no placement serves the load."""
        options = [
            [(group, f) for group in groups for f in group.levels_mhz]
            for groups in self._groups.values()
        ]
        counts = place(
            [
                [group.capacity.served(phase, f, load) for group, f in row]
                for phase, row in zip(self._groups, options, strict=True)
            ],
            [[len(group.kind.instances) for group, _ in row] for row in options],
            load.rate_rps * self._reserve,
            low_w=[[group.low_w for group, _ in row] for row in options],
            left_w=self._left_w(),
        )
        if counts is None:
            return None
        return [
            next(_Choice(*option, n) for n, option in zip(row, of, strict=True) if n)
            for row, of in zip(counts, options, strict=True)
        ]

    def _left_w(self) -> float | None:
        """Of the budget, when all are out of service."""
        if self._budget_w is None:
            return None
        groups = (group for of in self._groups.values() for group in of)
        return self._budget_w - sum(g.low_w * len(g.kind.instances) for g in groups)


class _Group:
    """A kind, and what one of it serves."""

    def __init__(self, kind: Kind, parameters: DualScaleParameters) -> None:
        self.kind = kind
        self.levels_mhz = levels_of(
            kind.policy, parameters.frequencies_mhz, parameters.num_levels, "dualscale"
        )
        self.capacity = Capacity(kind.policy, parameters.headroom_frac)
        self.low_w = kind.states.of(LOW_STATES[LOW.index(parameters.low)]).power_w


class _Choice(NamedTuple):
    group: _Group
    clock_mhz: int
    num_awake: int


def place(
    served: Sequence[Sequence[Served]],
    there: Sequence[Sequence[int]],
    rate_rps: float,
    *,
    low_w: Sequence[Sequence[float]],
    left_w: float | None = None,
) -> list[list[int]] | None:
    """The integer program: instances by phase and option, which is a kind at a clock.

    Args:
        served: By phase and option, what one instance serves and draws.
        there: Instances of that option's kind.
        rate_rps: That each phase must serve.
        low_w: What one of that kind draws that does not serve.
        left_w: What all may draw together beyond what they draw out of service.

    Returns:
        Instances by phase and option, of one option a phase and one instance at least; None if
        no placement serves the rate within the budget.
    """
    num_phases = len(served)
    above_w = np.array([s.power_w for row in served for s in row]) - np.concatenate(low_w)
    rates = np.array([s.rate_rps for row in served for s in row])
    size = len(rates)
    most = np.concatenate(there) * (rates > 0)
    of_phase = np.repeat(np.arange(num_phases), [len(row) for row in served])
    phase = (of_phase == np.arange(num_phases)[:, None]).astype(np.float64)
    zeros, counts = np.zeros((num_phases, size)), np.eye(size)
    rows = [  # variables: instances by (phase, option), then whether that option is taken
        LinearConstraint(np.hstack([phase * rates, zeros]), lb=rate_rps),
        LinearConstraint(np.hstack([zeros, phase]), lb=1, ub=1),
        LinearConstraint(np.hstack([counts, -np.diag(most)]), ub=0),
        LinearConstraint(np.hstack([counts, -np.eye(size)]), lb=0),
    ]
    if left_w is not None:
        rows.append(LinearConstraint(np.hstack([above_w, np.zeros(size)])[None, :], ub=left_w))
    solved = milp(
        np.hstack([above_w, np.zeros(size)]),
        constraints=rows,
        bounds=Bounds(0, np.hstack([most, np.ones(size)])),
        integrality=np.ones(2 * size, dtype=np.int64),
    )
    if solved.x is None:
        return None
    found = np.rint(solved.x[:size]).astype(int)
    return [found[of_phase == i].tolist() for i in range(num_phases)]
