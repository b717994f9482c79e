"""Noise, sags and stalls against numbers drawn and added up in another way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import Falling, make_requests, run
from voltana.profiles.catalog import Profile
from voltana.sim.config import make_config
from voltana.sim.engine.physics.noise import BLOCK, IterationNoise
from voltana.sim.metrics import summarise
from voltana.sim.policies.controllers.fixed import NoParameters
from voltana.sim.policies.parts.prediction import SkewedPower
from voltana.sim.policies.registry import CONTROLLERS, Entry
from voltana.sim.records import FloatArray, RunRecord

DRIVERS = ("reference", "coalesced")
SPREADS = {700: 0.02, 1000: 0.03, 1400: 0.05}
"""Relative standard deviation of decode by clock."""
TO_HALF_IQR = 0.6745
SEED = 13


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Prefill 0.5 s without noise, decode 0.25 s with; 256 W busy."""
    return write_synthetic_profile(
        tmp_path_factory.mktemp("profile"),
        time_s=lambda p, f, b, t: 0.5 if p == "prefill" else 0.25,
        power_w=lambda p, f, b, t: 256.0,
        spread_s=lambda p, f, b, t: 0.0 if p == "prefill" else 0.25 * SPREADS[f] * TO_HALF_IQR,
    )


def multipliers(spread: float, count: int, instance_id: int = 0) -> FloatArray:
    """What decode's iterations are to be multiplied by: single draws, by the definition."""
    seeds = np.random.SeedSequence(SEED, spawn_key=(5, instance_id)).spawn(2)[0]
    draw = np.random.default_rng(seeds)
    log_sd = np.sqrt(np.log1p(spread**2))
    return np.array([np.exp(log_sd * draw.standard_normal() - log_sd**2 / 2) for _ in range(count)])


@pytest.mark.parametrize("engine", DRIVERS)
@pytest.mark.parametrize(("clock", "scale"), [(700, 1.0), (1400, 1.0), (1000, 3.0)])
def test_each_gap_is_the_table_s_times_its_own_number(
    steady: Profile, engine: str, clock: int, scale: float
) -> None:
    """A lone request of 2,500 tokens runs through two block ends; B has 50 tokens beside it."""
    tokens = 2_500
    record, summary = run(
        steady, make_requests((0.0, 4, tokens), (20.0, 4, 50)), engine=engine, seed=SEED,
        controller=f"static:f={clock}", noise_scale=scale,
    )  # fmt: skip
    expected = 0.25 * multipliers(scale * SPREADS[clock], tokens)
    ends = 0.5 + np.cumsum(expected)
    # spread_s is written with six digits
    assert record.requests.first_token_s[0] == pytest.approx(ends[0], rel=1e-6)
    assert record.requests.finish_s[0] == pytest.approx(ends[-1], rel=1e-6)
    first = int(np.searchsorted(ends, 20.5)) + 1  # B joins when the iteration then running ends
    assert record.requests.first_token_s[1] == pytest.approx(ends[first], rel=1e-6)
    assert record.requests.finish_s[1] == pytest.approx(ends[first + 49], rel=1e-6)
    gaps = np.concatenate((expected[1:], expected[first + 1 : first + 50]))
    got = np.repeat(record.itl_s, record.itl_weight)
    np.testing.assert_allclose(np.sort(got), np.sort(gaps), rtol=1e-6)
    assert summary["decode_energy_j"] == pytest.approx(256.0 * expected.sum(), rel=1e-6)


def test_multipliers_are_lognormal_with_mean_one(steady: Profile) -> None:
    """200,000 of them: the mean within three standard errors, the shape by Kolmogorov-Smirnov."""
    config = make_config({"noise_scale": 4.0})
    noise = IterationNoise.make(config, steady.spread(), "decode", 0)
    assert noise is not None
    drawn = []
    for _ in range(200):
        drawn.append(np.array(noise.multipliers(0, 1)[0]))
        noise.refill()
    sample = np.concatenate(drawn)
    spread = 4.0 * SPREADS[1400]
    assert abs(sample.mean() - 1.0) < 3 * spread / np.sqrt(len(sample))
    assert sample.std() == pytest.approx(spread, rel=0.01)
    log_sd = np.sqrt(np.log1p(spread**2))
    law = stats.lognorm(s=log_sd, scale=np.exp(-(log_sd**2) / 2))
    assert stats.kstest(sample, law.cdf).pvalue > 0.01


