"""KAIROS's router: consolidate, then spread."""

from __future__ import annotations

from dataclasses import dataclass

from voltana.sim.policies.base import PolicyContext, RequestView, Router, States
from voltana.sim.policies.routers.simple import least
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class KairosRouterParameters:
    """Parameters of the router `kairos`."""

    fill_frac: float = parameter(
        0.5, "part of the KV cache up to which an instance is filled first", low=0, high=1
    )


class KairosRouter(Router):
    """Consolidate, then spread: the first decode instance under 50 % context, else the least used.

    Use is KV tokens in use or queued, with this prompt, over capacity. Instances of high index
    stay idle at low load. Prefill: fewest open requests.

    Source: KAIROS, arXiv 2604.16682.
    """

    __slots__ = ("_capacity_tokens", "_fill")

    def __init__(self, parameters: KairosRouterParameters, context: PolicyContext) -> None:
        self._fill = parameters.fill_frac
        self._capacity_tokens = max(context.kv_capacity_tokens, 1)

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        limit = self._fill * self._capacity_tokens - request.input_tokens
        chosen = next((i for i, s in enumerate(decode) if s.kv_load_tokens < limit), None)
        if chosen is None:
            chosen = least(decode, lambda s: s.kv_load_tokens)
        return least(prefill, lambda s: s.open_requests), chosen
