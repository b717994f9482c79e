"""Consolidation: as few decode instances as cost the least power, the others left to rest. Ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from voltana.sim.policies.base import (
    DECODE,
    PREFILL,
    InstanceState,
    PolicyContext,
    RequestView,
    Router,
    States,
)
from voltana.sim.policies.parts.clocks import levels_of
from voltana.sim.policies.parts.fullest import FullestBatch
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsolidateParameters:
    """Parameters of `consolidate`; all defaults are ours."""

    headroom_frac: float = parameter(
        0.1, "part of the ITL promise kept free on the instances in use", low=-1.0, high=0.9
    )
    period_s: float = parameter(0.25, "time between two looks at how many are needed", low=0.001)
    memory_s: float = parameter(3.0, "time constant of the mean token rate", low=0.0)
    dwell_s: float = parameter(5.0, "shortest time before one fewer is used again", low=0.0)
    gain_frac: float = parameter(
        0.05, "part of the power that one fewer has to save", low=0.0, high=1.0
    )
    prefill_frac: float = parameter(
        0.8, "part of the TTFT promise's part for prefill that queues may be packed to; 0 spreads",
        low=0, high=1,
    )  # fmt: skip
    prefill_most_s: float = parameter(
        2.0,
        "longest predicted time that a prefill queue is packed to, whatever the promise",
        low=0.0,
    )
    num_levels: int = parameter(8, "clocks considered, spread over the profile's", low=1)
    frequencies_mhz: tuple[int, ...] = parameter((), "clocks considered, instead of num_levels")


class Consolidate(Router):
    """New requests go to the first k decode instances; k is the number that needs the least power.

    A busy decode instance draws nearly the same power whatever its batch, an idle one a fifth of
    it. The fleet's token rate R is the sum of n/T over the instances (n running requests, T
    predicted at the present clock), averaged over `memory_s`. For each k, R/k each: at a clock f
    the batch settles at the least b with b >= R/k·T(f, b) (Little's law), and the least power of
    those f with T <= SLO·(1 - headroom) is k's price, less the idle power that k instances would
    draw anyway. Every `period_s` the cheapest k is taken: a larger one at once, one fewer if it
    saves `gain_frac` and the last change is `dwell_s` ago. If no k keeps the promise: all. Among
    the k, the fewest open requests; where that one has no room left in the fullest batch worth
    running (`voltana.sim.policies.parts.fullest`: beyond a stair of the table the token rate
    falls), k grows by one. An instance that is left out finishes what it has and falls idle;
    its controller then parks it.

    Prefill: the fullest instance where the running batch, the queue and this prompt together take
    no more at its clock than prefill_frac of what SLO_TTFT leaves for prefill (fuller batches cost
    less energy a token), else the one that has the least before it. Under a promise of many seconds
    `prefill_most_s` is the limit: a queue beyond the engine's largest batch saves nothing more, and
    where its predicted length is a fifth too short the promise is broken for all in it.

    Of instances that do both phases k are used for both. Prompts take the share of their time that
    the mean rate of prompt tokens asks for, in chunks of four prompts with 2,048 tokens (ours): a
    gap is longer by it, and power the mean of both.

    Source: ours. Near: KAIROS's consolidate-then-spread and slo-pack, which fill one instance to
    its limit first.
    """

    __slots__ = (
        "_active", "_changed_s", "_context", "_fullest", "_levels_mhz", "_limit_s", "_park_w",
        "_planned_s", "_prefill_s", "_prompt_rate", "_prompt_tokens", "_rate", "_settings",
    )  # fmt: skip

    def __init__(self, parameters: ConsolidateParameters, context: PolicyContext) -> None:
        self._levels_mhz = levels_of(
            context, parameters.frequencies_mhz, parameters.num_levels, "consolidate"
        )
        self._settings = parameters
        self._context = context
        self._limit_s = context.slo_itl_s * (1.0 - parameters.headroom_frac)
        self._prefill_s = min(
            context.prefill_budget_s * parameters.prefill_frac, parameters.prefill_most_s
        )
        self._park_w = min(context.power.idle_power_w(clock) for clock in self._levels_mhz)
        self._fullest = FullestBatch.of(context)
        self._active = 1
        self._rate = 0.0
        self._prompt_tokens = 0
        self._prompt_rate = 0.0
        """Prompt tokens/s that instances of both phases share; else 0."""
        self._planned_s = 0.0
        self._changed_s = float("-inf")

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        elapsed_s = request.arrival_s - self._planned_s
        if elapsed_s >= self._settings.period_s:
            self._planned_s = request.arrival_s
            self._plan(decode, elapsed_s)
        tokens = request.input_tokens
        if prefill is decode:
            self._prompt_tokens += tokens
            chosen = self._pick_decode(tokens, decode)
            return chosen, chosen
        return self._pick_prefill(tokens, prefill), self._pick_decode(tokens, decode)

    def _pick_decode(self, tokens: int, decode: States) -> int:
        active = min(self._active, len(decode))
        chosen = min(range(active), key=lambda i: decode[i].open_requests)
        state = decode[chosen]
        if active < len(decode) and not self._has_room(state, tokens):
            self._use(active + 1)
            return active
        return chosen

    def _has_room(self, state: InstanceState, tokens: int) -> bool:
        """Whether one more still fits the fullest batch worth running."""
        present = state.num_running + state.num_waiting
        context_tokens = (state.kv_load_tokens + tokens) / (present + 1)
        left = 1.0 - self._prompt_share(self._context.clocks_mhz[-1], self._active)
        return state.open_requests < self._fullest.requests(context_tokens, self._limit_s * left)

    def _use(self, active: int) -> None:
        if active != self._active:
            self._active = active
            self._changed_s = self._planned_s

    def _pick_prefill(self, tokens: int, prefill: States) -> int:
        waits_s = [self._prefill_wait_s(state, tokens) for state in prefill]
        fits = [i for i, wait_s in enumerate(waits_s) if wait_s <= self._prefill_s]
        if fits:
            return max(fits, key=lambda i: (waits_s[i], -i))
        return min(range(len(prefill)), key=lambda i: waits_s[i])

    def _prefill_wait_s(self, state: InstanceState, tokens: int) -> float:
        """Predicted time to the end of a prompt's prefill, were it sent there."""
        predict_s = self._context.predictor.predict_s
        clock = state.clock_or_top_mhz(self._context.clocks_mhz[-1])
        own_s = predict_s(PREFILL, clock, state.num_waiting + 1, state.waiting_tokens + tokens)
        if state.num_running == 0:
            return own_s
        return own_s + predict_s(PREFILL, clock, state.num_running, max(state.kv_tokens, 1))

    def _plan(self, decode: States, elapsed_s: float) -> None:
        """Choose how many instances new requests go to."""
        settings = self._settings
        running = sum(s.num_running for s in decode)
        memory_s = elapsed_s + settings.memory_s
        prompt_rate = self._prompt_tokens / elapsed_s
        self._prompt_rate += (prompt_rate - self._prompt_rate) * elapsed_s / memory_s
        self._prompt_tokens = 0
        rate = sum(self._token_rate(s) for s in decode if s.num_running)
        self._rate += (rate - self._rate) * elapsed_s / memory_s
        if not running:
            return
        context_tokens = sum(s.kv_tokens for s in decode) / running
        active = min(self._active, len(decode))
        wanted = self._cheapest(active, context_tokens, len(decode))
        if wanted > active:
            self._use(wanted)
        elif wanted < active and self._planned_s - self._changed_s >= settings.dwell_s:
            self._use(active - 1)

    def _token_rate(self, state: InstanceState) -> float:
        clock = state.clock_or_top_mhz(self._context.clocks_mhz[-1])
        time_s = self._context.predictor.predict_s(
            DECODE, clock, state.num_running, max(state.kv_tokens, 1)
        )
        return state.num_running / time_s * (1.0 - self._prompt_share(clock, self._active))

    def _prompt_share(self, clock: int, count: int) -> float:
        """Of the time of so many instances of both phases, what prompts take at a clock."""
        if not self._prompt_rate:
            return 0.0
        chunk_s = self._context.predictor.predict_s(PREFILL, clock, *_CHUNK)
        return min(self._prompt_rate / count * chunk_s / _CHUNK[1], _MOST_SHARE)

    def _cheapest(self, active: int, context_tokens: float, most: int) -> int:
        best, best_w = most, float("inf")
        for k in range(1, most + 1):
            total_w = k * self._price_w(k, context_tokens)
            if k < active:  # it has to be worth the change
                total_w *= 1.0 + self._settings.gain_frac
            if total_w < best_w:
                best, best_w = k, total_w
        return best

    def _price_w(self, count: int, context_tokens: float) -> float:
        """Least power above idle of one of so many; infinite if the promise can't be kept."""
        best_w, power_w = float("inf"), self._context.power.power_w
        for clock in self._levels_mhz:
            share = self._prompt_share(clock, count)
            batch = self.settled_batch(
                self._rate / count, context_tokens, clock, stretch=1.0 / (1.0 - share)
            )
            if batch is not None and share < _MOST_SHARE:
                tokens = max(int(batch * context_tokens), 1)
                mean_w = (1.0 - share) * power_w(DECODE, clock, batch, tokens)
                if share:
                    mean_w += share * power_w(PREFILL, clock, *_CHUNK)
                best_w = min(best_w, mean_w - self._park_w)
        return best_w

    def settled_batch(
        self, rate: float, context_tokens: float, clock: int, *, stretch: float = 1.0
    ) -> int | None:
        """The least b (in steps) with b >= rate·T(b), if the promise is kept there.

        Args:
            rate: Tokens/s that come to the instance.
            context_tokens: Of a request.
            clock: In MHz.
            stretch: Gap over the time of an iteration of decode.
        """
        predict_s = self._context.predictor.predict_s
        for batch in range(_STEP, int(rate * self._limit_s) + 2 * _STEP, _STEP):
            time_s = stretch * predict_s(DECODE, clock, batch, max(int(batch * context_tokens), 1))
            if time_s > self._limit_s:
                return None
            if batch >= rate * time_s:
                return batch
        return None


_STEP: Final = 8
"""Batch sizes looked at: every graph size of the engine."""
_CHUNK: Final = (4, 2048)
"""A chunk of prompts, as requests and tokens."""
_MOST_SHARE: Final = 0.9
"""Of an instance's time that prompts may take."""
