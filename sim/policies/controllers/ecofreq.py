"""EcoFreq, the frequency controller of VoltanaLLM v0.1."""

from __future__ import annotations

from dataclasses import dataclass

from voltana.sim.policies.base import (
    DECODE,
    PREFILL,
    Controller,
    IdlePlan,
    InstanceState,
    Phase,
    PolicyContext,
)
from voltana.sim.policies.parts.clocks import clock_list, first_clock_mhz
from voltana.sim.policies.parts.fitting import FOREVER, LowestFitting
from voltana.sim.policies.parts.mixed import predicted_s
from voltana.sim.policies.spec import parameter


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
    the longest queueing delay within it. Before the first iteration is known: the lowest listed
    clock. Idle for `idle_s`: lock that again.

    In prefill the limit is the whole TTFT promise, although the first token still waits for decode:
    the reference takes nothing off. There is no energy term, no hysteresis and no use of measured
    latency, exactly as in the reference. Left out are its `tps_threshold`, `rps_threshold` and
    `use_bs_total` (queued requests count into the batch), off in its demo, and
    `freq_manager_interval`, whose default is to decide at each iteration, as here.

    On a colocated instance (ours, in its spirit): T is the sum of both parts of the iteration about
    to run, and the limit decode's while requests run, prefill's while prompts do: the lower.

    Source: VoltanaLLM v0.1, arXiv 2509.04827 (freq_manager.py); levels: the profile's default list,
    [1005, 1410] on the A100. Our default margin is 0: the reference's demo aims above its SLO.
    """

    __slots__ = (
        "_decision_mhz", "_fitting", "_idle", "_levels_mhz", "_limit_s", "_phase", "_predictor",
        "_top_mhz", "_ttft_s",
    )  # fmt: skip
    colocates = True

    def __init__(self, parameters: EcoFreqParameters, context: PolicyContext) -> None:
        levels_mhz = clock_list(
            context.clocks_mhz,
            parameters.frequencies_mhz,
            context.default_levels_mhz,
            "ecofreq: frequencies",
        )
        self._levels_mhz = levels_mhz
        self._top_mhz = levels_mhz[-1]
        self._phase = context.phase
        slo_s = context.slo_s
        self._limit_s = slo_s * (1.0 + parameters.margin_frac)
        self._ttft_s = context.slo_ttft_s * (1.0 + parameters.margin_frac)
        self._predictor = context.predictor
        phase: Phase = PREFILL if context.phase == PREFILL else DECODE
        self._fitting = context.share(
            f"ecofreq: {phase} {levels_mhz} {self._limit_s}",
            lambda: LowestFitting(context.predictor, phase, levels_mhz, self._limit_s),
        )
        self._idle = IdlePlan(after_s=parameters.idle_s, clock_mhz=levels_mhz[0])
        self._decision_mhz = levels_mhz[0]

    def initial_clock_mhz(self) -> int:
        return self._levels_mhz[0]

    def decide(self, state: InstanceState) -> int:
        batch_size = state.last_batch_size
        if state.num_waiting > 0:
            clock_mhz = self._top_mhz
        elif state.chunk_tokens:
            clock_mhz = self._for_both(state)
        elif batch_size == 0:
            clock_mhz = self._decision_mhz
        elif self._phase != PREFILL:
            clock_mhz = self._fitting.clock_mhz(batch_size, state.last_tokens)
        else:
            limit_s, tokens = self._limit_s - state.last_queue_delay_s, state.last_tokens
            predict_s = self._predictor.predict_s
            clock_mhz = first_clock_mhz(
                self._levels_mhz, lambda f: predict_s(PREFILL, f, batch_size, tokens) <= limit_s
            )
        self._decision_mhz = clock_mhz
        return clock_mhz

    def _for_both(self, state: InstanceState) -> int:
        limit_s = self._ttft_s - state.last_queue_delay_s
        if state.num_running:
            limit_s = min(limit_s, self._limit_s)
        return first_clock_mhz(
            self._levels_mhz, lambda f: predicted_s(self._predictor, state, f) <= limit_s
        )

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return self._idle

    def steady_iterations(self, state: InstanceState, batch_size: int, tokens: int) -> int:
        """With a queue the top clock stays; else the clock stays until tokens exceed its limit."""
        if self._phase == PREFILL:
            return 0
        if state.num_waiting > 0:
            return FOREVER if self._decision_mhz == self._top_mhz else 0
        return self._fitting.steady_iterations(self._decision_mhz, batch_size, tokens, batch_size)
