"""Q-learning against value iteration, its checkpoints, and the simulator as its task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.sim.mdp.chain_task import ChainTask
from tests.sim.mdp.test_solve import CASES
from voltana.profiles.catalog import load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.mdp.grid import StateGrid
from voltana.sim.mdp.learn.qlearn import (
    Features,
    Learner,
    QSettings,
    load_checkpoint,
    q_learn,
    save_checkpoint,
)
from voltana.sim.mdp.learn.simulator_task import SimulatorTask
from voltana.sim.mdp.solve import JointModel, evaluate, value_iteration
from voltana.sim.workload.generate import make_workload

QUICK = QSettings(episodes=4, exploration=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)))
def test_within_two_percent_of_value_iteration(number: int) -> None:
    """The learned table's greedy policy is evaluated exactly, by a linear solve: no sampling."""
    model = JointModel(*CASES[number], 2)
    best_w = value_iteration(model, tolerance=1e-9).cost_w
    task = ChainTask(model, arrivals=2000)
    settings = QSettings(episodes=60, seed=3, exploration=0.6)
    learner = q_learn(task, settings)
    cost_w = evaluate(model, task.routing(learner.weights_j)).cost_w
    assert best_w * (1 - 1e-8) <= cost_w <= 1.02 * best_w


def test_an_untrained_table_is_far_off() -> None:
    """The two per cent above are earned: without learning it costs a third more."""
    model = JointModel(*CASES[2], 2)
    task = ChainTask(model, arrivals=1)
    cost_w = evaluate(model, task.routing(np.zeros(task.num_features))).cost_w
    assert cost_w > 1.3 * value_iteration(model).cost_w


def test_the_model_is_drawn_with_its_rates() -> None:
    """Sending everything to instance 0: time and cost a step against the exact average cost.

    20 000 gaps of mean 1/rate: the mean is off by 0.7 % (one sigma), five are allowed."""
    instance, rate_rps = CASES[0]
    model = JointModel(instance, rate_rps, 2)
    task = ChainTask(model, arrivals=20_000)
    task.reset(1)
    cost_j = elapsed_s = 0.0
    while task.actions():
        step_j, step_s = task.act(0)
        cost_j += step_j
        elapsed_s += step_s
    assert elapsed_s == pytest.approx(20_000 / rate_rps, rel=0.035)
    expected = evaluate(model, np.zeros(model.shape, dtype=np.int64)).cost_w
    assert cost_j / elapsed_s == pytest.approx(expected, rel=0.035)


def test_going_on_from_a_checkpoint_is_not_stopping(tmp_path: Path) -> None:
    task = ChainTask(JointModel(*CASES[0], 2), arrivals=200)
    whole = q_learn(task, QUICK)
    path = tmp_path / "c.npz"

    def stop_after_two(learner: Learner) -> bool:
        save_checkpoint(path, learner, QUICK, "test")
        return learner.episodes < 2

    q_learn(task, QUICK, after_episode=stop_after_two)
    resumed = load_checkpoint(path, QUICK, "test")
    assert resumed is not None
    assert resumed.episodes == 2
    again = q_learn(task, QUICK, resumed)
    np.testing.assert_array_equal(again.weights_j, whole.weights_j)
    assert (again.cost_w, again.steps) == (whole.cost_w, whole.steps)
    assert load_checkpoint(path, QSettings(episodes=5), "test") is None
    assert load_checkpoint(path, QUICK, "else") is None
    assert load_checkpoint(tmp_path / "none.npz", QUICK, "test") is None


def test_a_seed_is_a_training() -> None:
    task = ChainTask(JointModel(*CASES[0], 2), arrivals=100)
    one, two = (q_learn(task, QUICK).weights_j for _ in range(2))
    np.testing.assert_array_equal(one, two)
    other = q_learn(task, QSettings(episodes=4, exploration=0.5, seed=2)).weights_j
    assert not np.array_equal(one, other)


def simulator_task(edges: tuple[int, ...], num_decode: int = 2) -> SimulatorTask:
    grid = StateGrid(batch_edges_requests=edges, kv_nodes_tokens=(400.0,), levels_mhz=(1410,))
    return SimulatorTask(
        make_config({"num_decode": num_decode, "slo_itl_s": 0.045}),
        load_profile("a100-80g-sxm/llama-3.1-8b"),
        lambda seed: make_workload("sharegpt", rate_rps=20.0, duration_s=5.0, seed=seed),
        grid,
        penalty_j=1.0,
    )


def test_values_after_an_action_are_interpolated() -> None:
    """Nodes 0, 2.5, 6.5. Empty both: after the action one has 1, that is 0.4 of the way to 2.5:
    0.6 of {0, 0} and 0.4 of {0, 2.5}; which instance it is does not matter."""
    task = simulator_task((0, 1, 5, 9))
    task.reset(1)
    first, second = task.actions()
    assert dict(zip(*first, strict=True)) == pytest.approx({0: 0.6, 1: 0.4})
    assert first == second
    assert task.num_features == math.comb(4, 2)


def test_the_table_of_a_sum_of_batch_sizes_is_flat() -> None:
    """Values 7 J a request, wherever it is: one request more costs 7 J, except beyond the last
    node, where the table ends."""
    task = simulator_task((0, 1, 5, 9))
    weights = np.array([7.0 * (a + b) for a, b in [(0, 0), (0, 2.5), (0, 6.5), (2.5, 2.5),
                                                   (2.5, 6.5), (6.5, 6.5)]])  # fmt: skip
    delta_j = task.delta_j(weights)
    assert delta_j.shape == (3, 3, 2)
    np.testing.assert_allclose(delta_j[:2, :, 0], 7.0)
    np.testing.assert_allclose(delta_j[2, :, 0], 0.0)
    np.testing.assert_allclose(delta_j[..., 1], delta_j[..., 0].T)


