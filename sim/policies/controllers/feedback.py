"""Controllers that look at measured latency only and need no model: PID and MIAD."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from sim.policies.base import DECODE, Controller, IdlePlan, InstanceState, PolicyContext
from sim.policies.clocks import clock_at_least_mhz
from sim.policies.spec import parameter


class LatencyWindow:
    """The p95 latency of the last seconds, weighted by the requests that felt it."""

    __slots__ = ("_samples", "_window_s")

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, float, int]] = deque()

    def add(self, state: InstanceState, phase: str) -> None:
        """Take the iteration that has ended: its duration, in prefill with its queueing delay."""
        if state.last_duration_s <= 0:
            return
        latency_s = state.last_duration_s + (0 if phase == DECODE else state.ended_queue_delay_s)
        self._samples.append((state.now_s, latency_s, max(state.ended_batch_size, 1)))
        while self._samples[0][0] < state.now_s - self._window_s:
            self._samples.popleft()

    def p95_s(self) -> float | None:
        """Nearest-rank p95; None before the first sample."""
        if not self._samples:
            return None
        ordered = sorted((latency, weight) for _, latency, weight in self._samples)
        rest = 0.95 * sum(weight for _, weight in ordered)
        for latency_s, weight in ordered:
            rest -= weight
            if rest <= 1e-9:
                return latency_s
        return ordered[-1][0]


@dataclass(frozen=True, slots=True, kw_only=True)
class PidParameters:
    """Parameters of `pid`; all defaults are ours."""

    target_ratio: float = parameter(0.9, "setpoint as a part of the promise", low=0.1, high=1.0)
    kp_mhz: float = parameter(600.0, "MHz per relative error of 1", low=0)
    ki_mhz_per_s: float = parameter(400.0, "MHz per second of relative error 1", low=0)
    kd_mhz_s: float = parameter(20.0, "MHz per relative change of 1 a second", low=0)
    filter_s: float = parameter(0.2, "time constant of the derivative's filter", low=0.001)
    window_s: float = parameter(1.0, "window of the measured p95", low=0.01)
    dwell_s: float = parameter(0.1, "shortest time between two changes", low=0)
    idle_s: float = parameter(5.0, "idle time before the lowest clock is locked", low=0)


class Pid(Controller):
    """A discrete PID controller on measured latency: too slow raises the clock, slack lowers it.

    error = (setpoint - p95) / setpoint with setpoint = SLO·target and p95 the ITL (decode) or
    queueing plus prefill time (prefill) of the last window; clock = top - (Kp·error + Ki·∫error
    - Kd·d(p95/setpoint)/dt), snapped up to a supported clock. The derivative acts on the
    measurement, through a first-order filter; the integral stands still while the output is
    saturated and the error would drive it further (conditional anti-windup).

    Source: textbook control (Åström and Hägglund, PID Controllers, 1995); gains are ours: tune
    them for a profile.
    """

    __slots__ = (
        "_changed_s", "_clocks", "_decision_mhz", "_integral_mhz", "_last", "_parameters", "_phase",
        "_rate", "_setpoint_s", "_window",
    )  # fmt: skip

    def __init__(self, parameters: PidParameters, context: PolicyContext) -> None:
        self._parameters = parameters
        self._clocks = context.clocks_mhz
        self._phase = context.phase
        slo_s = context.slo_s
        self._setpoint_s = slo_s * parameters.target_ratio
        self._window = LatencyWindow(parameters.window_s)
        self._integral_mhz = 0.0
        self._rate = 0.0
        self._last: tuple[float, float] | None = None
        self._decision_mhz = self._clocks[-1]
        self._changed_s = float("-inf")

    def initial_clock_mhz(self) -> int:
        return self._clocks[-1]

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return IdlePlan(after_s=self._parameters.idle_s, clock_mhz=self._clocks[0])

    def decide(self, state: InstanceState) -> int:
        self._window.add(state, self._phase)
        p95_s = self._window.p95_s()
        if p95_s is None:
            return self._decision_mhz
        wanted = clock_at_least_mhz(self._clocks, self._output_mhz(p95_s, state.now_s))
        if state.now_s - self._changed_s >= self._parameters.dwell_s:
            if wanted != self._decision_mhz:
                self._changed_s = state.now_s
            self._decision_mhz = wanted
        return self._decision_mhz

    def _output_mhz(self, p95_s: float, now_s: float) -> float:
        p = self._parameters
        measured = p95_s / self._setpoint_s
        error = 1.0 - measured
        elapsed_s = min(now_s - self._last[0], p.window_s) if self._last else 0.0
        if self._last is not None and elapsed_s > 0:
            weight = elapsed_s / (p.filter_s + elapsed_s)
            self._rate += weight * ((measured - self._last[1]) / elapsed_s - self._rate)
        self._last = (now_s, measured)
        low, high = self._clocks[0], self._clocks[-1]
        output = high - (p.kp_mhz * error + self._integral_mhz - p.kd_mhz_s * self._rate)
        winds_up = (output >= high and error < 0) or (output <= low and error > 0)
        if not winds_up:
            self._integral_mhz += p.ki_mhz_per_s * error * elapsed_s
        return min(max(output, low), high)


@dataclass(frozen=True, slots=True, kw_only=True)
class MiadParameters:
    """Parameters of `miad`; the source gives no constants, these are ours."""

    period_s: float = parameter(1.0, "time between two decisions", low=0.001)
    danger_ratio: float = parameter(0.95, "part of the promise above which the clock rises", low=0)
    slack_ratio: float = parameter(0.8, "part of the promise below which the clock falls", low=0)
    rise_ratio: float = parameter(1.25, "factor of a rise", low=1.0)
    fall_mhz: float = parameter(30.0, "step of a fall", low=1.0)
    idle_s: float = parameter(5.0, "idle time before the lowest clock is locked", low=0)


class Miad(Controller):
    """Multiplicative increase of the clock on danger or a queue, additive decrease on slack.

    Every period: p95 > SLO·danger or somebody waits: f·rise, at most the top clock; p95 <
    SLO·slack: f - fall. Needs no model.

    Source: µ-Serve (ATC 2024) and FREESH, arXiv 2511.00807; constants are ours.
    """

    __slots__ = (
        "_clocks",
        "_decided_s",
        "_parameters",
        "_phase",
        "_slo_s",
        "_wanted_mhz",
        "_window",
    )

    def __init__(self, parameters: MiadParameters, context: PolicyContext) -> None:
        self._parameters = parameters
        self._clocks = context.clocks_mhz
        self._phase = context.phase
        self._slo_s = context.slo_s
        self._window = LatencyWindow(parameters.period_s)
        self._wanted_mhz = float(self._clocks[-1])
        self._decided_s = 0.0

    def initial_clock_mhz(self) -> int:
        return self._clocks[-1]

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return IdlePlan(after_s=self._parameters.idle_s, clock_mhz=self._clocks[0])

    def decide(self, state: InstanceState) -> int:
        self._window.add(state, self._phase)
        p = self._parameters
        p95_s = self._window.p95_s()
        if p95_s is not None and state.now_s - self._decided_s >= p.period_s:
            self._decided_s = state.now_s
            if p95_s > self._slo_s * p.danger_ratio or state.num_waiting > 0:
                self._wanted_mhz = min(self._wanted_mhz * p.rise_ratio, self._clocks[-1])
            elif p95_s < self._slo_s * p.slack_ratio:
                self._wanted_mhz = max(self._wanted_mhz - p.fall_mhz, self._clocks[0])
        return clock_at_least_mhz(self._clocks, self._wanted_mhz)
