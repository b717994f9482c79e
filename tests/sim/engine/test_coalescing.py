"""Long runs on the heap against runs of one on SimPy: same decisions, times and energy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.profiles.synthetic import Surface, rough_profile, write_synthetic_profile
from tests.sim.engine.fixtures import run
from tests.sim.engine.test_properties import POLICY, REQUEST, workload_of
from voltana.profiles.catalog import Profile
from voltana.sim.policies.registry import CONTROLLERS, ROUTERS
from voltana.sim.records import FloatArray, IntArray, RunRecord
from voltana.sim.workload.workload import Workload

REL = 1e-9
"""The two add up the same times in another order; doubles keep far more than nine digits."""
ABS_S = 1e-9


def crooked(share: float) -> Surface:
    """Times without round numbers, so that events do not tie by construction."""

    def time_s(phase: str, clock: int, batch: int, tokens: float) -> float:
        scale = 0.4 + 0.6 * 1400.0 / clock
        if phase == "prefill":
            return (0.00217 + 1.0837e-4 * tokens) * scale
        bend = 3.1e-6 * max(0.0, tokens - 1000.0)
        return (0.00413 + 2.137e-5 * batch + share * 1.0123e-6 * tokens + bend) * scale

    return time_s


@pytest.fixture(scope="module", params=[0.0, 1.0, 9.0])
def profile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(
        tmp_path_factory.mktemp("profile"),
        time_s=crooked(request.param),
        power_w=lambda p, f, b, t: 80.0 + 1.3e-4 * f * f + 0.017 * t + 0.9 * b,
        idle_w=lambda f: 40.0 + f / 50,
        spread_s=uneven_spread(crooked(request.param)),
    )


def uneven_spread(time_s: Surface) -> Surface:
    """Half interquartile ranges of 1 to 5 % of the time, of another share in each row."""

    def spread_s(phase: str, clock: int, batch: int, tokens: float) -> float:
        return time_s(phase, clock, batch, tokens) * (0.01 + (clock * batch % 41) / 1000.0)

    return spread_s


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(REQUEST, min_size=1, max_size=40), policy=POLICY, data=st.data())
def test_same_run(
    profile: Profile,
    rows: list[tuple[float, int, int]],
    policy: dict[str, Any],
    data: st.DataObject,
) -> None:
    if data.draw(st.booleans(), label="cut"):
        policy = policy | {"run_limit_s": data.draw(st.floats(0.01, 3.0), label="limit")}
    assert_same(profile, rows, policy)


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> list[Profile]:
    return [rough_profile(tmp_path_factory.mktemp("rough"), seed) for seed in range(4)]


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(REQUEST, min_size=1, max_size=30), policy=POLICY, index=st.integers(0, 3))
def test_same_run_on_tables_without_a_law(
    rough: list[Profile], rows: list[tuple[float, int, int]], policy: dict[str, Any], index: int
) -> None:
    """Random times and power on grids that differ from clock to clock."""
    assert_same(rough[index], rows, policy | {"extrapolate": True})


@pytest.mark.parametrize("controller", sorted(CONTROLLERS))
@pytest.mark.parametrize("router", ["ecoroute:tile=2"])
def test_every_controller(profile: Profile, controller: str, router: str) -> None:
    assert_same(profile, busy_rows(), {"controller": controller, "router": router})


@pytest.mark.parametrize("router", sorted(set(ROUTERS) - {"mdp"}))  # mdp needs a policy file
def test_every_router(profile: Profile, router: str) -> None:
    assert_same(profile, busy_rows(), {"controller": "ecofreq", "router": router})


def busy_rows() -> list[tuple[float, int, int]]:
    rng = np.random.default_rng(5)
    gaps = rng.exponential(0.05, 120)
    inputs, outputs = rng.integers(1, 400, 120), rng.integers(1, 200, 120)
    return list(zip(gaps.tolist(), inputs.tolist(), outputs.tolist(), strict=True))


def assert_same(
    profile: Profile, rows: list[tuple[float, int, int]], policy: dict[str, Any]
) -> None:
    values = {"num_prefill": 2, "num_decode": 2, "actuation_latency_s": 0.003} | policy
    workload = workload_of(rows)
    (plain, _), (quick, _) = run_both(profile, workload, **values)
    assert quick.makespan_s == pytest.approx(plain.makespan_s, rel=REL)
    for a, b in zip(sorted_gaps(plain), sorted_gaps(quick), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-7, atol=ABS_S)


def run_both(
    profile: Profile,
    workload: Workload,
    **settings: Any,  # noqa: ANN401
) -> list[tuple[RunRecord, dict[str, Any]]]:
    """Record and summary of both drivers, which agree on requests, instances and iterations."""
    both = [
        run(profile, workload, record_iterations=True, engine=engine, **settings)
        for engine in ("reference", "coalesced")
    ]
    plain, quick = (record for record, _ in both)
    same_requests(plain, quick)
    same_instances(plain, quick)
    same_iterations(plain, quick)
    return both


def same_requests(plain: RunRecord, quick: RunRecord) -> None:
    a, b = plain.requests, quick.requests
    for name in ("prefill_id", "decode_id", "status", "retractions"):
        np.testing.assert_array_equal(getattr(b, name), getattr(a, name), err_msg=name)
    for name in ("first_token_s", "finish_s"):
        np.testing.assert_allclose(getattr(b, name), getattr(a, name), rtol=REL, err_msg=name)


def same_instances(plain: RunRecord, quick: RunRecord) -> None:
    for a, b in zip(plain.instances, quick.instances, strict=True):
        assert (b.num_iterations, b.num_clock_changes, b.num_retractions) == (
            a.num_iterations, a.num_clock_changes, a.num_retractions,
        )  # fmt: skip
        for name in ("busy_s", "idle_s", "busy_energy_j", "idle_energy_j", "busy_window_energy_j"):
            assert getattr(b, name) == pytest.approx(getattr(a, name), rel=REL, abs=1e-9), name
        assert dict(b.clock_busy_s) == pytest.approx(dict(a.clock_busy_s), rel=REL, abs=1e-9)
        assert dict(b.clock_idle_s) == pytest.approx(dict(a.clock_idle_s), rel=REL, abs=1e-9)


def same_iterations(plain: RunRecord, quick: RunRecord) -> None:
    """Row for row: the decisions (clock of each iteration), batches, tokens and energy."""
    a, b = plain.iterations, quick.iterations
    assert (a is None) == (b is None)
    if a is None or b is None:
        return
    left, right = by_instance(a.phase, a.instance_id), by_instance(b.phase, b.instance_id)
    for name in ("batch_size", "tokens", "clock_mhz"):
        x, y = getattr(a, name)[left], getattr(b, name)[right]
        np.testing.assert_array_equal(y, x, err_msg=name)
    for name in ("start_s", "duration_s", "energy_j"):
        x, y = getattr(a, name)[left], getattr(b, name)[right]
        np.testing.assert_allclose(y, x, rtol=1e-7, atol=ABS_S, err_msg=name)


def by_instance(phase: Any, instance_id: IntArray) -> IntArray:  # noqa: ANN401 (array of text)
    """Order by instance; within one the rows are in time order already."""
    return np.lexsort((np.arange(len(phase)), instance_id, phase)).astype(np.int64)


def sorted_gaps(record: RunRecord) -> tuple[FloatArray, FloatArray]:
    """Distinct token gaps in order, each with its share of the weight, one entry a token gap."""
    order = np.argsort(record.itl_s, kind="stable")
    gaps = np.repeat(record.itl_s[order], record.itl_weight[order])
    return gaps, np.array([float(record.itl_weight.sum())])
