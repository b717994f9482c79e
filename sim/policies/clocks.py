"""Checks and look-ups on the list of supported clocks that several controllers share."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from profiles.errors import VoltanaError
from sim.policies.base import PolicyContext


def nearest_clock_mhz(clocks_mhz: Sequence[int], wanted_mhz: float) -> int:
    """The supported clock nearest to `wanted_mhz`; of two equally near, the faster (safer) one.

    Example:
        >>> nearest_clock_mhz((1005, 1200, 1410), 1102.5)
        1200
    """
    at = bisect_left(clocks_mhz, wanted_mhz)
    if at == 0:
        return clocks_mhz[0]
    if at == len(clocks_mhz):
        return clocks_mhz[-1]
    below, above = clocks_mhz[at - 1], clocks_mhz[at]
    return above if above - wanted_mhz <= wanted_mhz - below else below


def clock_at_least_mhz(clocks_mhz: Sequence[int], wanted_mhz: float) -> int:
    """The slowest supported clock that is not slower than `wanted_mhz`; the top one above it."""
    return clocks_mhz[min(bisect_left(clocks_mhz, wanted_mhz), len(clocks_mhz) - 1)]


def fastest_within_mhz(context: PolicyContext, batch_size: int, tokens: int, limit_w: float) -> int:
    """A power cap as a clock: the fastest whose modelled power for the batch is within the limit.

    The slowest if none is.
    """
    clocks, power_w = context.clocks_mhz, context.power.power_w
    for clock in reversed(clocks):
        if power_w(context.phase, clock, batch_size, tokens) <= limit_w:
            return clock
    return clocks[0]


def require_clock(clocks_mhz: Sequence[int], clock_mhz: int, where: str) -> int:
    """`clock_mhz` if it is supported.

    Raises:
        VoltanaError: It is not; the message lists the nearest supported clocks.
    """
    if clock_mhz in clocks_mhz:
        return clock_mhz
    near = sorted(sorted(clocks_mhz, key=lambda clock: abs(clock - clock_mhz))[:2])
    raise VoltanaError(
        f"{where} must be a clock the profile supports, got {clock_mhz} MHz: "
        f"nearest {' and '.join(str(clock) for clock in near)} MHz"
    )


def clock_list(
    clocks_mhz: Sequence[int], wanted_mhz: Sequence[int], default_mhz: Sequence[int], where: str
) -> tuple[int, ...]:
    """The user's clocks, ascending and checked, or the default when he gave none."""
    chosen = wanted_mhz or default_mhz
    return tuple(sorted({require_clock(clocks_mhz, clock, where) for clock in chosen}))


def levels_of(
    context: PolicyContext, wanted_mhz: Sequence[int], num_levels: int, where: str
) -> tuple[int, ...]:
    """The user's clocks, or `num_levels` of the profile's, evenly spread over all of them."""
    clocks = context.clocks_mhz
    spread = spread_clocks_mhz(clocks, clocks[0], num_levels)
    return clock_list(clocks, wanted_mhz, spread, f"{where}: frequencies")


def spread_clocks_mhz(clocks_mhz: Sequence[int], low_mhz: int, num_levels: int) -> tuple[int, ...]:
    """`num_levels` supported clocks, evenly spread from `low_mhz` to the top."""
    top_mhz = clocks_mhz[-1]
    step_mhz = (top_mhz - low_mhz) / max(num_levels - 1, 1)
    return tuple(
        sorted({nearest_clock_mhz(clocks_mhz, top_mhz - k * step_mhz) for k in range(num_levels)})
    )
