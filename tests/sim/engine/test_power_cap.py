"""A card that lowers its own clock until power fits: by hand, and under both drivers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from tests.sim.engine.test_coalescing import assert_same, busy_rows, crooked
from voltana.profiles.catalog import Profile

CLOCKS = tuple(range(700, 1401, 100))


@pytest.fixture
def plain(tmp_path: Path) -> Profile:
    """A decode iteration takes 0.1 s at 1400 MHz and ever longer below; it draws f / 4 watts."""
    return write_synthetic_profile(
        tmp_path,
        time_s=lambda p, f, b, t: 140.0 / f,
        power_w=lambda p, f, b, t: f / 4.0,
        clocks_mhz=CLOCKS,
    )


def clocks_of_decode(record_w: np.ndarray) -> list[int]:
    return [round(4.0 * w) for w in record_w]


@pytest.mark.parametrize("engine", ["reference", "coalesced"])
def test_without_a_lag_power_fits_at_once(plain: Profile, engine: str) -> None:
    """260 W are 1,000 MHz (250 W), as 1,100 MHz take 275 W: each iteration takes 0.14 s."""
    record, _ = run(
        plain, make_requests((0.0, 4, 5)), power_cap_w=260.0, power_cap_time_s=0.0,
        record_iterations=True, engine=engine,
    )  # fmt: skip
    rows = record.iterations
    assert rows is not None
    np.testing.assert_allclose(rows.duration_s, 0.14)
    np.testing.assert_allclose(rows.energy_j, 250.0 * 0.14)


@pytest.mark.parametrize("engine", ["reference", "coalesced"])
def test_the_clock_falls_with_the_time_constant(plain: Profile, engine: str) -> None:
    """From 1,400 towards 1,000 MHz: after t what is left of 400 MHz is exp(-t / 0.3 s), and each
    iteration runs at the supported clock below, as of its start."""
    record, _ = run(
        plain, make_requests((0.0, 4, 12)), power_cap_w=260.0, power_cap_time_s=0.3,
        record_iterations=True, engine=engine,
    )  # fmt: skip
    rows = record.iterations
    assert rows is not None
    decode = rows.phase == "decode"
    drawn_w = rows.energy_j[decode] / rows.duration_s[decode]
    limit, expected = 1400.0, []
    for _ in range(12):
        clock = int(limit // 100) * 100
        expected.append(clock)
        limit = 1000.0 + (limit - 1000.0) * math.exp(-140.0 / clock / 0.3)
    assert clocks_of_decode(drawn_w) == expected
    assert expected[0] == 1400
    assert expected[-1] == 1000


def test_a_cap_that_never_binds_changes_nothing(plain: Profile) -> None:
    requests = make_requests((0.0, 4, 9), (0.3, 8, 4))
    free, _ = run(plain, requests, record_iterations=True)
    capped, _ = run(plain, requests, record_iterations=True, power_cap_w=350.0)
    assert free.iterations is not None
    assert capped.iterations is not None
    np.testing.assert_array_equal(free.iterations.energy_j, capped.iterations.energy_j)
    assert free.makespan_s == capped.makespan_s


def test_it_recovers_at_rest(plain: Profile) -> None:
    """Long after the first request the clock is the top one again."""
    record, _ = run(
        plain, make_requests((0.0, 4, 12), (9.0, 4, 2)), power_cap_w=260.0,
        record_iterations=True,
    )  # fmt: skip
    rows = record.iterations
    assert rows is not None
    late = (rows.phase == "decode") & (rows.start_s > 9.0)
    assert clocks_of_decode((rows.energy_j / rows.duration_s)[late])[0] == 1400


@pytest.mark.parametrize("time_s", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("controller", ["static", "ecofreq"])
def test_both_drivers_agree(tmp_path: Path, controller: str, time_s: float) -> None:
    """Power grows with the context, so that the cap begins to bind inside a run of iterations."""
    profile = write_synthetic_profile(
        tmp_path,
        time_s=crooked(1.0),
        power_w=lambda p, f, b, t: 80.0 + 1.3e-4 * f * f + 0.05 * t + 0.9 * b,
        clocks_mhz=CLOCKS,
    )
    settings: dict[str, Any] = {"power_cap_w": 300.0, "power_cap_time_s": time_s}
    assert_same(
        profile, busy_rows(), {"controller": controller, "router": "round-robin"} | settings
    )
