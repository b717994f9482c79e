"""EcoMin: fill batches up to the stair, run them as slowly as pays, be back before the stair. Ours.

Decode in continuous batching meets a given token rate: when iterations slow down the batch grows
(Little's law) and the rate stays, so that a slow clock with a large batch costs the least power.
What limits this is not the promise but the way back. The token rate has a maximum, at the fullest
batch; a fleet that lets more requests join falls off it for good (see
`voltana.sim.policies.parts.fullest`). Prefill meets a given amount of work: its energy is (power -
idle power) × time, a U in the clock, and a small batch costs more a token than a large one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from voltana.sim.policies.base import (
    COLOCATED,
    DECODE,
    PREFILL,
    UNLOCKED_MHZ,
    Controller,
    IdlePlan,
    InstanceState,
    Phase,
    PolicyContext,
)
from voltana.sim.policies.parts.clocks import (
    first_clock_mhz,
    least_energy_clock_mhz,
    levels_of,
    nearest_clock_mhz,
)
from voltana.sim.policies.parts.correction import TimeCorrection
from voltana.sim.policies.parts.fullest import FullestBatch
from voltana.sim.policies.parts.mixed import GapWatch, predicted_gap_s, predicted_s
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class EcoMinParameters:
    """Parameters of `ecomin`; all defaults are ours."""

    headroom_frac: float = parameter(
        0.05, "part of the promise kept in reserve; below 0 aims past it", low=-1.0, high=0.9
    )
    reserve_ratio: float = parameter(
        4.0, "decode: room before the fullest batch in which the clock climbs from the bottom to"
        " the top, in standard deviations of a Poisson batch", low=0.01,
    )  # fmt: skip
    hold_frac: float = parameter(
        0.4, "prefill: part of its time in the TTFT promise for a batch to gather and run", low=0,
        high=1,
    )  # fmt: skip
    drain_gaps_ratio: float = parameter(
        5.0, "decode: mean gaps between new requests after which, without one, a batch is draining",
        low=0,
    )  # fmt: skip
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
    idle_s: float = parameter(0.5, "idle time before parking at the least idle power", low=0)
    num_levels: int = parameter(8, "clocks considered, spread over the profile's", low=1)
    frequencies_mhz: tuple[int, ...] = parameter((), "clocks considered, instead of num_levels")


_GAP_STEP: Final = 0.1
"""Weight of the last gap between new requests in their mean."""
_SHORTEST_GAP_S: Final = 0.05
"""About an iteration: shorter gaps cannot be told."""
_LIMIT_STEP: Final = 0.01
"""Of the ITL promise: limits are rounded to it, so that few of them have to be searched."""


class EcoMin(Controller):
    """Lowest clock that keeps the promise, back at the top before the batch is full; it may hold.

    Decode: B is the fullest batch, the one of the highest token rate at the top clock among those
    with q·T <= limit = SLO·(1 - headroom). No more than B run; others wait, TTFT pays. With n the
    requests that are here or on their way, s = (B - n) / sqrt(B) is the room left in standard
    deviations of a Poisson batch. Far from full: the lowest clock with q·T(f, n) <= limit, since at
    a given token rate that is the least power. With s < reserve: none below the clock nearest to
    bottom + (top - bottom)·(1 - s/reserve)², so that the batch turns before it is full; and none
    below the bottom, the clock of least energy an iteration, since work put off there would have
    to be caught up at clocks that are far dearer. The bottom also bounds a batch that is draining:
    no request has joined for `drain_gaps` mean gaps, so that its work is given, not its rate.
    Prefill, with S = SLO_TTFT - 2·SLO_ITL: waits for more prompts until the oldest would end at
    hold·S were the queue begun now. Then the lowest clock from the bottom on with
    max(delay, q·W) + q·T <= S·(1 - headroom), where W is T of the whole queue in one batch, or of
    the batch itself with nobody in the queue: who arrives during it waits for it.
    None keeps the promise: the fastest clock.

    T is the prediction corrected by recursive least squares on the observed iteration times, and q
    a quantile of observed / corrected (see `voltana.sim.policies.parts.correction`): a predictor
    that is wrong by a factor or a fixed time is found out within a few dozen iterations, and a
    single outlier counts for little. A rise of the clock acts at once, a fall waits for `dwell_s`.
    Idle: after `idle_s` lock the clock of least idle power.

    Colocated: decode's rule, its limit less the mean time in a gap in which decoding stands for
    prompts. With prompts in the iteration to come the larger of that and the lowest clock from the
    bottom on that keeps prefill's rule and, if the top clock can, SLO_ITL·(1 - headroom) from token
    to token of those who run. T is the sum of both parts. It does not wait for prompts.

    Source: ours. That the batch of a queue with as many servers as customers is Poisson, of
    variance equal to its mean, is the M/G/∞ queue's (Kleinrock, Queueing Systems I, 1975).
    """

    __slots__ = (
        "_bottom_mhz",
        "_came_s",
        "_changed_s",
        "_context",
        "_decision_mhz",
        "_fullest",
        "_gap_s",
        "_levels_mhz",
        "_open",
        "_park_mhz",
        "_park_w",
        "_planned_s",
        "_predicted_at_mhz",
        "_settings",
        "_top_mhz",
        "_watch",
        "correction",
    )  # fmt: skip
    colocates = True

    def __init__(self, parameters: EcoMinParameters, context: PolicyContext) -> None:
        self._levels_mhz = levels_of(
            context, parameters.frequencies_mhz, parameters.num_levels, "ecomin"
        )
        self._top_mhz = self._levels_mhz[-1]
        self._settings = parameters
        self._context = context
        self.correction = TimeCorrection(
            context.slo_s,
            memory_iterations=parameters.memory_iterations,
            quantile_ratio=parameters.quantile_ratio,
            quantile_step_ratio=parameters.correction_ratio,
        )
        self._decision_mhz = self._top_mhz
        self._predicted_at_mhz = -1
        self._changed_s = 0.0
        self._park_mhz = min((UNLOCKED_MHZ, *self._levels_mhz), key=context.power.idle_power_w)
        self._fullest = FullestBatch.of(context)
        self._bottom_mhz = nearest_clock_mhz(self._levels_mhz, least_energy_clock_mhz(context))
        self._open = 0
        self._came_s = self._gap_s = 0.0
        self._watch = GapWatch()
        self._planned_s = 0.0
        """Colocated: predicted time of the iteration that was decided on last."""

    def decide(self, state: InstanceState) -> int:
        phase = self._context.phase
        if phase == COLOCATED:
            self._learn_both(state)
            self._move_to(self._for_both(state), state.now_s)
        elif state.last_batch_size > 0:
            self._learn(state)
            wanted = self._for_decode(state) if phase == DECODE else self._for_prefill(state)
            self._move_to(wanted, state.now_s)
        # a decision that changes the clock does so within the iteration that now begins
        clock_mhz = state.clock_or_top_mhz(self._context.clocks_mhz[-1])
        steady = self._decision_mhz == clock_mhz
        self._predicted_at_mhz = state.clock_mhz if steady else -1
        if phase == COLOCATED:
            self._planned_s = predicted_s(self._context.predictor, state, clock_mhz)
        return self._decision_mhz

    def initial_clock_mhz(self) -> int:
        return self._top_mhz

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return IdlePlan(after_s=self._settings.idle_s, clock_mhz=self._park_mhz)

    def admit_up_to(self, state: InstanceState) -> int | None:
        requests = state.num_running + state.num_waiting
        return self._most(state.kv_load_tokens / requests) if requests else None

    def hold_s(self, state: InstanceState) -> float:
        budget_s = self._settings.hold_frac * self._context.prefill_budget_s
        run_s = self._bound_s(self._bottom_mhz, state.num_waiting, state.waiting_tokens)
        if run_s >= budget_s:
            return 0.0
        oldest_s = min(request.arrival_s for request in state.list_waiting())
        return max(oldest_s + budget_s - run_s - state.now_s, 0.0)

    def learnt(self) -> Mapping[str, float]:
        """Corrected over predicted time of an iteration as long as promised, and the error left."""
        slo_s = self._context.slo_s
        return {
            "correction": self.correction.correct_s(slo_s) / slo_s,
            "error_quantile": self.correction.ratio,
        }

    def _learn(self, state: InstanceState) -> None:
        if state.clock_mhz != self._predicted_at_mhz or state.ended_batch_size == 0:
            return  # the clock changed within the iteration: its time says nothing about either
        predicted_s = self._context.predictor.predict_s(
            self._context.phase,
            state.clock_or_top_mhz(self._context.clocks_mhz[-1]),
            state.ended_batch_size,
            state.ended_tokens,
        )
        self.correction.observe(predicted_s, state.last_duration_s)

    def _learn_both(self, state: InstanceState) -> None:
        self._watch.look(state)
        if state.clock_mhz == self._predicted_at_mhz:  # a rest shows no duration
            self.correction.observe(self._planned_s, state.last_duration_s)

    def _for_both(self, state: InstanceState) -> int:
        wanted = self._for_decode(state) if state.num_running else self._bottom_mhz
        return max(wanted, self._for_chunk(state)) if state.chunk_tokens else wanted

    def _for_chunk(self, state: InstanceState) -> int:
        context, bound_s = self._context, self.correction.bound_s
        ttft_s, itl_s = map(self._limit_s, (context.prefill_budget_s, context.slo_itl_s))
        predictor, queued = context.predictor, state.num_waiting
        top_s = bound_s(predicted_gap_s(predictor, state, self._top_mhz))
        has_gap = state.num_running > 0 and top_s <= itl_s

        def fits(clock_mhz: int) -> bool:
            time_s = bound_s(predicted_s(predictor, state, clock_mhz))
            behind_s = time_s
            if queued:
                behind_s = bound_s(
                    predictor.predict_s(PREFILL, clock_mhz, queued, state.waiting_tokens)
                )
            if max(state.last_queue_delay_s, behind_s) + time_s > ttft_s:
                return False
            return not has_gap or bound_s(predicted_gap_s(predictor, state, clock_mhz)) <= itl_s

        return first_clock_mhz(self._levels_mhz, lambda f: f >= self._bottom_mhz and fits(f))

    def _for_decode(self, state: InstanceState) -> int:
        settings = self._settings
        batch = max(state.num_running, state.last_batch_size)
        tokens = max(state.kv_tokens, state.last_tokens)
        most = self._most(tokens / batch)
        here = max(batch + state.num_waiting, state.open_requests)
        room = (most - here) / math.sqrt(most)
        floor_mhz = self._bottom_mhz if self._is_draining(state) else 0
        if room < settings.reserve_ratio:
            climb = (1.0 - room / settings.reserve_ratio) ** 2
            wanted_mhz = self._bottom_mhz + (self._top_mhz - self._bottom_mhz) * climb
            floor_mhz = nearest_clock_mhz(self._levels_mhz, wanted_mhz)
        limit_s = self._limit_s(self._context.slo_itl_s) - self._watch.aside_s
        here_tokens = tokens * here // batch
        return first_clock_mhz(
            self._levels_mhz,
            lambda f: f >= floor_mhz and self._bound_s(f, here, here_tokens) <= limit_s,
        )

    def _most(self, context_tokens: float) -> int:
        """The fullest batch, by times as they are observed."""
        slo_s = self._context.slo_itl_s
        error = self.correction.bound_s(slo_s) / slo_s
        limit_s = math.ceil(self._limit_s(1.0) / error / _LIMIT_STEP) * _LIMIT_STEP * slo_s
        return self._fullest.requests(context_tokens, limit_s)

    def _limit_s(self, slo_s: float) -> float:
        return slo_s * (1.0 - self._settings.headroom_frac)

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
        limit_s = self._limit_s(context.prefill_budget_s)
        queued = state.num_waiting

        def fits(clock_mhz: int) -> bool:
            time_s = self._bound_s(clock_mhz, batch, tokens)
            behind_s = self._bound_s(clock_mhz, queued, state.waiting_tokens) if queued else time_s
            return max(state.last_queue_delay_s, behind_s) + time_s <= limit_s

        return first_clock_mhz(self._levels_mhz, lambda f: f >= self._bottom_mhz and fits(f))

    def _bound_s(self, clock_mhz: int, batch_size: int, tokens: int) -> float:
        context = self._context
        phase: Phase = PREFILL if context.phase == PREFILL else DECODE
        return self.correction.bound_s(
            context.predictor.predict_s(phase, clock_mhz, batch_size, tokens)
        )

    def _move_to(self, wanted_mhz: int, now_s: float) -> None:
        is_fall = wanted_mhz < self._decision_mhz
        if is_fall and now_s - self._changed_s < self._settings.dwell_s:
            return
        if wanted_mhz != self._decision_mhz:
            self._decision_mhz = wanted_mhz
            self._changed_s = now_s
