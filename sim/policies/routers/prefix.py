"""Routers that know what prompts share: to where it is cached, unless that costs more.

All three choose the prefill instance by it. Of decode instances the one with the fewest open
requests takes the request; `prefix-affinity` looks into their caches too, where they have some. A
colocated instance is both.
"""

from __future__ import annotations

from dataclasses import dataclass

from voltana.sim.policies.base import (
    COLOCATED,
    PREFILL,
    InstanceState,
    PolicyContext,
    RequestView,
    Router,
    States,
)
from voltana.sim.policies.parts.clocks import clock_list
from voltana.sim.policies.parts.radix import RadixCache
from voltana.sim.policies.routers.simple import least
from voltana.sim.policies.spec import parameter


def _open(state: InstanceState) -> int:
    return state.open_requests


def _with_decode(chosen: int, decode: States) -> tuple[int, int]:
    return chosen, chosen if decode[0].phase == COLOCATED else least(decode, _open)


def _cached_tokens(request: RequestView, state: InstanceState) -> int:
    """Tokens of the prompt that the instance has."""
    return 0 if request.prompt is None else state.count_cached(request.prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixAffinityParameters:
    """Parameters of `prefix-affinity`: ours."""

    slack_requests: int = parameter(
        8, "open requests that the chosen instance may have beyond the least", low=0
    )


class PrefixAffinity(Router):
    """The instance that has most of the prompt, of those that are not much fuller.

    So in prefill, and by itself in decode, where open requests alone count if nothing is kept
    there. It looks into the caches themselves, as an engine's cache events would show them. Where
    two have as much, the one with fewer open requests.

    Source: common practice (Ray Serve's and Dynamo's routers weigh both); the bound on the
    difference in open requests is ours.
    """

    __slots__ = ("_slack",)
    reads_prompts = True
    looks_at = "counts"

    def __init__(self, parameters: PrefixAffinityParameters, context: PolicyContext) -> None:
        self._slack = parameters.slack_requests

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        chosen = self._choose(request, prefill)
        return chosen, chosen if decode[0].phase == COLOCATED else self._choose(request, decode)

    def _choose(self, request: RequestView, states: States) -> int:
        most = min(s.open_requests for s in states) + self._slack
        return least(
            states,
            lambda s: (s.open_requests > most, -_cached_tokens(request, s), s.open_requests),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAwareParameters:
    """Parameters of `cache-aware`: the source's, but for the size of a tree."""

    cache_threshold_frac: float = parameter(
        0.5, "part of a prompt that must have been sent to an instance before", low=0, high=1
    )
    balance_requests: int = parameter(
        32, "difference in open requests above which load decides", low=0
    )
    uneven_ratio: float = parameter(1.1, "and ratio of the most to the fewest", low=1)
    tree_tokens: int = parameter(
        0, "what is remembered of each instance's prompts (ours; 0 = its KV capacity)", low=0
    )


class CacheAware(Router):
    """SGLang's gateway: to the longest prefix that it remembers, unless the load is uneven.

    It remembers what it sent where, in a tree an instance, and asks no engine. If the most and the
    fewest open requests of two prefill instances differ by more than `balance` and the ratio, the
    one with the fewest gets the request; else the one with the longest match, if that is more than
    `cache_threshold` of the prompt; else the one with the fewest.

    Source: sgl-model-gateway, `policies/cache_aware.rs` and the defaults of `CacheAwareConfig` in
    `policies/mod.rs`. It compares text, we tokens; it trims its trees every 30 s, we at once; of
    equal matches we take the one with fewer open requests.
    """

    __slots__ = ("_least_match", "_ratio", "_requests", "_tree_tokens", "_trees")
    reads_prompts = True
    looks_at = "counts"

    def __init__(self, parameters: CacheAwareParameters, context: PolicyContext) -> None:
        self._least_match = parameters.cache_threshold_frac
        self._requests = parameters.balance_requests
        self._ratio = parameters.uneven_ratio
        self._tree_tokens = parameters.tree_tokens or context.kv_capacity_tokens
        self._trees: dict[int, RadixCache] = {}

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        chosen = self._choose(request, prefill)
        if request.prompt is not None:
            tree = self._tree(prefill[chosen])
            tree.insert(request.prompt, request.input_tokens)
            tree.free(0)  # down to its size
        return _with_decode(chosen, decode)

    def _choose(self, request: RequestView, prefill: States) -> int:
        counts = [s.open_requests for s in prefill]
        fewest, most = min(counts), max(counts)
        is_uneven = most - fewest > self._requests and most > self._ratio * fewest
        if is_uneven or request.prompt is None:
            return counts.index(fewest)
        prompt, length = request.prompt, request.input_tokens
        matches = [self._tree(s).count(prompt, length) for s in prefill]
        best = min(range(len(prefill)), key=lambda i: (-matches[i], counts[i]))
        return best if matches[best] > self._least_match * length else counts.index(fewest)

    def _tree(self, state: InstanceState) -> RadixCache:
        if state.instance_id not in self._trees:
            self._trees[state.instance_id] = RadixCache(self._tree_tokens)
        return self._trees[state.instance_id]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixEnergyParameters:
    """Parameters of `prefix-energy`: ours."""

    frequencies_mhz: tuple[int, ...] = parameter((), "levels that a queue is planned at")
    headroom_frac: float = parameter(
        0.1, "part of the prefill budget that queues are planned without", low=0, high=0.99
    )


class PrefixEnergy(Router):
    """Least added prefill energy: joules of recomputation against joules of imbalance.

    J(T), the energy of T tokens that wait at an instance, is that of one iteration of all of them,
    above what the card draws at rest: t(f, T) · (P(f, T) - P_rest(f)), at the level f of least
    energy among those that keep the prefill budget (TTFT - 2·ITL, less the headroom). A request
    with n tokens that the instance has not cached adds J(T + n) - J(T). Where nothing is cached n
    is the whole prompt, where the queue is long the clock must rise for all of it: both are joules,
    and the smallest sum wins. An instance where not even the top clock keeps the budget comes after
    all where some level does, the soonest first.

    Times are the predictor's, which knows no attention to a prefix; T counts the queue's prompts
    whole, though some of it may be cached. Of a colocated instance it counts prompts alone: that
    decoding waits or shares is in no sum.

    Source: ours.
    """

    __slots__ = ("_context", "_levels_mhz", "_limit_s")
    reads_prompts = True

    def __init__(self, parameters: PrefixEnergyParameters, context: PolicyContext) -> None:
        self._context = context
        self._levels_mhz = clock_list(
            context.clocks_mhz,
            parameters.frequencies_mhz,
            context.default_levels_mhz,
            "prefix-energy: frequencies",
        )
        self._limit_s = context.prefill_budget_s * (1.0 - parameters.headroom_frac)

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        return _with_decode(least(prefill, lambda s: self._cost(request, s)), decode)

    def _cost(self, request: RequestView, state: InstanceState) -> tuple[float, float, float]:
        """Seconds beyond the budget, joules added, open requests."""
        fresh = request.input_tokens - _cached_tokens(request, state)
        queued, batch = state.waiting_tokens, state.num_waiting
        if state.phase == COLOCATED:
            queued, batch = queued + state.chunk_tokens, batch + state.chunk_requests
        else:
            queued, batch = queued + state.kv_tokens, batch + state.num_running
        late_s, after_j = self._plan(batch + 1, queued + fresh)
        before_j = self._plan(batch, queued)[1] if queued > 0 else 0.0
        return late_s, after_j - before_j, state.open_requests

    def _plan(self, batch: int, tokens: int) -> tuple[float, float]:
        """Seconds beyond the budget and joules of one iteration of all that waits."""
        context, limit_s = self._context, self._limit_s
        plans = []
        for clock_mhz in self._levels_mhz:
            time_s = context.predictor.predict_s(PREFILL, clock_mhz, batch, tokens)
            power_w = context.power.power_w(PREFILL, clock_mhz, batch, tokens)
            rest_w = context.power.idle_power_w(clock_mhz)
            plans.append((max(0.0, time_s - limit_s), time_s * (power_w - rest_w)))
        return min(plans)