def test_running_sums_are_sums(steady: Profile) -> None:
    noise = IterationNoise.make(make_config({}), steady.spread(), "decode", 3)
    assert noise is not None
    factors, ones, firsts, squares = noise.multipliers(1000, 8)
    k = np.arange(BLOCK)
    for begin, end in ((0, 1), (0, BLOCK), (17, 900)):
        part, at = np.array(factors[begin:end]), k[begin:end]
        assert ones[end] - ones[begin] == pytest.approx(part.sum())
        assert firsts[end] - firsts[begin] == pytest.approx((at * part).sum())
        assert squares[end] - squares[begin] == pytest.approx((at * at * part).sum())


def test_without_noise_all_is_as_the_table_says(steady: Profile) -> None:
    """scale 0, and a phase whose table has a spread of nothing."""
    record, _ = run(steady, make_requests((0.0, 4, 9)), noise_scale=0)
    assert record.requests.finish_s.tolist() == [0.5 + 9 * 0.25]
    record, _ = run(steady, make_requests((0.0, 4, 9)))
    assert record.instances[0].busy_s == 0.5
    assert record.requests.finish_s[0] != 0.5 + 9 * 0.25


def test_every_instance_has_its_own_stream(steady: Profile) -> None:
    rows = [(0.0, 4, 40), (0.0, 4, 40)]
    record, _ = run(steady, make_requests(*rows), num_decode=2, num_prefill=2)
    assert record.requests.finish_s[0] != record.requests.finish_s[1]
    again, _ = run(steady, make_requests(*rows), num_decode=2, num_prefill=2)
    assert again.requests.finish_s.tolist() == record.requests.finish_s.tolist()
    other, _ = run(steady, make_requests(*rows), num_decode=2, num_prefill=2, seed=14)
    assert other.requests.finish_s[0] != record.requests.finish_s[0]


def sagging(profile: Profile, **settings: Any) -> RunRecord:  # noqa: ANN401
    return run(
        profile, make_requests((0.0, 4, 4_000)), noise_scale=0, sag_depth=0.5, sag_duration_s=10.0,
        sag_interval_s=30.0, record_iterations=True, **settings,
    )[0]  # fmt: skip


@pytest.mark.parametrize("engine", DRIVERS)
def test_in_a_sag_iterations_are_slower(steady: Profile, engine: str) -> None:
    """About 1,000 s at 0.25 or 0.375 s an iteration, in some 27 stretches that are drawn anew."""
    table = sagging(steady, engine=engine).iterations
    assert table is not None
    decode = table.phase == "decode"
    start_s, slow = table.start_s[decode], np.isclose(table.duration_s[decode], 0.375)
    assert (slow | np.isclose(table.duration_s[decode], 0.25)).all()
    draw = np.random.default_rng(np.random.SeedSequence(SEED, spawn_key=(5, 0)).spawn(2)[1])
    at_s, edges = 0.0, []
    for k in range(400):
        at_s += draw.exponential((30.0, 10.0)[k % 2])
        edges.append(at_s)
    np.testing.assert_array_equal(slow, np.searchsorted(edges, start_s, side="right") % 2 == 1)
    assert 10 <= np.diff(slow.astype(int)).clip(0).sum() <= 50


def test_both_phases_sag_and_neither_by_default(steady: Profile) -> None:
    record = sagging(steady)
    assert record.makespan_s > 0.5 + 4_000 * 0.25 * 1.05
    plain, _ = run(steady, make_requests((0.0, 4, 4_000)), noise_scale=0)
    assert plain.makespan_s == 0.5 + 4_000 * 0.25


