"""AGFT: its bandit against ridge regression solved at once, its windows, and that it learns."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.sim.policies.doubles import decode_state, make_context
from voltana.sim.policies.base import InstanceState
from voltana.sim.policies.controllers.agft import NUM_FEATURES, Agft, AgftParameters, Arm, _Window
from voltana.sim.policies.registry import make_controller


def test_an_arm_is_ridge_regression_with_its_confidence() -> None:
    """theta = (X'X + ridge·1)^-1 X'r, bound = theta·x + a·sqrt(x'(X'X + ridge·1)^-1 x)."""
    rng = np.random.default_rng(1)
    features, rewards = rng.normal(size=(40, NUM_FEATURES)), rng.normal(size=40)
    arm = Arm(1000, ridge=2.0)
    for x, reward in zip(features, rewards, strict=True):
        arm.learn(x, float(reward), 1.0)
    gram = features.T @ features + 2.0 * np.eye(NUM_FEATURES)
    theta = np.linalg.solve(gram, features.T @ rewards)
    x = rng.normal(size=NUM_FEATURES)
    expected = theta @ x + 0.5 * math.sqrt(x @ np.linalg.solve(gram, x))
    assert arm.bound(x, 0.5) == pytest.approx(expected, rel=1e-9)


class Bench:
    """One decode instance of 10 requests whose delay and power follow the clock; steps of 1/8 s,
    so that sums of them are exact."""

    def __init__(self, made: Agft, delay_s: dict[int, float], power_w: dict[int, float]) -> None:
        self.made = made
        self._delay_s = delay_s
        self._power_w = power_w
        self.state: InstanceState = decode_state(batch=10, tokens=1000)
        self.state.ended_batch_size, self.state.ended_tokens = 10, 1000
        self.state.kv_capacity_tokens = 100_000
        self.clock = 0
        self.history: list[tuple[float, int]] = []

    def play(self, steps: int) -> None:
        state = self.state
        for _ in range(steps):
            at = self.clock or 1400
            state.now_s += 0.125
            state.energy_j += 0.125 * self._power_w[at]
            state.last_duration_s = self._delay_s[at]
            state.clock_mhz = self.clock
            self.clock = self.made.decide(state)
            self.history.append((state.now_s, self.clock))

    def changes_s(self) -> list[float]:
        times = []
        for (_, a), (now_s, b) in pairwise(self.history):
            if a != b:
                times.append(now_s)
        return times


def agft(**parameters: Any) -> Agft:  # noqa: ANN401
    """Three clocks, windows of 1 s, a rest of 1/4 s."""
    chosen: dict[str, Any] = {
        "frequencies_mhz": (1000, 1200, 1400), "window_s": 1.0, "settle_s": 0.25,
    } | parameters  # fmt: skip
    return Agft(AgftParameters(**chosen), make_context(slo_itl_s=0.05))


SAME = {1000: 0.02, 1200: 0.02, 1400: 0.02}
"""A memory-bound batch: the clock does not matter to its time."""


def test_it_begins_with_ten_unlocked_windows() -> None:
    """Windows of 1 s from 0.125 s on: unlocked up to 10.125 s, then the first locked clock."""
    bench = Bench(agft(), SAME, {1000: 100.0, 1200: 150.0, 1400: 300.0})
    bench.play(80)
    assert {clock for _, clock in bench.history} == {0}
    bench.play(2)
    assert bench.clock == 1400  # all untried: the tie goes to the fastest
    assert bench.changes_s() == [10.125]


def test_reward_by_hand() -> None:
    """300 W, 20 ms: EDP 300·1·0.02 = 6 J·s, reference 0.9 of it, 5.4. Half of that: 2·(1 - 0.5);
    twice and more: -2."""
    bench = Bench(agft(), SAME, {1000: 100.0, 1200: 150.0, 1400: 300.0})
    bench.play(85)
    assert bench.made.reward(5.4) == pytest.approx(0.0, abs=1e-6)
    assert bench.made.reward(2.7) == pytest.approx(1.0, abs=1e-6)
    assert bench.made.reward(10.8) == pytest.approx(-2.0, abs=1e-6)
    assert bench.made.reward(99.0) == -2.0


def test_a_change_of_clock_is_followed_by_a_rest() -> None:
    """1/4 s that no window counts: two changes are 1.25 s apart at least."""
    bench = Bench(agft(), SAME, {1000: 100.0, 1200: 150.0, 1400: 300.0})
    bench.play(600)
    changes = bench.changes_s()
    assert len(changes) > 3
    gaps = [b - a for a, b in pairwise(changes)]
    assert min(gaps) >= 1.25


def test_it_learns_the_clock_of_least_energy_delay_product() -> None:
    """EDP is in proportion to P·T: 100 W·40 ms = 4, 150·20 = 3, 300·18 = 5.4: the middle one.
    After 300 rounds the weight of uncertainty is at its floor."""
    delay_s = {1000: 0.040, 1200: 0.020, 1400: 0.018}
    bench = Bench(agft(), delay_s, {1000: 100.0, 1200: 150.0, 1400: 300.0})
    bench.play(4000)
    late = [clock for now_s, clock in bench.history if now_s > 300.0]
    assert late.count(1200) > 0.9 * len(late)


def test_a_clock_that_breaks_the_promise_is_dropped_with_all_slower_ones() -> None:
    """60 ms at 1200 MHz, above 50: neither it nor 1000 is ever taken again."""
    delay_s = {1000: 0.045, 1200: 0.060, 1400: 0.018}
    bench = Bench(agft(), delay_s, {1000: 30.0, 1200: 60.0, 1400: 300.0})
    bench.play(3000)
    assert bench.made.clocks_mhz == (1400,)
    assert [c for _, c in bench.history[-1000:]].count(1400) == 1000


def test_the_top_clock_is_never_dropped() -> None:
    bench = Bench(agft(), {1000: 1.0, 1200: 1.0, 1400: 1.0}, {1000: 1.0, 1200: 2.0, 1400: 3.0})
    bench.play(3000)
    assert bench.made.clocks_mhz == (1400,)


def test_a_clock_that_fails_early_is_dropped() -> None:
    """1000 MHz: 100 W·49 ms = 4.9 against 0.9·300 W·5 ms = 1.35 of the reference: reward -2 at each
    of three tries. 1200 MHz, 150 W·5 ms, is better than the reference and stays. The weight of
    uncertainty does not decay here, so that the bad clock is tried three times within 60 rounds."""
    delay_s = {1000: 0.049, 1200: 0.005, 1400: 0.005}
    bench = Bench(agft(explore_decay=0.0), delay_s, {1000: 100.0, 1200: 150.0, 1400: 300.0})
    bench.play(1500)
    assert bench.made.clocks_mhz == (1200, 1400)
    tries = sum(1 for (_, a), (_, b) in pairwise(bench.history) if b == 1000 and a != b)
    assert 1 <= tries <= 3


def test_a_clock_that_is_only_a_little_worse_is_not_dropped_early() -> None:
    """1000 MHz: 337.5 W·20 ms = 6.75 against 5.4, reward 2·(1 - 1.25) = -0.5 at each try: above
    -1.2, also after three. Forty rounds, at which history speaks, are not over."""
    power_w = {1000: 337.5, 1200: 150.0, 1400: 300.0}
    bench = Bench(agft(explore_decay=0.0, explore_ratio=50.0), SAME, power_w)
    bench.play(380)
    assert bench.made.clocks_mhz == (1000, 1200, 1400)
    assert bench.made._arms[0].tries >= 3
    assert bench.made._round < 40


@pytest.mark.parametrize(("power_w", "left"), [(170.0, (1000, 1400)), (151.0, (1000, 1200, 1400))])
def test_history_prunes_what_is_surely_worse(power_w: float, left: tuple[int, ...]) -> None:
    """1000 MHz at 150 W ± 1 %, a spread of 1.5 W in EDP: 20 W more is surely worse, 1 W is not.
    Round 40 is the first that looks back, and 1200 MHz has been tried six times by then."""
    made = agft(explore_decay=0.0, explore_ratio=50.0, explore_floor_ratio=50.0)
    bench = Bench(made, SAME, {1000: 150.0, 1200: power_w, 1400: 300.0})
    for k in range(500):
        bench._power_w[1000] = 148.5 if k % 16 < 8 else 151.5
        bench.play(1)
    assert made.clocks_mhz == left


def test_a_window_that_a_long_idleness_interrupted_is_forgotten() -> None:
    """Ten seconds of silence at 50 W within the second baseline window; were it counted, the
    reference would be off by more than half of a window's energy-delay product."""
    made = agft(num_baseline=3)
    bench = Bench(made, SAME, {1000: 100.0, 1200: 150.0, 1400: 300.0})
    bench.play(12)
    bench.state.now_s += 10.0
    bench.state.energy_j += 500.0
    bench.play(30)
    assert made.reward(0.9 * 300.0 * 1.0 * 0.02) == pytest.approx(0.0, abs=1e-6)


