"""Routers that need no model: random, in turn, and by the least of what is counted.

Each picks the prefill and the decode instance by the same rule, independently.
Source: common practice; every serving system ships some of them.
"""

from __future__ import annotations

from collections.abc import Callable

from voltana.sim.policies.base import InstanceState, PolicyContext, RequestView, Router, States
from voltana.sim.policies.controllers.fixed import NoParameters
from voltana.sim.policies.parts.dice import Dice


def least(states: States, key: Callable[[InstanceState], float | tuple[float, ...]]) -> int:
    """Position of the smallest key; the first of equals."""
    return min(range(len(states)), key=lambda i: key(states[i]))


class RandomRouter(Router):
    """Uniformly random instances, from the router's own seed."""

    __slots__ = ("_dice",)
    looks_at = "counts"

    def __init__(self, parameters: NoParameters, context: PolicyContext) -> None:
        self._dice = Dice(context.rng)

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        dice = self._dice
        return dice.below(len(prefill)), dice.below(len(decode))


class RoundRobin(Router):
    """Instances in turn; prefill and decode turn separately."""

    __slots__ = ("_next",)
    looks_at = "counts"

    def __init__(self, parameters: NoParameters, context: PolicyContext) -> None:
        self._next = 0

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        turn = self._next
        self._next += 1
        return turn % len(prefill), turn % len(decode)


class LeastRequests(Router):
    """The instance with the fewest open requests."""

    __slots__ = ()
    looks_at = "counts"

    def __init__(self, parameters: NoParameters, context: PolicyContext) -> None:
        pass

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        return (
            least(prefill, lambda s: s.open_requests),
            least(decode, lambda s: s.open_requests),
        )


class TwoChoices(Router):
    """Of two random instances the one with fewer open requests: nearly as even, at constant cost.

    Source: Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, 2001.
    """

    __slots__ = ("_dice",)
    looks_at = "counts"

    def __init__(self, parameters: NoParameters, context: PolicyContext) -> None:
        self._dice = Dice(context.rng)

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        return self._pick(prefill), self._pick(decode)

    def _pick(self, states: States) -> int:
        below = self._dice.below
        first, second = below(len(states)), below(len(states))
        return second if states[second].open_requests < states[first].open_requests else first


class LeastKv(Router):
    """The decode instance with the fewest KV tokens in use or queued; prefill by queued tokens."""

    __slots__ = ()

    def __init__(self, parameters: NoParameters, context: PolicyContext) -> None:
        pass

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        return (
            least(prefill, lambda s: (s.kv_load_tokens, s.open_requests)),
            least(decode, lambda s: (s.kv_load_tokens, s.open_requests)),
        )
