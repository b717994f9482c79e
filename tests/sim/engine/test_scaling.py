"""Instances that leave service and come back: times and energy by hand, conservation, drivers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from tests.sim.engine.test_coalescing import assert_same, busy_rows, crooked
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.states import PowerStates, StateMeta
from voltana.sim.config import make_config
from voltana.sim.policies.registry import SCALERS

DRIVERS = ("reference", "coalesced")
TABLE = "tests.sim.engine.scaling_table"


def state(power_w: float, enter_s: float, wake_s: float, change_w: float) -> StateMeta:
    return StateMeta(
        power_w=power_w, enter_s=enter_s, wake_s=wake_s, change_w=change_w,
        status="modelled", source="by hand",
    )  # fmt: skip


STATES = PowerStates(
    parked=state(32.0, 0.0, 0.0, 48.0),
    asleep=state(16.0, 1.0, 2.0, 48.0),
    stopped=state(8.0, 0.0, 4.0, 48.0),
)


@pytest.fixture
def halves(tmp_path: Path) -> Profile:
    """Every iteration takes 0.5 s at 256 W busy and 64 W idle: sums are exact in binary."""
    made = write_synthetic_profile(
        tmp_path,
        time_s=lambda phase, f, b, t: 0.5,
        power_w=lambda phase, f, b, t: 256.0,
        idle_w=lambda f: 64.0,
    )
    return dataclasses.replace(made, states=STATES)


@pytest.mark.parametrize("engine", DRIVERS)
def test_energy_of_a_fleet_that_sleeps(halves: Profile, engine: str) -> None:
    """Of 2P2D the second ones sleep from 1 s on; the last request ends at 10 s.

    They idle for 1 s at 64 W, take 1 s at 48 W to fall asleep, then draw 16 W for 8 s: 240 J each.
    The others work 0.5 s (prefill) and 1 s (decode: two tokens) at 256 W and idle else.
    """
    requests = make_requests((8.5, 4, 2))
    record, summary = run(
        halves, requests, num_prefill=2, num_decode=2, scaler=f"{TABLE}:plans=asas", engine=engine
    )
    assert record.makespan_s == 10.0
    assert [dict(i.away_s) for i in record.instances] == [
        {}, {"changing": 1.0, "asleep": 8.0}, {}, {"changing": 1.0, "asleep": 8.0},
    ]  # fmt: skip
    assert summary["away_energy_j"] == 2 * (48.0 + 8 * 16.0)
    assert summary["idle_energy_j"] == 64.0 * (9.5 + 9.0 + 2 * 1.0)
    assert summary["energy_j"] == 256.0 * 1.5 + 64.0 * 20.5 + 352.0
    assert summary["in_service_share"] == 1.0 - 18.0 / 40.0
    assert summary["wake_ups"] == 0


@pytest.mark.parametrize("engine", DRIVERS)
def test_a_request_takes_no_instance_until_it_has_woken(halves: Profile, engine: str) -> None:
    """1P2D, round-robin. The second decode instance falls asleep from 1 to 2 s, is wanted again at
    3 s and awake at 5 s. Whoever comes at 4.75 s finds the first alone; at 5.25 s there are two."""
    requests = make_requests((2.5, 4, 2), (4.75, 4, 2), (5.25, 4, 2), (6.25, 4, 2))
    record, summary = run(
        halves, requests, num_decode=2, scaler=f"{TABLE}:plans=aas+aas+aaa", engine=engine
    )
    assert record.requests.decode_id.tolist() == [0, 0, 0, 1]
    assert dict(record.instances[2].away_s) == {"changing": 3.0, "asleep": 1.0}
    assert dict(record.instances[2].away_energy_j) == {"changing": 144.0, "asleep": 16.0}
    assert summary["wake_ups"] == 1


@pytest.mark.parametrize("engine", DRIVERS)
def test_who_replaces_another_wakes_before_it_goes(halves: Profile, engine: str) -> None:
    """The second decode instance sleeps from 2 s on. At 3 s it alone is wanted: awake at 5 s, and
    only then the first one drains: it ends the request of 4.75 s (prefill to 5.25 s, tokens at
    5.75 and 6.25 s), so that it falls until 7.25 s and sleeps for 1.5 s until all ends."""
    requests = make_requests((4.75, 4, 2), (5.5, 4, 2), (7.25, 4, 2))
    record, _ = run(
        halves, requests, num_decode=2, scaler=f"{TABLE}:plans=aas+aas+asa", engine=engine
    )
    assert record.requests.decode_id.tolist() == [0, 1, 1]
    assert record.requests.finish_s.tolist() == [6.25, 7.0, 8.75]
    assert dict(record.instances[1].away_s) == {"changing": 1.0, "asleep": 1.5}
    assert dict(record.instances[2].away_s) == {"changing": 3.0, "asleep": 1.0}


@pytest.mark.parametrize("engine", DRIVERS)
def test_wake_up_is_in_the_time_to_first_token(halves: Profile, engine: str) -> None:
    """All that serve are full with one request at a time: the second waits for its turn where one
    serves (prefill 0 to 0.5 to 1.0 s), and is not helped by an instance that wakes at 4 + 2 s."""
    requests = make_requests((4.25, 4, 5), (4.5, 4, 1), (6.5, 4, 1))
    values: dict[str, Any] = {
        "num_decode": 2, "max_running_requests": 1, "engine": engine, "router": "least-requests",
    }  # fmt: skip
    slept, _ = run(halves, requests, scaler=f"{TABLE}:plans=aas+aas+aas+aaa", **values)
    awake, _ = run(halves, requests, **values)
    # first: prefill to 4.75, tokens at 5.25 … 7.25; second: prefill to 5.25, decode when it is free
    assert slept.requests.first_token_s.tolist() == [5.25, 7.75, 7.5]
    assert awake.requests.first_token_s.tolist() == [5.25, 5.75, 7.5]
    assert slept.requests.decode_id.tolist() == [0, 0, 1]


def test_kv_on_its_way_keeps_prefill_in_service(halves: Profile) -> None:
    """Prefill 1 hands over at 1.25 s, over a link of 2 s; unwanted from 1 s, it goes at 3.25 s."""
    requests = make_requests((0.25, 4, 1), (0.75, 4, 1), (9.0, 4, 1))
    record, _ = run(
        halves, requests, num_prefill=2, scaler=f"{TABLE}:plans=asa", kv_transfer_latency_s=2.0
    )
    away_s = record.makespan_s - 3.25
    assert dict(record.instances[1].away_s) == {"changing": 1.0, "asleep": away_s - 1.0}


@pytest.mark.parametrize("engine", DRIVERS)
def test_a_deeper_sleep_and_the_way_back(halves: Profile, engine: str) -> None:
    """Parked at 1 s at once, stopped at 2 s, wanted lightly at 3 s (stays), awake at 4 + 4 s."""
    requests = make_requests(
        (9.0, 4, 1),
    )
    record, _ = run(
        halves, requests, num_decode=2, scaler=f"{TABLE}:plans=aap+aax+aap+aaa", engine=engine
    )
    assert dict(record.instances[2].away_energy_j) == {
        "changing": 4 * 48.0, "parked": 32.0, "stopped": 16.0,
    }  # fmt: skip
    assert record.instances[2].idle_s == 1.0 + 2.0


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    made = write_synthetic_profile(
        tmp_path_factory.mktemp("profile"),
        time_s=crooked(1.0),
        power_w=lambda p, f, b, t: 80.0 + 1.3e-4 * f * f + 0.017 * t + 0.9 * b,
        idle_w=lambda f: 40.0 + f / 50,
    )
    states = PowerStates(
        parked=state(31.7, 0.0, 0.0031, 52.9),
        asleep=state(17.3, 0.0737, 0.2113, 61.1),
        stopped=state(9.1, 0.0137, 0.7171, 47.3),
    )
    return dataclasses.replace(made, states=states)


PLANS = "aaaa+aasa+asaa+axpa+apax+aaas+saaa+xaap+aaaa"


@pytest.mark.parametrize(
    "settings",
    [
        {"controller": "base"},
        {"controller": "ecofreq", "router": "ecoroute:tile=2", "kv_transfer_latency_s": 0.031},
        {"controller": "ecomin", "router": "consolidate", "prefill_starts": "decode_boundary"},
        {"controller": "pid", "router": "least-kv", "run_limit_s": 4.0},
        {"controller": "static", "router": "least-requests", "budget_w": 1500.0},
    ],
    ids=lambda s: str(s["controller"]),
)
def test_both_drivers_agree_and_nothing_is_lost(uneven: Profile, settings: dict[str, Any]) -> None:
    spec = f"{TABLE}:plans={PLANS},base=1000,period=0.377"
    assert_same(uneven, busy_rows(), {"scaler": spec, **settings})


@pytest.mark.parametrize("name", sorted(SCALERS))
def test_every_scaler_under_both_drivers(uneven: Profile, name: str) -> None:
    """Busy at first, then nobody for seconds, then busy again."""
    rows = [*busy_rows(), (20.0, 8, 8), *busy_rows()]
    spec = name if name == "all-awake" else f"{name}:period=0.4131"
    assert_same(uneven, rows, {"scaler": spec, "controller": "base", "router": "least-requests"})


def test_all_time_is_somewhere_and_energy_adds_up(uneven: Profile) -> None:
    rows = np.array(busy_rows())
    rows[:, 0] = np.cumsum(rows[:, 0])
    requests = make_requests(*[(float(a), int(b), int(c)) for a, b, c in rows])
    record, summary = run(
        uneven, requests, num_prefill=2, num_decode=2, timeline_interval_s=0.001,
        scaler=f"{TABLE}:plans={PLANS},period=0.377", controller="base", timeline_max_samples=10**6,
    )  # fmt: skip
    for instance in record.instances:
        times_s = instance.busy_s, instance.idle_s, *instance.away_s.values()
        assert sum(times_s) == pytest.approx(record.makespan_s, rel=1e-12)
    assert record.timeline is not None
    sampled_j = 0.001 * record.timeline["power_w"].sum()  # a sample stands for a millisecond
    assert sampled_j == pytest.approx(summary["energy_j"], rel=2e-3)
    parts = ("prefill", "decode", "idle", "away")
    assert summary["energy_j"] == pytest.approx(sum(summary[f"{p}_energy_j"] for p in parts))
    assert summary["wake_ups"] >= 3


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ("aa", "plan.decode must have one of awake, parked, asleep, stopped for each of 1"),
        ("aas", "plan.decode must leave one instance awake, got"),
        ("aaa,base=1001", "base clocks must be supported ones, or 0 for none, got 1001"),
    ],
)
def test_plans_that_are_none(halves: Profile, plans: str, message: str) -> None:
    rows = ((0.0, 4, 4), (5.0, 4, 4))
    with pytest.raises(VoltanaError, match=message):
        run(halves, make_requests(*rows), num_prefill=2, scaler=f"{TABLE}:plans={plans}")


@pytest.mark.parametrize("scaler", [None, f"{TABLE}:plans={PLANS},period=0.377"])
def test_a_budget_is_kept(uneven: Profile, scaler: str | None) -> None:
    """1,400 W for 2P2D, which draw 2,100 W at the top clock: no sample is above it."""
    rows = np.array(busy_rows())
    rows[:, 0] = np.cumsum(rows[:, 0])
    requests = make_requests(*[(float(a), int(b), int(c)) for a, b, c in rows])
    drawn_w = {}
    for budget_w in (None, 1400.0):
        record, _ = run(
            uneven, requests, num_prefill=2, num_decode=2, timeline_interval_s=0.001,
            controller="static", scaler=scaler, budget_w=budget_w, actuation_latency_s=0.003,
            timeline_max_samples=10**6,
        )  # fmt: skip
        assert record.timeline is not None
        drawn_w[budget_w] = record.timeline["power_w"].reshape(-1, 4).sum(axis=1).max()
    assert drawn_w[None] > 1400.0 >= drawn_w[1400.0] > 900.0


def test_a_budget_that_cannot_be_kept_is_refused(uneven: Profile) -> None:
    with pytest.raises(VoltanaError, match="budget_w=200 is less than 2 instances in service may"):
        run(uneven, make_requests((0.0, 4, 4)), budget_w=200.0)


def test_a_profile_without_states_cannot_scale(halves: Profile) -> None:
    bare = dataclasses.replace(halves, states=None)
    with pytest.raises(VoltanaError, match=r"write its states\.toml"):
        run(bare, make_requests((0.0, 4, 4)), scaler="scale-to-load")


def test_what_does_not_scale_is_refused(halves: Profile) -> None:
    for key in ("active_prefill", "active_decode"):
        with pytest.raises(VoltanaError, match=f"{key} is not for a fleet that scales"):
            run(halves, make_requests((0.0, 4, 4)), scaler="scale-to-load", **{key: 1})


@pytest.mark.parametrize(
    "settings",
    [{"scaler": "dynamo"}, {"budget_w": 900.0}, {"decode_profiles": "a*2"}, {"power_cap_w": 300.0}],
)
def test_what_only_a_simulation_knows_is_refused_elsewhere(settings: dict[str, Any]) -> None:
    key = next(iter(settings))
    with pytest.raises(VoltanaError, match=f"a replay is of fleets .* leave out {key}"):
        make_config(settings).require_plain("a replay")
    make_config({}).require_plain("a replay")