@pytest.mark.parametrize("engine", DRIVERS)
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_clock_change_stalls_a_busy_instance_card_by_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, tensor_parallel: int
) -> None:
    """As `test_clock_change_splits_an_iteration`, and each change costs 1/16 s a card.

    Decode's second iteration begins at 1.0 unlocked (2000 MHz, 0.5 s); at 1.25, half done, 1000
    MHz comes: n/16 s stand still, then half of 1 s. Busy power is that of the clock in force.
    """
    monkeypatch.setitem(CONTROLLERS, "falling", Entry(make=Falling, parameters=NoParameters))
    profile = write_synthetic_profile(
        tmp_path,
        time_s=lambda p, f, b, t: 1000.0 / f,
        power_w=lambda p, f, b, t: float(f),
        clocks_mhz=(1000, 2000),
    )
    model = replace(profile.meta.model, tensor_parallel=tensor_parallel)
    profile = replace(profile, meta=replace(profile.meta, model=model))
    record, summary = run(
        profile, make_requests((0.0, 4, 2)), prefill_controller="static:f=2000", engine=engine,
        decode_controller="falling", actuation_latency_s=0.25,
        slo_itl_s=10.0, clock_stall_s=1 / 16,
    )  # fmt: skip
    stall_s = tensor_parallel / 16
    assert record.requests.finish_s.tolist() == [1.75 + stall_s]
    assert summary["decode_energy_j"] == 0.75 * 2000 + (0.5 + stall_s) * 1000
    # a change that is in force at the boundary holds up the iteration that begins there
    record, summary = run(
        profile, make_requests((0.0, 4, 2)), prefill_controller="static:f=2000", engine=engine,
        decode_controller="falling", actuation_latency_s=0.0,
        slo_itl_s=10.0, clock_stall_s=1 / 16,
    )  # fmt: skip
    assert record.requests.finish_s.tolist() == [2.0 + stall_s]
    assert summary["decode_energy_j"] == 0.5 * 2000 + (1.0 + stall_s) * 1000


@pytest.mark.parametrize("engine", DRIVERS)
def test_a_change_at_rest_stalls_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """1000 MHz is locked after 5 s of idleness; the request at 8 s does not pay for that."""
    monkeypatch.setitem(CONTROLLERS, "falling", Entry(make=Falling, parameters=NoParameters))
    profile = write_synthetic_profile(
        tmp_path, time_s=lambda p, f, b, t: 0.5, clocks_mhz=(1000, 2000)
    )
    record, _ = run(
        profile, make_requests((8.0, 4, 1)), prefill_controller="static:f=2000", engine=engine,
        decode_controller="falling", actuation_latency_s=0.25, clock_stall_s=0.125,
    )  # fmt: skip
    assert record.instances[1].num_clock_changes == 1
    assert record.requests.finish_s.tolist() == [9.0]


def test_energy_is_power_times_what_the_iteration_took(steady: Profile) -> None:
    rows = [(0.3 * k, 4, 30 + k) for k in range(40)]
    record, _ = run(steady, make_requests(*rows), controller="ecofreq", sag_depth=0.4)
    for instance in record.instances:
        assert instance.busy_energy_j == pytest.approx(256.0 * instance.busy_s, rel=1e-9)


def test_a_sketched_run_sees_the_same_noise(steady: Profile) -> None:
    rows = [(0.3 * k, 4, 300 + k) for k in range(40)]
    exact, a = run(steady, make_requests(*rows), slo_itl_s=0.26)
    sketched, b = run(steady, make_requests(*rows), slo_itl_s=0.26, metrics="sketch")
    assert 0.1 < a["itl_attainment"] < 0.9
    assert b["itl_attainment"] == a["itl_attainment"]
    assert b["itl_s"]["mean"] == pytest.approx(a["itl_s"]["mean"], rel=1e-9)
    assert summarise(exact)["energy_j"] == summarise(sketched)["energy_j"]


class Known:
    """200 W busy at every clock; idle 50 W unlocked, 30 W locked."""

    def power_w(self, phase: str, clock_mhz: int, batch_size: int, tokens: int) -> float:
        return 200.0

    def idle_power_w(self, clock_mhz: int) -> float:
        return 30.0 if clock_mhz else 50.0


def test_power_that_is_believed_wrongly() -> None:
    """700 of 1400 MHz: 30 + 170·1.5/4 with an exponent of 2; unlocked: 50 + 150·1.5."""
    known = Known()
    same = SkewedPower.wrap(known, scale=1.0, clock_error=0.0, top_mhz=1400)
    assert same is known
    skewed = SkewedPower.wrap(known, scale=1.5, clock_error=2.0, top_mhz=1400)
    assert skewed.power_w("decode", 700, 1, 1) == pytest.approx(30 + 170 * 1.5 / 4)
    assert skewed.power_w("decode", 0, 1, 1) == pytest.approx(50 + 150 * 1.5)
    assert skewed.idle_power_w(700) == 30.0
