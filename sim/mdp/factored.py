"""Routing many instances: one-step policy improvement over values that add up by groups.

The joint chain of N instances is too large beyond two or three. A policy that splits the Poisson
stream by fixed shares over groups of instances, and routes within each group as is best for it,
is not: every group is a chain of its own, the average cost is the sum of theirs, and so are the
relative values, h(s) = Σ h_G(s_G). One step of policy improvement over that sends an arrival to
the instance with the least

    Δ_i(s_G) = (cost of being turned away) + E h_G(state with the request at i) - h_G(s_G),

in joules, which needs the states of the instance's own group only. It is never worse than the
split it starts from (policy improvement), and it is not optimal in general; with a single group it
is. The split is the best of those in which some groups share the load alike, one takes a part of
that, and the others rest: packing comes out where it is cheaper.

`lower_bound_w` frees the choice: an arrival may be taken by any number of instances, one of them
on average. Each instance then is a chain of its own again, and a linear program solves it. No
policy costs less.

Sources: Krishnan, Joint optimization of server assignments, IEEE Trans. AC 35 (1990); Bhulai,
Value function approximation in complex queueing systems (2017), chapter 2; the bound is Whittle's
relaxation, Restless bandits, J. Appl. Prob. 25A (1988).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.mdp.model import InstanceModel
from voltana.sim.mdp.solve import (
    JointModel,
    Solution,
    evaluate,
    policy_iteration,
    sum_over_axes,
    value_iteration,
)

FloatArray = npt.NDArray[np.float64]

PARTS: Final = (0.0, 0.25, 0.5, 0.75)
"""Share of the one partly loaded group, relative to a fully sharing one."""
_ASLEEP_RPS: Final = 1e-3
"""Rate at which a group without a share is solved: even it must know the cost of a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPolicy:
    """The long-run cost of sending a request to each instance."""

    delta_j: tuple[FloatArray, ...]
    """One array a group. Shape (S, …, S, members), with one S for each member."""
    shares_rps: tuple[float, ...]
    """Arrival rate of each group under the split that was improved on."""
    split_cost_w: float
    """Average cost of that split, J/s, an upper bound of this policy's; with one group, its own."""
    gap_w: float
    """Largest error of that cost, J/s: the sum of the errors of the groups' solutions."""


def solve_by_policies(instance: InstanceModel, rate_rps: float, num_instances: int) -> GroupPolicy:
    """The fleet as one group by policy iteration: exact, for small models whose clocks have a rule.

    Args:
        instance: One instance's chain.
        rate_rps: Arrivals at the fleet, requests/s.
        num_instances: N >= 1.

    Raises:
        VoltanaError: The chain is too large for a linear solve, or its clocks are free.
    """
    solved = policy_iteration(JointModel(instance, rate_rps, num_instances))
    return GroupPolicy(
        delta_j=(delta_of(instance, solved.values_j),),
        shares_rps=(rate_rps,),
        split_cost_w=solved.cost_w,
        gap_w=solved.gap_w,
    )


def solve_groups(
    instance: InstanceModel,
    rate_rps: float,
    num_instances: int,
    *,
    group_size: int = 2,
    tolerance: float = 1e-4,
    progress: Callable[[int, int], None] | None = None,
) -> GroupPolicy:
    """Find the best split over groups and improve on it.

    Args:
        instance: One instance's chain.
        rate_rps: Arrivals at the fleet, requests/s.
        num_instances: N >= 1; the last group has what remains.
        group_size: Instances of a group.
        tolerance: Relative width of the bounds at which a group counts as solved.
        progress: Called with the splits tried and their number.
    """
    if num_instances < 1 or group_size < 1 or not rate_rps > 0:
        raise VoltanaError(
            "a fleet needs an instance, a group size >= 1 and a rate > 0,"
            f" got {num_instances}, {group_size}, {rate_rps}"
        )
    sizes = group_sizes(num_instances, group_size)

    @cache
    def solve(share_rps: float, size: int) -> Solution:
        return solve_group(instance, share_rps, size, tolerance)

    candidates = splits(rate_rps, sizes)
    costs: list[float] = []
    for number, shares in enumerate(candidates, start=1):
        parts = [solve(*part) for part in zip(shares, sizes, strict=True)]
        costs.append(sum(part.cost_w for part in parts))
        if progress is not None:
            progress(number, len(candidates))
    best = candidates[int(np.argmin(costs))]
    solved = [solve(*part) for part in zip(best, sizes, strict=True)]
    return GroupPolicy(
        delta_j=tuple(delta_of(instance, s.values_j) for s in solved),
        shares_rps=best,
        split_cost_w=min(costs),
        gap_w=sum(s.gap_w for s in solved),
    )


