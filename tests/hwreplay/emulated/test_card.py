"""Clocks and energy of an emulated card against closed forms: sums of watts times seconds.

The A100 profile's idle.csv: 63 W unlocked and at 1410 MHz, 39.4873 W at 1005, 38.1063 W at 810.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.hwreplay.emulated.conftest import PROFILE, Bench, MakeBench
from voltana.hwreplay.emulated.machine import Machine
from voltana.hwreplay.emulated.state import Behaviour, create_cards, open_cards
from voltana.profiles.catalog import load_profile
from voltana.profiles.common.errors import VoltanaError

UNLOCKED_W, W_1005, W_810 = 63.0, 39.4873, 38.1063


def energy_j(bench: Bench) -> float:
    return bench.card.look().energy_j


def test_rest_at_two_clocks_locked_in_the_middle_of_it(make_bench: MakeBench) -> None:
    bench = make_bench()
    assert bench.at(2.0).lock(1005) == 0
    assert bench.at(5.0).lock(0) == 0
    assert energy_j(bench.at(6.0)) == pytest.approx(3 * UNLOCKED_W + 3 * W_1005, rel=1e-12)


def test_a_lock_counts_from_when_it_takes_effect(make_bench: MakeBench) -> None:
    """Two under way at once; nobody looks while they take effect."""
    bench = make_bench(lock_lag_s=0.2)
    bench.at(1.0).lock(1005)
    bench.at(1.1).lock(810)
    look = bench.at(1.15).card.look()
    assert (look.clock_mhz, look.locked_mhz, look.wanted_mhz) == (1410, 0, 810)
    assert look.next_change_s == pytest.approx(1.2)
    assert energy_j(bench.at(2.3)) == pytest.approx(
        1.2 * UNLOCKED_W + 0.1 * W_1005 + 1.0 * W_810, rel=1e-12
    )
    assert bench.card.effective_clock_mhz() == 810
    assert bench.card.look().next_change_s == math.inf


def test_a_shorter_lag_does_not_overtake_a_longer_one(make_bench: MakeBench) -> None:
    bench = make_bench(lock_lag_s=1.0)
    bench.at(0.0).lock(1005)
    bench.card.faults.lock_lag_s = 0.0
    bench.at(0.5).lock(0)
    assert bench.at(0.9).card.look().locked_mhz == 0
    look = bench.at(1.0).card.look()
    assert (look.locked_mhz, look.wanted_mhz) == (0, 0)


def test_more_locks_than_places_end_at_the_newest(make_bench: MakeBench) -> None:
    bench = make_bench(lock_lag_s=1.0)
    for number in range(100):
        bench.at(number / 1000).lock((705, 1005)[number % 2])
    bench.at(0.1).lock(810)
    assert bench.at(1.2).card.look().locked_mhz == 810


def test_passes_draw_their_own_power_and_end_by_themselves(make_bench: MakeBench) -> None:
    """Begun at 1 for 0.5 s and not ended: at rest from 1.5 on. The second is cut short."""
    bench = make_bench()
    bench.at(1.0).card.begin_pass(300.0, 0.5)
    bench.at(2.0).card.begin_pass(200.0, 1.0)
    bench.at(2.25).card.end_pass()
    look = bench.at(3.0).card.look()
    assert look.energy_j == pytest.approx(300 * 0.5 + 200 * 0.25 + UNLOCKED_W * 2.25, rel=1e-12)
    assert look.busy_s == pytest.approx(0.75)
    assert look.num_passes == 2


def test_a_pass_whose_clock_changes_is_rebooked_from_there(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.at(0.0).card.begin_pass(300.0, 1.0)
    bench.at(0.5).lock(1005)
    bench.card.begin_pass(200.0, 0.7)
    look = bench.at(2.0).card.look()
    assert look.energy_j == pytest.approx(300 * 0.5 + 200 * 0.7 + W_1005 * 0.8, rel=1e-12)
    assert look.num_passes == 1


def test_energy_does_not_depend_on_who_looks_when(make_bench: MakeBench) -> None:
    """The same story, once unseen and once looked at at a thousand random moments between."""

    def tell(bench: Bench, looks: np.ndarray) -> float:
        events = [
            (0.3, lambda: bench.lock(1005)), (0.7, lambda: bench.card.begin_pass(250.0, 0.4)),
            (0.9, lambda: bench.card.sag(810, 0.35)), (1.4, lambda: bench.lock(0)),
            (1.6, lambda: bench.card.begin_pass(310.0, 0.1)),
        ]  # fmt: skip
        merged = events + [(float(at_s), bench.card.look) for at_s in looks]
        for at_s, act in sorted(merged, key=lambda event: event[0]):
            bench.at(at_s)
            act()
        return energy_j(bench.at(3.0))

    rng = np.random.default_rng(4)
    seen_j = tell(make_bench(lock_lag_s=0.05), rng.uniform(0.0, 3.0, 1000))
    assert seen_j == pytest.approx(tell(make_bench(lock_lag_s=0.05), np.empty(0)), rel=1e-12)


def test_a_sag_caps_the_clock_for_its_time_and_says_why(make_bench: MakeBench) -> None:
    """A lock below it stays what it is."""
    bench = make_bench()
    bench.at(1.0).card.sag(1005, 2.0)
    assert bench.at(2.0).card.effective_clock_mhz() == 1005
    bench.lock(810)
    assert bench.card.effective_clock_mhz() == 810
    bench.lock(0)
    assert bench.at(3.5).card.effective_clock_mhz() == 1410
    assert energy_j(bench) == pytest.approx(1.5 * UNLOCKED_W + 2 * W_1005, rel=1e-12)


def test_a_lost_card_draws_nothing_and_comes_back_unlocked(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.lock(1005)
    bench.at(1.0).card.lose()
    assert bench.at(2.0).card.look().is_lost
    bench.card.find_again()
    look = bench.at(3.0).card.look()
    assert (look.locked_mhz, look.is_lost) == (0, False)
    assert look.energy_j == pytest.approx(W_1005 + UNLOCKED_W, rel=1e-12)


def test_power_is_the_mean_of_the_window_before_the_last_period(make_bench: MakeBench) -> None:
    """A pass of 300 W from 0.19 to 0.23: the window of 25 ms before 0.2 holds 10 ms of it."""
    bench = make_bench()
    assert bench.at(0.0).reading_w() == UNLOCKED_W  # before the first period: now
    bench.at(0.19).card.begin_pass(300.0, 0.04)
    assert bench.at(0.199).reading_w() == pytest.approx(UNLOCKED_W)  # still that of 0.1
    expected_w = (10 * 300.0 + 15 * UNLOCKED_W) / 25
    assert bench.at(0.201).reading_w() == pytest.approx(expected_w, rel=1e-9)
    assert bench.at(0.299).reading_w() == pytest.approx(expected_w, rel=1e-9)
    assert bench.at(0.301).reading_w() == pytest.approx(UNLOCKED_W, rel=1e-9)


def test_a_second_of_averaging_as_newer_cards_have(make_bench: MakeBench) -> None:
    bench = make_bench(power_window_s=1.0, power_period_s=0.1)
    bench.at(2.0).card.begin_pass(363.0, 0.5)
    assert bench.at(2.55).reading_w() == pytest.approx(0.5 * 363 + 0.5 * UNLOCKED_W, rel=1e-9)
    assert bench.at(40.0).reading_w() == pytest.approx(UNLOCKED_W, rel=1e-9)


def test_the_counter_moves_in_ticks_and_is_exact_at_them(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.at(0.05).card.begin_pass(300.0, 0.1)
    assert bench.at(0.09).counter_j() == 0.0
    at_tick_j = 0.05 * UNLOCKED_W + 0.05 * 300
    assert bench.at(0.101).counter_j() == pytest.approx(at_tick_j, rel=1e-9)
    assert bench.at(0.199).counter_j() == pytest.approx(at_tick_j, rel=1e-9)
    end_j = 100 * UNLOCKED_W + 0.1 * (300 - UNLOCKED_W)
    assert bench.at(100.001).counter_j() == pytest.approx(end_j, rel=1e-9)


def test_of_two_ranks_each_rests_at_half_the_instances_power(make_bench: MakeBench) -> None:
    """qwen3-32b-tp2 states an instance of two cards."""
    from voltana.profiles.catalog import load_profile

    name = "a100-80g-sxm/qwen3-32b-tp2"
    bench = make_bench(num_cards=2, profile=name)
    bench.lock(1005)
    idle_w = float(load_profile(name).idle_power_w(1005))
    assert energy_j(bench.at(2.0)) == pytest.approx(idle_w, rel=1e-12)  # two seconds of a half


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lock_lag_s": -1.0}, "lock_call_s and lock_lag_s must be >= 0"),
        ({"power_window_s": 2.0}, "times grid_s"),
        ({"counter_period_s": 0.001}, "times grid_s"),
    ],
)
def test_behaviour_out_of_range_is_one_line(values: dict[str, float], said: str) -> None:
    with pytest.raises(VoltanaError, match=said) as done:
        Behaviour(**values)
    assert "\n" not in str(done.value)


def test_unlike_instances_stand_on_cards_of_their_own(make_bench: MakeBench) -> None:
    """One prefill instance of one card, decode of two and one: the third card is another kind's."""
    wide, other = "a100-80g-sxm/qwen3-32b-tp2", "h100-sxm/llama-3.1-8b"
    bench = make_bench()
    machine = Machine(
        profile=PROFILE, counts={"prefill": 1, "decode": 2}, directory=bench.path.parent,
        library=bench.library, own={"decode": [wide, other]},
    )  # fmt: skip
    assert machine.gpus() == {"prefill": ((0,),), "decode": ((1, 2), (3,))}
    assert machine.profiles == [PROFILE, wide, wide, other]
    create_cards(bench.path, machine.profiles, machine.num_cards, bench.library)
    cards = open_cards(bench.path, bench.library)
    for index, name in ((0, PROFILE), (2, wide), (3, other)):
        meta = load_profile(name).meta
        fixed = cards[index].record.fixed
        assert cards[index].name == meta.gpu.name
        assert max(fixed.clocks_mhz[: fixed.num_clocks]) == meta.clocks.supported_mhz[-1]


def test_no_cards_are_no_machine(make_bench: MakeBench) -> None:
    bench = make_bench()
    with pytest.raises(VoltanaError, match=r"must be 1\.\.64, got 0"):
        create_cards(bench.path, PROFILE, 0, bench.library)
