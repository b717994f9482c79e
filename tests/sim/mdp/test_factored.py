"""The index: between the split it improves on and the optimum, and exact where it must be."""

from __future__ import annotations

import numpy as np
import pytest

from tests.sim.mdp.small import one_level
from tests.sim.mdp.test_solve import two_levels
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.mdp.factored import (
    GroupPolicy,
    delta_of,
    group_sizes,
    lower_bound_w,
    solve_by_policies,
    solve_group,
    solve_groups,
    splits,
)
from voltana.sim.mdp.model import InstanceModel
from voltana.sim.mdp.solve import (
    JointModel,
    evaluate,
    policy_iteration,
    sum_over_axes,
    value_iteration,
)

CASES = [
    (one_level(4, penalty_j=5.0), 2.0, 2, 1),
    (one_level(5, penalty_j=2.0, slo_itl_s=0.125, slope_s=0.01), 3.0, 2, 1),
    (one_level(3, penalty_j=20.0), 3.0, 3, 1),
    (one_level(3, penalty_j=20.0), 3.0, 3, 2),
    (one_level(2, penalty_j=2.0, slo_itl_s=0.115, slope_s=0.01), 4.0, 4, 2),
]


def cost_of(policy: GroupPolicy, model: JointModel) -> float:
    """The exact cost of a group policy, each joint state's instance looked up by plain loops."""
    routing = np.zeros(model.shape, dtype=np.int64)
    for state in np.ndindex(model.shape):
        costs: list[float] = []
        for delta_j in policy.delta_j:
            members = delta_j.shape[-1]
            costs += delta_j[state[len(costs) : len(costs) + members]].tolist()
        routing[state] = int(np.argmin(np.round(costs, 9)))
    return evaluate(model, routing).cost_w


@pytest.mark.parametrize(("instance", "rate_rps", "count", "size"), CASES)
def test_between_optimum_and_split(
    instance: InstanceModel, rate_rps: float, count: int, size: int
) -> None:
    """One step of policy improvement is never worse than its start, and at best optimal; here it
    makes good more than half of what the split loses. The relaxed problem lies below all."""
    policy = solve_groups(instance, rate_rps, count, group_size=size, tolerance=1e-9)
    model = JointModel(instance, rate_rps, count)
    cost_w, best_w = cost_of(policy, model), policy_iteration(model).cost_w
    assert lower_bound_w(instance, rate_rps, count) <= best_w + 1e-6
    assert best_w - 1e-6 <= cost_w <= policy.split_cost_w + 1e-6
    assert cost_w - best_w <= 0.5 * (policy.split_cost_w - best_w) + 1e-6


@pytest.mark.parametrize(("instance", "rate_rps", "count", "size"), CASES[:3])
def test_one_group_of_all_is_the_optimum(
    instance: InstanceModel, rate_rps: float, count: int, size: int
) -> None:
    policy = solve_groups(instance, rate_rps, count, group_size=count, tolerance=1e-9)
    model = JointModel(instance, rate_rps, count)
    best_w = policy_iteration(model).cost_w
    assert policy.split_cost_w == pytest.approx(best_w, rel=1e-6)
    assert cost_of(policy, model) == pytest.approx(best_w, rel=1e-6)


def test_pairs_are_no_worse_than_singles() -> None:
    """Not a theorem; on this case both against the optimum of three instances."""
    instance, rate_rps, count, _ = CASES[2]
    model = JointModel(instance, rate_rps, count)
    singles, pairs = (
        cost_of(solve_groups(instance, rate_rps, count, group_size=k), model) for k in (1, 2)
    )
    assert pairs <= singles
    assert pairs <= 1.05 * policy_iteration(model).cost_w


def test_the_bound_is_reached_where_one_instance_does_it_all() -> None:
    """Two places, no penalty, hardly any load: the relaxed instances share it as they like, and so
    does the real fleet, that only ever wakes one: 2·40 W + 70 W·busy + 10 W a request more."""
    instance, rate_rps = one_level(2), 1e-3
    assert lower_bound_w(instance, rate_rps, 2) == pytest.approx(
        policy_iteration(JointModel(instance, rate_rps, 2)).cost_w, rel=1e-5
    )


def test_the_greedy_step_over_the_separable_values_is_the_index() -> None:
    instance, rate_rps, count, _ = CASES[0]
    one = solve_group(instance, rate_rps / 2, 1)
    model = JointModel(instance, rate_rps, count)
    actions = model.action_values_j(sum_over_axes([one.values_j] * 2))
    delta_j = delta_of(instance, one.values_j)[:, 0]
    expected = delta_j[:, None] - delta_j[None, :]
    np.testing.assert_allclose(actions[0] - actions[1], expected, atol=1e-9)


def test_one_instance_by_hand() -> None:
    """One place, arrivals a = 0.5/s, service 1/s: busy a third of the time. Average cost
    40 + 70/3 W (nothing is charged for a loss). From busy, 70 J - but g's excess of 70/3 W runs
    for a second: h(1) - h(0) = 70·(1 - 1/3) = 46.67 J = the index of the empty state; a busy one
    turns the request away free of charge: 0."""
    solution = solve_group(one_level(1), 0.5, 1)
    assert solution.cost_w == pytest.approx(40 + 70 / 3, rel=1e-12)
    delta_j = delta_of(one_level(1), solution.values_j)[:, 0]
    np.testing.assert_allclose(delta_j, [140 / 3, 0.0], atol=1e-9)


