"""The lower bound: below every run, exact where it can be, and its minima against brute force."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.profiles.synthetic import (
    ROUGH_CLOCKS,
    constant_time_s,
    rough_profile,
    write_synthetic_profile,
)
from tests.sim.engine.fixtures import make_requests
from voltana.experiments.bound.lower import lower_bound
from voltana.experiments.bound.surface import decode_surface, prefill_knots
from voltana.experiments.runs import cached_profile, run, workload_of
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.schema import Provenance, SpreadMeta
from voltana.sim.config import make_config
from voltana.sim.engine.simulate import simulate
from voltana.sim.metrics import summarise
from voltana.sim.policies.registry import CONTROLLERS, ROUTERS
from voltana.sim.workload.generate import make_workload
from voltana.sim.workload.workload import Workload


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> list[Profile]:
    made = [rough_profile(tmp_path_factory.mktemp("rough"), seed) for seed in range(5)]
    made.append(write_synthetic_profile(tmp_path_factory.mktemp("smooth")))
    return [noisy(profile) for profile in made]


def noisy(profile: Profile) -> Profile:
    """With iterations that vary by 3 and 5 %; `noise_scale` turns that up and off."""
    stated = Provenance(status="modelled", source="a test")
    meta = replace(
        profile.meta, spread=SpreadMeta(prefill=0.03, decode=0.05),
        provenance={**profile.meta.provenance, "iteration_spread": stated},
    )  # fmt: skip
    return replace(profile, meta=meta)


REQUEST = st.tuples(st.floats(0.0, 0.3, allow_nan=False), st.integers(1, 250), st.integers(1, 40))
SETTINGS = st.fixed_dictionaries(
    {
        "controller": st.sampled_from(
            [*sorted(CONTROLLERS), "static:f=700", "static:f=1000", "ecofreq:idle=0",
             "ecomin:dwell=0,idle=0", "powercap:cap=150",
             "agft:window=0.05,settle=0.01,num_baseline=2", "rapid:period=0.05,cooldown=0.1",
             "polca:budget=500,lag=0.05,brake_lag=0.02,period=0.05"]
        ),
        "router": st.sampled_from(
            # mdp needs a policy file
            [*sorted(set(ROUTERS) - {"mdp"}), "ecoroute:tile=2", "kairos:fill=0.1"]
        ),
        "num_prefill": st.integers(1, 2),
        "num_decode": st.integers(1, 3),
        "active_prefill": st.just(1),
        "active_decode": st.sampled_from([None, 1]),
        "noise_scale": st.sampled_from([0.0, 1.0, 2.0]),
        "sag_depth": st.sampled_from([0.0, 0.5]),
        "actuation_latency_s": st.sampled_from([0.0, 0.003, 0.05]),
        "slo_itl_s": st.sampled_from([0.002, 0.004, 0.01]),
        "slo_ttft_s": st.sampled_from([0.05, 0.6]),
        "kv_capacity_tokens": st.sampled_from([280, 700, 4000]),
        "kv_reserve_tokens": st.sampled_from([0, 50]),
        "max_prefill_tokens": st.sampled_from([128, 1024]),
        "max_prefill_requests": st.sampled_from([2, 30]),
        "max_running_requests": st.sampled_from([2, 30]),
        "first_token": st.sampled_from(["decode", "prefill"]),
        "extrapolate": st.booleans(),
    }
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(REQUEST, min_size=1, max_size=30), values=SETTINGS, index=st.integers(0, 5)
)  # fmt: skip
def test_no_run_goes_below_the_bound(
    profiles: list[Profile], rows: list[tuple[float, int, int]], values: dict[str, Any], index: int
) -> None:
    """For the bound of any run, and for that of runs which attain what this one did."""
    gaps, inputs, outputs = zip(*rows, strict=True)
    workload = Workload(
        arrival_s=np.cumsum(gaps), input_tokens=np.array(inputs), output_tokens=np.array(outputs)
    )
    config = make_config({"profile": "rough", **values})
    record = simulate(config, profiles[index], workload)
    summary = summarise(record)
    anyone = lower_bound(config, profiles[index], workload)
    keeper = lower_bound(config, profiles[index], workload, attainment=summary["attainment"])
    assert anyone.energy_j <= summary["energy_j"]
    assert keeper.energy_j <= summary["energy_j"]
    assert anyone.makespan_s <= record.makespan_s * (1 + 1e-9)
    # the parts, too: each phase's energy above the floor
    floor_w = anyone.idle_floor_j / (len(record.instances) * anyone.makespan_s or 1.0)
    for phase, part_j in (("prefill", keeper.prefill_j), ("decode", keeper.decode_j)):
        busy = [(i.busy_energy_j, i.busy_s) for i in record.instances if i.phase == phase]
        above_j = sum(j - floor_w * s for j, s in busy)
        assert part_j <= above_j * (1 + 1e-9) + 1e-9


@pytest.mark.slow
@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(REQUEST, min_size=1, max_size=30), values=SETTINGS,
    cards=st.lists(st.integers(0, 5), min_size=5, max_size=5),
)  # fmt: skip
def test_no_run_of_unlike_cards_goes_below_the_bound(
    profiles: list[Profile],
    rows: list[tuple[float, int, int]],
    values: dict[str, Any],
    cards: list[int],
) -> None:
    """A card of its own for each instance, in both phases."""
    gaps, inputs, outputs = zip(*rows, strict=True)
    workload = Workload(
        arrival_s=np.cumsum(gaps), input_tokens=np.array(inputs), output_tokens=np.array(outputs)
    )
    others = {f"card {i}": profile for i, profile in enumerate(profiles)}
    names = [f"card {i}" for i in cards]
    own = {
        "prefill_profiles": "+".join(names[: values["num_prefill"]]),
        "decode_profiles": "+".join(names[2 : 2 + values["num_decode"]]),
    }
    config = make_config({"profile": "rough", **values, **own})
    record = simulate(config, profiles[0], workload, others=others)
    summary = summarise(record)
    for attainment in (0.0, summary["attainment"]):
        bound = lower_bound(config, profiles[0], workload, attainment=attainment, others=others)
        assert bound.energy_j <= summary["energy_j"]
        assert bound.makespan_s <= record.makespan_s * (1 + 1e-9)


def always(value: float, *_: object) -> float:
    """The same, whatever is asked."""
    return value


def test_the_bound_of_unlike_cards_has_each_at_its_own_powers(tmp_path: Path) -> None:
    """Iterations of 0.5 s: 200 W above 100 W at rest, or 150 W above 60 W.

    One request of 3 tokens at time 1 ends at 3 s at the earliest. Prefill has one of each, decode
    the first kind twice: 3·(100 + 60 + 100 + 100) J of floor, 1.5 s of decode at 100 W more, and
    64/1024 of an iteration of prefill at the lesser of 100 and 90 W more.
    """
    first, second = (
        write_synthetic_profile(
            tmp_path / str(idle_w), time_s=constant_time_s, power_w=partial(always, busy_w),
            idle_w=partial(always, idle_w),
        )
        for busy_w, idle_w in ((200.0, 100.0), (150.0, 60.0))
    )  # fmt: skip
    config = make_config(
        {"num_prefill": 2, "num_decode": 2, "prefill_profiles": "a+b", "decode_profiles": "a*2"}
    )
    workload = make_requests((1.0, 64, 3))
    bound = lower_bound(config, first, workload, others={"a": first, "b": second})
    assert bound.makespan_s == 3.0
    assert bound.idle_floor_j == pytest.approx(3 * 360.0, rel=1e-12)
    assert bound.decode_j == pytest.approx(150.0, rel=1e-12)
    assert bound.prefill_j == pytest.approx(64 / 1024 * 45.0, rel=1e-12)


def test_noise_takes_little_off_a_long_run_and_nothing_without_it() -> None:
    """One percent of the bound of 2,160 requests; with the noise off, the table's own bound."""
    profile = cached_profile("a100-80g-sxm/llama-3.1-8b")
    values = {"rate_rps": 36, "duration_s": 60, "slo_itl_s": 0.045, "controller": "static"}
    on, off = make_config(values), make_config({**values, "noise_scale": 0.0})
    workload = workload_of(on)
    with_noise = lower_bound(on, profile, workload, attainment=0.99).energy_j
    without = lower_bound(off, profile, workload, attainment=0.99).energy_j
    assert 0.98 * without < with_noise < without


