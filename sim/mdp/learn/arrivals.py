"""The simulator played arrival by arrival: who decides sits outside, between two arrivals.

A step costs the energy and the late tokens since the arrival before. Energy is booked when an
iteration ends, so a step's energy may lag by the iteration that is running; the sum over a run is
exact. A late token is one that comes later than promised: a gap above the ITL SLO, or a first
token above the TTFT SLO.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.engine.fleet import Fleet
from voltana.sim.engine.instance import Instance
from voltana.sim.engine.logs.exact import ExactLog
from voltana.sim.engine.request import SimRequest
from voltana.sim.policies.base import (
    Controller,
    IdlePlan,
    InstanceState,
    PolicyContext,
    RequestView,
    Router,
)
from voltana.sim.policies.routers.simple import least
from voltana.sim.records import RunRecord
from voltana.sim.workload.workload import Workload

IDLE_S = 5.0
"""Idle time after which an instance whose clock is held goes to the lowest level, as EcoFreq's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What happened between two arrivals."""

    energy_j: float
    """Energy of all instances."""
    decode_energy_j: float
    """Energy of the decode instances: the part that routing can change."""
    late_gaps: int
    late_first_tokens: int
    elapsed_s: float

    @property
    def late_tokens(self) -> int:
        """Tokens that came later than promised."""
        return self.late_gaps + self.late_first_tokens


class ArrivalSimulation:
    """One run whose decode instances are chosen from outside; prefill: fewest open requests.

    A request that no instance can hold is rejected and not offered for routing.

    Args:
        config: What to run; its router is not used, and with `levels_mhz` its decode controller
            neither.
        profile: The truth about times and power.
        workload: The requests.
        levels_mhz: Clocks that `accept` may set; none leaves the clocks to the configured
            controller.
        drains: Whether the last step goes on until every request has ended.

    Raises:
        VoltanaError: There is no request to be routed, or a level is not supported.
    """

    def __init__(
        self,
        config: SimConfig,
        profile: Profile,
        workload: Workload,
        *,
        levels_mhz: Sequence[int] = (),
        drains: bool = True,
    ) -> None:
        unknown = set(levels_mhz) - set(profile.meta.clocks.supported_mhz)
        if unknown:
            raise VoltanaError(f"{profile.meta.gpu.name} has no clock of {min(unknown)} MHz")
        self._log = CountingLog(workload, config)
        self._chosen = _Chosen()
        self._held: list[_Held] = []
        self._levels_mhz = tuple(levels_mhz)
        self._fleet = Fleet(
            config,
            profile,
            (workload,),
            self._log,
            router=self._chosen,
            decode_controller=self._hold if levels_mhz else None,
        )
        self._drains = drains
        self._booked = (0.0, 0.0, 0, 0)
        self._oracle = config.length_oracle
        self.record: RunRecord | None = None
        """The run's record; None until the run has ended."""
        self.top_mhz = profile.meta.clocks.supported_mhz[-1]
        self._coming = self._fleet.start()
        self._request = self._next()
        if self._request is None:
            raise VoltanaError(f"{workload.name} has no request that an instance can hold")

    @property
    def decode(self) -> list[InstanceState]:
        """The decode instances, up to date at the arrival that is to be decided."""
        return [instance.state for instance in self._fleet.decode]

    @property
    def request(self) -> RequestView:
        """The request to be routed now; the last one once the run has ended."""
        request = self._request or self._last
        return RequestView(
            request.request_id,
            request.arrival_s,
            request.input_tokens,
            request.output_tokens if self._oracle else None,
        )

    @property
    def is_over(self) -> bool:
        """Whether all requests have been routed."""
        return self._request is None

    def accept(self, decode_id: int, clock_mhz: int | None = None) -> Cost:
        """Send the request to an instance, and go on to the next arrival.

        Args:
            decode_id: Position of the decode instance.
            clock_mhz: Its clock from its next iteration on, until it is set again.
        """
        if self._request is None:
            raise VoltanaError("the run has ended: there is no request to route")
        self._chosen.decode_id = decode_id
        if clock_mhz is not None:
            self._held[decode_id].clock_mhz = clock_mhz
        self._last = self._request
        self._fleet.accept(self._request)
        self._request = self._next()
        end_s = self._request.arrival_s if self._request else self._end()
        return self._cost(end_s - self._last.arrival_s)

    def _next(self) -> SimRequest | None:
        for request in self._coming:
            self._fleet.advance(request.arrival_s)
            if self._fleet.can_hold(request):
                self._fleet.report(request.arrival_s)
                return request
            self._fleet.accept(request)
        return None

    def _end(self) -> float:
        if not self._drains:
            return self._last.arrival_s
        self.record = self._fleet.finish()
        return self.record.makespan_s

    def _cost(self, elapsed_s: float) -> Cost:
        decode_j = _energy_j(self._fleet.decode)
        total_j = decode_j + _energy_j(self._fleet.prefill)
        before, log = self._booked, self._log
        self._booked = (total_j, decode_j, log.late_gaps, log.late_first_tokens)
        return Cost(
            energy_j=total_j - before[0],
            decode_energy_j=decode_j - before[1],
            late_gaps=log.late_gaps - before[2],
            late_first_tokens=log.late_first_tokens - before[3],
            elapsed_s=elapsed_s,
        )

    def _hold(self, context: PolicyContext) -> Controller:
        self._held.append(_Held(self._levels_mhz))
        return self._held[-1]


