"""RAPID: one power budget that moves between prefill and decode. Steps and thresholds are ours.

As in `polca` all controllers of a fleet share one plan (`Cluster.share`).
"""

from __future__ import annotations

from dataclasses import dataclass

from voltana.sim.policies.base import (
    DECODE,
    PREFILL,
    Cluster,
    Controller,
    InstanceState,
    Phase,
    PolicyContext,
)
from voltana.sim.policies.parts.clocks import busy_power_w, fastest_within_mhz, fleet_power_w
from voltana.sim.policies.parts.latency import LatencyWindow
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class RapidParameters:
    """Parameters of `rapid`; the source's steps and thresholds are not published: all ours."""

    budget_w: float | None = parameter(
        None, "power budget of the fleet; none: share_frac of its modelled draw at full load", low=1
    )
    share_frac: float = parameter(0.7, "budget as a part of that draw", low=0.05, high=2.0)
    period_s: float = parameter(0.5, "time between two looks (the source's)", low=0.01)
    cooldown_s: float = parameter(3.0, "rest after a move (the source: 2 to 6)", low=0)
    step_w: float = parameter(
        20.0, "power an instance of the giving phase gives in a move", low=0.1
    )
    pressure_ratio: float = parameter(0.9, "p99 / budget above which a phase is pressed", low=0)
    slack_ratio: float = parameter(0.8, "p99 / budget below which a phase can give", low=0)
    queue_requests: int = parameter(8, "queued prompts an instance that are pressure too", low=1)
    window_s: float = parameter(2.0, "window of the measured p99", low=0.01)


class RapidPlan:
    """Splits the budget between the phases; every instance of a phase has the same cap.

    Args:
        parameters: Budget, step, thresholds and pace.
        context: The promises, the supported clocks and the power model.
        fleet: Every instance's live state.
    """

    def __init__(self, parameters: RapidParameters, context: PolicyContext, fleet: Cluster) -> None:
        p, clocks = parameters, context.clocks_mhz
        self._parameters = p
        self.fleet = fleet
        self._count = {PREFILL: context.num_prefill, DECODE: context.num_decode}
        self._limit_s = {PREFILL: context.prefill_budget_s, DECODE: context.slo_itl_s}
        self._most_w = {f: busy_power_w(context, f, clocks[-1]) for f in (PREFILL, DECODE)}
        self._least_w = {f: busy_power_w(context, f, clocks[0]) for f in (PREFILL, DECODE)}
        budget_w = p.share_frac * fleet_power_w(context) if p.budget_w is None else p.budget_w
        full_w = fleet_power_w(context)
        self.caps_w: dict[str, float] = {
            phase: budget_w * self._most_w[phase] / full_w for phase in (PREFILL, DECODE)
        }
        """Power cap of one instance, by phase."""
        self._windows = {
            phase: LatencyWindow(p.window_s, context.attainment_target)
            for phase in (PREFILL, DECODE)
        }
        self._looked_s = self._moved_s = 0.0

    def cap_w(self, phase: Phase, state: InstanceState) -> float:
        """Take the caller's last iteration into account and return its cap."""
        p, now_s = self._parameters, state.now_s
        self._windows[phase].add(state, phase)
        if now_s - self._looked_s >= p.period_s:
            self._looked_s = now_s
            if now_s - self._moved_s >= p.cooldown_s and self._move():
                self._moved_s = now_s
        return self.caps_w[phase]

    def _move(self) -> bool:
        prefill, decode = self._load(PREFILL), self._load(DECODE)
        p = self._parameters
        queued = sum(state.num_waiting for state in self.fleet.prefill)
        pressed = prefill > p.pressure_ratio or queued > p.queue_requests * self._count[PREFILL]
        if pressed and decode < p.slack_ratio:
            return self.shift(DECODE, PREFILL)
        if decode > p.pressure_ratio and prefill < p.slack_ratio:
            return self.shift(PREFILL, DECODE)
        return False

    def _load(self, phase: Phase) -> float:
        """The phase's p99 latency over what it may take; 0 before there is any."""
        felt_s = self._windows[phase].quantile_s()
        return 0.0 if felt_s is None else felt_s / max(self._limit_s[phase], 1e-9)

    def shift(self, giver: Phase, taker: Phase) -> bool:
        """Move a step of power, within both phases' limits; false if there is no room."""
        given_w = min(
            self._parameters.step_w, self.caps_w[giver] - self._least_w[giver],
        ) * self._count[giver]  # fmt: skip
        room_w = (self._most_w[taker] - self.caps_w[taker]) * self._count[taker]
        moved_w = min(given_w, room_w)
        if moved_w <= 1e-6:
            return False
        self.caps_w[giver] -= moved_w / self._count[giver]
        self.caps_w[taker] += moved_w / self._count[taker]
        return True


class Rapid(Controller):
    """A power budget that moves between prefill and decode, to the phase that misses its promise.

    Every 0.5 s, unless power was moved within the cooldown: prefill pressed (p99 of queueing plus
    batch time over the pressure ratio of what the TTFT promise leaves for prefill, or a long queue)
    and decode with slack (p99 ITL below its slack ratio): each decode instance gives a step of its
    cap, and the prefill instances share the sum; the other way round likewise. The quantile is the
    attainment target's. A cap stays between the modelled power of
    a full batch at the lowest and at the top clock; the sum of all caps stays the budget. A cap
    acts as the fastest clock whose modelled power for the present batch is within it. The first
    split is in proportion to the phases' full draw.

    Source: RAPID, arXiv 2601.12241. Its role switch of whole GPUs is the scaler `rapid-roles`;
    steps, thresholds and the first split are ours.
    """

    __slots__ = ("_context", "_plan")

    def __init__(self, parameters: RapidParameters, context: PolicyContext) -> None:
        fleet = context.observe_cluster("rapid")
        self._context = context
        self._plan = fleet.share(
            f"rapid {parameters}", lambda: RapidPlan(parameters, context, fleet)
        )

    def decide(self, state: InstanceState) -> int:
        cap_w = self._plan.cap_w(self._context.phase, state)
        if state.last_batch_size == 0:
            return self._context.clocks_mhz[0]
        return fastest_within_mhz(self._context, state.last_batch_size, state.last_tokens, cap_w)
