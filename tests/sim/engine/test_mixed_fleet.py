"""Unlike instances in one fleet: each runs by its own tables, and routers that know them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

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
from tests.sim.engine.test_properties import workload_of as rows_of
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.engine.simulate import simulate
from voltana.sim.metrics import summarise
from voltana.sim.records import RunRecord
from voltana.sim.workload.workload import Workload

BASE: dict[str, Any] = {
    "profile": "slow", "num_prefill": 2, "num_decode": 2, "controller": "static",
    "router": "round-robin", "actuation_latency_s": 0.0, "kv_reserve_tokens": 0,
    "prefill_profiles": "slow+fast", "decode_profiles": "fast+slow",
}  # fmt: skip


@pytest.fixture
def kinds(tmp_path: Path) -> dict[str, Profile]:
    """Slow: 0.5 s an iteration at 256 W, idle 64 W. Fast: 0.25 s at 512 W, idle 128 W."""
    return {
        name: write_synthetic_profile(
            tmp_path / name,
            time_s=lambda p, f, b, t, s=seconds: s,  # type: ignore[misc]
            power_w=lambda p, f, b, t, s=seconds: 128.0 / s,  # type: ignore[misc]
            idle_w=lambda f, s=seconds: 32.0 / s,  # type: ignore[misc]
            clocks_mhz=clocks,
        )
        for name, seconds, clocks in (
            ("slow", 0.5, (700, 1000, 1400)), ("fast", 0.25, (900, 1800)),
        )
    }  # fmt: skip


def run_mixed(
    kinds: dict[str, Profile],
    workload: Workload,
    **settings: Any,  # noqa: ANN401
) -> RunRecord:
    config = make_config({**BASE, **settings})
    return simulate(config, kinds["slow"], workload, others=kinds)


@pytest.mark.parametrize("engine", ["reference", "coalesced"])
def test_each_instance_runs_by_its_own_profile(kinds: dict[str, Profile], engine: str) -> None:
    """Round-robin. First: slow prefill to 0.5 s, fast decode: 0.75, 1.0 s. Second, at 2 s: fast
    prefill to 2.25 s, slow decode: 2.75, 3.25 s. Each clock is its own card's top one."""
    requests = make_requests((0.0, 4, 2), (2.0, 4, 2))
    record = run_mixed(kinds, requests, engine=engine)
    assert record.requests.first_token_s.tolist() == [0.75, 2.75]
    assert record.requests.finish_s.tolist() == [1.0, 3.25]
    slow_prefill, fast_prefill, fast_decode, slow_decode = record.instances
    assert slow_prefill.busy_energy_j == slow_decode.busy_energy_j / 2 == 256.0 * 0.5
    assert fast_prefill.busy_energy_j == fast_decode.busy_energy_j / 2 == 512.0 * 0.25
    assert slow_decode.idle_energy_j == 64.0 * (3.25 - 1.0)
    assert fast_decode.idle_energy_j == 128.0 * (3.25 - 0.5)
    assert [dict(i.clock_busy_s) for i in record.instances] == [
        {1400: 0.5}, {1800: 0.25}, {1800: 0.5}, {1400: 1.0},
    ]  # fmt: skip


def test_least_time_and_least_energy_by_hand(kinds: dict[str, Profile]) -> None:
    """Nobody is there. Time: 0.25 s on the fast ones, 0.5 s on the slow ones. Energy above idle
    of a prompt: (512 - 128) · 0.25 = 96 J and (256 - 64) · 0.5 = 96 J, equal: the sooner one, fast.
    Power above idle of decode: 384 W and 192 W: slow."""
    requests = make_requests((0.0, 4, 1))
    values = {"predictor": "table", "slo_ttft_s": 9.0, "slo_itl_s": 1.0}
    quick = run_mixed(kinds, requests, router="least-time", **values).requests
    thrifty = run_mixed(kinds, requests, router="least-energy", **values).requests
    assert (quick.prefill_id.tolist(), quick.decode_id.tolist()) == ([1], [0])
    assert (thrifty.prefill_id.tolist(), thrifty.decode_id.tolist()) == ([1], [1])
    tight = run_mixed(kinds, requests, router="least-energy", **(values | {"slo_itl_s": 0.3}))
    assert tight.requests.decode_id.tolist() == [0]  # the slow one would miss the promise


def test_a_request_that_the_smallest_cannot_hold_is_rejected(kinds: dict[str, Profile]) -> None:
    meta = kinds["fast"].meta
    engine = dataclasses.replace(meta.engine, kv_capacity_tokens=100)
    small = dataclasses.replace(kinds["fast"], meta=dataclasses.replace(meta, engine=engine))
    requests = make_requests((0.0, 90, 20), (1.0, 70, 20))
    summary = summarise(run_mixed(kinds | {"fast": small}, requests))
    assert (summary["requests_rejected"], summary["requests_completed"]) == (1, 1)


@pytest.mark.parametrize("router", ["least-time", "least-energy", "ecoroute:tile=2"])
def test_both_drivers_agree_on_mixed_fleets(tmp_path: Path, router: str) -> None:
    kinds = {
        name: write_synthetic_profile(
            tmp_path / name,
            time_s=crooked(share),
            power_w=lambda p, f, b, t: 80.0 + 1.3e-4 * f * f + 0.017 * t + 0.9 * b,
            clocks_mhz=clocks,
        )
        for name, share, clocks in (
            ("slow", 9.0, (700, 1000, 1400)), ("fast", 0.0, (900, 1300, 1800)),
        )
    }  # fmt: skip
    values = {"controller": "ecofreq", "router": router, "actuation_latency_s": 0.003}
    plain, quick = (
        run_mixed(kinds, rows_of(busy_rows()), engine=engine, record_iterations=True, **values)
        for engine in ("reference", "coalesced")
    )
    same_requests(plain, quick)
    same_instances(plain, quick)
    same_iterations(plain, quick)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("slow", "prefill_profiles must name 2 instances, got 1 in 'slow'"),
        ("slow*3", "prefill_profiles must name 2 instances, got 3"),
        ("slow*x", r"prefill_profiles must be NAME or NAME\*COUNT, joined by \+, got 'slow\*x'"),
    ],
)
def test_lists_that_are_none(value: str, message: str) -> None:
    with pytest.raises(VoltanaError, match=message):
        make_config({**BASE, "prefill_profiles": value})
    assert make_config({**BASE, "prefill_profiles": "a*2"}).mixed_profiles["prefill"] == ["a", "a"]


def test_one_model_a_fleet(kinds: dict[str, Profile]) -> None:
    meta = kinds["fast"].meta
    model = dataclasses.replace(meta.model, kv_bytes_per_token=2048)
    other = dataclasses.replace(kinds["fast"], meta=dataclasses.replace(meta, model=model))
    with pytest.raises(VoltanaError, match=r"must serve one model, got profiles .* 1024 and 2048"):
        run_mixed(kinds | {"fast": other}, make_requests((0.0, 4, 2)))
