"""How many of a card's clocks a budget holds: worked by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.measure.budget import clock_s, thinned
from voltana.profiles.measure.campaign import Plan
from voltana.profiles.measure.trial import Protocol

CLOCKS_MHZ = tuple(range(345, 1995, 15))


def plan(budget_s: float) -> Plan:
    return Plan(
        clocks_mhz=CLOCKS_MHZ, phases=("prefill", "decode"), budget_s=budget_s, max_batch_size=8,
        max_tokens=100, protocol=Protocol(window_s=1.9, num_trials=3, warm_up_s=1.0, settle_s=3.0),
    )  # fmt: skip


def test_a_clock_costs_its_idle_power_and_twenty_points() -> None:
    """Trials of 3 x 2 s; idle 3 + 6 s; a point 1 + 1 + 6 s, ten of each phase."""
    assert clock_s(plan(1.0)) == pytest.approx(9.0 + 20 * 8.0)


@pytest.mark.parametrize(("budget_s", "number"), [(338.0, 2), (3600.0, 21), (1e6, 110)])
def test_as_many_clocks_as_fit_are_spread_over_the_range(budget_s: float, number: int) -> None:
    chosen = thinned(CLOCKS_MHZ, plan(budget_s))
    assert len(set(chosen)) == number
    assert (chosen[0], chosen[-1]) == (345, 1980)
    steps = {b - a for a, b in pairwise(chosen)}
    assert max(steps) - min(steps) <= 15


def test_a_card_with_one_clock_has_nothing_to_thin() -> None:
    assert thinned((1000,), plan(170.0)) == (1000,)


def test_a_budget_for_less_than_two_is_refused() -> None:
    with pytest.raises(VoltanaError, match=r"169 s a clock and 2 clocks at least.*337 s"):
        thinned(CLOCKS_MHZ, plan(337.0))
