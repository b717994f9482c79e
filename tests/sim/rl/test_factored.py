"""The index: between the split it improves on and the optimum, and exact where it must be."""

from __future__ import annotations

import numpy as np
import pytest

from sim.rl.factored import index_of, separable_start, solve_index, solve_one, splits
from sim.rl.model import InstanceModel
from sim.rl.solve import JointModel, evaluate, policy_iteration
from tests.sim.rl.small import one_level

CASES = [
    (one_level(4, penalty_j=5.0), 2.0, 2),
    (one_level(5, penalty_j=2.0, slo_itl_s=0.125, slope_s=0.01), 3.0, 2),
    (one_level(3, penalty_j=20.0), 3.0, 3),
]


@pytest.mark.parametrize(("instance", "rate_rps", "count"), CASES)
def test_between_optimum_and_split(instance: InstanceModel, rate_rps: float, count: int) -> None:
    """One step of policy improvement is never worse than its start, and at best optimal; here it
    makes good more than half of what the split loses."""
    index = solve_index(instance, rate_rps, count)
    model = JointModel(instance, rate_rps, count)
    routing = np.zeros(model.shape, dtype=np.int64)
    for state in np.ndindex(model.shape):
        routing[state] = int(np.argmin([index.index_j[i, s] for i, s in enumerate(state)]))
    cost_w = evaluate(model, routing).cost_w
    best_w = policy_iteration(model).cost_w
    assert best_w - 1e-9 <= cost_w <= index.split_cost_w + 1e-9
    assert cost_w - best_w <= 0.5 * (index.split_cost_w - best_w) + 1e-9


def test_the_greedy_step_over_the_separable_values_is_the_index() -> None:
    index = solve_index(*CASES[0])
    model = JointModel(*CASES[0])
    actions = model.action_values_j(separable_start(index))
    gap = actions[0] - actions[1]
    expected = index.index_j[0][:, None] - index.index_j[1][None, :]
    np.testing.assert_allclose(gap, expected, atol=1e-9)


def test_one_instance_by_hand() -> None:
    """One place, arrivals a = 0.5/s, service 1/s: busy a third of the time. Average cost
    40 + 70/3 W (nothing is charged for a loss). From busy, 70 J - but g's excess of 70/3 W runs
    for a second: h(1) - h(0) = 70·(1 - 1/3) = 46.67 J = the index of the empty state; a busy one
    turns the request away free of charge: 0."""
    solution = solve_one(one_level(1), 0.5)
    assert solution.cost_w == pytest.approx(40 + 70 / 3, rel=1e-12)
    np.testing.assert_allclose(index_of(one_level(1), solution.values_j), [140 / 3, 0.0], atol=1e-9)


def test_splits_share_the_whole_stream() -> None:
    for shares in splits(24.0, 4):
        assert len(shares) == 4
        assert sum(shares) == pytest.approx(24.0)
    assert len(set(splits(24.0, 4))) == len(splits(24.0, 4))