def group_sizes(num_instances: int, group_size: int) -> tuple[int, ...]:
    """Members of each group.

    Example:
        >>> group_sizes(5, 2)
        (2, 2, 1)
    """
    full, rest = divmod(num_instances, group_size)
    return (group_size,) * full + ((rest,) if rest else ())


def splits(rate_rps: float, sizes: tuple[int, ...]) -> list[tuple[float, ...]]:
    """Arrival rates that are tried, by member: m groups alike, one with a part, the others none.

    Example:
        >>> splits(30.0, (2, 1))[0], splits(30.0, (2, 1))[-1]
        ((30.0, 0.0), (20.0, 10.0))
    """
    found: list[tuple[float, ...]] = []
    count = len(sizes)
    for alike in range(1, count + 1):
        for part in PARTS if alike < count else (0.0,):
            levels = [1.0] * alike + [part] * (alike < count) + [0.0] * (count - alike - 1)
            loads = [level * size for level, size in zip(levels, sizes, strict=True)]
            found.append(tuple(rate_rps * load / sum(loads) for load in loads))
    return found


def solve_group(
    instance: InstanceModel, rate_rps: float, size: int, tolerance: float = 1e-4
) -> Solution:
    """Average cost and relative values of a group that takes every arrival of its stream.

    Args:
        instance: One instance's chain.
        rate_rps: Arrivals at the group, requests/s.
        size: Instances of the group, >= 1.
        tolerance: Relative width of the bounds at which it counts as solved.
    """
    rate_rps = max(rate_rps, _ASLEEP_RPS)
    model = JointModel(instance, rate_rps, size)
    is_free = bool(instance.clock_rate.any())
    if size == 1 and not is_free:
        return evaluate(model, np.zeros(model.shape, dtype=np.int64))
    start_j = None
    if size > 1 and not is_free:
        one = solve_group(instance, rate_rps / size, 1, tolerance)
        start_j = sum_over_axes([one.values_j] * size)
    return value_iteration(model, tolerance=tolerance, max_sweeps=200_000, start_j=start_j)


def delta_of(instance: InstanceModel, values_j: FloatArray) -> FloatArray:
    """Δ of each member from a group's relative values. Shape (S, …, S, members)."""
    model = JointModel(instance, 1.0, values_j.ndim)
    return np.moveaxis(model.action_values_j(values_j) - values_j, 0, -1)


def lower_bound_w(instance: InstanceModel, rate_rps: float, num_instances: int) -> float:
    """A cost in J/s that no routing of N such instances goes below on this model; see the module.

    Args:
        instance: One instance's chain.
        rate_rps: Arrivals at the fleet, requests/s.
        num_instances: N >= 1.

    Raises:
        VoltanaError: Its clocks are free, or the program finds no solution.
    """
    if instance.clock_rate.any():
        raise VoltanaError("the bound needs a clock rule that is not free")
    size = len(instance.cost_w)
    stay = instance.generator.toarray().T
    take = stay + rate_rps * (instance.arrival.toarray().T - np.eye(size))
    ones, none = np.ones(size), np.zeros(size)
    solved = linprog(
        np.concatenate([instance.cost_w + rate_rps * instance.blocked_j, instance.cost_w]),
        A_eq=np.vstack([np.hstack([take, stay]), np.append(ones, ones), np.append(ones, none)]),
        b_eq=np.concatenate([none, [1.0, 1.0 / num_instances]]),
        method="highs",
    )
    if solved.status != 0 or solved.fun is None:
        raise VoltanaError(f"no lower bound: {solved.message}")
    return num_instances * float(solved.fun)
