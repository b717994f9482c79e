"""Q-learning's task on the model's own chain, whose best policy is known exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from voltana.sim.mdp.learn.qlearn import Features
from voltana.sim.mdp.solve import JointModel

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Jumps = tuple[list[int], list[float]]
"""Where to, and the cumulative probability of it."""


class ChainTask:
    """Draws the joint chain's jumps; one feature a joint state and action, a table.

    Args:
        model: The chain; clocks must not be free.
        arrivals: Steps of an episode.
    """

    def __init__(self, model: JointModel, arrivals: int) -> None:
        instance = model.instance
        self._rate_rps = model.rate_rps
        self._count = model.num_instances
        self._states = instance.grid.num_states
        self._cost_w: list[float] = instance.cost_w.tolist()
        self._blocked_j: list[float] = instance.blocked_j.tolist()
        move, arrive = instance.generator.toarray(), instance.arrival.toarray()
        np.fill_diagonal(move, 0.0)
        self._leave: list[float] = move.sum(axis=1).tolist()
        self._moves = [_jumps(row) for row in move]
        self._arrivals = [_jumps(row) for row in arrive]
        self._length = arrivals
        self.num_features = self._states**self._count * self._count

    def reset(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._at = [0] * self._count
        self._left = self._length

    def actions(self) -> Sequence[Features]:
        if self._left == 0:
            return ()
        number = 0
        for state in self._at:
            number = number * self._states + state
        return [([number * self._count + i], [1.0]) for i in range(self._count)]

    def act(self, action: int) -> tuple[float, float]:
        rng, at = self._rng, self._at
        cost_j = self._blocked_j[at[action]]
        at[action] = _draw(self._arrivals[at[action]], rng)
        elapsed_s = 0.0
        while True:
            leaving = [self._leave[state] for state in at]
            total = self._rate_rps + sum(leaving)
            wait_s = rng.exponential(1.0 / total)
            elapsed_s += wait_s
            cost_j += wait_s * sum(self._cost_w[state] for state in at)
            mark = rng.random() * total - self._rate_rps
            if mark < 0:
                break
            who = 0
            while who + 1 < len(at) and mark >= leaving[who]:
                mark -= leaving[who]
                who += 1
            at[who] = _draw(self._moves[at[who]], rng)
        self._left -= 1
        return cost_j, elapsed_s

    def routing(self, weights_j: FloatArray) -> IntArray:
        """The greedy instance in each joint state. Shape (S,)·N."""
        shape = (self._states,) * self._count
        return np.asarray(np.argmin(weights_j.reshape(*shape, self._count), axis=-1))


def _jumps(row: FloatArray) -> Jumps:
    where = np.flatnonzero(row)
    share = np.cumsum(row[where])
    return where.tolist(), (share / share[-1] if len(where) else share).tolist()


def _draw(jumps: Jumps, rng: np.random.Generator) -> int:
    where, share = jumps
    if len(where) == 1:
        return where[0]
    mark = rng.random()
    return next(k for k, s in zip(where, share, strict=True) if mark < s)