def test_one_request_alone_meets_its_bound(tmp_path: Path) -> None:
    """Iterations of 0.5 s at 200 W, idle at 100 W, so the floor is 100 W.

    One request of 3 output tokens at time 1: prefill 0.5 s and decode 1.5 s, ends at 3 s.
    Two instances: 2·100·3 = 600 J, and 100 W more while busy: 50 J + 150 J.
    """
    profile = write_synthetic_profile(
        tmp_path, time_s=constant_time_s, power_w=lambda *_: 200.0, idle_w=lambda _: 100.0
    )
    config = make_config({"num_prefill": 1, "num_decode": 1, "controller": "static"})
    workload = make_requests((1.0, 64, 3))
    bound = lower_bound(config, profile, workload)
    assert bound.makespan_s == 3.0
    assert bound.idle_floor_j == 600.0
    assert bound.decode_j == pytest.approx(150.0, rel=1e-12)
    # prefill shares its iteration with up to 1,024 tokens: 64/1024 of 50 J
    assert bound.prefill_j == pytest.approx(3.125, rel=1e-12)
    summary = summarise(simulate(config, profile, workload))
    assert summary["energy_j"] == pytest.approx(800.0, rel=1e-12)


def test_a_promise_forbids_the_cheap_large_batches(tmp_path: Path) -> None:
    """T = 10 ms + 1 ms·b at 100 W above the floor: a token costs 100·(10/b + 1) mJ.

    64 together: 0.116 J, but T = 74 ms. A promise of 20 ms leaves b = 10: 0.2 J. 100 requests of
    101 tokens, all at once, all of them kept.
    """
    profile = write_synthetic_profile(
        tmp_path, power_w=lambda *_: 200.0, idle_w=lambda _: 100.0, batches=tuple(range(1, 65)),
        time_s=lambda phase, f, b, t: 0.01 + 0.001 * b if phase == "decode" else 0.01,
    )  # fmt: skip
    config = make_config({"slo_itl_s": 0.02, "slo_ttft_s": 100.0})
    workload = make_requests(*[(0.0, 10, 101)] * 100)
    anyone = lower_bound(config, profile, workload).decode_j
    keepers = lower_bound(config, profile, workload, attainment=1.0).decode_j
    assert anyone == pytest.approx(10_100 * 0.1 * (10 / 64 + 1), rel=1e-6)
    # the first token of each is free of the promise, the 100 after it are not
    expected = 100 * 0.1 * (10 / 64 + 1) + 10_000 * 0.2
    assert keepers == pytest.approx(expected, rel=0.01)
    assert keepers <= expected * (1 + 1e-9)


