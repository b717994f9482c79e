"""EcoFreq, the frequency controller of VoltanaLLM v0.1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sim.policies.base import (
    DECODE,
    UNLOCKED_MHZ,
    Controller,
    IdlePlan,
    InstanceState,
    LinePredictor,
    PolicyContext,
)
from sim.policies.clocks import clock_list
from sim.policies.controllers.fixed import FOREVER
from sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class EcoFreqParameters:
    """Parameters of `ecofreq`."""

    margin_frac: float = parameter(
        0.0,
        "aim at SLO x (1 + margin); 0 honours the promise, the reference demo runs +0.35",
        low=-0.95,
    )
    frequencies_mhz: tuple[int, ...] = parameter(
        (), "clocks to choose from; the last is used when none fits"
    )
    idle_s: float = parameter(5.0, "idle time after which the lowest listed clock is locked", low=0)


class EcoFreq(Controller):
    """The lowest listed clock whose predicted latency fits the promise; any queue means top clock.

    Rule, each iteration: with a request waiting, the top listed clock. Else the first clock in
    ascending order with T(f, batch, tokens) <= SLO x (1 + margin) - offset, else the top one. In
    decode T is the step time and the offset 0; in prefill T is the batch's time and the offset
    the longest queueing delay within it. Before the first iteration is known the clock stays as
    it is (not locked). Idle for `idle_s`: lock the lowest listed clock.

    There is no energy term, no hysteresis and no use of measured latency, exactly as in the
    reference. Its `tps_threshold` and `rps_threshold`, off in the reference's demo, are left out.

    Source: VOLTANALLM §4 (reference code freq_manager.py); levels: the profile's default list,
    [1005, 1410] on the A100. Our default margin is 0: the reference's demo aims above its SLO.
    """

    __slots__ = (
        "_decision_mhz", "_idle", "_limit_s", "_line", "_lower_mhz", "_phase", "_predict_s",
        "_top_mhz",
    )  # fmt: skip

    def __init__(self, parameters: EcoFreqParameters, context: PolicyContext) -> None:
        levels_mhz = clock_list(
            context.clocks_mhz,
            parameters.frequencies_mhz,
            context.default_levels_mhz,
            "ecofreq: frequencies",
        )
        self._lower_mhz = levels_mhz[:-1]
        self._top_mhz = levels_mhz[-1]
        self._phase = context.phase
        slo_s = context.slo_itl_s if context.phase == DECODE else context.slo_ttft_s
        self._limit_s = slo_s * (1.0 + parameters.margin_frac)
        self._predict_s = context.predictor.predict_s
        self._line: Callable[..., tuple[float, float]] | None = (
            context.predictor.predict_line if isinstance(context.predictor, LinePredictor) else None
        )
        self._idle = IdlePlan(after_s=parameters.idle_s, clock_mhz=levels_mhz[0])
        self._decision_mhz = UNLOCKED_MHZ

    def decide(self, state: InstanceState) -> int:
        batch_size = state.last_batch_size
        if state.num_waiting > 0:
            clock_mhz = self._top_mhz
        elif batch_size == 0:
            clock_mhz = self._decision_mhz
        else:
            clock_mhz = self._lowest_fitting_mhz(
                batch_size, state.last_tokens, self._limit_s - state.last_queue_delay_s
            )
        self._decision_mhz = clock_mhz
        return clock_mhz

    def _lowest_fitting_mhz(self, batch_size: int, tokens: int, limit_s: float) -> int:
        predict_s = self._predict_s
        phase = self._phase
        for clock_mhz in self._lower_mhz:
            if predict_s(phase, clock_mhz, batch_size, tokens) <= limit_s:
                return clock_mhz
        return self._top_mhz

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return self._idle

    def steady_iterations(self, state: InstanceState, tokens_per_iteration: int) -> int:
        """Solve T(f, batch, tokens + k d) <= limit for the largest k, where T is a line in tokens.

        Time never falls as tokens grow, so the clocks that did not fit will not, and the decision
        lasts until the chosen one stops fitting.
        """
        batch_size = state.last_batch_size
        if self._line is None or state.num_waiting > 0 or batch_size == 0 or self._phase != DECODE:
            return 0
        tokens = state.last_tokens
        limit_s = self._limit_s - state.last_queue_delay_s
        clock_mhz = self._lowest_fitting_mhz(batch_size, tokens, limit_s)
        if clock_mhz != self._decision_mhz:
            return 0
        if clock_mhz == self._top_mhz or tokens_per_iteration == 0:
            return FOREVER
        constant_s, slope_s = self._line(self._phase, clock_mhz, batch_size)
        if slope_s <= 0.0:
            return FOREVER if slope_s == 0.0 else 0
        return self._last_fitting_iteration(
            clock_mhz,
            batch_size,
            tokens,
            tokens_per_iteration,
            int(((limit_s - constant_s) / slope_s - tokens) / tokens_per_iteration),
            limit_s,
        )

    def _last_fitting_iteration(
        self, clock_mhz: int, batch_size: int, tokens: int, step: int, guess: int, limit_s: float
    ) -> int:
        """Guard the closed form against rounding: step back while the bound itself does not fit."""
        for k in range(guess, max(guess - 3, 0), -1):
            time_s = self._predict_s(self._phase, clock_mhz, batch_size, tokens + k * step)
            if time_s <= limit_s:
                return k
        return 0
