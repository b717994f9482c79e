"""What several policies do with the list of supported clocks: check it, cut it, choose from it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import COLOCATED, DECODE, PREFILL, Phase, PolicyContext

_FULL_DECODE_REQUESTS: Final = 64
_FULL_PREFILL: Final = (8, 8192)
"""Our idea of a batch that keeps an instance busy: requests, and prompt tokens of them all."""


def full_batch(context: PolicyContext, phase: Phase) -> tuple[int, int]:
    """A batch that keeps an instance busy, as (requests, tokens).

    Prefill: 8 prompts of 8,192 tokens in all. Decode: 64 requests whose context fills a quarter of
    the KV cache. The numbers are ours.
    """
    if phase == DECODE:
        tokens = max(context.kv_capacity_tokens // 4, _FULL_DECODE_REQUESTS)
        return _FULL_DECODE_REQUESTS, tokens
    return _FULL_PREFILL


def busy_power_w(context: PolicyContext, phase: Phase, clock_mhz: int) -> float:
    """Modelled power of an instance with a full batch (`full_batch`), in W.

    Args:
        context: The power model and the KV capacity.
        phase: Which batch; the context's own phase does not count.
        clock_mhz: SM clock.
    """
    return context.power.power_w(phase, clock_mhz, *full_batch(context, phase))


def fleet_power_w(context: PolicyContext) -> float:
    """Modelled power of the fleet, all of it busy at the top clock; 1 W at least."""
    top_mhz = context.clocks_mhz[-1]
    prefill_w = context.num_prefill * busy_power_w(context, PREFILL, top_mhz)
    return max(1.0, prefill_w + context.num_decode * busy_power_w(context, DECODE, top_mhz))


def first_clock_mhz(clocks_mhz: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The first clock that fits, else the last: ascending, it is the lowest within a limit.

    Example:
        >>> first_clock_mhz((1005, 1200, 1410), lambda f: f >= 1100)
        1200
        >>> first_clock_mhz((1005, 1200, 1410), lambda f: f >= 1500)
        1410
    """
    for clock in clocks_mhz[:-1]:
        if fits(clock):
            return clock
    return clocks_mhz[-1]


def cheapest_clock_mhz(clocks_mhz: Sequence[int], cost: Callable[[int], float]) -> int:
    """The clock of least cost, the first of equals. Infinite is what does not fit; else the last.

    Example:
        >>> cheapest_clock_mhz((1005, 1200, 1410), lambda f: f if f > 1005 else math.inf)
        1200
        >>> cheapest_clock_mhz((1005, 1200, 1410), lambda f: math.inf)
        1410
    """
    costs = [cost(clock) for clock in clocks_mhz]
    least = min(costs)
    return clocks_mhz[costs.index(least)] if least < math.inf else clocks_mhz[-1]


def busy_energy_j(context: PolicyContext, clock_mhz: int, batch_size: int, tokens: int) -> float:
    """Energy of one iteration beyond what the idle instance would draw in that time, by the models.

    (P - idle)·T: the part that the choice of a clock changes, since the time that a faster clock
    saves is spent idle.

    Args:
        context: The phase, its predictor and its power model.
        clock_mhz: SM clock.
        batch_size: Requests.
        tokens: New tokens (prefill) or context tokens (decode) of the whole batch.

    Returns:
        Energy in J.
    """
    point = context.phase, clock_mhz, batch_size, tokens
    above_idle_w = context.power.power_w(*point) - context.power.idle_power_w(clock_mhz)
    return above_idle_w * context.predictor.predict_s(*point)


def least_energy_clock_mhz(context: PolicyContext) -> int:
    """The bottom of the U: the supported clock of least `busy_energy_j` for a full batch.

    Of a colocated instance: of least energy for a full batch of each phase together.

    Left of it an iteration takes more time and more energy too. In prefill, whose work is given,
    such a clock is a loss whatever the load. In decode it is a choice: with continuous batching the
    token rate is given, not the work of an iteration, so that the energy of a token follows power
    alone, which is lower still at a lower clock; but there power falls by little and the batch
    grows by much, so that a controller which only measures latency ends where it cannot return
    from. The floor keeps such controllers out of there; it is not the clock of least energy for a
    given load. EcoMin, which knows what the batch will settle at, may go below.

    Args:
        context: The phase, its predictor and its power model.

    Sources:
        The U-shape of energy over clock in both phases: VoltanaLLM, arXiv 2509.04827. The full
        batch at which it is looked up is ours; on the A100 profiles no batch moves the bottom.
    """
    both: tuple[Phase, ...] = PREFILL, DECODE
    phases = both if context.phase == COLOCATED else (context.phase,)
    parts = [(replace(context, phase=each), full_batch(context, each)) for each in phases]
    return min(
        context.clocks_mhz,
        key=lambda clock: sum(busy_energy_j(part, clock, *batch) for part, batch in parts),
    )


