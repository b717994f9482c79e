"""Routers that know each instance by its own models: for fleets of unlike cards. Ours."""

from __future__ import annotations

from dataclasses import dataclass

from voltana.sim.policies.base import (
    DECODE,
    PREFILL,
    InstanceState,
    Phase,
    PolicyContext,
    RequestView,
    Router,
    States,
)
from voltana.sim.policies.controllers.fixed import NoParameters
from voltana.sim.policies.parts.prediction import ModelsOf
from voltana.sim.policies.routers.simple import least
from voltana.sim.policies.spec import parameter


class KnownInstances:
    """Times and energy of batches on an instance, by its own models at the clock in force.

    Args:
        context: Of a router.
    """

    __slots__ = ("_models",)

    def __init__(self, context: PolicyContext) -> None:
        self._models = ModelsOf(context)

    def point(
        self, state: InstanceState, phase: Phase, batch_size: int, tokens: int
    ) -> tuple[float, float]:
        """Time (s) and power above idle (W) of one iteration; nothing for an empty batch.

        Args:
            state: The instance.
            phase: Which work.
            batch_size: Requests.
            tokens: New tokens (prefill) or context (decode) of them all.
        """
        if batch_size == 0:
            return 0.0, 0.0
        models = self._models(state)
        clock = state.clock_or_top_mhz(models.clocks_mhz[-1])
        at = phase, clock, batch_size, max(tokens, 1)
        above_idle_w = models.power.power_w(*at) - models.power.idle_power_w(clock)
        return models.predictor.predict_s(*at), above_idle_w

    def wait_s(self, state: InstanceState, tokens: int) -> float:
        """Time to the end of a prompt's prefill: the batch that runs, then the queue with it.

        Args:
            state: A prefill instance.
            tokens: Of the prompt.
        """
        running_s, _ = self.point(state, PREFILL, state.num_running, state.kv_tokens)
        queued = state.num_waiting + 1, state.waiting_tokens + tokens
        return running_s + self.point(state, PREFILL, *queued)[0]

    def next_s(self, state: InstanceState, tokens: int) -> float:
        """Time of a decode iteration with one request more.

        Args:
            state: A decode instance.
            tokens: Context of that request.
        """
        return self.point(state, DECODE, state.open_requests + 1, state.kv_load_tokens + tokens)[0]


class LeastTime(Router):
    """Least expected time by each instance's own models, at the clock in force.

    Prefill: the running batch, then the queue and this prompt in one. Decode: an iteration with
    this request added; of equals the fewest open requests. Unlike cards so get work by their speed.

    Source: ours; least expected time is common practice for unlike servers.
    """

    __slots__ = ("_known",)

    def __init__(self, parameters: NoParameters, context: PolicyContext) -> None:
        self._known = KnownInstances(context)

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        known, tokens = self._known, request.input_tokens
        return (
            least(prefill, lambda s: known.wait_s(s, tokens)),
            least(decode, lambda s: (known.next_s(s, tokens), s.open_requests)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastEnergyParameters:
    """Parameters of `least-energy`; all defaults are ours."""

    prefill_frac: float = parameter(
        0.5, "part of the TTFT promise's part for prefill that a prompt may take", low=0.0
    )
    headroom_frac: float = parameter(0.1, "part of the ITL promise kept free", low=-1.0, high=0.9)


class LeastEnergy(Router):
    """Least added energy above idle by each instance's own models, where promises are kept.

    Prefill: of the instances where a prompt would end within its part of the budget, the one whose
    queued batch takes the least energy more. Decode: of those whose iteration with this request
    keeps ITL · (1 - headroom), the one whose power above idle rises least (the token rate is
    given); of equals the most open requests. Where none keeps it: least expected time.

    Source: ours.
    """

    __slots__ = ("_itl_s", "_known", "_prefill_s")

    def __init__(self, parameters: LeastEnergyParameters, context: PolicyContext) -> None:
        self._known = KnownInstances(context)
        self._prefill_s = context.prefill_budget_s * parameters.prefill_frac
        self._itl_s = context.slo_itl_s * (1.0 - parameters.headroom_frac)

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        tokens = request.input_tokens
        return self._pick_prefill(tokens, prefill), self._pick_decode(tokens, decode)

    def _pick_prefill(self, tokens: int, prefill: States) -> int:
        waits_s = [self._known.wait_s(state, tokens) for state in prefill]
        fits = [i for i, wait_s in enumerate(waits_s) if wait_s <= self._prefill_s]
        if not fits:
            return min(range(len(prefill)), key=lambda i: waits_s[i])
        return min(fits, key=lambda i: (self._added_j(prefill[i], tokens), waits_s[i]))

    def _added_j(self, state: InstanceState, tokens: int) -> float:
        count, queued = state.num_waiting, state.waiting_tokens
        with_s, with_w = self._known.point(state, PREFILL, count + 1, queued + tokens)
        without_s, without_w = self._known.point(state, PREFILL, count, queued)
        return with_s * with_w - without_s * without_w

    def _pick_decode(self, tokens: int, decode: States) -> int:
        known = self._known
        fits = [i for i, state in enumerate(decode) if known.next_s(state, tokens) <= self._itl_s]
        if not fits:
            return least(decode, lambda s: (known.next_s(s, tokens), s.open_requests))
        return min(fits, key=lambda i: (self._rise_w(decode[i], tokens), -decode[i].open_requests))

    def _rise_w(self, state: InstanceState, tokens: int) -> float:
        count, load = state.open_requests, state.kv_load_tokens
        after_w = self._known.point(state, DECODE, count + 1, load + tokens)[1]
        return after_w - self._known.point(state, DECODE, count, load)[1]
