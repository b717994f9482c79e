"""Requests that a controller holds: times by hand, and the same under both drivers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from tests.sim.engine.test_coalescing import assert_same, busy_rows, crooked
from voltana.profiles.catalog import Profile

NAME = "tests.sim.engine.holding"
DRIVERS = ("reference", "coalesced")


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    """Prefill 1 ms a token, decode 10 ms an iteration."""
    return write_synthetic_profile(
        tmp_path, time_s=lambda p, f, b, t: 1e-3 * t if p == "prefill" else 0.01
    )


@pytest.mark.parametrize("engine", DRIVERS)
def test_a_held_queue_begins_when_its_first_request_has_waited(
    profile: Profile, engine: str
) -> None:
    """At rest until 0.5 s: 20 tokens to 0.52 s, first tokens at 0.53 s. One that comes at 2 s waits
    to 2.5 s by itself; the timer of the first hold is long gone."""
    requests = make_requests((0.0, 10, 3), (0.3, 10, 3), (2.0, 10, 3))
    record, _ = run(profile, requests, engine=engine, controller=f"{NAME}:hold=0.5")
    expected = [0.53, 0.53, 2.52]
    np.testing.assert_allclose(record.requests.first_token_s, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("engine", DRIVERS)
def test_a_full_queue_begins_at_once_and_the_next_hold_is_its_own(
    profile: Profile, engine: str
) -> None:
    """The second at 0.3 s makes it full: 0.32 s. The third, at 0.4 s, waits to 0.9 s, although the
    first hold would have ended at 0.5 s."""
    requests = make_requests((0.0, 10, 3), (0.3, 10, 3), (0.4, 10, 3))
    spec = f"{NAME}:hold=0.5,enough=2"
    record, _ = run(profile, requests, engine=engine, controller=spec)
    expected = [0.33, 0.33, 0.92]
    np.testing.assert_allclose(record.requests.first_token_s, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("engine", DRIVERS)
def test_a_queue_left_at_the_end_of_a_batch_is_held_too(profile: Profile, engine: str) -> None:
    """The second comes while the first runs, from 0.5 to 0.6 s (100 tokens): held to 1.1 s."""
    requests = make_requests((0.0, 100, 3), (0.55, 10, 3))
    record, _ = run(profile, requests, engine=engine, controller=f"{NAME}:hold=0.5")
    expected = [0.61, 1.12]
    np.testing.assert_allclose(record.requests.first_token_s, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("engine", DRIVERS)
@pytest.mark.parametrize("most", [0, 1])
def test_no_more_are_admitted_than_wanted_but_always_one(
    profile: Profile, engine: str, most: int
) -> None:
    """10 tokens of prompt are there at 0.03 s for three; then one after the other, 5 tokens each:
    first tokens at 0.04, 0.09 and 0.14 s."""
    requests = make_requests((0.0, 10, 5), (0.0, 10, 5), (0.0, 10, 5))
    record, _ = run(profile, requests, engine=engine, controller=f"{NAME}:most={most}")
    expected = [0.04, 0.09, 0.14]
    np.testing.assert_allclose(record.requests.first_token_s, expected, rtol=0, atol=1e-9)
    assert record.makespan_s == pytest.approx(0.18, abs=1e-9)


@pytest.mark.parametrize(
    "controller",
    [f"{NAME}:hold=0.1,enough=4,most=7", f"{NAME}:hold=0.03,most=2", "ecomin:hold=0.9"],
)
def test_both_drivers_hold_alike(tmp_path: Path, controller: str) -> None:
    """Promises of the second kind leave EcoMin room for a few requests at a time."""
    crooked_profile = write_synthetic_profile(
        tmp_path,
        time_s=crooked(1.0),
        power_w=lambda p, f, b, t: 80.0 + 1.3e-4 * f * f + 0.017 * t + 0.9 * b,
    )
    for promises in ({}, {"slo_itl_s": 0.0055, "slo_ttft_s": 2.0}):
        values = {"controller": controller, "router": "round-robin", **promises}
        assert_same(crooked_profile, busy_rows(), values)
