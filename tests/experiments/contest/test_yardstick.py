"""The yardstick against counts by hand and by brute force, and the two studies that print it."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest

from voltana.experiments.contest.room import Room, line
from voltana.experiments.contest.yardstick import plan
from voltana.experiments.frontier.static.fleets import profile_knots
from voltana.experiments.runs import cached_profile, run, workload_of
from voltana.experiments.study.capacity import highest
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.metrics import summarise
from voltana.sim.workload.workload import Workload

BASE = {"profile": "a100-80g-sxm/llama-3.1-8b", "slo_ttft_s": 0.6, "slo_itl_s": 0.045}


def workload(arrival_s: list[float], inputs: list[int], outputs: list[int]) -> Workload:
    return Workload(
        arrival_s=np.array(arrival_s),
        input_tokens=np.array(inputs),
        output_tokens=np.array(outputs),
    )


def test_prefill_is_the_cheapest_of_all_partitions() -> None:
    """Seven prompts have 64 partitions into neighbours; each is priced with `StepModel` itself."""
    config = make_config(BASE)
    profile = cached_profile(config.profile)
    arrivals = [0.0, 0.05, 0.3, 0.35, 0.36, 0.9, 1.0]
    prompts = [200, 900, 50, 400, 120, 3000, 64]
    truth = profile.truth()
    idle_w = min(truth.idle_power_w(clock) for clock in (0, *profile.clocks_mhz))
    clocks = profile_knots(profile, profile.clocks_mhz)

    def batch_j(first: int, end: int) -> float:
        tokens = prompts[first:end]
        effective = sum(tokens) ** 2 / sum(t * t for t in tokens)
        left_s = 0.6 - 2 * 0.045 - (arrivals[end - 1] - arrivals[first])
        points = [truth.time_and_power("prefill", f, effective, sum(tokens)) for f in clocks]
        return min(((w - idle_w) * s for s, w in points if s <= left_s), default=float("inf"))

    least = float("inf")
    for cuts in product((False, True), repeat=len(prompts) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(prompts)]
        least = min(least, sum(batch_j(*edge) for edge in pairwise(edges)))
    found = plan(config, profile, workload(arrivals, prompts, [100] * 7))
    assert found.prefill_j == pytest.approx(least, rel=1e-9)


def test_decode_at_a_steady_rate_costs_the_cheapest_steady_state() -> None:
    """Over long times the program must come to n = λ·L·T(f, n/k) at the best of all (f, k)."""
    config = make_config(BASE)
    profile = cached_profile(config.profile)
    rate, seconds, tokens = 20, 600, 300
    arrivals = np.arange(rate * seconds) / rate
    requests = workload(arrivals.tolist(), [200] * len(arrivals), [tokens] * len(arrivals))
    truth, context = profile.truth(), 200 + 0.5 * (tokens - 1)
    idle_w = min(truth.idle_power_w(clock) for clock in (0, *profile.clocks_mhz))
    least_w = float("inf")
    for clock, k in product(profile_knots(profile, profile.clocks_mhz), (1, 2)):
        for batch in range(1, 260):
            time_s, power_w = truth.time_and_power("decode", clock, batch, batch * context)
            if time_s <= 0.045 and k * batch >= rate * tokens * time_s:
                least_w = min(least_w, k * (power_w - idle_w))
                break
    mean_w = plan(config, profile, requests).decode_j / seconds
    assert mean_w == pytest.approx(least_w, rel=0.03)
    assert mean_w < 1.005 * least_w  # clocks may be mixed, and the batch has to fill up first


def test_a_policy_spends_more_than_the_planner() -> None:
    """Noise, chance and delay cost something: the default stays above, and not by half."""
    config = make_config(
        {**BASE, "rate_rps": 25, "duration_s": 60, "controller": "ecomin", "router": "consolidate"}
    )
    spent_j = summarise(run(config))["energy_j"]
    planned_j = plan(config, cached_profile(config.profile), workload_of(config)).energy_j
    assert planned_j < spent_j < 1.5 * planned_j


def test_a_load_beyond_the_top_clocks_has_no_plan() -> None:
    config = make_config({**BASE, "rate_rps": 80, "duration_s": 60})
    with pytest.raises(VoltanaError, match="do not carry this load: add instances or lower"):
        plan(config, cached_profile(config.profile), workload_of(config))


def test_the_highest_rate_is_found_by_halving() -> None:
    asked: list[float] = []

    def keeps(rate: float) -> bool:
        asked.append(rate)
        return rate <= 39.4

    assert highest(keeps, 30.0, 50.0, 0.5) == 39.0
    assert len(asked) <= 7
    with pytest.raises(VoltanaError, match="go lower"):
        highest(lambda rate: False, 30.0, 50.0, 0.5)


def test_savings_are_of_the_static_fleet() -> None:
    """400 kJ of 500 are 20 % saved, 350 kJ are 30 and 300 kJ are 40."""
    room = Room(load="day", fleet_kj=500.0, default_kj=400.0, planner_kj=350.0, bound_kj=300.0)
    assert line(room) == "| day | 500.0 | 400.0 | 350.0 | 300.0 | 20.0 | 30.0 | 40.0 |"
