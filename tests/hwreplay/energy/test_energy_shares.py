"""Whose energy it was: by hand, and conserved over any history."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltana.hwreplay.energy.shares import InstanceShares
from voltana.profiles.engines.sglang_metrics import IterationMetrics
from voltana.sim.policies.base import Phase

IDLE_W = 100.0


def make(phase: Phase) -> InstanceShares:
    return InstanceShares(phase, lambda _: IDLE_W, 1000)


def record(sequence: int, end_s: float, wall_s: float, **values: int) -> IterationMetrics:
    return IterationMetrics(sequence=sequence, received_s=end_s, wall_time_s=wall_s, **values)


def test_decode_is_shared_by_head_and_rest_is_nobody_s() -> None:
    """1 s between two readings, 250 J. One pass of 0.2 s with two requests, 0.3 s later one of
    0.3 s with three, of which this router knows two. Rest: 0.5 s · 100 W = 50 J. Passes: 200 J in
    0.5 s; 80 J for two, 120 J for three.
    """
    one = make("decode")
    one.on_reading(1.0, 7.0, 0)
    first, second = one.arrive(1, 0.5, 0), one.arrive(2, 0.6, 0)
    one.on_record(record(1, 1.3, 0.2, num_decode_requests=2))
    one.on_record(record(2, 1.9, 0.3, num_decode_requests=3))
    one.on_reading(2.0, 257.0, 0)
    one.settle(2.0)
    assert one.settled_s == 1.0  # the engine has not spoken of 2 s
    one.on_record(record(3, 2.0, 0.0))
    one.settle(2.0)
    assert (one.settled_s, one.idle_j) == (2.0, 57.0)
    assert first.energy_j == second.energy_j == pytest.approx(80.0 / 2 + 120.0 / 3)
    assert one.others_j == pytest.approx(40.0)


def test_prefill_is_shared_by_new_tokens_and_a_cut_prompt_pays_twice() -> None:
    """Prompts of 600 and 800 tokens, a budget of 1000: 600 + 400, then 400; 300 J a pass."""
    one = make("prefill")
    one.on_reading(0.0, 0.0, 0)
    short, long = one.arrive(1, 0.0, 600), one.arrive(2, 0.0, 800)
    one.on_record(record(1, 1.0, 1.0, num_prefill_requests=2, sum_prefill_tokens=1000))
    one.on_record(record(2, 2.0, 1.0, num_prefill_requests=1, sum_prefill_tokens=400))
    one.on_reading(2.0, 600.0, 0)
    one.settle(2.0)
    assert (short.energy_j, long.energy_j) == pytest.approx((180.0, 120.0 + 300.0))
    assert one.idle_j == one.others_j == 0.0


def test_who_left_with_the_last_token_pays_for_its_pass_and_for_none_after() -> None:
    """The client had its last token 1 ms before the record of the pass that made it."""
    one = make("decode")
    one.on_reading(0.0, 0.0, 0)
    gone, stays = one.arrive(1, 0.0, 0), one.arrive(2, 0.0, 0)
    one.leave(1, 0.999)
    one.on_record(record(1, 1.0, 1.0, num_decode_requests=2))
    one.on_record(record(2, 2.0, 1.0, num_decode_requests=1))
    one.on_reading(2.0, 400.0, 0)
    one.settle(2.0)
    assert (gone.energy_j, stays.energy_j) == pytest.approx((100.0, 300.0))


step = st.tuples(
    st.sampled_from(["arrive", "leave", "pass", "rest", "read", "restart"]),
    st.integers(0, 5),
    st.floats(0.001, 1.5),
)


@given(phase=st.sampled_from(["prefill", "decode"]), steps=st.lists(step, max_size=80))
def test_requests_rest_and_others_add_up_to_the_meter(
    phase: Phase, steps: list[tuple[str, int, float]]
) -> None:
    """Whatever comes in whatever order, with requests of others and meters that begin anew."""
    one, now_s, meter_j, total_j = make(phase), 0.0, 0.0, 0.0
    stays: dict[int, Any] = {}
    for number, (kind, who, length_s) in enumerate(steps):
        now_s += length_s
        if kind == "arrive":
            stay = one.arrive(who, now_s, 100 * (who + 1))
            stays[id(stay)] = stay
        elif kind == "leave":
            one.leave(who, now_s)
        elif kind == "pass":
            batch = {f"num_{phase}_requests": who + 1, "sum_prefill_tokens": 300 * who}
            one.on_record(record(number, now_s, length_s / 2, **batch))
        elif kind == "rest":
            one.on_record(record(number, now_s, 0.0))
        else:
            gained_j = 250.0 * length_s
            total_j += gained_j
            meter_j = gained_j if kind == "restart" and gained_j < meter_j else meter_j + gained_j
            one.on_reading(now_s, meter_j, 0)
        one.settle(now_s)
    one.settle(math.inf)
    of_stays = sum(stay.energy_j for stay in stays.values())
    assert of_stays == pytest.approx(one.requests_j, abs=1e-6)
    assert of_stays + one.idle_j + one.others_j == pytest.approx(total_j, abs=1e-6)
    assert min(one.idle_j, one.others_j, one.requests_j) >= -1e-9