class CountingLog:
    """An `ExactLog` that also counts late tokens as they come."""

    def __init__(self, workload: Workload, config: SimConfig) -> None:
        self._log = ExactLog(workload)
        self._slo_ttft_s, self._slo_itl_s = config.slo_ttft_s, config.slo_itl_s
        self.late_gaps = self.late_first_tokens = 0
        self.unresolved = 0

    def arrive(self, request: SimRequest) -> None:
        self.unresolved += 1
        self._log.arrive(request)

    def assign(self, request: SimRequest) -> None:
        self._log.assign(request)

    def first_token(self, request: SimRequest, now_s: float) -> None:
        self.late_first_tokens += now_s - request.arrival_s > self._slo_ttft_s
        self._log.first_token(request, now_s)

    def finish(self, request: SimRequest, now_s: float) -> None:
        self.unresolved -= 1
        self._log.finish(request, now_s)

    def reject(self, request: SimRequest) -> None:
        self.unresolved -= 1
        self._log.reject(request)

    def reuse(self, request: SimRequest, tokens: int) -> None:
        self._log.reuse(request, tokens)

    def retract(self, request: SimRequest) -> None:
        self._log.retract(request)

    def gaps(self, first_s: float, step_s: float, count: int, weight: int) -> None:
        self.late_gaps += weight * count_above(self._slo_itl_s, first_s, step_s, count)
        self._log.gaps(first_s, step_s, count, weight)

    def noisy_gaps(
        self, first_s: float, step_s: float, weight: int, multipliers: array[float]
    ) -> None:
        for k, multiplier in enumerate(multipliers):
            if (first_s + k * step_s) * multiplier > self._slo_itl_s:
                self.late_gaps += weight
        self._log.noisy_gaps(first_s, step_s, weight, multipliers)

    def results(self, end_s: float) -> dict[str, Any]:
        return self._log.results(end_s)


def count_above(limit: float, first: float, step: float, count: int) -> int:
    """How many of first + k·step, k = 0 … count - 1, are above the limit.

    Args:
        limit: In the unit of the others.
        first: First number of the arithmetic sequence.
        step: Its difference, of either sign.
        count: How many numbers it has, >= 1.

    Example:
        >>> count_above(2.0, 1.0, 0.5, 5), count_above(2.0, 3.0, -0.5, 5), count_above(2, 3, 0, 5)
        (2, 2, 5)
    """
    if step == 0 or count == 1:
        return count if first > limit else 0
    if step > 0:
        return count - min(count, max(0, math.floor((limit - first) / step) + 1))
    return min(count, max(0, math.ceil((first - limit) / -step)))


class _Chosen(Router):
    """The decode instance that was set from outside."""

    __slots__ = ("decode_id",)
    looks_at = "counts"

    def __init__(self) -> None:
        self.decode_id = 0

    def route(
        self,
        request: RequestView,
        prefill: Sequence[InstanceState],
        decode: Sequence[InstanceState],
    ) -> tuple[int, int]:
        return least(prefill, lambda s: s.open_requests), self.decode_id


class _Held(Controller):
    """The clock that was set from outside, the top level at first."""

    __slots__ = ("_idle", "_top_mhz", "clock_mhz")

    def __init__(self, levels_mhz: Sequence[int]) -> None:
        self.clock_mhz = levels_mhz[-1]
        self._top_mhz = levels_mhz[-1]
        self._idle = IdlePlan(after_s=IDLE_S, clock_mhz=levels_mhz[0])

    def initial_clock_mhz(self) -> int:
        return self._top_mhz

    def decide(self, state: InstanceState) -> int:
        return self.clock_mhz

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return self._idle


def _energy_j(instances: Sequence[Instance]) -> float:
    return sum(instance.state.energy_j for instance in instances)
