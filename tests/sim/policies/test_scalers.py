"""Scalers' decisions by hand, and the integer program against trying everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from tests.sim.engine.test_scaling import STATES
from tests.sim.policies.doubles import FlatPower, Formula, make_context
from voltana.sim.policies.base import InstanceState, Phase, PowerState
from voltana.sim.policies.registry import make_scaler
from voltana.sim.policies.scalers.base import (
    Demand,
    FleetView,
    Kind,
    Plan,
    Scaler,
    ScalerContext,
    keep,
)
from voltana.sim.policies.scalers.capacity import Capacity, Load, Served
from voltana.sim.policies.scalers.dualscale import place

AWAKE_4: tuple[PowerState, ...] = ("awake", "awake", "awake", "awake")
LOAD = Load(rate_rps=10.0, input_tokens=100.0, input_burst=1.0, output_tokens=50.0)


def flat_context() -> ScalerContext:
    """Prefill takes 10 ms a prompt at 1000 MHz, a decode iteration 1 ms a request (both in
    proportion to 1/f); TTFT leaves 0.43 s for prefill, ITL is 0.1 s."""
    times = Formula(lambda p, f, b, t: (0.01 if p == "prefill" else 0.001) * b * 1000 / f)
    policy = make_context(times, slo_ttft_s=0.63, slo_itl_s=0.1)
    policy = replace(policy, num_prefill=1, num_decode=4)
    return ScalerContext(policy=policy, states=STATES)


class Watts(FlatPower):
    """So much at work."""

    def __init__(self, busy_w: float) -> None:
        self._busy_w = busy_w

    def power_w(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        return self._busy_w


def states_of(phase: Phase, *power_states: PowerState) -> list[InstanceState]:
    return [
        InstanceState(instance_id=i, phase=phase, power_state=state)
        for i, state in enumerate(power_states)
    ]


def view_of(
    now_s: float, rate_rps: float, decode: list[InstanceState], window_s: float = 10.0
) -> FleetView:
    """Prompts of 100 tokens and answers of 50; one prefill instance."""
    count = round(rate_rps * window_s)
    demand = Demand(
        window_s=window_s, requests=count, input_tokens=100 * count,
        squared_input_tokens=10_000 * count, finished_requests=count, finished_tokens=50 * count,
    )  # fmt: skip
    prefill = states_of("prefill", "awake")
    return FleetView(now_s=now_s, prefill=prefill, decode=decode, demand=demand)


def num_awake(plan: Plan) -> int:
    return sum(state == "awake" for state in plan.decode)


def mean_within(most: int) -> float:
    """m with m + 2.33·√m = most, by halving."""
    low, high = 0.0, float(most)
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if middle + 2.33 * math.sqrt(middle) < most else (low, middle)
    return low


def test_capacity_by_hand() -> None:
    """At 1400 MHz. Prefill: half of 0.43 s holds 30 prompts of 7.14 ms; so many come in 1 % of
    such times where 19.7 do on average. Decode: 140 requests take 0.1 s; it settles at the mean
    that reaches them in 1 %, 115."""
    capacity = Capacity(flat_context().policy, 0.0)
    prefill = capacity.served("prefill", 1400, LOAD)
    assert prefill.rate_rps == pytest.approx(mean_within(30) / 0.215)
    assert mean_within(30) == pytest.approx(19.7, abs=0.1)
    decode = capacity.served("decode", 1400, LOAD)
    batch = math.floor(mean_within(140))
    assert decode.rate_rps == pytest.approx(batch / (batch * 0.001 / 1.4) / 50)  # 28 requests/s
    assert decode.power_w == 100.0
    half = Capacity(flat_context().policy, 0.5)
    assert half.served("prefill", 1400, LOAD) == prefill
    slow = capacity.served("prefill", 1000, LOAD)
    assert slow.rate_rps == pytest.approx(mean_within(21) / 0.215)


def test_capacity_of_a_colocated_instance_by_hand() -> None:
    """At 1400 MHz, answers of 50: a prompt takes 7.14 ms, which over its 49 gaps is 0.146 ms beside
    the 0.714 ms that it takes in each iteration: 116 requests make a mean gap of 0.1 s. However
    many run, each takes 49 · 0.714 + 7.14 ms in all. Of that time it is prompts for a sixth."""
    context = replace(flat_context().policy, phase="colocated", first_token="prefill")
    capacity = Capacity(replace(context, power=TwoWatts()), 0.0)
    served = capacity.served("colocated", 1400, LOAD)
    one_s, all_s = 0.01 / 1.4, (49 * 0.001 + 0.01) / 1.4
    assert served.rate_rps == pytest.approx(1.0 / all_s)
    assert served.power_w == pytest.approx(100.0 + one_s / all_s * 200.0)
    # half of 0.1 s less a gap of 0.01 s holds 6 prompts, and no more may come in 99 % of such
    # times; 11 tokens take 14.3 ms in all, which would be 70 requests/s
    hasty = replace(context, slo_ttft_s=0.1, slo_itl_s=0.01)
    short = replace(LOAD, output_tokens=11.0)
    served = Capacity(hasty, -0.9).served("colocated", 1400, short)
    assert served.rate_rps == pytest.approx(mean_within(6) / 0.045)


def test_a_colocated_instance_serves_what_is_said_of_it(tmp_path: Path) -> None:
    """Prompts of 100 take 10 ms, b requests 5 + b/2 ms an iteration. Played evenly at the rate that
    is said: the mean gap is that of the mean batch b, which makes 49 tokens a request in 1/rate."""
    profile = write_synthetic_profile(
        tmp_path, time_s=lambda p, f, b, t: 1e-4 * t if p == "prefill" else 0.005 + 5e-4 * b
    )
    times = Formula(lambda p, f, b, t: 1e-4 * t if p == "prefill" else 0.005 + 5e-4 * b)
    context = replace(
        make_context(times, slo_ttft_s=2.0, slo_itl_s=0.05), phase="colocated",
        first_token="prefill",
    )  # fmt: skip
    rate_rps = Capacity(context, 0.1).served("colocated", 1400, LOAD).rate_rps
    requests = make_requests(*((k / rate_rps, 100, 50) for k in range(4000)))
    record, _ = run(
        profile,
        requests,
        num_prefill=0,
        num_decode=0,
        num_colocated=1,
        kv_capacity_tokens=10**6,
        extrapolate=True,
    )
    gap_s = np.average(record.itl_s, weights=record.itl_weight)
    # gap = 0.005 + b · 0.0005 + b · 0.01 / 49 with b = 49 · rate · gap
    assert gap_s == pytest.approx(0.005 / (1.0 - rate_rps * (49 * 0.0005 + 0.01)), rel=0.03)
    assert 0.03 < gap_s <= 0.045


def test_scalers_plan_a_colocated_fleet_as_one_phase() -> None:
    """23.7 requests/s of the hand-worked capacity each: 30 need two, and 36 with the reserve of a
    fifth of `scale-to-load` and `dualscale`, too. There is no plan for prefill."""
    context = flat_context()
    context = replace(context, policy=replace(context.policy, phase="colocated"))
    four = states_of("colocated", *AWAKE_4)
    view = replace(view_of(300.0, 30.0, four), prefill=[])
    counts = {}
    for spec in ("scale-to-load:memory=0,dwell=0", "dynamo", "throttllm:grace=0", "dualscale"):
        plan = make_scaler(spec, context).plan(view)
        assert plan.prefill == []
        counts[spec.partition(":")[0]] = num_awake(plan)
    assert counts == {"scale-to-load": 3, "dynamo": 2, "throttllm": 2, "dualscale": 2}


class TwoWatts(FlatPower):
    """100 W in decode, 300 W in prefill."""

    def power_w(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        return 300.0 if phase == "prefill" else 100.0


def test_burst_takes_capacity_away() -> None:
    capacity = Capacity(flat_context().policy, 0.0)
    bursts = (1.0, 2.0, 8.0)
    loads = [
        Load(rate_rps=1.0, input_tokens=100.0, input_burst=b, output_tokens=50.0) for b in bursts
    ]
    rates = [capacity.served("prefill", 1400, load).rate_rps for load in loads]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 1.5 * rates[2]


def test_those_who_serve_soonest_are_kept() -> None:
    states = states_of("decode", "asleep", "awake", "waking", "parked", "draining", "stopped")
    assert keep(states, 3, "stopped") == [
        "stopped", "awake", "awake", "stopped", "awake", "stopped",
    ]  # fmt: skip
    assert keep(states, 0, "parked").count("awake") == 1
    assert keep(states, 99, "parked").count("awake") == 6


def test_scale_to_load_is_quick_up_and_slow_down() -> None:
    """One instance serves 28 requests/s of decode. 60 a second and a fifth more, 72, need three at
    once. At 20 (24 with reserve, 26.4 with slack) one would do: one goes after 60 s, one later."""
    scaler = make_scaler("scale-to-load:memory=0,headroom=0", flat_context())
    one = states_of("decode", "awake", "asleep", "asleep", "asleep")
    assert num_awake(scaler.plan(view_of(5.0, 60.0, one))) == 3
    three = states_of("decode", "awake", "awake", "awake", "asleep")
    counts = [
        num_awake(scaler.plan(view_of(now_s, 20.0, three))) for now_s in (10.0, 40.0, 69.9, 70.0)
    ]
    assert counts == [3, 3, 3, 2]
    two = states_of("decode", "awake", "awake", "asleep", "asleep")
    assert num_awake(scaler.plan(view_of(71.0, 20.0, two))) == 2
    assert num_awake(scaler.plan(view_of(130.0, 20.0, two))) == 1


def test_a_load_within_the_slack_sends_nobody_away() -> None:
    """22 a second: 26.4 with reserve fit one instance, 29.0 with slack do not."""
    scaler = make_scaler("scale-to-load:memory=0,headroom=0,dwell=0", flat_context())
    two = states_of("decode", "awake", "awake")
    assert num_awake(scaler.plan(view_of(5.0, 22.0, two))) == 2
    assert num_awake(scaler.plan(view_of(10.0, 20.0, two))) == 1


def test_dynamo_follows_the_last_interval_alone() -> None:
    scaler = make_scaler("dynamo", flat_context())
    four = states_of("decode", *AWAKE_4)
    rates = (100.0, 27.0, 29.0, 57.0)
    counts = [num_awake(scaler.plan(view_of(180.0 * k, r, four))) for k, r in enumerate(rates)]
    assert counts == [4, 1, 2, 3]


def test_throttllm_waits_out_its_grace() -> None:
    """At first all count as needed. From 10 s on one would do: the others go 60 s after 0 s."""
    scaler = make_scaler("throttllm", flat_context())
    four = states_of("decode", *AWAKE_4)
    plan = [(0.0, 80.0), (10.0, 27.0), (59.0, 27.0), (60.0, 27.0), (70.0, 80.0)]
    counts = [num_awake(scaler.plan(view_of(now_s, rate, four))) for now_s, rate in plan]
    assert counts == [4, 4, 4, 1, 3]


def test_without_any_request_all_stay() -> None:
    four = states_of("decode", *AWAKE_4)
    for name in ("scale-to-load", "dynamo", "throttllm", "dualscale"):
        scaler: Scaler = make_scaler(name, flat_context())
        assert num_awake(scaler.plan(view_of(5.0, 0.0, four))) == 4


def test_dualscale_takes_the_lowest_clock_that_serves() -> None:
    """Power is flat at work, so that fewer instances are cheapest: 30 requests/s with a fifth more
    are 36, which two of 28 (1400 MHz) serve, and one does at no clock."""
    scaler = make_scaler("dualscale:headroom=0,frequencies=1000+1200+1400", flat_context())
    plan = scaler.plan(view_of(300.0, 30.0, states_of("decode", *AWAKE_4)))
    assert num_awake(plan) == 2
    assert (plan.prefill_mhz, plan.decode_mhz) != (0, 0)
    assert list(plan.decode) == ["awake", "awake", "stopped", "stopped"]


def test_dualscale_serves_with_the_kind_that_takes_less() -> None:
    """Decode has two instances of 28 requests/s at the top clock, and two of a kind whose
    iterations take half the time at one and a half times the power. Up to 23 requests/s, and a
    fifth more, one of the first is cheapest; above, one of the second, not two of the first."""
    context = flat_context()
    times = Formula(lambda p, f, b, t: (0.005 if p == "prefill" else 0.0005) * b * 1000 / f)
    quick = replace(context.policy, predictor=times, power=Watts(300.0))
    slow = replace(context.policy, power=Watts(200.0))
    kinds = [
        Kind(instances=(0, 2), policy=slow, states=STATES),
        Kind(instances=(1, 3), policy=quick, states=STATES),
    ]
    chosen = {}
    for rate_rps in (20.0, 30.0):
        scaler = make_scaler(
            "dualscale:headroom=0,frequencies=1400", replace(context, kinds={"decode": kinds})
        )
        plan = scaler.plan(view_of(300.0, rate_rps, states_of("decode", *AWAKE_4)))
        chosen[rate_rps] = list(plan.decode)
    assert chosen[20.0] == ["awake", "stopped", "stopped", "stopped"]
    assert chosen[30.0] == ["stopped", "awake", "stopped", "stopped"]


Option = tuple[int, int]
"""A kind and a clock."""


def test_placement_is_the_best_there_is() -> None:
    """Against trying every number of every kind at every clock, with and without a budget."""
    rng = np.random.default_rng(7)
    for trial in range(60):
        clocks, num_kinds = 4, 1 + trial % 2
        there = rng.integers(1, 5, (2, num_kinds)).tolist()
        low_w = rng.uniform(20, 90, num_kinds).tolist()
        served: list[dict[Option, Served]] = [
            {
                (kind, clock): Served(rate_rps=float(r), power_w=float(w))
                for kind in range(num_kinds)
                for clock, (r, w) in enumerate(
                    zip(
                        np.sort(rng.uniform(0, 20, clocks)),
                        rng.uniform(80, 400, clocks),
                        strict=True,
                    )
                )
            }
            for _ in there
        ]
        rate = float(rng.uniform(1, 50))
        away_w = sum(n * w for row in there for n, w in zip(row, low_w, strict=True))
        budget_w = None if trial % 3 else float(rng.uniform(200, 1600))
        found = place(
            [list(of.values()) for of in served],
            [[row[k] for k, _ in of] for row, of in zip(there, served, strict=True)],
            rate,
            low_w=[[low_w[k] for k, _ in of] for of in served],
            left_w=None if budget_w is None else budget_w - away_w,
        )
        best = tried(served, there, rate, low_w, budget_w)
        if best is None:
            assert found is None
            continue
        assert found is not None
        assert all(sum(n > 0 for n in row) == 1 for row in found)
        taken = [
            next((option, n) for option, n in zip(of, row, strict=True) if n)
            for of, row in zip(served, found, strict=True)
        ]
        assert cost_w(served, there, taken, low_w) == pytest.approx(best)


def cost_w(
    served: list[dict[Option, Served]],
    there: list[list[int]],
    taken: Sequence[tuple[Option, int]],
    low_w: list[float],
) -> float:
    total_w = 0.0
    for of, row, (option, count) in zip(served, there, taken, strict=True):
        away = [n - count * (kind == option[0]) for kind, n in enumerate(row)]
        total_w += count * of[option].power_w
        total_w += sum(n * w for n, w in zip(away, low_w, strict=True))
    return total_w


def tried(
    served: list[dict[Option, Served]],
    there: list[list[int]],
    rate: float,
    low_w: list[float],
    budget_w: float | None,
) -> float | None:
    options = [
        [(o, n) for o, s in of.items() for n in range(1, row[o[0]] + 1) if n * s.rate_rps >= rate]
        for of, row in zip(served, there, strict=True)
    ]
    costs = [cost_w(served, there, taken, low_w) for taken in itertools.product(*options)]
    kept = [c for c in costs if budget_w is None or c <= budget_w]
    return min(kept) if kept else None
