"""The exact solvers against cases worked by hand and against a linear program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import linprog

from tests.sim.mdp.small import one_level
from tests.sim.policies.doubles import Formula, make_context
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.mdp.grid import StateGrid
from voltana.sim.mdp.model import InstanceModel, ModelParameters, build_instance
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


def two_levels(capacity: int) -> InstanceModel:
    """Free clocks: 0.1 s an iteration at 1000 MHz and 100 W, 0.05 s at 1400 MHz and 190 W."""
    grid = StateGrid(
        batch_edges_requests=tuple(range(capacity + 2)),
        kv_nodes_tokens=(15.0,),
        levels_mhz=(1000, 1400),
    )
    parameters = ModelParameters(
        slo_itl_s=0.07, input_tokens=5, output_tokens=10, context_tokens=15, penalty_j=3.0,
        clock_rule="free",
    )  # fmt: skip
    predictor = Formula(lambda p, f, b, t: 0.1 if f == 1000 else 0.05)
    context = replace(make_context(predictor), power=TwoPowers())
    return build_instance(grid, parameters, context)


class TwoPowers:
    """Busy 100 and 190 W, idle 40 and 60 W."""

    def power_w(self, phase: str, clock_mhz: int, batch_size: int, tokens: int) -> float:
        return 100.0 if clock_mhz == 1000 else 190.0

    def idle_power_w(self, clock_mhz: int) -> float:
        return 40.0 if clock_mhz == 1000 else 60.0


@pytest.mark.parametrize("rate_rps", [0.5, 2.0])
def test_free_clocks_are_the_best_of_all_rules_of_clocks(rate_rps: float) -> None:
    """One instance of up to two requests, two clocks: each of the 64 ways to choose a clock in its
    six states is a chain of its own, and its average cost a linear solve with plain matrices."""
    instance = two_levels(2)
    size = instance.grid.num_states
    arrive = rate_rps * (instance.arrival.toarray() - np.eye(size))
    fixed = instance.generator.toarray() + arrive
    cost = instance.cost_w + rate_rps * instance.blocked_j
    costs = []
    for levels in product((0, 1), repeat=size):
        rates = fixed.copy()
        for state, level in enumerate(levels):
            target = state // 2 * 2 + level
            rates[state, target] += instance.clock_rate[state]
            rates[state, state] -= instance.clock_rate[state]
        # balance of all states, and probabilities that add up to one; least squares, as a rule
        # that holds a clock for ever makes another one's states transient
        system = np.vstack([rates.T, np.ones(size)])
        share = np.linalg.lstsq(system, np.append(np.zeros(size), 1.0))[0]
        if np.linalg.matrix_rank(system) == size:  # one recurrent class
            costs.append(float(share @ cost))
    found = value_iteration(JointModel(instance, rate_rps, 1), tolerance=1e-10)
    assert found.cost_w == pytest.approx(min(costs), rel=1e-8)
    assert min(costs) < 0.95 * max(costs)


@pytest.mark.parametrize("instance", [one_level(3, penalty_j=5.0), two_levels(2)])
def test_a_pair_s_shortcut_is_the_general_rule(instance: InstanceModel) -> None:
    """On values that are symmetric, whatever they are."""
    model = JointModel(instance, 2.0, 2)
    values = np.random.default_rng(6).normal(size=model.shape)
    values = values + values.T
    np.testing.assert_allclose(
        model.pair_improvement_w(values), model.improvement_w(values), atol=1e-9
    )
    start = np.random.default_rng(7).normal(size=model.shape)
    free = value_iteration(model, tolerance=1e-9)
    begun = value_iteration(model, tolerance=1e-9, start_j=start)
    assert begun.cost_w == pytest.approx(free.cost_w, rel=1e-8)
    np.testing.assert_allclose(begun.values_j, begun.values_j.T, atol=1e-9)
    assert begun.values_j[0, 0] == 0.0


def test_progress_is_told_every_fifty_sweeps_and_may_stop() -> None:
    told: list[int] = []

    def progress(sweep: int, width: float) -> bool:
        told.append(sweep)
        return sweep < 150

    model = JointModel(*CASES[0], 2)
    stopped = value_iteration(model, tolerance=0.0, max_sweeps=1000, progress=progress)
    assert told == [50, 100, 150]
    assert stopped.gap_w == value_iteration(model, tolerance=0.0, max_sweeps=150).gap_w
    exact = value_iteration(model, tolerance=1e-6)
    assert exact.gap_w <= 0.5e-6 * exact.cost_w


def test_the_whole_rate_matrix_is_that_of_plain_loops() -> None:
    """Three instances, each joint state's request sent to a random one."""
    instance, rate_rps = one_level(2), 1.5
    model = JointModel(instance, rate_rps, 3)
    routing = np.random.default_rng(8).integers(0, 3, model.shape)
    move, arrive = instance.generator.toarray(), instance.arrival.toarray()
    size = len(move)
    expected = np.zeros((size**3, size**3))
    for number, state in enumerate(np.ndindex(model.shape)):
        for axis in range(3):
            for to in range(size):
                other = list(state)
                other[axis] = to
                at = np.ravel_multi_index(tuple(other), model.shape)
                expected[number, at] += move[state[axis], to]
                if routing[state] == axis:
                    expected[number, at] += rate_rps * arrive[state[axis], to]
        expected[number, number] -= rate_rps
    np.testing.assert_allclose(model.generator_of(routing).toarray(), expected, atol=1e-12)


def test_what_cannot_be_solved_is_refused_in_one_line() -> None:
    small, free = one_level(1), two_levels(1)
    many = "the joint chain of 4 instances has 41^4 states"
    lines: list[tuple[Callable[[], object], str]] = [
        (lambda: JointModel(one_level(40), 1.0, 4),
         f"{many}, more than 2000000: take the factored solver, or fewer buckets"),
        (lambda: JointModel(small, 0.0, 1),
         "a joint model needs rate > 0 and an instance, got 0.0, 1"),
        (lambda: JointModel(small, 1.0, 0),
         "a joint model needs rate > 0 and an instance, got 1.0, 0"),
        (lambda: policy_iteration(JointModel(one_level(150), 1.0, 2)),
         "a linear solve takes at most 20000 states, got 22801: use value iteration"),
        (lambda: policy_iteration(JointModel(free, 1.0, 1)),
         "a linear solve needs a clock rule that is not free"),
        (lambda: policy_iteration(JointModel(small, 1.0, 2), max_rounds=0),
         "policy iteration did not settle in 0 rounds"),
    ]  # fmt: skip
    for call, line in lines:
        with pytest.raises(VoltanaError) as caught:
            call()
        assert str(caught.value) == line
