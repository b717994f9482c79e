"""Routing many instances: one-step policy improvement over a separable value function.

The joint chain of N instances is too large beyond two or three. A policy that splits the Poisson
stream by fixed shares is not: each instance then is a chain of its own, the average cost is the
sum of theirs, and so are the relative values, h(s) = Σ h_i(s_i). One step of policy improvement
over that sends an arrival to the instance with the least

    Δ_i(s_i) = (cost of being turned away) + E h_i(state with the request) - h_i(s_i),

an index in joules that needs the instance's own state only. It is never worse than the split it
starts from (policy improvement), and it is not optimal in general. The split is the best of those
in which some instances share the load alike, one takes a part of that, and the others rest:
packing comes out where it is cheaper.

Sources: Krishnan, Joint optimization of server assignments, IEEE Trans. AC 35 (1990); Bhulai,
Value function approximation in complex queueing systems (2017), chapter 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from profiles.errors import VoltanaError
from sim.rl.model import InstanceModel
from sim.rl.solve import JointModel, Solution, evaluate, value_iteration

FloatArray = npt.NDArray[np.float64]

PARTS: Final = (0.0, 0.25, 0.5, 0.75)
"""Share of the one partly loaded instance, relative to a fully sharing one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """A marginal cost per instance: what accepting a request costs in the long run."""

    index_j: FloatArray
    """Shape (N, S)."""
    values_j: FloatArray
    """Relative values of each instance under its share. Shape (N, S)."""
    shares_rps: tuple[float, ...]
    """Arrival rate of each instance under the split that was improved on."""
    split_cost_w: float
    """Average cost of that split, J/s: an upper bound of the index policy's."""


def solve_index(
    instance: InstanceModel,
    rate_rps: float,
    num_instances: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Find the best split and improve on it.

    Args:
        instance: One instance's chain.
        rate_rps: Arrivals at the fleet, requests/s.
        num_instances: N >= 1.
        progress: Called with the splits tried and their number.
    """
    if num_instances < 1 or not rate_rps > 0:
        raise VoltanaError(
            f"a fleet needs an instance and a rate > 0, got {num_instances}, {rate_rps}"
        )
    solve = lru_cache(maxsize=None)(lambda share: solve_one(instance, share))
    candidates = splits(rate_rps, num_instances)
    costs: list[float] = []
    for number, shares in enumerate(candidates, start=1):
        costs.append(sum(solve(share).cost_w for share in shares))
        if progress is not None:
            progress(number, len(candidates))
    best = int(np.argmin(costs))
    shares = candidates[best]
    values = np.stack([solve(share).values_j for share in shares])
    return Index(
        index_j=np.stack([index_of(instance, row) for row in values]),
        values_j=values,
        shares_rps=shares,
        split_cost_w=costs[best],
    )


def splits(rate_rps: float, num_instances: int) -> list[tuple[float, ...]]:
    """Arrival rates that are tried: m alike, one with a part, the others none.

    Example:
        >>> splits(30.0, 2)[0], splits(30.0, 2)[-1]
        ((30.0, 0.0), (15.0, 15.0))
    """
    found: list[tuple[float, ...]] = []
    for alike in range(1, num_instances + 1):
        for part in PARTS if alike < num_instances else (0.0,):
            unit = rate_rps / (alike + part)
            rest = num_instances - alike
            tail = (part * unit,) + (0.0,) * (rest - 1) if rest else ()
            found.append((unit,) * alike + tail)
    return found


def solve_one(instance: InstanceModel, rate_rps: float) -> Solution:
    """Average cost and relative values of one instance that takes every arrival of its stream."""
    model = JointModel(instance, max(rate_rps, 1e-9), 1)
    if instance.clock_rate.any():
        return value_iteration(model, tolerance=1e-5, max_sweeps=200_000)
    return evaluate(model, np.zeros(model.shape, dtype=np.int64))


def index_of(instance: InstanceModel, values_j: FloatArray) -> FloatArray:
    """Δ(s) of one instance from its relative values. Shape (S,)."""
    return np.asarray(instance.blocked_j + instance.arrival @ values_j - values_j)


def separable_start(index: Index) -> FloatArray:
    """Σ h_i(s_i) as a joint tensor: where value iteration may begin. Shape (S,)·N."""
    count = len(index.values_j)
    total = np.zeros((index.values_j.shape[1],) * count)
    for axis, values in enumerate(index.values_j):
        shape = [1] * count
        shape[axis] = len(values)
        total = total + values.reshape(shape)
    return total
