"""EcoMin: the clock that costs the least energy among those that keep the promise. Ours.

Two facts set it apart from "lowest clock that fits". Prefill meets a given amount of work, so its
energy is (power - idle power) × time: a U in the clock, and left of its bottom slower is dearer.
Decode in continuous batching meets a given token rate: when iterations slow down the batch grows
(Little's law) and the rate stays, so that its energy per token follows the power alone; and the
larger batch, not the present one, has to keep the promise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sim.policies.base import (
    DECODE,
    UNLOCKED_MHZ,
    Controller,
    IdlePlan,
    InstanceState,
    PolicyContext,
)
from sim.policies.clocks import levels_of
from sim.policies.correction import TimeCorrection
from sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class EcoMinParameters:
    """Parameters of `ecomin`; all defaults are ours."""

    headroom_frac: float = parameter(
        0.15, "part of the promise kept in reserve; below 0 aims past it", low=-1.0, high=0.9
    )
    reserve_frac: float = parameter(
        0.25, "decode: further part kept in reserve below the clock of least energy a token",
        low=0, high=0.9,
    )  # fmt: skip
    drain_gaps_ratio: float = parameter(
        5.0,
        "decode: mean gaps between new requests after which, without one, a batch is draining",
        low=0,
    )
    quantile_ratio: float = parameter(
        0.95, "quantile of observed / corrected time that corrected times are multiplied by",
        low=0.5, high=0.999,
    )  # fmt: skip
    correction_ratio: float = parameter(
        0.01, "step of that quantile's online estimate, an iteration", low=0, high=0.2
    )
    memory_iterations: float = parameter(
        500.0, "iterations that the least-squares correction of predictions looks back", low=2
    )
    dwell_s: float = parameter(0.25, "shortest time before the clock may fall again", low=0)
    idle_s: float = parameter(0.05, "idle time before parking at the least idle power", low=0)
    num_levels: int = parameter(8, "clocks considered, spread over the profile's", low=1)
    frequencies_mhz: tuple[int, ...] = parameter((), "clocks considered, instead of num_levels")


_GAP_STEP: Final = 0.1
"""Weight of the last gap between new requests in their mean."""
_SHORTEST_GAP_S: Final = 0.05
"""About an iteration: shorter gaps cannot be told."""


class EcoMin(Controller):
    """Least energy per token among the clocks whose corrected prediction keeps the promise.

    Decode: among clocks f with q·T(f, b', t') <= SLO·(1 - headroom), the one with the least power;
    b' = b·T(f)/T(now) is the batch that the present token rate settles at, never below b. Below the
    clock of least energy an iteration, where power falls by little and the batch grows by much, the
    limit is lower by SLO·reserve, so that chance does not force far dearer clocks soon after. A
    batch that no request has joined for `drain_gaps` mean gaps is draining: its work is given, not
    its rate, and it runs no slower than that clock.
    Prefill: among clocks with max(delay, q·W) + q·T <= limit the one with the least (P - idle)·T,
    where limit = (SLO_TTFT - 2·SLO_ITL)·(1 - headroom) and W is T of the whole queue in one batch,
    or T of the batch itself with nobody in the queue: who arrives during it waits for it.
    None keeps the promise, or requests wait in decode: the fastest clock.

    T is the prediction corrected by recursive least squares on the observed iteration times, and q
    a quantile of observed / corrected (see `sim.policies.correction`): a predictor that is wrong by
    a factor or a fixed time is found out within a few dozen iterations, and a single outlier counts
    for little. A rise of the clock acts at once, a fall waits for `dwell_s`.
    Idle: after `idle_s` lock the clock of least idle power.

    Source: ours; EcoFreq with an energy term.
    """

    __slots__ = (
        "_came_s", "_changed_s", "_context", "_correction", "_decision_mhz", "_gap_s",
        "_levels_mhz", "_open", "_park_mhz", "_park_w", "_predicted_at_mhz", "_rankings",
        "_settings", "_top_mhz",
    )  # fmt: skip

    def __init__(self, parameters: EcoMinParameters, context: PolicyContext) -> None:
        self._levels_mhz = levels_of(
            context, parameters.frequencies_mhz, parameters.num_levels, "ecomin"
        )
        self._top_mhz = self._levels_mhz[-1]
        self._settings = parameters
        self._context = context
        self._correction = TimeCorrection(
            context.slo_s,
            memory_iterations=parameters.memory_iterations,
            quantile_ratio=parameters.quantile_ratio,
            quantile_step_ratio=parameters.correction_ratio,
        )
        self._decision_mhz = self._top_mhz
        self._predicted_at_mhz = -1
        self._changed_s = 0.0
        self._park_mhz = min((UNLOCKED_MHZ, *self._levels_mhz), key=context.power.idle_power_w)
        self._park_w = context.power.idle_power_w(self._park_mhz)
        self._rankings: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
        self._open = 0
        self._came_s = self._gap_s = 0.0

    def decide(self, state: InstanceState) -> int:
        if state.last_batch_size > 0:
            self._learn(state)
            is_decode = self._context.phase == DECODE
            wanted = self._for_decode(state) if is_decode else self._for_prefill(state)
            self._move_to(wanted, state.now_s)
        # a decision that changes the clock does so within the iteration that now begins
        steady = self._decision_mhz == state.clock_or_top_mhz(self._context.clocks_mhz[-1])
        self._predicted_at_mhz = state.clock_mhz if steady else -1
        return self._decision_mhz

    def initial_clock_mhz(self) -> int:
        return self._top_mhz

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return IdlePlan(after_s=self._settings.idle_s, clock_mhz=self._park_mhz)

    def _learn(self, state: InstanceState) -> None:
        if state.clock_mhz != self._predicted_at_mhz or state.ended_batch_size == 0:
            return  # the clock changed within the iteration: its time says nothing about either
        predicted_s = self._context.predictor.predict_s(
            self._context.phase,
            state.clock_or_top_mhz(self._context.clocks_mhz[-1]),
            state.ended_batch_size,
            state.ended_tokens,
        )
        self._correction.observe(predicted_s, state.last_duration_s)

    def _for_decode(self, state: InstanceState) -> int:
        if state.num_waiting > 0:
            return self._top_mhz
        settings, ratio = self._settings, self._correction.ratio
        batch = max(state.num_running, state.last_batch_size)
        tokens = max(state.kv_tokens, state.last_tokens)
        limit_s = self._context.slo_itl_s * (1.0 - settings.headroom_frac)
        roomy_s = limit_s - self._context.slo_itl_s * settings.reserve_frac
        if self._is_draining(state):
            roomy_s = 0.0
        now_s = self._predict_s(state.clock_or_top_mhz(self._top_mhz), batch, tokens)
        bottom_mhz, by_power = self._ranking(batch, tokens)
        for clock in by_power:
            growth = max(self._predict_s(clock, batch, tokens) / now_s, 1.0)
            settled_s = self._predict_s(clock, int(batch * growth), int(tokens * growth))
            if ratio * settled_s <= (roomy_s if clock < bottom_mhz else limit_s):
                return clock
        return self._top_mhz

    def _ranking(self, batch: int, tokens: int) -> tuple[int, tuple[int, ...]]:
        """The clock of least energy above idle for one such iteration; all clocks by power.

        Worked out once for batches alike: neither turns on a few tokens.
        """
        key = batch >> 2, tokens >> 11
        ranking = self._rankings.get(key)
        if ranking is None:
            power, predictor = self._context.power, self._context.predictor
            watts = {f: power.power_w(DECODE, f, batch, tokens) for f in self._levels_mhz}
            above_j = {
                f: (watts[f] - self._park_w) * predictor.predict_s(DECODE, f, batch, tokens)
                for f in self._levels_mhz
            }
            bottom_mhz = min(self._levels_mhz, key=lambda f: above_j[f])
            ranking = bottom_mhz, tuple(sorted(self._levels_mhz, key=lambda f: watts[f]))
            self._rankings[key] = ranking
        return ranking

    def _is_draining(self, state: InstanceState) -> bool:
        """Whether requests leave and none has come for longer than chance explains."""
        if state.open_requests > self._open:
            gap_s = state.now_s - self._came_s
            self._gap_s += _GAP_STEP * (gap_s - self._gap_s)
            self._came_s = state.now_s
        self._open = state.open_requests
        quiet_s = state.now_s - self._came_s
        return quiet_s > self._settings.drain_gaps_ratio * max(self._gap_s, _SHORTEST_GAP_S)

    def _for_prefill(self, state: InstanceState) -> int:
        context = self._context
        batch, tokens = state.last_batch_size, state.last_tokens
        limit_s = context.prefill_budget_s * (1.0 - self._settings.headroom_frac)
        queued, ratio = state.num_waiting, self._correction.ratio
        best_mhz, best_j = self._top_mhz, float("inf")
        for clock in self._levels_mhz:
            time_s = self._predict_s(clock, batch, tokens)
            behind_s = self._predict_s(clock, queued, state.waiting_tokens) if queued else time_s
            if max(state.last_queue_delay_s, ratio * behind_s) + ratio * time_s <= limit_s:
                idle_w = context.power.idle_power_w(clock)
                power_w = context.power.power_w(context.phase, clock, batch, tokens)
                energy_j = (power_w - idle_w) * time_s
                if energy_j < best_j:
                    best_mhz, best_j = clock, energy_j
        return best_mhz

    def _predict_s(self, clock_mhz: int, batch_size: int, tokens: int) -> float:
        context = self._context
        return self._correction.correct_s(
            context.predictor.predict_s(context.phase, clock_mhz, batch_size, tokens)
        )

    def _move_to(self, wanted_mhz: int, now_s: float) -> None:
        is_fall = wanted_mhz < self._decision_mhz
        if is_fall and now_s - self._changed_s < self._settings.dwell_s:
            return
        if wanted_mhz != self._decision_mhz:
            self._decision_mhz = wanted_mhz
            self._changed_s = now_s
