"""AGFT: its bandit against ridge regression solved at once, its windows, and that it learns."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.sim.policies.doubles import decode_state, make_context
from voltana.sim.policies.base import InstanceState
from voltana.sim.policies.controllers.agft import (
    NUM_FEATURES,
    Agft,
    AgftParameters,
    Arm,
    EdpWindow,
    Scores,
    has_failed_early,
    surely_worse,
)
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
        self.delay_s = delay_s
        self.power_w = power_w
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
            state.energy_j += 0.125 * self.power_w[at]
            state.last_duration_s = self.delay_s[at]
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
    assert bench.made.arms[0].tries >= 3
    assert bench.made.num_rounds < 40


@pytest.mark.parametrize(("power_w", "left"), [(170.0, (1000, 1400)), (151.0, (1000, 1200, 1400))])
def test_history_prunes_what_is_surely_worse(power_w: float, left: tuple[int, ...]) -> None:
    """1000 MHz at 150 W ± 1 %, a spread of 1.5 W in EDP: 20 W more is surely worse, 1 W is not.
    Round 40 is the first that looks back, and 1200 MHz has been tried six times by then."""
    made = agft(explore_decay=0.0, explore_ratio=50.0, explore_floor_ratio=50.0)
    bench = Bench(made, SAME, {1000: 150.0, 1200: power_w, 1400: 300.0})
    for k in range(500):
        bench.power_w[1000] = 148.5 if k % 16 < 8 else 151.5
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
    window = EdpWindow(0.0)
    state = InstanceState(instance_id=0, phase="prefill", last_queue_delay_s=9.0)
    window.add(state)
    for now_s, batch, delay_s, duration_s in ((0.5, 3, 0.010, 0.020), (1.0, 1, 0.030, 0.040)):
        state.now_s, state.ended_batch_size = now_s, batch
        state.ended_queue_delay_s, state.last_duration_s = delay_s, duration_s
        window.add(state)
        if now_s == 0.5:
            assert window.measure(state, 1.0)[2] == pytest.approx(0.030)
    assert window.measure(state, 1.0)[2] == pytest.approx(0.040)
    alone = EdpWindow(0.0)
    for now_s in (0.0, 0.5):
        state.now_s = now_s
        alone.add(state)
    assert alone.measure(state, 1.0)[2] == pytest.approx(0.070)  # one batch of one request


def test_decode_window_by_hand() -> None:
    """Opened at 1 s and 100 J; until 2 s 10 requests an iteration of 20 ms and 20 of 30 ms, 400 J.

    30 tokens in 1 s are 24 in a window of 0.8 s, 15 an iteration; 300 J are 240; mean delay (10·20
    + 20·30) / 30 ms. An iteration of unknown length counts for nothing."""
    window = EdpWindow(1.0)
    state = decode_state(batch=99, tokens=9999, waiting=2, kv=250)
    state.kv_capacity_tokens = 1000
    for now_s, energy_j, batch, duration_s in (
        (0.9, 70.0, 7, 0.5), (1.0, 100.0, 7, 0.5), (1.2, 200.0, 10, 0.02), (1.6, 300.0, 5, 0.0),
        (2.0, 400.0, 20, 0.03),
    ):  # fmt: skip
        state.now_s, state.energy_j = now_s, energy_j
        state.ended_batch_size, state.ended_tokens, state.last_duration_s = batch, 999, duration_s
        window.add(state)
        assert window.is_open == (now_s >= 1.0)
    assert (window.opened_s, window.heard_s) == (1.0, 2.0)
    features, edp, delay_s = window.measure(state, 0.8)
    assert features.tolist() == pytest.approx([1.0, 0.0, 24.0, 15.0, 15.0, 0.25])
    assert delay_s == pytest.approx(0.8 / 30)
    assert edp == pytest.approx(240 * 0.8 / 30)


def test_prefill_window_by_hand() -> None:
    """1,000 tokens of 4 prompts and 500 of one within 0.5 s: 2,400 in 0.8 s, 750 an iteration."""
    window = EdpWindow(0.0)
    state = InstanceState(instance_id=0, phase="prefill", kv_tokens=1)
    window.add(state)
    for now_s, batch, tokens in ((0.25, 4, 1000), (0.5, 1, 500)):
        state.now_s, state.last_duration_s = now_s, 0.1
        state.ended_batch_size, state.ended_tokens = batch, tokens
        window.add(state)
    features, edp, delay_s = window.measure(state, 0.8)
    assert features.tolist() == pytest.approx([0.0, 2400.0, 0.0, 750.0, 2.5, 1.0])
    assert edp == 0.0
    assert delay_s == pytest.approx(0.1)


def test_a_window_without_an_iteration_has_no_delay() -> None:
    window, state = EdpWindow(0.0), decode_state()
    window.add(state)
    state.now_s, state.energy_j = 1.0, 50.0
    window.add(state)
    features, edp, delay_s = window.measure(state, 1.0)
    assert (features.tolist(), edp, delay_s) == ([0.0] * 6, 0.0, 0.0)


def test_scores_are_numpys_of_all_samples_so_far_within_three() -> None:
    """Against the mean and the population's spread at once. The last feature never varies; the one
    before is 0 fifty times and then 1, which is 7 deviations off."""
    rng = np.random.default_rng(2)
    samples = rng.normal(size=(51, 4))
    samples[:, 2], samples[:, 3] = 0.0, 5.0
    samples[50, 2] = 1.0
    made = Scores(4)
    for count, sample in enumerate(samples, start=1):
        seen = samples[:count]
        spread = seen.std(axis=0)
        expected = (sample - seen.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
        scores = made.of(sample)
        assert scores == pytest.approx(np.clip(expected, -3, 3), abs=1e-9)
        assert count < 51 or scores[2:].tolist() == [3.0, 0.0]


@pytest.mark.parametrize(("num_rounds", "weight"), [(0, 10.0), (50, 3.678794), (231, 0.1)])
def test_exploration_decays_to_its_floor(num_rounds: int, weight: float) -> None:
    """10·exp(-0.02·round): 10/e after 50; 0.0985, less than 0.1, after 231."""
    assert AgftParameters().exploration(num_rounds) == pytest.approx(weight, abs=1e-6)


def arm(*edps: float, reward: float = 0.0) -> Arm:
    """A clock that was tried at those energy delay products, with that mean reward."""
    made = Arm(1000, ridge=1.0)
    for edp in edps:
        made.learn(np.zeros(NUM_FEATURES), reward, edp)
    return made


@pytest.mark.parametrize(
    ("tries", "reward", "num_rounds", "failed"),
    [
        (3, -1.25, 60, True), (2, -1.25, 60, False), (3, -1.25, 61, False), (3, -1.125, 60, False),
        (8, -1.25, 8, True),
    ],
)  # fmt: skip
def test_early_failure(tries: int, reward: float, num_rounds: int, failed: bool) -> None:
    """A mean of -1.2 or less after three tries at least, up to the sixtieth round."""
    assert has_failed_early(arm(*[1.0] * tries, reward=reward), num_rounds) is failed


def test_surely_worse_is_by_more_than_four_deviations_of_the_best() -> None:
    """Three times 9 and 11: mean 10, spread sqrt(6/5) = 1.095 with n - 1: up to 14.38."""
    best = arm(9.0, 11.0, 9.0, 11.0, 9.0, 11.0)
    near, far, hardly_tried = arm(*[14.38] * 6), arm(*[14.39] * 6), arm(*[99.0] * 5)
    assert surely_worse([near, best, far, hardly_tried]) == [far]
    assert surely_worse([hardly_tried]) == []


@pytest.mark.parametrize(
    ("below_mhz", "left"),
    [
        (1200, (1000, 1400)),  # it alone: it is not below the limit
        (1201, (1400,)),  # below it: with all slower ones
    ],
)
def test_a_slow_clock_that_fails_early_takes_the_slower_with_it(
    below_mhz: int, left: tuple[int, ...]
) -> None:
    """1200 MHz takes 900 W·20 ms, three times what the other two and the reference's windows do:
    -2 at each try, and 2·(1 - 1/0.9) = -0.22 for the others."""
    made = agft(explore_decay=0.0, prune_below_mhz=below_mhz)
    bench = Bench(made, SAME, {1000: 300.0, 1200: 900.0, 1400: 300.0})
    bench.play(380)
    assert made.clocks_mhz == left


def test_a_rest_begins_when_nothing_was_heard_for_a_window_and_the_idle_time() -> None:
    """Windows of 1 s, idle after 2 s: at 3 s of silence the window goes on and closes, at 3.125 s
    it is forgotten and another begins. Two windows of 300 W set the reference, then 1400 MHz."""
    for silent_s, clocks in ((3.0, [0, 1400]), (3.125, [0, 0])):
        bench = Bench(agft(num_baseline=2, idle_s=2.0), SAME, dict.fromkeys(SAME, 300.0))
        bench.play(9)
        bench.state.now_s += silent_s - 0.125
        seen = [bench.clock]
        bench.play(1)
        assert [*seen, bench.clock] == clocks
