"""Exact solution of the routing MDP for a few instances: value iteration and policy iteration.

Average cost per second. The joint chain of N identical instances with S states each is
uniformised at a rate above every exit rate; tensors have shape (S,)·N and one instance's rates
act along its axis, so that the S^N × S^N matrix is never built in value iteration.

Source: Puterman, Markov Decision Processes (1994), 8.5 (relative value iteration and its bounds),
8.6 (policy iteration), 11.5 (uniformisation of continuous time).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.sparse.linalg import spsolve

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.mdp.model import InstanceModel

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Progress = Callable[[int, float], bool]
"""Called with the sweep's number and the width of the bounds relative to the cost; False stops."""

MAX_JOINT_STATES: Final = 2_000_000
MAX_LINEAR_STATES: Final = 20_000
"""Policy iteration solves a sparse system of this many unknowns at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Average cost and relative values of the best (or of a given) policy."""

    cost_w: float
    """Average cost, J/s: the middle of its bounds."""
    gap_w: float
    """Half the distance of the bounds: the optimum lies within cost_w ± gap_w."""
    values_j: FloatArray
    """Relative values, 0 in the empty state. Shape (S,)·N."""


class JointModel:
    """N identical instances, one Poisson stream.

    Args:
        instance: One instance's chain.
        rate_rps: Arrivals, requests/s, > 0.
        num_instances: N >= 1.

    Raises:
        VoltanaError: The joint chain is too large, or a number is out of range.
    """

    def __init__(self, instance: InstanceModel, rate_rps: float, num_instances: int) -> None:
        states = instance.grid.num_states
        if not rate_rps > 0 or num_instances < 1:
            raise VoltanaError(
                f"a joint model needs rate > 0 and an instance, got {rate_rps}, {num_instances}"
            )
        if states**num_instances > MAX_JOINT_STATES:
            raise VoltanaError(
                f"the joint chain of {num_instances} instances has {states}^{num_instances} states,"
                f" more than {MAX_JOINT_STATES}: take the factored solver, or fewer buckets"
            )
        self.instance = instance
        self.rate_rps = rate_rps
        self.num_instances = num_instances
        self.shape = (states,) * num_instances
        self.cost_w = sum_over_axes([instance.cost_w] * num_instances)
        self.uniform_rate = 1.02 * (rate_rps + num_instances * instance.exit_rate)
        self._is_free = bool(instance.clock_rate.any())

    def action_values_j(self, values_j: FloatArray) -> FloatArray:
        """Cost of sending the request to each instance plus the value after. Shape (N, S, …)."""
        arrival, blocked_j = self.instance.arrival, self.instance.blocked_j
        return np.stack(
            [
                _along(arrival, values_j, axis) + _spread(blocked_j, axis, self.num_instances)
                for axis in range(self.num_instances)
            ]
        )

    def improvement_w(self, values_j: FloatArray) -> FloatArray:
        """Expected rate of change of cost plus value under the best choice, J/s. Shape (S,)·N.

        This is the Bellman residual: its least and greatest entries bound the best average cost
        (Puterman, theorem 8.5.5).
        """
        after = self.action_values_j(values_j).min(axis=0)
        total = self.cost_w + self.rate_rps * (after - values_j)
        for axis in range(self.num_instances):
            total += _along(self.instance.generator, values_j, axis)
            if self._is_free:
                rate = _spread(self.instance.clock_rate, axis, self.num_instances)
                total += rate * (self._best_clock(values_j, axis) - values_j)
        return np.asarray(total)

    def pair_improvement_w(self, values_j: FloatArray) -> FloatArray:
        """`improvement_w` of two instances whose values are symmetric, at half the work."""
        instance = self.instance
        after = instance.arrival @ values_j + instance.blocked_j[:, None]
        local = instance.generator @ values_j
        if self._is_free:
            best = self._best_clock(values_j, 0)
            local += instance.clock_rate[:, None] * (best - values_j)
        total = self.rate_rps * (np.minimum(after, after.T) - values_j)
        total += self.cost_w
        total += local
        total += local.T
        return np.asarray(total)

    def _best_clock(self, values_j: FloatArray, axis: int) -> FloatArray:
        levels = len(self.instance.grid.levels_mhz)
        moved = np.moveaxis(values_j, axis, 0)
        grouped = moved.reshape(-1, levels, *moved.shape[1:])
        best = np.repeat(grouped.min(axis=1), levels, axis=0)
        return np.asarray(np.moveaxis(best, 0, axis))

    def generator_of(self, routing: IntArray) -> sp.csr_array:
        """Rate matrix of one policy over the joint states, row-major. Shape (S^N, S^N)."""
        size = self.instance.grid.num_states
        total = sp.csr_array((size**self.num_instances,) * 2)
        for axis in range(self.num_instances):
            before, after = (
                sp.eye_array(size**axis),
                sp.eye_array(size ** (self.num_instances - axis - 1)),
            )
            chosen = sp.diags_array((routing.ravel() == axis).astype(np.float64))
            arrival = sp.kron(sp.kron(before, self.instance.arrival), after)
            total = total + self.rate_rps * (chosen @ arrival)
            total = total + sp.kron(sp.kron(before, self.instance.generator), after)
        total = total - self.rate_rps * sp.eye_array(size**self.num_instances)
        return sp.csr_array(total)


