"""PID on measured latency: a controller that needs no model."""

from __future__ import annotations

from dataclasses import dataclass

from voltana.sim.policies.base import (
    COLOCATED,
    Controller,
    IdlePlan,
    InstanceState,
    PolicyContext,
)
from voltana.sim.policies.parts.clocks import clock_at_least_mhz, clocks_above_floor
from voltana.sim.policies.parts.latency import LatencyWindow
from voltana.sim.policies.parts.mixed import BothPhases
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class PidParameters:
    """Parameters of `pid`; all defaults are ours."""

    target_ratio: float = parameter(0.9, "setpoint as a part of the promise", low=0.1, high=1.0)
    quantile_ratio: float | None = parameter(
        None, "quantile of latency to hold at the setpoint; none: the attainment target, 0.99",
        low=0.01, high=1.0,
    )  # fmt: skip
    kp_mhz: float = parameter(600.0, "MHz per relative error of 1", low=0)
    ki_mhz_per_s: float = parameter(400.0, "MHz per second of relative error 1", low=0)
    kd_mhz_s: float = parameter(20.0, "MHz per relative change of 1 a second", low=0)
    filter_s: float = parameter(0.2, "time constant of the derivative's filter", low=0.001)
    window_s: float = parameter(1.0, "window of the measured quantile", low=0.01)
    dwell_s: float = parameter(0.1, "shortest time between two changes", low=0)
    idle_s: float = parameter(5.0, "idle time before the profile's lowest clock is locked", low=0)
    frequencies_mhz: tuple[int, ...] = parameter(
        (), "clocks to choose from; none: all from the phase's clock of least energy upwards"
    )


class Pid(Controller):
    """A discrete PID controller on measured latency: too slow raises the clock, slack lowers it.

    error = (setpoint - y) / setpoint with setpoint = budget·target and y a quantile of the ITL
    (decode) or of queueing plus prefill time (prefill) over the last window; clock = top -
    (Kp·error + Ki·∫error - Kd·d(y/setpoint)/dt), snapped up to a listed clock. The budget is the
    ITL promise, in prefill what the TTFT promise leaves for prefill. The derivative acts on the
    measurement, through a first-order filter; the integral stands still while the output is
    saturated and the error would drive it further (conditional anti-windup).

    On a colocated instance y/setpoint is the larger one of both phases; an ITL there includes
    iterations in which decoding stood.

    Nothing is measured while the instance rests. After a rest, or where no sample is younger than
    the window, the integral grows by the one iteration that was measured, not by the rest, and the
    derivative starts from zero.

    Source: textbook control (Åström and Hägglund, PID Controllers, 1995); gains are ours: tune
    them for a profile.
    """

    __slots__ = (
        "_both", "_changed_s", "_clocks", "_decision_mhz", "_has_rested", "_integral_mhz", "_last",
        "_parameters", "_park_mhz", "_phase", "_rate", "_setpoint_s", "_window",
    )  # fmt: skip
    colocates = True

    def __init__(self, parameters: PidParameters, context: PolicyContext) -> None:
        self._parameters = parameters
        self._clocks = clocks_above_floor(context, parameters.frequencies_mhz, "pid")
        self._park_mhz = context.clocks_mhz[0]
        self._phase = context.phase
        self._setpoint_s = context.budget_s * parameters.target_ratio
        quantile = parameters.quantile_ratio or context.attainment_target
        self._window = LatencyWindow(parameters.window_s, quantile)
        self._both = BothPhases(context, parameters.window_s, quantile, parameters.target_ratio)
        self._integral_mhz = 0.0
        self._rate = 0.0
        self._last: tuple[float, float] | None = None
        """Time and measurement, over the setpoint, of the last call."""
        self._has_rested = False
        self._decision_mhz = self._clocks[-1]
        self._changed_s = float("-inf")

    def initial_clock_mhz(self) -> int:
        return self._clocks[-1]

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        self._has_rested = True
        return IdlePlan(after_s=self._parameters.idle_s, clock_mhz=self._park_mhz)

    def decide(self, state: InstanceState) -> int:
        measured = self._measure(state)
        if measured is None:
            return self._decision_mhz
        wanted = clock_at_least_mhz(self._clocks, self._output_mhz(measured, state))
        if state.now_s - self._changed_s >= self._parameters.dwell_s:
            if wanted != self._decision_mhz:
                self._changed_s = state.now_s
            self._decision_mhz = wanted
        return self._decision_mhz

    def _measure(self, state: InstanceState) -> float | None:
        """Latency over the setpoint; None if nothing can be held."""
        if self._phase == COLOCATED:
            return self._both.ratio(state)
        self._window.add(state, self._phase)
        felt_s = self._window.quantile_s()
        if felt_s is None or self._setpoint_s <= 0.0:
            return None
        return felt_s / self._setpoint_s

    def _output_mhz(self, measured: float, state: InstanceState) -> float:
        p = self._parameters
        error = 1.0 - measured
        elapsed_s = self._follow(measured, state)
        low, high = self._clocks[0], self._clocks[-1]
        output = high - (p.kp_mhz * error + self._integral_mhz - p.kd_mhz_s * self._rate)
        winds_up = (output >= high and error < 0) or (output <= low and error > 0)
        if not winds_up:
            self._integral_mhz += p.ki_mhz_per_s * error * elapsed_s
        return min(max(output, low), high)

    def _follow(self, measured: float, state: InstanceState) -> float:
        """Update the filtered derivative; returns the time that the measurement stands for."""
        last, self._last = self._last, (state.now_s, measured)
        if last is None:
            return 0.0
        elapsed_s = state.now_s - last[0]
        if self._has_rested or elapsed_s > self._parameters.window_s:
            self._has_rested = False
            self._rate = 0.0
            return min(elapsed_s, state.last_duration_s)
        if elapsed_s > 0:
            weight = elapsed_s / (self._parameters.filter_s + elapsed_s)
            self._rate += weight * ((measured - last[1]) / elapsed_s - self._rate)
        return elapsed_s