def test_learning_on_the_simulator_moves_values_that_were_seen() -> None:
    learner = q_learn(simulator_task((0, 1, 5, 9, 17, 33)), QSettings(episodes=2))
    assert learner.steps == 200
    assert np.isfinite(learner.weights_j).all()
    assert np.count_nonzero(learner.weights_j) > 3
    assert 100.0 < learner.cost_w < 1000.0  # two A100 idle at about 100 W, and draw at most 800 W


class Scripted:
    """Two choices in state A, two in B, the second of which counts twice; A, B, A and over."""

    num_features = 4

    def reset(self, seed: int) -> None:
        a: list[Features] = [([0], [1.0]), ([1], [1.0])]
        b: list[Features] = [([2], [1.0]), ([3], [2.0])]
        self._coming = [a, b, a]
        self._costs = [(6.0, 2.0), (10.0, 1.0), (1.0, 1.0)]
        self.taken: list[int] = []

    def actions(self) -> Sequence[Features]:
        return self._coming[0] if self._coming else ()

    def act(self, action: int) -> tuple[float, float]:
        self.taken.append(action)
        self._coming.pop(0)
        return self._costs.pop(0)


def test_three_steps_by_hand() -> None:
    """Weights 4, 5, 3, 1, rate 0.5/(1 + steps), cost per second with a memory of 10 s.

    A: 4 < 5. 6 J in 2 s, 3 J/s; B's least is 2·1: the error is 6 - 6 + 2 - 4 = -2, half of it: 3.
    B: 2 < 3. 10 J in 1 s; (0.9·6 + 10) J / (0.9·2 + 1) s = 5.5 J/s; A's least is 3 now: the error
    is 10 - 5.5 + 3 - 2 = 5.5, a quarter of it is 1.375, by a feature of 2: 1 + 1.375·2/4. A again:
    1 J in 1 s, and nothing follows that could be learnt from."""
    task = Scripted()
    settings = QSettings(
        episodes=1, exploration=0.0, learning_rate=0.5, learning_steps=1.0, memory_s=10.0
    )
    learner = q_learn(task, settings, Learner(weights_j=np.array([4.0, 5.0, 3.0, 1.0])))
    assert task.taken == [0, 1, 0]
    assert learner.weights_j.tolist() == pytest.approx([3.0, 5.0, 3.0, 1.6875], rel=1e-12)
    assert learner.cost_j == pytest.approx(0.9 * 15.4 + 1.0, rel=1e-12)
    assert learner.time_s == pytest.approx(0.9 * 2.8 + 1.0, rel=1e-12)
    assert (learner.steps, learner.episodes) == (3, 1)
    assert Learner(weights_j=np.zeros(1)).cost_w == 0.0


def test_exploration_falls_to_nothing_after_the_last_episode() -> None:
    """0.8, 0.6, 0.4 and 0.2 of 500 actions are drawn, half of them the dear one: 200, 150, 100 and
    50, each within four standard deviations, sqrt(500·p·(1 - p))."""
    task, dear = TwoChoices(), []

    def count(learner: Learner) -> bool:
        dear.append(sum(task.taken))
        return True

    q_learn(task, QSettings(episodes=4, exploration=0.8), after_episode=count)
    for seen, share in zip(dear, (0.4, 0.3, 0.2, 0.1), strict=True):
        assert abs(seen - 500 * share) < 4.0 * math.sqrt(500 * share * (1.0 - share))


class TwoChoices:
    """An endless choice between 1 J and 100 J, a second each."""

    num_features = 2

    def reset(self, seed: int) -> None:
        self.left = 500
        self.taken: list[int] = []

    def actions(self) -> Sequence[Features]:
        return [([0], [1.0]), ([1], [1.0])] if self.left else ()

    def act(self, action: int) -> tuple[float, float]:
        self.left -= 1
        self.taken.append(action)
        return (1.0, 100.0)[action], 1.0


def test_exploration_does_not_count_as_cost() -> None:
    """A quarter of the actions are drawn to the dear side; the greedy policy costs 1 J a second.

    What is learned of the dear one is its excess, 99 J, since both lead to the same next state."""
    task = TwoChoices()
    learner = q_learn(task, QSettings(episodes=1, exploration=0.5, learning_rate=0.5))
    assert 80 <= sum(task.taken) <= 170  # 125 expected, 4 standard deviations of 9.7
    assert learner.cost_w == pytest.approx(1.0)
    assert learner.weights_j[1] - learner.weights_j[0] == pytest.approx(99.0, rel=1e-6)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(VoltanaError, match="episodes must be >= 1"):
        QSettings(episodes=0)
    with pytest.raises(VoltanaError, match="learning_rate must be > 0"):
        QSettings(learning_rate=0.0)
    with pytest.raises(VoltanaError, match="exploration must be in"):
        QSettings(exploration=1.5)
    with pytest.raises(VoltanaError, match="more than 200000 entries"):
        simulator_task(tuple(range(40)), num_decode=4)
    task = ChainTask(JointModel(*CASES[0], 2), arrivals=1)
    with pytest.raises(VoltanaError, match="the weights to start from are 3"):
        q_learn(task, QUICK, Learner(weights_j=np.zeros(3)))
