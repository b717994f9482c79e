"""Colocated instances that leave service, and their power budget: by hand, conserved, drivers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.sim.engine.fixtures import make_requests, run
from tests.sim.engine.sessions import random_sessions, sharing
from tests.sim.engine.test_coalescing import assert_same, busy_rows, run_both
from tests.sim.engine.test_properties import workload_of
from tests.sim.engine.test_scaling import DRIVERS, TABLE, halves, uneven  # noqa: F401 (fixtures)
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.registry import SCALERS

TWO: dict[str, Any] = {"num_prefill": 0, "num_decode": 0, "num_colocated": 2}
THREE: dict[str, Any] = TWO | {"num_colocated": 3}
PLANS = "aaa+asa+saa+axp+apa+aas+saa+xap+aaa"


@pytest.mark.parametrize("engine", DRIVERS)
def test_energy_of_a_fleet_that_sleeps(halves: Profile, engine: str) -> None:  # noqa: F811
    """The second sleeps from 1 s on: 1 s idle at 64 W, 1 s at 48 W, 7.5 s at 16 W. The first works
    for a prompt and one more token, 1 s at 256 W, and idles for the 8.5 s before."""
    record, summary = run(
        halves, make_requests((8.5, 4, 2)), scaler=f"{TABLE}:plans=as", engine=engine, **TWO
    )
    assert record.makespan_s == 9.5
    assert [dict(i.away_s) for i in record.instances] == [{}, {"changing": 1.0, "asleep": 7.5}]
    assert summary["colocated_energy_j"] == 256.0
    assert summary["idle_energy_j"] == 64.0 * 9.5
    assert summary["away_energy_j"] == 48.0 + 7.5 * 16.0
    assert summary["energy_j"] == 256.0 + 608.0 + 168.0
    assert summary["in_service_share"] == 1.0 - 8.5 / 19.0


@pytest.mark.parametrize("engine", DRIVERS)
def test_it_ends_what_it_has_and_comes_back(halves: Profile, engine: str) -> None:  # noqa: F811
    """The second gets the request of 0.75 s, is unwanted from 1 s, and its only token is out at
    1.25 s: asleep from 2.25 s. Wanted again at 4 s, it is awake at 6 s: whoever comes at 5 s finds
    the first alone, at 7 s it is the second's turn again."""
    requests = make_requests((0.25, 4, 1), (0.75, 4, 1), (5.0, 4, 1), (6.5, 4, 1), (7.0, 4, 1))
    plans = "as+as+as+aa"
    record, summary = run(halves, requests, scaler=f"{TABLE}:plans={plans}", engine=engine, **TWO)
    assert record.requests.decode_id.tolist()[1:3] == [1, 0]
    assert 1 in record.requests.decode_id.tolist()[3:]
    assert dict(record.instances[1].away_s) == {"changing": 3.0, "asleep": 1.75}
    assert summary["wake_ups"] == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"controller": "base"},
        {"controller": "ecofreq", "colocated_order": "sglang-mixed", "max_prefill_tokens": 64},
        {"controller": "ecomin", "colocated_order": "vllm", "kv_capacity_tokens": 900},
        {"controller": "static", "budget_w": 1100.0, "router": "least-requests"},
    ],
    ids=lambda s: str(s["controller"]),
)
def test_both_drivers_agree(uneven: Profile, settings: dict[str, Any]) -> None:  # noqa: F811
    spec = f"{TABLE}:plans={PLANS},base=1000,period=0.377"
    assert_same(uneven, busy_rows(), THREE | {"scaler": spec} | settings)


IN_A_HURRY = {"scale-to-load": ",dwell=1", "throttllm": ",grace=1"}