def test_splits_share_the_whole_stream() -> None:
    for sizes in ((1, 1, 1, 1), (2, 2, 1)):
        for shares in splits(24.0, sizes):
            assert len(shares) == len(sizes)
            assert sum(shares) == pytest.approx(24.0)
        assert len(set(splits(24.0, sizes))) == len(splits(24.0, sizes))


def test_splits_by_hand() -> None:
    """30/s over a pair and a single: the pair alone, with the single at a quarter, a half and three
    quarters of an even share (its members then have 2 : part of it), and all alike."""
    assert splits(30.0, (2, 1)) == [
        (30.0, 0.0), pytest.approx((30 * 2 / 2.25, 30 * 0.25 / 2.25)), (24.0, 6.0),
        pytest.approx((30 * 2 / 2.75, 30 * 0.75 / 2.75)), (20.0, 10.0),
    ]  # fmt: skip
    assert splits(9.0, (1, 1, 1))[4:] == [
        (4.5, 4.5, 0.0), (4.0, 4.0, 1.0), pytest.approx((3.6, 3.6, 1.8)),
        pytest.approx((9 / 2.75, 9 / 2.75, 9 * 0.75 / 2.75)), (3.0, 3.0, 3.0),
    ]  # fmt: skip
    assert [group_sizes(n, 2) for n in (1, 4, 5)] == [(1,), (2, 2), (2, 2, 1)]


def test_a_group_policy_says_what_it_was_made_of() -> None:
    """Its split is the cheapest of those tried, each group's part solved by itself."""
    instance, rate_rps, count, size = CASES[3]
    told: list[tuple[int, int]] = []
    made = solve_groups(
        instance, rate_rps, count, group_size=size, tolerance=1e-9,
        progress=lambda *now: told.append(now),
    )  # fmt: skip
    tried = splits(rate_rps, (2, 1))
    assert told == [(k, len(tried)) for k in range(1, len(tried) + 1)]
    costs = [
        sum(solve_group(instance, r, n, 1e-9).cost_w for r, n in zip(shares, (2, 1), strict=True))
        for shares in tried
    ]
    assert made.split_cost_w == pytest.approx(min(costs), rel=1e-9)
    assert made.shares_rps == tried[int(np.argmin(costs))]
    assert [d.shape for d in made.delta_j] == [(4, 4, 2), (4, 1)]
    gaps = [
        solve_group(instance, r, n, 1e-9).gap_w
        for r, n in zip(made.shares_rps, (2, 1), strict=True)
    ]
    assert made.gap_w == pytest.approx(sum(gaps), abs=1e-9)


def test_policy_iteration_is_a_single_group() -> None:
    instance, rate_rps, count, _ = CASES[1]
    exact = solve_by_policies(instance, rate_rps, count)
    model = JointModel(instance, rate_rps, count)
    assert exact.shares_rps == (rate_rps,)
    assert exact.gap_w == 0.0
    assert exact.split_cost_w == policy_iteration(model).cost_w
    assert cost_of(exact, model) == pytest.approx(exact.split_cost_w, rel=1e-9)


def test_what_cannot_be_grouped_or_bounded_is_refused_in_one_line() -> None:
    small = one_level(1)
    start = "a fleet needs an instance, a group size >= 1 and a rate > 0, got "
    for arguments, got in (((0.0, 1, 1), "1, 1, 0.0"), ((1.0, 0, 1), "0, 1, 1.0"),
                           ((1.0, 1, 0), "1, 0, 1.0")):  # fmt: skip
        with pytest.raises(VoltanaError) as caught:
            solve_groups(small, arguments[0], arguments[1], group_size=arguments[2])
        assert str(caught.value) == start + got
    with pytest.raises(VoltanaError) as caught:
        lower_bound_w(two_levels(1), 1.0, 1)
    assert str(caught.value) == "the bound needs a clock rule that is not free"


def test_a_group_without_a_share_knows_the_cost_of_a_request() -> None:
    """Hardly any load: 40 W and no error, and 70 J for the first request, which takes a second."""
    solution = solve_group(one_level(1), 0.0, 1)
    assert solution.cost_w == pytest.approx(40.0, abs=0.1)
    assert delta_of(one_level(1), solution.values_j)[0, 0] == pytest.approx(70.0, abs=0.1)


def test_a_free_instance_is_a_group_too() -> None:
    """Solved by value iteration, alone and in pairs; the pair is never dearer than two halves."""
    instance = two_levels(2)
    one, pair = (solve_group(instance, rate, n, 1e-8) for rate, n in ((1.0, 1), (2.0, 2)))
    for solution, rate, n in ((one, 1.0, 1), (pair, 2.0, 2)):
        exact = value_iteration(JointModel(instance, rate, n), tolerance=1e-9)
        assert solution.cost_w == pytest.approx(exact.cost_w, rel=1e-7)
    assert pair.cost_w <= 2.0 * one.cost_w