def test_the_same_windows_give_the_same_clocks() -> None:
    histories = []
    for _ in range(2):
        bench = Bench(agft(), SAME, {1000: 100.0, 1200: 150.0, 1400: 300.0})
        bench.play(800)
        histories.append(bench.history)
    assert histories[0] == histories[1]


def test_clocks_can_be_named() -> None:
    made = make_controller("agft:frequencies=1000+1400", make_context())
    assert isinstance(made, Agft)
    assert made.clocks_mhz == (1000, 1400)


def test_a_prefill_window_s_delay_is_that_of_the_batches_that_ended() -> None:
    """Three requests that waited 10 ms for a batch of 20 ms, one that waited 30 for 40:
    (3·30 + 70) / 4 = 40 ms. What the batch to come has waited is not over."""
    window = _Window(0.0)
    state = InstanceState(instance_id=0, phase="prefill", last_queue_delay_s=9.0)
    window.add(state)
    for now_s, batch, delay_s, duration_s in ((0.5, 3, 0.010, 0.020), (1.0, 1, 0.030, 0.040)):
        state.now_s, state.ended_batch_size = now_s, batch
        state.ended_queue_delay_s, state.last_duration_s = delay_s, duration_s
        window.add(state)
        if now_s == 0.5:
            assert window.measure(state, 1.0)[2] == pytest.approx(0.030)
    assert window.measure(state, 1.0)[2] == pytest.approx(0.040)
    alone = _Window(0.0)
    for now_s in (0.0, 0.5):
        state.now_s = now_s
        alone.add(state)
    assert alone.measure(state, 1.0)[2] == pytest.approx(0.070)  # one batch of one request
