"""Scalers that follow the load: as many instances as it needs, in different hurry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from voltana.profiles.states import LOW_STATES, LowState
from voltana.sim.policies.base import AWAKE, States
from voltana.sim.policies.scalers.base import FleetView, Plan, Scaler, ScalerContext, Wanted, keep
from voltana.sim.policies.scalers.capacity import Capacity, Load, LoadMeter
from voltana.sim.policies.spec import parameter

LOW: Final[tuple[str, ...]] = LOW_STATES


@dataclass(frozen=True, slots=True, kw_only=True)
class NoScalerParameters:
    """For a scaler without parameters."""


class AllAwake(Scaler):
    """Every instance serves all the time: the fleet as it is without a scaler.

    Source: the baseline.
    """

    knows_kinds = True

    def __init__(self, parameters: NoScalerParameters, context: ScalerContext) -> None:
        self.period_s = 3600.0

    def plan(self, view: FleetView) -> Plan:
        return Plan(prefill=[AWAKE] * len(view.prefill), decode=[AWAKE] * len(view.decode))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleToLoadParameters:
    """Parameters of `scale-to-load`; all defaults are ours."""

    period_s: float = parameter(5.0, "time between two looks", low=0.1)
    memory_s: float = parameter(30.0, "time constant of the mean rate", low=0.0)
    reserve_frac: float = parameter(0.2, "load is taken to be this much more", low=0.0)
    slack_frac: float = parameter(
        0.1, "one fewer must hold this much more than that, too (hysteresis)", low=0.0
    )
    dwell_s: float = parameter(60.0, "for how long one fewer must have done", low=0.0)
    headroom_frac: float = parameter(0.1, "part of the ITL promise kept free", low=-1.0, high=0.9)
    spare: int = parameter(0, "instances of each phase kept awake beyond those needed", low=0)
    low: str = parameter("asleep", "what the others are", choices=LOW)


class ScaleToLoad(Scaler):
    """As many instances of each phase as the load needs at the top clock, one fewer after a while.

    The load is the larger of the last window's rate and its mean, plus a reserve; what one instance
    serves is `voltana.sim.policies.scalers.capacity`. More are woken at once. One is sent away when
    one fewer would have held the load and its slack through the whole dwell.

    Source: ours; autoscaling by load with hysteresis, as every cluster does it.
    """

    def __init__(self, parameters: ScaleToLoadParameters, context: ScalerContext) -> None:
        self.period_s = parameters.period_s
        self._settings = parameters
        self._low: LowState = LOW_STATES[LOW.index(parameters.low)]
        self._top_mhz = context.policy.clocks_mhz[-1]
        self._capacity = Capacity(context.policy, parameters.headroom_frac)
        self._meter = LoadMeter(parameters.memory_s)
        self._enough_from_s: dict[str, float] = {}

    def plan(self, view: FleetView) -> Plan:
        load = self._meter.take(view.demand)
        if load is None:
            return Plan(prefill=[AWAKE] * len(view.prefill), decode=[AWAKE] * len(view.decode))
        last_rps = view.demand.requests / view.demand.window_s
        rate_rps = max(load.rate_rps, last_rps) * (1.0 + self._settings.reserve_frac)
        return Plan(
            prefill=self._phase(view.prefill, rate_rps, load, view.now_s),
            decode=self._phase(view.decode, rate_rps, load, view.now_s),
        )

    def _phase(self, states: States, rate_rps: float, load: Load, now_s: float) -> list[Wanted]:
        if not states:
            return []
        phase = states[0].phase
        one_rps = self._capacity.served(phase, self._top_mhz, load).rate_rps
        present = sum(s.power_state in (AWAKE, "waking") for s in states)
        spare = self._settings.spare
        needed = instances_for(rate_rps, one_rps, len(states)) + spare
        with_slack = rate_rps * (1.0 + self._settings.slack_frac)
        is_enough = instances_for(with_slack, one_rps, len(states)) + spare < present
        since_s = self._enough_from_s.setdefault(phase, now_s) if is_enough else math.inf
        if not is_enough:
            self._enough_from_s.pop(phase, None)
        if needed < present:
            leaves = now_s - since_s >= self._settings.dwell_s
            if leaves:
                self._enough_from_s[phase] = now_s
            needed = present - 1 if leaves else present
        return keep(states, needed, self._low)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamoParameters:
    """Parameters of `dynamo`."""

    period_s: float = parameter(180.0, "adjustment interval", low=0.1)
    headroom_frac: float = parameter(0.0, "part of the ITL promise kept free (ours)", high=0.9)
    low: str = parameter("stopped", "what the others are", choices=LOW)


class Dynamo(Scaler):
    """Replicas by the last interval: the tokens that came over those that one instance serves.

    Prefill: ceil(prompt tokens a second / tokens a second of one); decode: the same of answers, at
    the batch that keeps the ITL promise. No hysteresis, no reserve. Replicas that are not wanted
    are stopped, as the planner removes them. Its corrections by observed latencies (a factor on
    either throughput) and its forecasts other than "as the last interval" are left out, and what
    one instance serves is `voltana.sim.policies.scalers.capacity` in place of its profiler's table.

    Source: NVIDIA Dynamo's SLA planner (ai-dynamo/dynamo, `planner`), with its constant predictor.
    """

    def __init__(self, parameters: DynamoParameters, context: ScalerContext) -> None:
        self.period_s = parameters.period_s
        self._low: LowState = LOW_STATES[LOW.index(parameters.low)]
        self._top_mhz = context.policy.clocks_mhz[-1]
        self._capacity = Capacity(context.policy, parameters.headroom_frac)
        self._meter = LoadMeter(0.0)

    def plan(self, view: FleetView) -> Plan:
        load = self._meter.take(view.demand)
        if load is None:
            return Plan(prefill=[AWAKE] * len(view.prefill), decode=[AWAKE] * len(view.decode))
        return Plan(prefill=self._phase(view.prefill, load), decode=self._phase(view.decode, load))

    def _phase(self, states: States, load: Load) -> list[Wanted]:
        if not states:
            return []
        one_rps = self._capacity.served(states[0].phase, self._top_mhz, load).rate_rps
        return keep(states, instances_for(load.rate_rps, one_rps, len(states)), self._low)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottllmParameters:
    """Parameters of `throttllm`."""

    period_s: float = parameter(10.0, "time between two looks", low=0.1)
    grace_s: float = parameter(60.0, "how long an instance too many goes on (ours)", low=0.0)
    headroom_frac: float = parameter(0.0, "part of the ITL promise kept free (ours)", high=0.9)
    low: str = parameter("stopped", "what the others are", choices=LOW)


class Throttllm(Scaler):
    """Instances by the last window's rate against a table of what they serve, with a grace period.

    What the source changes every 10 s is the size of one engine (tensor parallelism), which it
    starts in the shadow of the old one; the rule here changes the number of instances by the same
    table look-up. New ones start at once and serve when they are up; one too many goes on for the
    grace period, in case it is needed again.

    Source: throttLL'eM, arXiv 2408.05235; number in place of size and the length of grace are ours.
    """

    def __init__(self, parameters: ThrottllmParameters, context: ScalerContext) -> None:
        self.period_s = parameters.period_s
        self._grace_s = parameters.grace_s
        self._low: LowState = LOW_STATES[LOW.index(parameters.low)]
        self._top_mhz = context.policy.clocks_mhz[-1]
        self._capacity = Capacity(context.policy, parameters.headroom_frac)
        self._meter = LoadMeter(0.0)
        self._needed_s: dict[str, list[float]] = {}
        """When the first so many instances of a phase were needed last."""

    def plan(self, view: FleetView) -> Plan:
        load = self._meter.take(view.demand)
        if load is None:
            return Plan(prefill=[AWAKE] * len(view.prefill), decode=[AWAKE] * len(view.decode))
        return Plan(
            prefill=self._phase(view.prefill, load, view.now_s),
            decode=self._phase(view.decode, load, view.now_s),
        )

    def _phase(self, states: States, load: Load, now_s: float) -> list[Wanted]:
        if not states:
            return []
        phase = states[0].phase
        one_rps = self._capacity.served(phase, self._top_mhz, load).rate_rps
        count = instances_for(load.rate_rps, one_rps, len(states))
        needed_s = self._needed_s.setdefault(phase, [now_s] * len(states))
        needed_s[:count] = [now_s] * count
        while count < len(states) and now_s - needed_s[count] < self._grace_s:
            count += 1
        return keep(states, count, self._low)


def instances_for(rate_rps: float, one_rps: float, there: int) -> int:
    """How many instances a rate needs; all of them if even those may be too few.

    Example:
        >>> instances_for(21.0, 10.0, 8), instances_for(0.0, 10.0, 8), instances_for(1.0, 0.0, 8)
        (3, 1, 8)
    """
    if one_rps * there <= rate_rps:
        return there
    return max(math.ceil(rate_rps / one_rps), 1)
