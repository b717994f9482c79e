"""Controllers that choose from profiled tables at a slow pace: DynamoLLM's window, a power cap."""

from __future__ import annotations

import math
from dataclasses import dataclass

from voltana.sim.policies.base import Controller, IdlePlan, InstanceState, PolicyContext
from voltana.sim.policies.parts.clocks import cheapest_clock_mhz, fastest_within_mhz, levels_of
from voltana.sim.policies.parts.latency import LatencyWindow
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowParameters:
    """Parameters of `window`."""

    period_s: float = parameter(5.0, "length of a window and time between decisions", low=0.001)
    num_levels: int = parameter(7, "clocks considered, spread over the profile's (ours)", low=1)
    frequencies_mhz: tuple[int, ...] = parameter((), "clocks considered, instead of num_levels")


class Window(Controller):
    """Every 5 s the clock of least energy that would have kept the promise for the last window.

    The load is the mean batch, tokens and queueing delay of the window's iterations. Candidates
    keep delay + T(f, load) within the ITL promise, in prefill within what the TTFT promise leaves
    for prefill; among them the least P·T. The top clock if there is none, or if the queue is longer
    than at the last decision. Until the first window ends: the top clock.

    Source: the instance manager of DynamoLLM, arXiv 2408.00741, simplified; its p99 tables are the
    latency predictor here, its arrival rate is left out of the load, and its overload rule and the
    seven levels (the paper: steps of 200 MHz) are ours.
    """

    __slots__ = (
        "_batches", "_budget_s", "_context", "_decision_mhz", "_delay_s", "_iterations",
        "_levels_mhz", "_period_s", "_queue", "_started_s", "_tokens",
    )  # fmt: skip

    def __init__(self, parameters: WindowParameters, context: PolicyContext) -> None:
        self._levels_mhz = levels_of(
            context, parameters.frequencies_mhz, parameters.num_levels, "window"
        )
        self._context = context
        self._period_s = parameters.period_s
        self._budget_s = context.budget_s
        self._decision_mhz = self._levels_mhz[-1]
        self._started_s = 0.0
        self._queue = 0
        self._forget()

    def _forget(self) -> None:
        self._iterations = 0
        self._batches = 0
        self._tokens = 0
        self._delay_s = 0.0

    def initial_clock_mhz(self) -> int:
        return self._levels_mhz[-1]

    def decide(self, state: InstanceState) -> int:
        if state.last_batch_size > 0:
            self._iterations += 1
            self._batches += state.last_batch_size
            self._tokens += state.last_tokens
            self._delay_s += state.last_queue_delay_s
        if state.now_s - self._started_s >= self._period_s and self._iterations > 0:
            self._decision_mhz = self._choose(state.num_waiting)
            self._queue = state.num_waiting
            self._started_s = state.now_s
            self._forget()
        return self._decision_mhz

    def _choose(self, queue: int) -> int:
        if queue > self._queue:
            return self._levels_mhz[-1]
        context = self._context
        batch = max(self._batches // self._iterations, 1)
        tokens = math.ceil(self._tokens / self._iterations)
        limit_s = self._budget_s - self._delay_s / self._iterations

        def energy_j(clock_mhz: int) -> float:
            point = context.phase, clock_mhz, batch, tokens
            time_s = context.predictor.predict_s(*point)
            return context.power.power_w(*point) * time_s if time_s <= limit_s else math.inf

        return cheapest_clock_mhz(self._levels_mhz, energy_j)


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerCapParameters:
    """Parameters of `powercap`."""

    cap_w: float | None = parameter(
        None, "cap of the instance; without it draw_frac of the natural draw", low=1
    )
    draw_frac: float = parameter(
        0.85, "cap as a part of the natural draw (the source: 0.8 to 0.9)", low=0.05, high=1.0
    )
    release_s: float = parameter(
        1.0, "window of the p99 latency that releases the cap, and for how long; 0: never", low=0
    )


class PowerCap(Controller):
    """A power cap instead of a clock, as the effective clock that keeps the draw under the cap.

    Effective clock: the fastest whose modelled power for the present batch is within the cap; the
    slowest if none is. The natural draw is the most the top clock would have drawn in any batch so
    far. While the p99 latency of the last `release_s` misses the promise (in prefill: what the TTFT
    promise leaves for prefill), and for as long after, the cap is released: the top clock. Idle:
    the top clock's lock stays, as a cap leaves the clock alone. With `release_s` 0 nothing releases
    it: a card's own limit.

    Source: phase-decoupled power control, arXiv 2609.11133, which caps decode and holds prefill in
    a window of clocks; capping prefill by the same rule and the release window are ours.
    """

    __slots__ = (
        "_budget_s", "_context", "_natural_w", "_parameters", "_released_until_s", "_window",
    )  # fmt: skip

    def __init__(self, parameters: PowerCapParameters, context: PolicyContext) -> None:
        self._parameters = parameters
        self._context = context
        self._budget_s = context.budget_s
        self._window = LatencyWindow(parameters.release_s, 0.99)
        self._natural_w = 0.0
        self._released_until_s = -math.inf

    def initial_clock_mhz(self) -> int:
        return self._context.clocks_mhz[-1]

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return None

    def decide(self, state: InstanceState) -> int:
        context = self._context
        if self._parameters.release_s > 0:
            self._window.add(state, context.phase)
        if state.last_batch_size == 0:
            return context.clocks_mhz[-1]
        natural_w = self._power_w(context.clocks_mhz[-1], state)
        self._natural_w = max(self._natural_w, natural_w)
        p99_s = self._window.quantile_s()
        if p99_s is not None and p99_s > self._budget_s:
            self._released_until_s = state.now_s + self._parameters.release_s
        if state.now_s < self._released_until_s:
            return context.clocks_mhz[-1]
        return self.effective_clock_mhz(state)

    def effective_clock_mhz(self, state: InstanceState) -> int:
        """The fastest clock within the cap for the batch of `state`."""
        p = self._parameters
        cap_w = p.draw_frac * self._natural_w if p.cap_w is None else p.cap_w
        return fastest_within_mhz(self._context, state.last_batch_size, state.last_tokens, cap_w)

    def _power_w(self, clock_mhz: int, state: InstanceState) -> float:
        return self._context.power.power_w(
            self._context.phase, clock_mhz, state.last_batch_size, state.last_tokens
        )
