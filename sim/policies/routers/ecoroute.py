"""EcoRoute, the decode routers of VoltanaLLM v0.1: the what-if rule and the tile rule.

Both pick the prefill instance at random and the decode instance at arrival, before prefill.
Below n = the router's open requests towards an instance, load = its KV tokens in use and queued.
Source: VoltanaLLM v0.1, arXiv 2509.04827 (echo_lb.py, policies `fadr` and `tile_aware`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from voltana.sim.policies.base import DECODE, PolicyContext, RequestView, Router, States
from voltana.sim.policies.parts.clocks import clock_list, spread_clocks_mhz
from voltana.sim.policies.parts.dice import Dice
from voltana.sim.policies.parts.fitting import LowestFitting
from voltana.sim.policies.spec import parameter

REFERENCE_LEVELS_MHZ: Final = (1005, 1095, 1200, 1305, 1410)


@dataclass(frozen=True, slots=True, kw_only=True)
class EcoRouteParameters:
    """Parameters of `ecoroute`."""

    tile_requests: int = parameter(128, "requests of a full decode tile", low=1)
    look_ahead_tokens: int = parameter(
        50, "decode steps that the what-if case looks ahead, tokens per open request", low=0
    )
    look_now_tokens: int = parameter(
        2, "decode steps that the present case looks ahead, tokens per open request", low=0
    )
    margin_frac: float = parameter(
        0.0, "judge by SLO x (1 + margin); the reference's router uses none", low=-0.95
    )
    frequencies_mhz: tuple[int, ...] = parameter(
        (), "clock levels of the what-if; by default the reference's five, or five of the profile"
    )


class EcoRoute(Router):
    """Send a request where it would not force a higher clock; among those, where it fits best.

    While every instance has fewer requests than a tile: the lowest clock, then the fewest
    requests. Else, for each instance, cur = lowest level that keeps the ITL promise now and
    nxt = lowest that keeps it with this request added; its tag is +nxt if the request would raise
    the level (or the top level is needed anyway), else -cur. If the levels of the tags lie more
    than one apart, take the slow end; otherwise the smallest tag (unraised first, of those the
    highest clock), then the fewest tiles, then the most requests: fill what is partly filled.
    """

    __slots__ = (
        "_dice", "_fitting", "_level", "_levels_mhz", "_look_ahead", "_look_now", "_tile",
        "_top_mhz",
    )  # fmt: skip

    looks_at = "clocks"

    def __init__(self, parameters: EcoRouteParameters, context: PolicyContext) -> None:
        self._levels_mhz = clock_list(
            context.clocks_mhz,
            parameters.frequencies_mhz,
            reference_levels(context),
            "ecoroute: frequencies",
        )
        self._top_mhz = self._levels_mhz[-1]
        self._level = {clock: i for i, clock in enumerate(self._levels_mhz)}
        slo_s = context.slo_itl_s * (1.0 + parameters.margin_frac)
        self._fitting = LowestFitting(context.predictor, DECODE, self._levels_mhz, slo_s)
        self._tile = parameters.tile_requests
        self._look_ahead = parameters.look_ahead_tokens
        self._look_now = parameters.look_now_tokens
        self._dice = Dice(context.rng)

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        prefill_at = self._dice.below(len(prefill))
        return prefill_at, self.route_decode(request.input_tokens, decode)

    def route_decode(self, input_tokens: int, decode: States) -> int:
        """Position of the decode instance for a prompt of that many tokens."""
        if len(decode) == 1:
            return 0
        tile = self._tile
        if max([s.open_requests for s in decode]) < tile:
            return slowest_emptiest(decode, self._top_mhz)
        clock_mhz, top_mhz = self._fitting.clock_mhz, self._top_mhz
        ranked: list[tuple[int, int, int, int]] = []
        """For each instance: its tag, its number of tiles (rounded up), -n, its position."""
        for at, state in enumerate(decode):
            state.refresh()
            n, load = state.open_requests, state.kv_tokens + state.waiting_tokens
            now_mhz = clock_mhz(n, load + self._look_now * n)
            next_mhz = clock_mhz(n + 1, load + input_tokens + self._look_ahead * n)
            raises = next_mhz > now_mhz or next_mhz == top_mhz
            ranked.append((next_mhz if raises else -now_mhz, -(-n // tile), -n, at))
        sizes = [abs(row[0]) for row in ranked]
        lowest = min(sizes)
        if self._level[max(sizes)] - self._level[lowest] > 1:
            ranked = [row for row, size in zip(ranked, sizes, strict=True) if size == lowest]
        return min(ranked)[3]


@dataclass(frozen=True, slots=True, kw_only=True)
class EcoRouteTileParameters:
    """Parameters of `ecoroute-tile`."""

    tile_requests: int = parameter(128, "requests of a full decode tile", low=1)


class EcoRouteTile(Router):
    """Fill the partly filled tile; needs no predictor.

    While every instance has fewer requests than a tile: the lowest clock, then the fewest
    requests. Else, ordered by (tiles, most requests first), the first that is empty or whose last
    tile is not full; if all are full, the first. The reference's demo labels this rule EchoRoute.
    """

    __slots__ = ("_dice", "_tile", "_top_mhz")
    looks_at = "clocks"

    def __init__(self, parameters: EcoRouteTileParameters, context: PolicyContext) -> None:
        self._tile = parameters.tile_requests
        self._dice = Dice(context.rng)
        self._top_mhz = context.clocks_mhz[-1]

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        return self._dice.below(len(prefill)), self._fill(decode)

    def _fill(self, decode: States) -> int:
        tile = self._tile
        counts = [s.open_requests for s in decode]
        if max(counts) < tile:
            return slowest_emptiest(decode, self._top_mhz)
        order = sorted(range(len(decode)), key=lambda i: (-(-counts[i] // tile), -counts[i]))
        for i in order:
            if counts[i] == 0 or counts[i] % tile > 0:
                return i
        return order[0]


def slowest_emptiest(states: States, top_mhz: int) -> int:
    """Lowest clock (an unlocked card counts as the top one), then fewest open requests."""
    keys = [(s.clock_or_top_mhz(top_mhz), s.open_requests) for s in states]
    return keys.index(min(keys))


def reference_levels(context: PolicyContext) -> tuple[int, ...]:
    """The reference's five clock levels where the profile has them, else five of the profile."""
    if set(REFERENCE_LEVELS_MHZ) <= set(context.clocks_mhz):
        return REFERENCE_LEVELS_MHZ
    return spread_clocks_mhz(context.clocks_mhz, context.default_levels_mhz[0], 5)
