"""What a planner that knows every arrival would spend: a yardstick between policies and the bound.

The lower bound (`voltana.experiments.bound.lower`) knows no time: it lets every token be made in
the fullest batch there is. Here time counts. Decode is a fluid, planned by a dynamic program over
the run's own arrivals, and prefill an optimal partition of its own prompts into batches. Both act
on the profile's tables without noise, delay or chance, so that this is no policy that can be run,
and no proven bound either: a policy that comes near it has nothing left to gain from knowing more.

*Decode.* n requests are there, spread evenly over k of the M instances, at clock f. They leave at
n / (L·T(f, n/k)) a second, with L the workload's mean number of decode iterations and T at its mean
context, and come as they arrive. Every `STEP_S` the planner picks k and f anew, at no cost: moving
requests, clocks and waking cost nothing. T keeps the ITL promise; what does not fit waits, no more
than arrives within what TTFT leaves for waiting. Energy: k·P(f, n/k) + (M - k)·idle.

*Prefill.* Requests are batched in the order of arrival. A batch begins when its last prompt has
arrived and ends before the first one's TTFT, less two token gaps; each takes the clock of least
(P - idle)·T that does so, or the top clock where none does. Instances are never short.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from voltana.experiments.frontier.static.fleets import profile_knots
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.policies.base import DECODE
from voltana.sim.workload.workload import Workload

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

STEP_S: Final = 1.0
"""Between two decisions of the planner."""
_GRID: Final = 400
"""Numbers of requests at which the value is known, at most."""
_BEYOND: Final = 1.2
"""Times the ITL promise at the top clock: no larger batch is looked at, whatever stairs follow."""
_MOST_TOGETHER: Final = 64
"""Prompts of one prefill batch, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """Energy of the plan, in J, and the parts it is made of."""

    prefill_j: float
    """Above idle."""
    decode_j: float
    """Above idle."""
    idle_j: float
    """Of all instances for the whole time."""

    @property
    def energy_j(self) -> float:
        """The sum."""
        return self.prefill_j + self.decode_j + self.idle_j


def plan(config: SimConfig, profile: Profile, workload: Workload) -> Yardstick:
    """The yardstick of a workload on a fleet.

    Args:
        config: Fleet, limits and promises; its policies do not count.
        profile: Times and power.
        workload: The requests, all known beforehand.

    Raises:
        VoltanaError: The workload is empty, or the top clocks do not carry the fluid.
    """
    if not len(workload):
        raise VoltanaError("a yardstick needs a request at least: raise the rate or the duration")
    truth = profile.truth(extrapolate=config.extrapolate)
    idle_w = min(truth.rest_power_w(clock) for clock in (0, *profile.clocks_mhz))
    clocks = profile_knots(profile, profile.clocks_mhz)
    wait_s = config.slo_ttft_s - (2 if config.first_token == "decode" else 1) * config.slo_itl_s
    alone_s = truth.time_and_power(DECODE, clocks[-1], 1, float(workload.input_tokens.min()))[0]
    makespan_s = float((workload.arrival_s + workload.output_tokens * alone_s).max())
    return Yardstick(
        prefill_j=_prefill_j(config, profile, workload, clocks, idle_w, wait_s),
        decode_j=_decode_j(config, profile, workload, clocks, idle_w, wait_s),
        idle_j=(config.num_prefill + config.num_decode) * idle_w * makespan_s,
    )


