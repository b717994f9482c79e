"""MIAD: multiplicative increase, additive decrease of the clock. Every constant is ours."""

from __future__ import annotations

from dataclasses import dataclass

from voltana.sim.policies.base import Controller, IdlePlan, InstanceState, PolicyContext
from voltana.sim.policies.parts.clocks import clock_at_least_mhz, clocks_above_floor
from voltana.sim.policies.parts.latency import LatencyWindow
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class MiadParameters:
    """Parameters of `miad`; the source gives no constants, these are ours."""

    period_s: float = parameter(1.0, "time between two decisions", low=0.001)
    danger_ratio: float = parameter(0.95, "part of the promise above which the clock rises", low=0)
    slack_ratio: float = parameter(0.8, "part of the promise below which the clock falls", low=0)
    rise_ratio: float = parameter(1.25, "factor of a rise", low=1.0)
    fall_mhz: float = parameter(30.0, "step of a fall", low=1.0)
    idle_s: float = parameter(5.0, "idle time before the profile's lowest clock is locked", low=0)
    frequencies_mhz: tuple[int, ...] = parameter(
        (), "clocks to choose from; none: all from the phase's clock of least energy upwards"
    )


class Miad(Controller):
    """Multiplicative increase of the clock on danger or a queue, additive decrease on slack.

    Every period: y > budget·danger or somebody waits: f·rise, at most the top clock; y <
    budget·slack: f - fall, at least the lowest listed one. y is the quantile of latency at the
    attainment target (99 %) over the period, the budget the ITL promise, in prefill what the TTFT
    promise leaves for prefill. Needs no model but for the lowest clock it lists.

    Source: µ-Serve (ATC 2024) and FREESH, arXiv 2511.00807; constants are ours, and so is the
    quantile and that no clock is below that of least energy.
    """

    __slots__ = (
        "_budget_s", "_clocks", "_decided_s", "_parameters", "_park_mhz", "_phase", "_wanted_mhz",
        "_window",
    )  # fmt: skip

    def __init__(self, parameters: MiadParameters, context: PolicyContext) -> None:
        self._parameters = parameters
        self._clocks = clocks_above_floor(context, parameters.frequencies_mhz, "miad")
        self._park_mhz = context.clocks_mhz[0]
        self._phase = context.phase
        self._budget_s = context.budget_s
        self._window = LatencyWindow(parameters.period_s, context.attainment_target)
        self._wanted_mhz = float(self._clocks[-1])
        self._decided_s = 0.0

    def initial_clock_mhz(self) -> int:
        return self._clocks[-1]

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return IdlePlan(after_s=self._parameters.idle_s, clock_mhz=self._park_mhz)

    def decide(self, state: InstanceState) -> int:
        self._window.add(state, self._phase)
        p = self._parameters
        felt_s = self._window.quantile_s()
        if felt_s is not None and state.now_s - self._decided_s >= p.period_s:
            self._decided_s = state.now_s
            if felt_s > self._budget_s * p.danger_ratio or state.num_waiting > 0:
                self._wanted_mhz = min(self._wanted_mhz * p.rise_ratio, self._clocks[-1])
            elif felt_s < self._budget_s * p.slack_ratio:
                self._wanted_mhz = max(self._wanted_mhz - p.fall_mhz, self._clocks[0])
        return clock_at_least_mhz(self._clocks, self._wanted_mhz)
