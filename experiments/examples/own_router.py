"""An example of a router of your own: the least work queued, by tokens and not by requests.

It is no part of the list of policies. Name the module in place of a router:

    voltana simulate --router voltana.experiments.examples.own_router:weight=0.5
"""

from __future__ import annotations

from dataclasses import dataclass

from voltana.sim.policies.base import PolicyContext, RequestView, Router, States
from voltana.sim.policies.registry import Entry
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastWorkParameters:
    """Parameters of least work; the default is ours."""

    weight_ratio: float = parameter(
        1.0, "a KV token in use counts as much as so many tokens in the queue", low=0
    )


class LeastWork(Router):
    """Prefill by the prompt tokens that wait, decode by the KV tokens in use and in the queue.

    A long prompt counts as what it is, where least-requests takes it for one of many.
    """

    def __init__(self, parameters: LeastWorkParameters, context: PolicyContext) -> None:
        self._weight = parameters.weight_ratio

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        return _least(prefill, 0.0), _least(decode, self._weight)


def _least(states: States, weight: float) -> int:
    """Position of the instance with the least work: an index into `states`, not an id."""

    def work(position: int) -> tuple[float, int]:
        state = states[position]
        return weight * state.kv_tokens + state.waiting_tokens, state.open_requests

    return min(range(len(states)), key=work)


ROUTER = Entry(make=LeastWork, parameters=LeastWorkParameters)
