"""Caches of prefixes of instances that leave service: what is lost, and both drivers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from tests.sim.engine.sessions import random_sessions, sharing
from tests.sim.engine.test_coalescing import crooked, same_instances, same_iterations, same_requests
from tests.sim.engine.test_scaling import STATES, TABLE, state
from voltana.profiles.catalog import Profile
from voltana.profiles.states import PowerStates

CACHES: dict[str, Any] = {
    "num_prefill": 2, "num_decode": 2, "prefix_cache_tokens": 700, "decode_cache": True,
    "prefill_starts": "decode_boundary", "kv_capacity_tokens": 900,
}  # fmt: skip


@pytest.fixture
def halves(tmp_path: Path) -> Profile:
    """Every iteration takes 0.5 s."""
    made = write_synthetic_profile(tmp_path, time_s=lambda phase, f, b, t: 0.5)
    return dataclasses.replace(made, states=STATES)


@pytest.mark.parametrize("engine", ["reference", "coalesced"])
@pytest.mark.parametrize(
    ("plans", "found", "unsent"),
    [
        ("aaaa", 63, 64),
        ("aaaa+aaaa+apap+aaaa", 63, 64),
        ("aaaa+aaaa+asas+aaaa", 0, 0),
        ("aaaa+aaaa+axax+aaaa", 0, 0),
        ("aaaa+aaaa+apap+apas+aaaa", 63, 0),
    ],
)
def test_what_is_lost_with_the_memory(
    halves: Profile, engine: str, plans: str, found: int, unsent: int
) -> None:
    """Every second request goes to the second instances, which have ended the first of them when
    they leave service at 3 s, parked, asleep or stopped, and are back long before the second."""
    rows = [(0.0, [(1, 9)], 1), (0.0, [(2, 64)], 1), (20.0, [(3, 9)], 1), (20.0, [(2, 64)], 1)]
    record, summary = run(
        halves, sharing(rows), scaler=f"{TABLE}:plans={plans}", engine=engine, **CACHES
    )
    assert record.requests.cached_tokens is not None
    assert record.requests.cached_tokens.tolist() == [0, 0, 0, found]
    assert (summary["unsent_tokens"], summary["evicted_tokens"]) == (unsent, 0)


@pytest.mark.parametrize("engine", ["reference", "coalesced"])
def test_a_card_forgets_when_it_changes_its_role(halves: Profile, engine: str) -> None:
    """The second card of each phase decodes until 10 s, prefills until 20 s and decodes again: the
    prompt that it had decoded at first has to be sent whole."""
    rows = [(0.0, [(1, 9)], 1), (0.0, [(2, 64)], 1), (25.0, [(1, 9)], 1), (25.0, [(2, 64)], 1)]
    found = {}
    for name, middle in (("stays", "aala"), ("switches", "aaal")):
        plans = "+".join(["alaa"] * 10 + [middle.replace("aala", "alaa")] * 10 + ["alaa"])
        _, summary = run(
            halves, sharing(rows), engine=engine,
            scaler=f"{TABLE}:plans={plans},switching=1,switch=2", **CACHES,
        )  # fmt: skip
        found[name] = summary["unsent_tokens"]
    assert found == {"stays": 9 + 64, "switches": 9}


PLANS = "aaaa+aasa+asaa+axpa+apax+aaas+saaa+xaap+aaaa"


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
@pytest.mark.parametrize("seed", range(3))
def test_both_drivers_agree(tmp_path: Path, seed: int, first_token: str) -> None:
    made = write_synthetic_profile(
        tmp_path, time_s=crooked(1.0),
        power_w=lambda p, f, b, t: 80.0 + 1.3e-4 * f * f + 0.017 * t + 0.9 * b,
        idle_w=lambda f: 40.0 + f / 50,
    )  # fmt: skip
    states = PowerStates(
        parked=state(31.7, 0.0, 0.0031, 52.9),
        asleep=state(17.3, 0.0737, 0.2113, 61.1),
        stopped=state(9.1, 0.0137, 0.4171, 47.3),
    )
    profile = dataclasses.replace(made, states=states)
    workload = random_sessions(seed, count=150, mean_gap_s=0.05, is_closed=True, has_answers=True)
    told = CACHES | {
        "scaler": f"{TABLE}:plans={PLANS},base=1000,period=0.377", "controller": "ecofreq",
        "router": "prefix-affinity", "first_token": first_token, "record_iterations": True,
        "kv_transfer_latency_s": 0.01,
    }  # fmt: skip
    plain, before = run(profile, workload, engine="reference", **told)
    quick, after = run(profile, workload, engine="coalesced", **told)
    same_requests(plain, quick)
    same_instances(plain, quick)
    same_iterations(plain, quick)
    np.testing.assert_array_equal(plain.requests.cached_tokens, quick.requests.cached_tokens)
    for key in ("unsent_tokens", "evicted_tokens", "cached_tokens", "wake_ups"):
        assert before[key] == after[key]
    assert after["requests_completed"] == 150
    assert after["wake_ups"] > 3


def test_decode_may_go_when_prefill_was_all(halves: Profile) -> None:
    """One token, which prefill has made at 1.25 s: the decode instance that is unwanted from 1 s on
    goes there and then, and is asleep from 2.25 s until the last request ends at 9.5 s."""
    record, _ = run(
        halves, make_requests((0.0, 4, 1), (0.75, 4, 1), (9.0, 4, 1)), num_decode=2,
        scaler=f"{TABLE}:plans=aas", first_token="prefill",
    )  # fmt: skip
    assert dict(record.instances[2].away_s) == {"changing": 1.0, "asleep": 9.5 - 2.25}
