"""The exact solvers against cases worked by hand and against a linear program."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import linprog

from tests.sim.mdp.small import one_level
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.mdp.model import InstanceModel
from voltana.sim.mdp.solve import JointModel, evaluate, policy_iteration, value_iteration


def test_two_single_servers_by_hand() -> None:
    """Capacity 1, service 1/s, arrivals 2/s. A second of work costs 70 J, being turned away
    50 J·10 tokens = 500 J: the free one takes it, and the number in the system is Erlang's loss
    system with a = 2: weights 1, 2, 2 of 5. Idle 40 W, busy 110 W: 80/5 + 2·150/5 + 2·220/5 =
    164 W; lost 2/s·2/5·500 J = 400 W. Together 564 W."""
    model = JointModel(one_level(1, penalty_j=50.0), 2.0, 2)
    assert value_iteration(model, tolerance=1e-10).cost_w == pytest.approx(564.0, rel=1e-9)
    assert policy_iteration(model).cost_w == pytest.approx(564.0, rel=1e-9)


def test_a_cheap_refusal_is_taken() -> None:
    """As above at 5 J a token: 50 J to be turned away is less than the 70 J of waking the second
    instance. One place then: busy 2/3 of the time, 40 + 40/3 + 2·110/3 + 2·2/3·50 = 193.33 W."""
    model = JointModel(one_level(1, penalty_j=5.0), 2.0, 2)
    assert policy_iteration(model).cost_w == pytest.approx(580 / 3, rel=1e-9)


def test_packing_by_hand() -> None:
    """Capacity 2, no penalty; a second request costs 10 W, waking an instance 70 W: fill first.
    Loss costs nothing, so a full instance beside an empty one even attracts requests: sending
    them there turns them away. The best policy keeps one instance empty for ever: its number is
    Erlang's with a = 1 and two places: 1, 1, 1/2 of 5/2: 0.4·40 + 0.4·110 + 0.2·120 = 84 W,
    and the other's 40 W: 124 W."""
    model = JointModel(one_level(2), 1.0, 2)
    solution = policy_iteration(model)
    assert solution.cost_w == pytest.approx(124.0, rel=1e-9)
    routing = greedy_routing(model, solution.values_j)
    assert routing[1, 0] == 0
    assert routing[0, 1] == 1


def linear_program_cost(instance: InstanceModel, rate_rps: float) -> float:
    """Least average cost of two instances as a linear program over state-action frequencies.

    Builds every rate with plain loops over pairs of states, apart from the solver's tensors.
    """
    move, arrive = instance.generator.toarray(), instance.arrival.toarray()
    size = len(move)
    pairs = [(i, j, a) for i in range(size) for j in range(size) for a in range(2)]
    cost = np.zeros(len(pairs))
    balance = np.zeros((size * size, len(pairs)))
    for column, (i, j, action) in enumerate(pairs):
        cost[column] = instance.cost_w[i] + instance.cost_w[j]
        cost[column] += rate_rps * instance.blocked_j[i if action == 0 else j]
        for k in range(size):
            balance[k * size + j, column] += move[i, k]
            balance[i * size + k, column] += move[j, k]
            if action == 0:
                balance[k * size + j, column] += rate_rps * arrive[i, k]
            else:
                balance[i * size + k, column] += rate_rps * arrive[j, k]
        balance[i * size + j, column] -= rate_rps
    solved = linprog(
        cost,
        A_eq=np.vstack([balance, np.ones(len(pairs))]),
        b_eq=np.append(np.zeros(size * size), 1.0),
        method="highs",
    )
    assert solved.status == 0
    assert solved.fun is not None
    return float(solved.fun)


def greedy_routing(model: JointModel, values_j: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    return np.asarray(np.argmin(model.action_values_j(values_j), axis=0))


CASES = [
    (one_level(3, penalty_j=5.0), 2.0),
    (one_level(4, penalty_j=0.5, slo_itl_s=0.125, slope_s=0.01), 4.0),
    (one_level(5, penalty_j=20.0, slo_itl_s=0.13, slope_s=0.02), 1.0),
]


@pytest.mark.parametrize(("instance", "rate_rps"), CASES)
def test_both_solvers_agree_with_a_linear_program(instance: InstanceModel, rate_rps: float) -> None:
    model = JointModel(instance, rate_rps, 2)
    expected = linear_program_cost(instance, rate_rps)
    by_values = value_iteration(model, tolerance=1e-9)
    assert by_values.cost_w == pytest.approx(expected, rel=1e-7)
    assert policy_iteration(model).cost_w == pytest.approx(expected, rel=1e-7)
    greedy = evaluate(model, greedy_routing(model, by_values.values_j))
    assert greedy.cost_w == pytest.approx(expected, rel=1e-7)


def test_the_bounds_hold_the_optimum_from_the_first_sweep() -> None:
    model = JointModel(*CASES[1], 2)
    best = policy_iteration(model).cost_w
    for sweeps in (1, 3, 10, 100):
        early = value_iteration(model, max_sweeps=sweeps, tolerance=0.0)
        assert early.cost_w - early.gap_w - 1e-9 <= best <= early.cost_w + early.gap_w + 1e-9


def test_too_large_a_chain_is_refused() -> None:
    with pytest.raises(VoltanaError, match="take the factored solver"):
        JointModel(one_level(40), 1.0, 4)
