"""Power that follows the temperature: against an integrator, by hand, and under both drivers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from tests.sim.engine.test_coalescing import assert_same, busy_rows, crooked
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.engine.physics.air import AirParameters
from voltana.sim.engine.physics.warmth import Warmth

AIR = AirParameters(
    leakage_frac=0.005, resistance_c_per_w=0.2, time_s=4.0, ambient_c=25.0, table_c=60.0
)
TEXT = "air:leakage=0.005,resistance_c_per_w=0.2,time=4,ambient=25,table=60"


@pytest.fixture
def even(tmp_path: Path) -> Profile:
    """200 W at work and 200 W at rest, a tenth of a second an iteration."""
    return write_synthetic_profile(
        tmp_path, time_s=lambda p, f, b, t: 0.1, power_w=lambda p, f, b, t: 200.0,
        idle_w=lambda f: 200.0,
    )  # fmt: skip


def test_it_is_what_an_integrator_makes_of_the_equation() -> None:
    """A card of two in an instance, 10 s at 300 W, then 6 s at 50 W."""
    warmth = Warmth(AIR, 2)
    warmth.temperature_c = 40.0

    def rates(t: float, y: Any) -> list[float]:  # noqa: ANN401 (the integrator's array)
        power_w = (300.0 if t < 10.0 else 50.0) * (1.0 + 0.005 * (y[0] - 60.0))
        return [(25.0 + 0.2 * power_w / 2 - y[0]) / 4.0, power_w]

    state = [40.0, 0.0]
    energy_j = 0.0
    for start_s, end_s, power_w in ((0.0, 10.0, 300.0), (10.0, 16.0, 50.0)):
        energy_j += warmth.spend(power_w, end_s - start_s)
        answer = solve_ivp(rates, (start_s, end_s - 1e-12), state, rtol=1e-10, atol=1e-10)
        state = answer.y[:, -1].tolist()
        assert warmth.temperature_c == pytest.approx(state[0], rel=1e-8)
        assert energy_j == pytest.approx(state[1], rel=1e-8)


def test_it_does_not_matter_how_time_is_cut() -> None:
    whole, parts = Warmth(AIR, 1), Warmth(AIR, 1)
    energy_j = whole.spend(250.0, 3.0)
    cuts = np.diff([0.0, 0.001, 0.9, 1.0, 2.7, 3.0])
    assert sum(parts.spend(250.0, s) for s in cuts) == pytest.approx(energy_j, rel=1e-12)
    assert parts.temperature_c == pytest.approx(whole.temperature_c, rel=1e-12)


@pytest.mark.parametrize("engine", ["reference", "coalesced"])
def test_a_card_that_is_settled_draws_what_its_temperature_says(even: Profile, engine: str) -> None:
    """T = 25 + 0.2 P and P = 200 (1 + 0.005 (T - 60)): P = 200 · 0.825 / (1 - 0.2) = 206.25 W."""
    record, summary = run(
        even, make_requests((0.0, 4, 9), (0.35, 8, 4), (4.0, 8, 4)), temperature=TEXT, engine=engine
    )
    assert summary["energy_j"] == pytest.approx(2 * 206.25 * record.makespan_s, rel=1e-12)


def test_without_leakage_nothing_changes(even: Profile) -> None:
    requests = make_requests((0.0, 4, 9), (0.35, 8, 4))
    plain, _ = run(even, requests, record_iterations=True)
    still, _ = run(even, requests, record_iterations=True, temperature="air:leakage=0")
    assert plain.iterations is not None
    assert still.iterations is not None
    np.testing.assert_allclose(still.iterations.energy_j, plain.iterations.energy_j, rtol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"controller": "static"},
        {"controller": "ecofreq", "clock_stall_s": 0.004, "noise_scale": 1.0},
        {"controller": "ecofreq", "num_colocated": 2, "num_prefill": 0, "num_decode": 0},
    ],
)
def test_both_drivers_agree_and_rows_add_up(tmp_path: Path, settings: dict[str, Any]) -> None:
    profile = write_synthetic_profile(
        tmp_path, time_s=crooked(1.0),
        power_w=lambda p, f, b, t: 80.0 + 1.3e-4 * f * f + 0.05 * t + 0.9 * b,
    )  # fmt: skip
    warm = settings | {"router": "round-robin", "temperature": "air:leakage=0.01,time=0.3"}
    assert_same(profile, busy_rows(), warm)
    workload = make_requests((0.0, 300, 40), (0.05, 90, 25), (0.3, 500, 60))
    record, summary = run(profile, workload, record_iterations=True, **warm)
    assert record.iterations is not None
    busy_j = sum(i.busy_energy_j for i in record.instances)
    assert record.iterations.energy_j.sum() == pytest.approx(busy_j, rel=1e-9)
    _, cold = run(profile, workload, **(warm | {"temperature": None}))
    assert abs(summary["energy_j"] / cold["energy_j"] - 1.0) > 0.01


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": "water"}, "must be air"),
        ({"temperature": "air:leakage=0.1"}, "must settle"),
        ({"temperature": "air", "power_cap_w": 300.0}, "leave one out"),
        ({"temperature": "air", "scaler": "scale-to-load"}, "temperature is not for a fleet that"),
    ],
)
def test_what_it_does_not_do(even: Profile, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(VoltanaError, match=words):
        run(even, make_requests((0.0, 4, 9)), **settings)