def test_minima_against_brute_force(profiles: list[Profile]) -> None:
    """Every clock, batch size and whole token count asked of the step model one by one."""
    for index in (0, 1, 3):
        profile = profiles[index]
        truth = profile.truth()
        surface = decode_surface(profile, 30, False, 4096).above(40.0)
        points = [
            (b, t, *truth.time_and_power("decode", f, b, t))
            for f in ROUGH_CLOCKS
            for b in range(1, 31)
            for t in (*range(1, 300, 13), *range(300, 4097, 201), 4096)
        ]
        b, t, time, power = np.array(points).T
        for beta, lam in ((0.0, 0.0), (1e-3, 0.0), (1e-4, 5.0), (0.05, 100.0)):
            brute = float((((power - 40.0) * time + lam * b * time - beta * t) / b).min())
            ours = surface.least_per_request(beta, lam)
            assert ours <= brute + 1e-12
            assert ours == pytest.approx(brute, abs=0.02 * abs(brute) + 0.02)


def test_prefill_rows_hold_every_point_above_them(profiles: list[Profile]) -> None:
    """Energy per token at random effective batch sizes is never below the rows' least."""
    rng = np.random.default_rng(3)
    for profile in profiles[:3]:
        truth = profile.truth(extrapolate=True)
        dense = []
        for knots, times, powers in prefill_knots(profile, 1024, 30, True):
            at = np.linspace(knots[0], knots[-1], 4000)
            cost = (np.interp(at, knots, powers) - 40) * np.interp(at, knots, times) / at
            dense.append(float(cost.min()))
        for _ in range(3000):
            clock, tokens = int(rng.choice(ROUGH_CLOCKS)), int(rng.integers(1, 1025))
            batch = float(np.exp(rng.uniform(np.log(0.2), np.log(30))))
            time_s, power_w = truth.time_and_power("prefill", clock, batch, tokens)
            assert (power_w - 40) * time_s / tokens >= min(dense) * (1 - 1e-3)


def test_of_the_shipped_profile_the_bound_is_close() -> None:
    """At 36 requests/s a kept run costs less than 1.5 times the bound: it says something."""
    config = make_config(
        {"rate_rps": 36, "duration_s": 60, "slo_itl_s": 0.045, "controller": "ecofreq"}
    )
    summary = summarise(run(config))
    assert summary["attainment"] > 0.99
    profile, workload = cached_profile(config.profile), workload_of(config)
    anyone = lower_bound(config, profile, workload).energy_j
    keeper = lower_bound(config, profile, workload, attainment=0.99).energy_j
    assert anyone <= keeper <= summary["energy_j"] <= 1.5 * keeper


def test_what_a_bound_refuses(profiles: list[Profile]) -> None:
    workload = make_requests((0.0, 10, 10))
    with pytest.raises(VoltanaError, match="run_limit_s"):
        lower_bound(make_config({"run_limit_s": 5.0}), profiles[0], workload)
    with pytest.raises(VoltanaError, match=r"attainment of a bound must be in \[0, 1\]"):
        lower_bound(make_config({}), profiles[0], workload, attainment=99.0)


def test_requests_that_are_turned_away_cost_nothing(profiles: list[Profile]) -> None:
    config = make_config({"kv_capacity_tokens": 50})
    assert lower_bound(config, profiles[0], make_requests((0.0, 100, 100))).energy_j == 0.0


def test_what_the_bound_does_not_know_is_refused(profiles: list[Profile]) -> None:
    workload = make_workload("chat:think=1", rate_rps=5.0, duration_s=5.0, seed=1)
    with pytest.raises(VoltanaError, match="let no turn wait"):
        lower_bound(make_config({}), profiles[-1], workload)
    alone = replace(workload, turns=None)
    with pytest.raises(VoltanaError, match="leave out prefix_cache_tokens"):
        lower_bound(make_config({"prefix_cache_tokens": 9_000}), profiles[-1], alone)