def value_iteration(
    model: JointModel,
    *,
    tolerance: float = 1e-6,
    max_sweeps: int = 1_000_000,
    start_j: FloatArray | None = None,
    progress: Progress | None = None,
) -> Solution:
    """Relative value iteration until the bounds of the cost are `tolerance` of it apart.

    Args:
        model: Joint chain.
        tolerance: Relative width of the bounds at which to stop.
        max_sweeps: Stop after this many sweeps in any case; the gap says how far it came.
        start_j: Values to begin with; made symmetric for two instances.
        progress: Called every 50 sweeps; may stop it.
    """
    values_j = np.zeros(model.shape) if start_j is None else start_j.copy()
    is_pair = model.num_instances == 2
    if is_pair:
        values_j = (values_j + values_j.T) / 2.0
    improve = model.pair_improvement_w if is_pair else model.improvement_w
    step_s = 1.0 / model.uniform_rate
    origin = (0,) * model.num_instances
    low = high = 0.0
    for sweep in range(1, max_sweeps + 1):
        change_w = improve(values_j)
        low, high = float(change_w.min()), float(change_w.max())
        values_j += step_s * change_w
        values_j -= values_j[origin]
        width = (high - low) / max(abs(high + low) / 2.0, 1e-300)
        if width <= tolerance:
            break
        if progress is not None and sweep % 50 == 0 and not progress(sweep, width):
            break
    return Solution(cost_w=(low + high) / 2.0, gap_w=(high - low) / 2.0, values_j=values_j)


def policy_iteration(model: JointModel, *, max_rounds: int = 100) -> Solution:
    """Howard's policy iteration, each policy evaluated by a sparse linear solve.

    Raises:
        VoltanaError: The chain is too large for it, or its clocks are free.
    """
    routing = np.zeros(model.shape, dtype=np.int64)
    for _ in range(max_rounds):
        solution = evaluate(model, routing)
        actions = model.action_values_j(solution.values_j)
        held = np.take_along_axis(actions, routing[None], axis=0)[0]
        slack = 1e-9 * max(1.0, float(np.abs(solution.values_j).max()))
        better = actions.min(axis=0) < held - slack  # keep the action unless another is better
        if not better.any():
            return solution
        routing = np.where(better, np.argmin(actions, axis=0), routing)
    raise VoltanaError(f"policy iteration did not settle in {max_rounds} rounds")


def evaluate(model: JointModel, routing: IntArray) -> Solution:
    """Average cost and relative values of one routing policy, by a linear solve.

    Solves Q h - g = -c with h = 0 in the empty state; needs one recurrent class, which the empty
    state gives, since every policy reaches it.

    Raises:
        VoltanaError: The chain is too large for it, or its clocks are free.
    """
    size = int(np.prod(model.shape))
    if size > MAX_LINEAR_STATES:
        raise VoltanaError(
            f"a linear solve takes at most {MAX_LINEAR_STATES} states, got {size}:"
            " use value iteration"
        )
    if model.instance.clock_rate.any():
        raise VoltanaError("a linear solve needs a clock rule that is not free")
    rates = model.generator_of(routing).tolil()
    cost = model.cost_w + model.rate_rps * _blocked(model, routing)
    rates[:, 0] = -1.0  # the first unknown is the cost, as the empty state's value is 0
    solved = spsolve(sp.csc_array(rates), -cost.ravel())
    values_j = solved.copy()
    values_j[0] = 0.0
    return Solution(cost_w=float(solved[0]), gap_w=0.0, values_j=values_j.reshape(model.shape))


def _blocked(model: JointModel, routing: IntArray) -> FloatArray:
    blocked_j, count = model.instance.blocked_j, model.num_instances
    costs = np.stack([_spread(blocked_j, i, count) + np.zeros(model.shape) for i in range(count)])
    return np.asarray(np.take_along_axis(costs, routing[None], axis=0)[0])


def _along(matrix: sp.csr_array, values: FloatArray, axis: int) -> FloatArray:
    """Apply a matrix of shape (S, S) to one axis of a tensor."""
    moved = np.moveaxis(values, axis, 0)
    flat = np.ascontiguousarray(moved).reshape(moved.shape[0], -1)
    return np.asarray(np.moveaxis((matrix @ flat).reshape(moved.shape), 0, axis))


def sum_over_axes(vectors: Sequence[FloatArray]) -> FloatArray:
    """Σ v_i(s_i), one vector along each axis. Shape (len(v_0), len(v_1), …)."""
    return np.asarray(sum(_spread(v, i, len(vectors)) for i, v in enumerate(vectors)))


def _spread(per_instance: FloatArray, axis: int, count: int) -> FloatArray:
    """A vector over one axis as a tensor of `count` axes that broadcasts."""
    shape = [1] * count
    shape[axis] = len(per_instance)
    return per_instance.reshape(shape)
