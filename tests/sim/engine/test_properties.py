"""Laws that hold for every workload, profile and policy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import Falling, make_requests, run
from voltana.profiles.catalog import Profile
from voltana.sim.metrics import summarise
from voltana.sim.policies.controllers.fixed import NoParameters
from voltana.sim.policies.registry import CONTROLLERS, ROUTERS, Entry
from voltana.sim.records import COMPLETED, IN_FLIGHT, REJECTED, RunRecord
from voltana.sim.workload.workload import Workload


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(
        tmp_path_factory.mktemp("profile"), idle_w=lambda f: 40.0 + f / 50
    )


REQUEST = st.tuples(st.floats(0.0, 0.5, allow_nan=False), st.integers(1, 900), st.integers(1, 60))
POLICY = st.fixed_dictionaries(
    {
        "controller": st.sampled_from(
            [*sorted(CONTROLLERS), "static:f=700", "ecofreq:idle=0.1,margin=0.2",
             "ecofreq:frequencies=700+1000+1400",
             "agft:window=0.05,settle=0.01,num_baseline=2", "rapid:period=0.05,cooldown=0.1",
             "polca:budget=700,lag=0.05,brake_lag=0.02,period=0.05"]
        ),
        "router": st.sampled_from(
            # mdp needs a policy file
            [*sorted(set(ROUTERS) - {"mdp"}), "ecoroute:tile=2", "ecoroute-tile:tile=3"]
        ),
        "num_prefill": st.integers(1, 3),
        "num_decode": st.integers(1, 3),
        "actuation_latency_s": st.sampled_from([0.0, 0.003, 0.05, 0.2]),
        "slo_itl_s": st.sampled_from([0.004, 0.008, 0.06]),
        "kv_capacity_tokens": st.sampled_from([700, 1500, 4000]),
        "kv_reserve_tokens": st.sampled_from([0, 50]),
        "kv_retract_tokens": st.sampled_from([1, 20]),
        "max_prefill_tokens": st.sampled_from([128, 1024]),
        "max_running_requests": st.sampled_from([2, 30]),
        "first_token": st.sampled_from(["decode", "prefill"]),
        "prefill_metrics": st.sampled_from(["before", "after"]),
        "decode_metrics": st.sampled_from(["before", "after"]),
        "kv_transfer_latency_s": st.sampled_from([0.0, 0.01]),
        "kv_transfers": st.sampled_from(
            ["at_once", "in_turn", "shared_by_prefill", "shared_by_decode", "shared_by_fleet"]
        ),
        "kv_transfer_bytes_per_s": st.sampled_from([None, 2e7]),
        "temperature": st.sampled_from([None, "air:leakage=0.01,time=0.05"]),
        "prefill_starts": st.sampled_from(["arrival", "decode_boundary"]),
        "handshake_latency_s": st.sampled_from([0.0, 0.003]),
        "serving_latency_s": st.sampled_from([0.0, 0.0, 0.004]),
        "noise_scale": st.sampled_from([0.0, 1.0, 4.0]),
        "sag_depth": st.sampled_from([0.0, 0.5]),
        "sag_duration_s": st.just(0.05),
        "sag_interval_s": st.just(0.1),
        "clock_stall_s": st.sampled_from([0.0, 0.005]),
    }
)  # fmt: skip


def workload_of(rows: list[tuple[float, int, int]]) -> Workload:
    gaps, inputs, outputs = zip(*rows, strict=True)
    return Workload(
        arrival_s=np.cumsum(gaps),
        input_tokens=np.array(inputs, dtype=np.int64),
        output_tokens=np.array(outputs, dtype=np.int64),
    )


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(REQUEST, min_size=1, max_size=40), policy=POLICY)
def test_nothing_is_lost(
    profile: Profile, rows: list[tuple[float, int, int]], policy: dict[str, Any]
) -> None:
    record, summary = run(profile, workload_of(rows), record_iterations=True, **policy)
    check_conservation(record, summary, policy)
    assert (record.requests.status != IN_FLIGHT).all()
    check_tokens(record, policy["first_token"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(REQUEST, min_size=5, max_size=40), policy=POLICY, limit=st.floats(0.01, 2.0))
def test_nothing_is_lost_when_the_run_is_cut(
    profile: Profile, rows: list[tuple[float, int, int]], policy: dict[str, Any], limit: float
) -> None:
    record, summary = run(profile, workload_of(rows), run_limit_s=limit, **policy)
    check_conservation(record, summary, policy)
    assert record.makespan_s <= limit * (1 + 1e-12)


def check_conservation(record: RunRecord, summary: dict[str, Any], policy: dict[str, Any]) -> None:
    status = record.requests.status
    parts = ("completed", "rejected", "failed", "in_flight")
    assert sum(summary[f"requests_{p}"] for p in parts) == summary["requests_total"] == len(status)
    too_long = record.requests.input_tokens + record.requests.output_tokens
    assert ((status == REJECTED) <= (too_long > policy["kv_capacity_tokens"])).all()
    instances = policy["num_prefill"] + policy["num_decode"]
    assert len(record.instances) == instances
    state_s = sum(i.busy_s + i.idle_s for i in record.instances)
    assert state_s == pytest.approx(record.makespan_s * instances, rel=1e-9)
    for i in record.instances:
        assert sum(i.clock_busy_s.values()) == pytest.approx(i.busy_s, rel=1e-9)
        assert sum(i.clock_idle_s.values()) == pytest.approx(i.idle_s, rel=1e-9)
        assert i.busy_window_energy_j <= (i.busy_energy_j + i.idle_energy_j) * (1 + 1e-12)
        assert i.busy_window_energy_j >= i.busy_energy_j * (1 - 1e-12)
        idle_watts = {f: 40.0 + f / 50 for f in (0, 700, 1000, 1400)}
        expected = sum(idle_watts[f] * s for f, s in i.clock_idle_s.items())
        if policy["temperature"] is None:
            assert i.idle_energy_j == pytest.approx(expected, rel=1e-5, abs=1e-9)
        else:  # never below what a card as cold as its air draws
            assert i.idle_energy_j >= expected * (1.0 + 0.01 * (30.0 - 50.0)) - 1e-9
    total = sum(i.busy_energy_j + i.idle_energy_j for i in record.instances)
    assert summary["energy_j"] == pytest.approx(total, rel=1e-12)


def check_tokens(record: RunRecord, first_token: str) -> None:
    requests = record.requests
    done = requests.status == COMPLETED
    outputs = requests.output_tokens[done]
    # every completed request has one gap fewer than tokens
    assert record.itl_weight.sum() == (outputs - 1).sum()
    assert (requests.first_token_s[done] >= requests.arrival_s[done]).all()
    assert (requests.finish_s[done] >= requests.first_token_s[done]).all()
    # the gaps add up to the time between first and last tokens
    spans = (requests.finish_s - requests.first_token_s)[done].sum()
    assert np.dot(record.itl_s, record.itl_weight) == pytest.approx(spans, rel=1e-9, abs=1e-9)
    table = record.iterations
    if table is None:
        assert not done.any()
        return
    steps = table.batch_size[table.phase == "decode"].sum()
    assert steps == (outputs if first_token == "decode" else outputs - 1).sum()
    prefilled = table.tokens[table.phase == "prefill"].sum()
    assert prefilled == requests.input_tokens[done].sum()
    assert table.energy_j.sum() == pytest.approx(
        sum(i.busy_energy_j for i in record.instances), rel=1e-9
    )


def test_same_seed_same_bytes_in_another_process(tmp_path: Path) -> None:
    """Interpreters with different string hashing print the same summary, but for the wall time."""
    command = [sys.executable, "-m", "voltana.experiments.cli", "simulate", "--rate", "20",
               "--duration", "10", "--router", "random", "--json"]  # fmt: skip
    outputs = []
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            command, cwd=ROOT, env={"PYTHONHASHSEED": hash_seed, "PATH": "/usr/bin"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        summary = json.loads(done.stdout)
        del summary["wall_s"]
        outputs.append(json.dumps(summary))
    assert outputs[0] == outputs[1]


def test_timeline_is_bounded_and_in_order(profile: Profile) -> None:
    rows = [(0.05, 50, 20)] * 100
    record, _ = run(profile, workload_of(rows), timeline_interval_s=0.001, timeline_max_samples=64)
    timeline = record.timeline
    assert timeline is not None
    times = np.unique(timeline["time_s"])
    assert 16 <= len(times) <= 64
    assert (np.diff(timeline["time_s"]) >= 0).all()
    assert set(timeline["phase"]) == {"prefill", "decode"}


def test_actuation_latency_delays_the_saving(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock drops from the unlocked top: the later it lands, the more energy."""
    monkeypatch.setitem(CONTROLLERS, "falling", Entry(make=Falling, parameters=NoParameters))
    energies = [
        run(profile, make_requests((0.0, 100, 200)), controller="falling",
            actuation_latency_s=lag)[1]["decode_energy_j"]
        for lag in (0.003, 0.05, 0.2)
    ]  # fmt: skip
    assert energies == sorted(energies)
    assert energies[0] < energies[-1]


def test_summary_of_a_rejected_only_run_has_no_numbers_from_nowhere(profile: Profile) -> None:
    record, summary = run(profile, make_requests((0.0, 100, 100)), kv_capacity_tokens=50)
    assert summary["attainment"] == summary["ttft_attainment"] == 0.0
    assert np.isnan(summary["energy_per_output_token_j"])
    assert summarise(record)["energy_j"] == 0.0
