"""Instances left at rest: they cost what idling costs, and nothing else changes."""

from __future__ import annotations

import pytest

from voltana.experiments.runs import cached_profile, run
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.metrics import summarise

BASE = {"rate_rps": 12, "duration_s": 20, "controller": "static:f=1005"}


@pytest.mark.parametrize("router", ["round-robin", "ecoroute", "consolidate"])
def test_a_fleet_with_rest_is_a_smaller_fleet_and_idle_power(router: str) -> None:
    """3P4D of which 1P2D get requests, beside 1P2D alone: 4 instances idle all the time."""
    whole = make_config({**BASE, "router": router, "num_prefill": 3, "num_decode": 4,
                         "active_prefill": 1, "active_decode": 2})  # fmt: skip
    small = make_config({**BASE, "router": router, "num_prefill": 1, "num_decode": 2})
    ours, theirs = summarise(run(whole)), summarise(run(small))
    idle_w = cached_profile(whole.profile).truth().idle_power_w(1005)
    assert ours["makespan_s"] == theirs["makespan_s"]
    assert ours["attainment"] == theirs["attainment"]
    expected = theirs["energy_j"] + 4 * idle_w * ours["makespan_s"]
    assert ours["energy_j"] == pytest.approx(expected, rel=1e-9)


def test_no_more_are_active_than_there_are() -> None:
    with pytest.raises(VoltanaError, match="active_decode must be <= num_decode, 2, got 3"):
        make_config({"active_decode": 3})
    with pytest.raises(VoltanaError, match="active_prefill must be > 0"):
        make_config({"active_prefill": 0})
