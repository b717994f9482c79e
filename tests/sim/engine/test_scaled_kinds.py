"""Unlike instances that leave service: each by the states of its own profile, chosen by kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests
from tests.sim.engine.test_coalescing import (
    busy_rows,
    crooked,
    same_instances,
    same_iterations,
    same_requests,
)
from tests.sim.engine.test_mixed_fleet import kinds, run_mixed  # noqa: F401 (a fixture)
from tests.sim.engine.test_properties import workload_of as rows_of
from tests.sim.engine.test_scaling import DRIVERS, PLANS, STATES, TABLE, state
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.engine.simulate import simulate
from voltana.sim.metrics import summarise

OTHERS = dataclasses.replace(STATES, asleep=state(40.0, 1.0, 2.0, 96.0))


@pytest.fixture
def scaled(kinds: dict[str, Profile]) -> dict[str, Profile]:  # noqa: F811
    return {
        name: dataclasses.replace(profile, states=STATES if name == "slow" else OTHERS)
        for name, profile in kinds.items()
    }


@pytest.mark.parametrize("engine", DRIVERS)
def test_each_sleeps_as_its_own_profile_says(scaled: dict[str, Profile], engine: str) -> None:
    """The fast one of each phase sleeps from 1 s on: 1 s idle at 128 W, 1 s at 96, 8 s at 40. The
    slow ones work 1.5 s at 256 W and idle for 18.5 s at 64; the last token comes at 10 s."""
    record = run_mixed(
        scaled, make_requests((8.5, 4, 2)), scaler=f"{TABLE}:plans=asas", engine=engine,
        prefill_profiles="slow+fast", decode_profiles="slow+fast",
    )  # fmt: skip
    assert record.makespan_s == 10.0
    summary = summarise(record)
    assert summary["away_energy_j"] == 2 * (96.0 + 8 * 40.0)
    assert summary["idle_energy_j"] == 64.0 * 18.5 + 2 * 128.0
    assert summary["energy_j"] == 256.0 * 1.5 + 64.0 * 18.5 + 256.0 + 832.0


@pytest.mark.parametrize("engine", DRIVERS)
def test_unlike_ones_leave_when_who_replaces_them_has_woken(
    scaled: dict[str, Profile], engine: str
) -> None:
    """The fast one of three falls asleep from 1 to 2 s. From 4 s on it alone is wanted, and wakes
    until 6 s: then the two slow ones begin to fall, though more than one was awake before. The last
    token comes at 9.75 + 0.5 + 2 * 0.25 s."""
    record = run_mixed(
        scaled, make_requests((9.75, 4, 2)), engine=engine, num_prefill=1, num_decode=3,
        prefill_profiles="slow", decode_profiles="slow+slow+fast",
        scaler=f"{TABLE}:plans=aaas+aaas+aaas+assa",
    )  # fmt: skip
    assert record.makespan_s == 10.75
    slow = {"changing": 1.0, "asleep": 3.75}
    assert [dict(i.away_s) for i in record.instances] == [
        {}, slow, slow, {"changing": 3.0, "asleep": 2.0},
    ]  # fmt: skip


def crooked_kinds(tmp_path: Path) -> dict[str, Profile]:
    """Slow and fast, with clocks of their own."""
    return {
        name: dataclasses.replace(
            write_synthetic_profile(
                tmp_path / name,
                time_s=crooked(share),
                power_w=lambda p, f, b, t: 80.0 + 1.3e-4 * f * f + 0.017 * t + 0.9 * b,
                clocks_mhz=clocks,
            ),
            states=STATES,
        )
        for name, share, clocks in (("slow", 9.0, (700, 1000, 1400)), ("fast", 0.0, (900, 1800)))
    }


def test_dualscale_under_both_drivers(tmp_path: Path) -> None:
    """Kinds with clocks of their own; who serves changes with the load, and base clocks are kept
    by cards that have them."""
    made = crooked_kinds(tmp_path)
    rows = [*busy_rows(), (20.0, 8, 8), *busy_rows()]
    records = [
        run_mixed(
            made, rows_of(rows), scaler="dualscale:period=0.4131", controller="base",
            router="least-requests", engine=engine, record_iterations=True,
            actuation_latency_s=0.003,
        )
        for engine in DRIVERS
    ]  # fmt: skip
    same_requests(*records)
    same_instances(*records)
    same_iterations(*records)
    assert summarise(records[0])["in_service_share"] < 1.0
    table = records[0].iterations
    assert table is not None
    for phase, own in (("prefill", ("slow", "fast")), ("decode", ("fast", "slow"))):
        for index, name in enumerate(own):
            ran = (table.phase == phase) & (table.instance_id == index)
            assert set(table.clock_mhz[ran]) <= set(made[name].clocks_mhz)


def test_who_knows_one_kind_only_is_refused(scaled: dict[str, Profile]) -> None:
    with pytest.raises(VoltanaError, match="scale-to-load plans with one kind of instances"):
        run_mixed(scaled, make_requests((0.0, 4, 4)), scaler="scale-to-load")
    bare = scaled | {"fast": dataclasses.replace(scaled["fast"], states=None)}
    config = make_config(
        {"scaler": "dualscale", "num_decode": 2, "decode_profiles": "slow+fast", "profile": "slow"}
    )
    with pytest.raises(VoltanaError, match="does not say what an instance out of service draws"):
        simulate(config, scaled["slow"], make_requests((0.0, 4, 4)), others=bare)


@pytest.fixture
def watts(tmp_path: Path) -> dict[str, Profile]:
    """Slow: f/4 W, 175, 250 and 350 W; fast: f/3 W, 300 and 600 W. Half a second an iteration."""
    return {
        name: dataclasses.replace(
            write_synthetic_profile(
                tmp_path / name,
                time_s=lambda p, f, b, t: 0.5,
                power_w=lambda p, f, b, t, d=divisor: f / d,  # type: ignore[misc]
                idle_w=lambda f: 64.0,
                clocks_mhz=clocks,
            ),
            states=STATES,
        )
        for name, divisor, clocks in (("slow", 4, (700, 1000, 1400)), ("fast", 3, (900, 1800)))
    }


@pytest.mark.parametrize("engine", DRIVERS)
@pytest.mark.parametrize(
    ("budget_w", "slow_mhz", "fast_mhz", "then_mhz"),
    [(1100.0, 1000, 900, 1000), (1099.0, 700, 900, 1000), (1316.0, 1000, 900, 1400)],
)
def test_a_budget_is_one_share_of_every_card_s_range(
    watts: dict[str, Profile],
    engine: str,
    budget_w: float,
    slow_mhz: int,
    fast_mhz: int,
    then_mhz: int,
) -> None:
    """Two of each. Of their ranges 1000 MHz are 0.43, where the fast ones have 900: 2 · 250 and
    2 · 300 W. Once the fast one of prefill sleeps at 16 W, the lowest clocks leave room for 0.43
    again, and 1,316 W are enough for all at the top: 2 · 350 + 600 + 16."""
    requests = make_requests((0.0, 4, 1), (0.0, 4, 1), (8.5, 4, 1), (9.5, 4, 1))
    record = run_mixed(
        watts, requests, scaler=f"{TABLE}:plans=asaa", engine=engine, budget_w=budget_w,
        record_iterations=True,
    )  # fmt: skip
    table = record.iterations
    assert table is not None
    first = table.start_s < 2.0
    slow = ((table.phase == "prefill") & (table.instance_id == 0)) | (
        (table.phase == "decode") & (table.instance_id == 1)
    )
    assert set(table.clock_mhz[first & slow]) == {slow_mhz}
    assert set(table.clock_mhz[first & ~slow]) == {fast_mhz}
    assert record.instances[0].clock_busy_s[then_mhz] >= 1.0  # the last two prompts


def test_a_budget_below_the_lowest_clocks_is_refused(watts: dict[str, Profile]) -> None:
    with pytest.raises(VoltanaError, match=r"budget_w=949 is less than 4 .* lowest clock, 950 W"):
        run_mixed(watts, make_requests((0.0, 4, 1)), budget_w=949.0)


@pytest.mark.parametrize(
    "scaler", [None, f"{TABLE}:plans={PLANS},period=0.377", "dualscale:period=0.41"]
)
def test_unlike_cards_keep_their_budget(tmp_path: Path, scaler: str | None) -> None:
    """2P2D of two kinds draw 1,900 W at their top clocks: no sample of either driver is above
    1,300 W, and no clock of a card is one of the other kind's."""
    made = crooked_kinds(tmp_path)
    drawn_w = {}
    for budget_w in (None, 1300.0):
        both = [
            run_mixed(
                made, rows_of(busy_rows()), controller="base", scaler=scaler, budget_w=budget_w,
                router="least-requests", engine=engine, record_iterations=True,
                actuation_latency_s=0.003, timeline_interval_s=0.001, timeline_max_samples=10**6,
            )
            for engine in DRIVERS
        ]  # fmt: skip
        same_requests(*both)
        same_instances(*both)
        same_iterations(*both)
        timeline = both[1].timeline
        assert timeline is not None
        drawn_w[budget_w] = timeline["power_w"].reshape(-1, 4).sum(axis=1).max()
        energy_j = summarise(both[1])["energy_j"]
        assert 0.001 * timeline["power_w"].sum() == pytest.approx(energy_j, rel=3e-3)
    assert drawn_w[None] > 1300.0 >= drawn_w[1300.0] > 900.0