def _decode_j(
    config: SimConfig,
    profile: Profile,
    workload: Workload,
    clocks: tuple[int, ...],
    idle_w: float,
    wait_s: float,
) -> float:
    steps = workload.output_tokens - (0 if config.first_token == "decode" else 1)
    mean_steps = float(steps.mean())
    spans = steps * workload.input_tokens + 0.5 * steps * (steps - 1.0)
    context = float(spans.sum() / max(steps.sum(), 1))
    most = config.max_running_requests or profile.meta.engine.max_running_requests
    time_s, power_w = _decode_tables(config, profile, clocks, context, most)
    coming = np.bincount((workload.arrival_s / STEP_S).astype(int)) / STEP_S
    full = _fullest(time_s, config.slo_itl_s) * config.num_decode
    grid = np.linspace(0.0, full + coming.max() * wait_s, _GRID)
    options = [
        _Option.of(time_s[i], power_w[i], k, grid, config.slo_itl_s, mean_steps, idle_w)
        for i in range(len(clocks))
        for k in range(1, config.num_decode + 1)
    ]
    left_w = np.stack([o.above_w for o in options])
    leaving = np.stack([o.leaving for o in options])
    waiting = np.stack([o.waiting for o in options])
    # what is left at the end is worked off at the cheapest rate there is
    cheapest_j = float((left_w[:, 1:] / leaving[:, 1:]).min())
    value = grid * cheapest_j
    for rate in coming[::-1]:
        after = grid + (rate - leaving) * STEP_S
        cost = left_w * STEP_S + np.interp(np.maximum(after, 0.0), grid, value, right=np.inf)
        cost[waiting > rate * wait_s + 1.0] = np.inf
        value = cost.min(axis=0)
        value[~np.isfinite(value)] = 1e15  # a state from which nothing brings back
    if value[0] >= 1e14:
        raise VoltanaError("the top clocks do not carry this load: add instances or lower rate_rps")
    return float(value[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Option:
    """One clock on k instances, at each number of requests of the grid."""

    above_w: FloatArray
    leaving: FloatArray
    """requests/s"""
    waiting: FloatArray
    """Requests beyond what keeps ITL."""

    @classmethod
    def of(
        cls, time_s: FloatArray, power_w: FloatArray, k: int, grid: FloatArray,
        slo_s: float, mean_steps: float, idle_w: float,
    ) -> _Option:  # fmt: skip
        batches = np.arange(1, len(time_s) + 1, dtype=np.float64)
        fits = np.flatnonzero(time_s <= slo_s)
        most = float(fits[-1] + 1) if len(fits) else 0.0
        each = np.minimum(grid / k, most)
        # a batch between two sizes is part of the time the one, part the other
        rate = np.interp(each, np.r_[0.0, batches], np.r_[0.0, batches / time_s])
        above_w = np.interp(each, np.r_[0.0, batches], np.r_[0.0, power_w - idle_w])
        return cls(
            above_w=k * above_w, leaving=k * rate / mean_steps, waiting=grid - k * each
        )  # fmt: skip


def _decode_tables(
    config: SimConfig, profile: Profile, clocks: tuple[int, ...], context: float, most: int
) -> tuple[FloatArray, FloatArray]:
    """Time (s) and power (W) by clock and batch size from 1 on."""
    truth = profile.truth(extrapolate=config.extrapolate)
    most = min(most, int(profile.decode["batch_size"].max()))

    def top_s(batch: int) -> float:
        return truth.time_and_power(DECODE, clocks[-1], batch, batch * context)[0]

    beyond = (b for b in range(1, most + 1) if top_s(b) > _BEYOND * config.slo_itl_s)
    most = next(beyond, most)
    points = [
        [truth.time_and_power(DECODE, f, b, b * context) for b in range(1, most + 1)]
        for f in clocks
    ]
    table = np.asarray(points)
    return table[:, :, 0], table[:, :, 1]


def _fullest(time_s: FloatArray, slo_s: float) -> int:
    """The largest batch that keeps the promise at the top clock."""
    fits = np.flatnonzero(time_s[-1] <= slo_s)
    if not len(fits):
        raise VoltanaError("no batch keeps the ITL promise at the top clock: raise slo_itl_s")
    return int(fits[-1]) + 1


def _prefill_j(
    config: SimConfig,
    profile: Profile,
    workload: Workload,
    clocks: tuple[int, ...],
    idle_w: float,
    wait_s: float,
) -> float:
    """The cheapest partition of the prompts into batches of neighbours; a prompt alone may be late.

    best[j] is the least energy of the first j prompts: batches of one prompt more and more are
    tried for all j at once.
    """
    tokens = workload.input_tokens.astype(np.float64)
    budget = float(config.max_prefill_tokens or profile.meta.engine.max_prefill_tokens)
    total, squares = np.r_[0.0, tokens.cumsum()], np.r_[0.0, (tokens * tokens).cumsum()]
    costs = []
    for size in range(1, _MOST_TOGETHER + 1):
        if size > len(workload):
            break
        batch_tokens = total[size:] - total[:-size]
        effective = batch_tokens**2 / (squares[size:] - squares[:-size])
        gathered_s = workload.arrival_s[size - 1 :] - workload.arrival_s[: len(tokens) - size + 1]
        possible = (batch_tokens <= budget) & (gathered_s < wait_s)
        if size == 1:
            possible[:] = True
        elif not possible.any():
            break
        cost = np.full(len(tokens) - size + 1, np.inf)
        cost[possible] = _batches_j(
            profile, config, clocks, idle_w, wait_s - gathered_s[possible],
            effective[possible], batch_tokens[possible], is_alone=size == 1,
        )  # fmt: skip
        costs.append(cost)
    best = [0.0]
    for j in range(1, len(tokens) + 1):
        best.append(min(best[j - s - 1] + costs[s][j - s - 1] for s in range(min(j, len(costs)))))
    return best[-1]


def _batches_j(
    profile: Profile, config: SimConfig, clocks: tuple[int, ...], idle_w: float,
    left_s: FloatArray, effective: FloatArray, tokens: FloatArray, *, is_alone: bool,
) -> FloatArray:  # fmt: skip
    """Least (P - idle)·T of each batch that ends within `left_s`; infinite where no clock does."""
    best = excess_j = np.full(len(tokens), np.inf)
    for clock in clocks:
        time_s, power_w = _prefill_points(profile, config, clock, effective, tokens)
        excess_j = (power_w - idle_w) * time_s
        best = np.minimum(best, np.where(time_s <= left_s, excess_j, np.inf))
    if is_alone:  # late at any clock: at the last and fastest one
        best = np.where(np.isfinite(best), best, excess_j)
    return best


def _prefill_points(
    profile: Profile, config: SimConfig, clock: int, effective: FloatArray, tokens: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Time and power at one clock, as `StepModel` has them within its grid; held beyond it."""
    rows = profile.truth(extrapolate=config.extrapolate).prefill_rows(clock)
    sizes = np.asarray(list(rows), dtype=np.float64)
    knots = [np.asarray(rows[int(b)][0]) for b in sizes]
    times = np.stack([_at(knots[i], rows[int(b)][1], tokens) for i, b in enumerate(sizes)])
    powers = np.stack([_at(knots[i], rows[int(b)][3], tokens) for i, b in enumerate(sizes)])
    inverse = 1.0 / np.clip(effective, sizes[0], sizes[-1])
    high = np.clip(np.searchsorted(sizes, 1.0 / inverse, "right"), 1, len(sizes) - 1)
    low, at = high - 1, np.arange(len(tokens))
    weight = (inverse - 1.0 / sizes[low]) / (1.0 / sizes[high] - 1.0 / sizes[low])
    return (
        times[low, at] + weight * (times[high, at] - times[low, at]),
        powers[low, at] + weight * (powers[high, at] - powers[low, at]),
    )


def _at(knots: FloatArray, values: list[float], tokens: FloatArray) -> FloatArray:
    return np.asarray(np.interp(tokens, knots, np.asarray(values)), dtype=np.float64)