@pytest.mark.parametrize("name", sorted(set(SCALERS) - {"all-awake", "rapid-roles"}))
def test_every_scaler_under_both_drivers(uneven: Profile, name: str) -> None:  # noqa: F811
    """Busy at first, then nobody for seconds, then busy again."""
    rows = [*busy_rows(), (20.0, 8, 8), *busy_rows()]
    spec = f"{name}:period=0.4131{IN_A_HURRY.get(name, '')}"
    (_, summary), _ = run_both(
        uneven, workload_of(rows), router="least-requests", actuation_latency_s=0.003,
        scaler=spec, controller="base", **THREE,
    )  # fmt: skip
    assert summary["in_service_share"] < 0.9
    assert summary["requests_completed"] == len(rows)


def test_roles_need_phases(halves: Profile) -> None:  # noqa: F811
    with pytest.raises(VoltanaError, match="rapid-roles moves cards between prefill and decode"):
        run(halves, make_requests((0.0, 4, 4)), scaler="rapid-roles", **TWO)


@pytest.mark.parametrize("engine", DRIVERS)
@pytest.mark.parametrize(("letter", "found"), [("p", 63), ("s", 0), ("x", 0)])
def test_what_is_lost_with_the_memory(
    halves: Profile,  # noqa: F811
    engine: str,
    letter: str,
    found: int,
) -> None:
    """The second has ended the prompt when it leaves at 3 s, and is back before it is asked again.
    What is lost is not evicted."""
    rows = [(0.0, [(1, 9)], 1), (0.0, [(2, 64)], 1), (20.0, [(3, 9)], 1), (20.0, [(2, 64)], 1)]
    record, summary = run(
        halves, sharing(rows), scaler=f"{TABLE}:plans=aa+aa+a{letter}+aa", engine=engine,
        colocated_cache=True, **TWO,
    )  # fmt: skip
    assert record.requests.cached_tokens is not None
    assert record.requests.cached_tokens.tolist() == [0, 0, 0, found]
    assert summary["evicted_tokens"] == 0


@pytest.mark.parametrize("order", ["sglang", "sglang-mixed"])
def test_both_drivers_agree_with_caches(uneven: Profile, order: str) -> None:  # noqa: F811
    workload = random_sessions(2, count=150, mean_gap_s=0.05, is_closed=True, has_answers=True)
    values = THREE | {
        "scaler": f"{TABLE}:plans={PLANS},base=1000,period=0.377", "controller": "ecofreq",
        "router": "prefix-affinity", "kv_capacity_tokens": 900, "colocated_cache": True,
        "colocated_order": order, "max_prefill_tokens": 64, "actuation_latency_s": 0.003,
    }  # fmt: skip
    (plain, before), (quick, after) = run_both(uneven, workload, **values)
    np.testing.assert_array_equal(plain.requests.cached_tokens, quick.requests.cached_tokens)
    for key in ("evicted_tokens", "cached_tokens", "wake_ups"):
        assert before[key] == after[key]
    assert after["requests_completed"] == 150
    assert after["wake_ups"] > 3


@pytest.mark.parametrize("budget_w", [None, 900.0])
def test_time_energy_and_the_budget_are_kept(
    uneven: Profile,  # noqa: F811
    budget_w: float | None,
) -> None:
    """3C with chunks beside decoding draw 1,300 W without a budget; no sample is above one."""
    record, summary = run(
        uneven, workload_of(busy_rows()), scaler=f"{TABLE}:plans={PLANS},period=0.377",
        colocated_order="sglang-mixed", max_prefill_tokens=64, budget_w=budget_w,
        timeline_interval_s=0.001, timeline_max_samples=10**6, **THREE,
    )  # fmt: skip
    for instance in record.instances:
        times_s = instance.busy_s, instance.idle_s, *instance.away_s.values()
        assert sum(times_s) == pytest.approx(record.makespan_s, rel=1e-12)
    parts = ("colocated", "idle", "away")
    assert summary["energy_j"] == pytest.approx(sum(summary[f"{p}_energy_j"] for p in parts))
    assert record.timeline is not None
    drawn_w = record.timeline["power_w"].reshape(-1, 3).sum(axis=1)
    assert 0.001 * drawn_w.sum() == pytest.approx(summary["energy_j"], rel=3e-3)
    assert (drawn_w.max() <= 900.0) == (budget_w is not None)