def clocks_above_floor(
    context: PolicyContext, wanted_mhz: Sequence[int], where: str
) -> tuple[int, ...]:
    """The user's clocks, checked; without any, the supported ones from the phase's floor upwards.

    The floor is `least_energy_clock_mhz`.

    Args:
        context: The supported clocks, the phase and its models.
        wanted_mhz: What the user gave for `frequencies`; may be empty.
        where: Policy, for an error message.

    Raises:
        VoltanaError: A clock is not supported.
    """
    clocks = context.clocks_mhz
    if wanted_mhz:
        return clock_list(clocks, wanted_mhz, (), f"{where}: frequencies")
    return clocks[clocks.index(least_energy_clock_mhz(context)) :]


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

    Args:
        context: The phase, its supported clocks and its power model.
        batch_size: Requests.
        tokens: New tokens (prefill) or context tokens (decode) of the whole batch.
        limit_w: Power of the instance, in W.
    """
    power_w, phase = context.power.power_w, context.phase
    return first_clock_mhz(
        context.clocks_mhz[::-1], lambda f: power_w(phase, f, batch_size, tokens) <= limit_w
    )


def require_clock(clocks_mhz: Sequence[int], clock_mhz: int, where: str) -> int:
    """`clock_mhz` if it is supported.

    Args:
        clocks_mhz: Supported clocks.
        clock_mhz: The clock that was asked for.
        where: Policy and parameter, for an error message.

    Raises:
        VoltanaError: It is not; the message lists the nearest supported clocks.
    """
    if clock_mhz in clocks_mhz:
        return clock_mhz
    near = nearest_two_mhz(clocks_mhz, clock_mhz)
    raise VoltanaError(
        f"{where} must be a clock the profile supports, got {clock_mhz} MHz: "
        f"nearest {' and '.join(str(clock) for clock in near)} MHz"
    )


def nearest_two_mhz(clocks_mhz: Sequence[int], wanted_mhz: int) -> list[int]:
    """The two supported clocks nearest to `wanted_mhz`, ascending; one if there is only one."""
    return sorted(sorted(clocks_mhz, key=lambda clock: abs(clock - wanted_mhz))[:2])


def clock_list(
    clocks_mhz: Sequence[int], wanted_mhz: Sequence[int], default_mhz: Sequence[int], where: str
) -> tuple[int, ...]:
    """The user's clocks, ascending and checked, or the default where there are none.

    Args:
        clocks_mhz: Supported clocks.
        wanted_mhz: The user's clocks; may be empty.
        default_mhz: What is taken then.
        where: Policy and parameter, for an error message.

    Raises:
        VoltanaError: A clock is not supported.
    """
    chosen = wanted_mhz or default_mhz
    return tuple(sorted({require_clock(clocks_mhz, clock, where) for clock in chosen}))


def levels_of(
    context: PolicyContext,
    wanted_mhz: Sequence[int],
    num_levels: int,
    where: str,
    *,
    low_mhz: int | None = None,
) -> tuple[int, ...]:
    """The user's clocks, or some of the profile's, evenly spread up to the top clock.

    Args:
        context: The supported clocks.
        wanted_mhz: What the user gave for `frequencies`; may be empty.
        num_levels: How many clocks are spread if it is.
        where: Policy, for an error message.
        low_mhz: Where the spread begins; by default at the lowest clock.

    Raises:
        VoltanaError: A clock is not supported.
    """
    clocks = context.clocks_mhz
    spread = spread_clocks_mhz(clocks, clocks[0] if low_mhz is None else low_mhz, num_levels)
    return clock_list(clocks, wanted_mhz, spread, f"{where}: frequencies")


def spread_clocks_mhz(clocks_mhz: Sequence[int], low_mhz: int, num_levels: int) -> tuple[int, ...]:
    """Supported clocks, evenly spread from one clock to the top.

    Args:
        clocks_mhz: Supported clocks, ascending.
        low_mhz: The lowest of the spread.
        num_levels: How many; fewer if some fall on the same supported clock.
    """
    top_mhz = clocks_mhz[-1]
    step_mhz = (top_mhz - low_mhz) / max(num_levels - 1, 1)
    return tuple(
        sorted({nearest_clock_mhz(clocks_mhz, top_mhz - k * step_mhz) for k in range(num_levels)})
    )
