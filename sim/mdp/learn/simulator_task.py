"""The simulator as a task for Q-learning."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement, product
from typing import Final

import numpy as np
import numpy.typing as npt

from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.mdp.grid import StateGrid
from voltana.sim.mdp.learn.arrivals import ArrivalSimulation
from voltana.sim.mdp.learn.qlearn import Features
from voltana.sim.workload.workload import Workload

FloatArray = npt.NDArray[np.float64]
MAX_TABLE: Final = 200_000


class SimulatorTask:
    """The simulator; the value of an action is that of the batch sizes right after it.

    It is interpolated linearly in every instance's batch size between the nodes of the grid, and
    alike however the instances are ordered. Interpolation never spreads values apart, which keeps
    Q-learning stable (Szepesvári, Smart, Interpolation-based Q-learning, ICML 2004); sums of
    values per instance do not, and diverged here.

    Args:
        config: Fleet, promises and controllers.
        profile: The truth about times and power.
        make_workload: The requests of an episode, from a seed.
        grid: Its batch nodes are used, and neither KV nodes nor levels.
        penalty_j: Joules that a late token gap is taken to cost.

    Raises:
        VoltanaError: The table would be too large.
    """

    def __init__(
        self,
        config: SimConfig,
        profile: Profile,
        make_workload: Callable[[int], Workload],
        grid: StateGrid,
        *,
        penalty_j: float,
    ) -> None:
        self._config, self._profile = config, profile
        self._make_workload = make_workload
        self._nodes: list[float] = grid.batch_nodes_requests.tolist()
        self._penalty_j = penalty_j
        buckets, count = grid.num_batch, config.num_decode
        self.num_features = math.comb(buckets + count - 1, count)
        if buckets**count > MAX_TABLE:
            raise VoltanaError(
                f"a table of {count} instances with {buckets} batch buckets has more than"
                f" {MAX_TABLE} entries: take fewer buckets (a greater width), or another solver"
            )
        orderless = combinations_with_replacement(range(buckets), count)
        self._number = {key: number for number, key in enumerate(orderless)}

    def reset(self, seed: int) -> None:
        self._run = ArrivalSimulation(
            self._config, self._profile, self._make_workload(seed), drains=False
        )

    def actions(self) -> Sequence[Features]:
        if self._run.is_over:
            return ()
        open_now = [state.open_requests for state in self._run.decode]
        as_is = [self._corners(count) for count in open_now]
        return [
            self._features([*as_is[:i], self._corners(count + 1), *as_is[i + 1 :]])
            for i, count in enumerate(open_now)
        ]

    def act(self, action: int) -> tuple[float, float]:
        cost = self._run.accept(action)
        return cost.decode_energy_j + self._penalty_j * cost.late_gaps, cost.elapsed_s

    def delta_j(self, weights_j: FloatArray) -> FloatArray:
        """Value after sending to each member less the value before. Shape (B, …, B, members)."""
        buckets, count = len(self._nodes), self._config.num_decode
        table = np.zeros((buckets,) * count + (count,))
        for key in np.ndindex((buckets,) * count):
            before = weights_j[self._number[tuple(sorted(key))]]
            for i in range(count):
                sizes = [self._nodes[k] + (j == i) for j, k in enumerate(key)]
                numbers, amounts = self._features([self._corners(size) for size in sizes])
                after = sum(weights_j[k] * x for k, x in zip(numbers, amounts, strict=True))
                table[(*key, i)] = after - before
        return table

    def _corners(self, requests: float) -> list[tuple[int, float]]:
        nodes = self._nodes
        low = bisect_right(nodes, requests) - 1
        if low + 1 >= len(nodes) or requests == nodes[low]:
            return [(low, 1.0)]
        weight = (requests - nodes[low]) / (nodes[low + 1] - nodes[low])
        return [(low, 1.0 - weight), (low + 1, weight)]

    def _features(self, corners: Sequence[Sequence[tuple[int, float]]]) -> Features:
        summed: dict[int, float] = {}
        for corner in product(*corners):
            number = self._number[tuple(sorted(bucket for bucket, _ in corner))]
            weight = math.prod(share for _, share in corner)
            summed[number] = summed.get(number, 0.0) + weight
        return list(summed), list(summed.values())
