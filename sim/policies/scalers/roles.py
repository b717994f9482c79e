"""RAPID's role switch: a card goes to prefill or back to decode, to the phase that is pressed."""

from __future__ import annotations

from dataclasses import dataclass

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import AWAKE, COLOCATED, DECODE, InstanceState, Phase, States
from voltana.sim.policies.scalers.base import LENT, FleetView, Plan, Scaler, ScalerContext, Wanted
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class RapidRolesParameters:
    """Parameters of `rapid-roles`; the source's thresholds are not published: all ours."""

    switching: int = parameter(1, "cards that have both roles", low=1)
    period_s: float = parameter(0.5, "time between two looks (the source's)", low=0.01)
    switch_s: float = parameter(3.0, "how long a switch takes (the source: 2 to 5)", low=0.0)
    cooldown_s: float = parameter(3.0, "rest after a switch (the source: 2 to 6)", low=0.0)
    pressure_ratio: float = parameter(0.9, "latency / promise above which a phase is pressed")
    slack_ratio: float = parameter(0.8, "latency / promise below which a phase can give")
    queue_requests: int = parameter(8, "queued prompts an instance that are pressure too", low=1)


class RapidRoles(Scaler):
    """One card at a time changes its role, to the phase that is pressed while the other has slack.

    Every 0.5 s, unless a card is under way or one has arrived within the cooldown: a phase is
    pressed if the worst latency among its serving instances' latest iterations (in prefill with its
    queueing, against what the TTFT promise leaves for prefill; in decode against the ITL promise)
    is above the pressure ratio, or if prefill has a long queue. It has slack below the slack ratio.
    The giving role ends what it has; then the card switches.

    With `budget_w` the watts of all follow by one ceiling on clocks. The source moves watts first
    and roles when caps are at their limits; one ceiling has no shares to move.

    Source: RAPID, arXiv 2601.12241; thresholds and the worst of latest iterations are ours.
    """

    def __init__(self, parameters: RapidRolesParameters, context: ScalerContext) -> None:
        if context.policy.phase == COLOCATED:
            raise VoltanaError(
                "rapid-roles moves cards between prefill and decode, and colocated instances do "
                "both: take another scaler, or num_prefill and num_decode"
            )
        self.period_s = parameters.period_s
        self.num_switching = parameters.switching
        self.switch_s = parameters.switch_s
        self._settings = parameters
        self._limits_s: dict[Phase, float] = {
            "prefill": context.policy.prefill_budget_s, "decode": context.policy.slo_itl_s,
        }  # fmt: skip
        self._in_prefill = 0
        """So many of the cards shall be in prefill, the first ones."""
        self._rest_until_s = 0.0

    def plan(self, view: FleetView) -> Plan:
        count, step = self.num_switching, self._step(view)
        if step and 0 <= self._in_prefill + step <= count:
            self._in_prefill += step
        here, other = self._in_prefill, count - self._in_prefill
        awake: list[Wanted] = [AWAKE]
        lent: list[Wanted] = [LENT]
        return Plan(
            prefill=awake * (len(view.prefill) - count + here) + lent * other,
            decode=awake * (len(view.decode) - count) + lent * here + awake * other,
        )

    def _step(self, view: FleetView) -> int:
        """1: a card to prefill; -1: one to decode; 0: none."""
        p = self._settings
        switching = (*view.prefill[-p.switching :], *view.decode[-p.switching :])
        if any(s.power_state not in (AWAKE, LENT) for s in switching):
            self._rest_until_s = view.now_s + p.cooldown_s
        if view.now_s < self._rest_until_s:
            return 0
        prefill, decode = self._load(view.prefill), self._load(view.decode)
        serving = [s for s in view.prefill if s.power_state == AWAKE]
        queued = sum(s.num_waiting for s in serving)
        is_pressed = prefill > p.pressure_ratio or queued > p.queue_requests * len(serving)
        if is_pressed and decode < p.slack_ratio:
            return 1
        return -1 if decode > p.pressure_ratio and prefill < p.slack_ratio else 0

    def _load(self, states: States) -> float:
        """The phase's worst latest latency over what it may take."""
        limit_s = max(self._limits_s[states[0].phase], 1e-9)
        busy = [s for s in states if s.power_state == AWAKE and s.is_busy]
        return max((_felt_s(s) for s in busy), default=0.0) / limit_s


def _felt_s(state: InstanceState) -> float:
    queued_s = 0.0 if state.phase == DECODE else state.ended_queue_delay_s
    return state.last_duration_s + queued_s
