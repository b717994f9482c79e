"""`voltana profile --engine sglang` on the real SGLang, from points to a profile that simulates."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.hwreplay.conftest import ENGINE, EngineFleet
from tests.sim.engine.fixtures import make_requests
from voltana.profiles.catalog import load_profile
from voltana.profiles.engines.base import Point
from voltana.profiles.engines.llama_config import load_shape
from voltana.profiles.engines.sglang import SglangEngine, full_runs
from voltana.profiles.engines.sglang_attach import attach
from voltana.sim.config import make_config
from voltana.sim.engine.simulate import simulate
from voltana.sim.metrics import summarise


@pytest.fixture
def fleet_file(engine_fleet: EngineFleet, tmp_path: Path) -> Path:
    path = tmp_path / "fleet.toml"
    prefill, decode = engine_fleet.prefill, engine_fleet.decode[0]
    path.write_text(
        f'[[fleet.prefill]]\nurl = "{prefill.plan.url}"\nmetrics = "{prefill.plan.metrics}"\n'
        f"bootstrap_port = {prefill.plan.bootstrap_port}\n"
        f'[[fleet.decode]]\nurl = "{decode.plan.url}"\nmetrics = "{decode.plan.metrics}"\n'
    )
    return path


@pytest.mark.engine
@pytest.mark.slow
def test_points_are_held_as_asked(fleet_file: Path) -> None:
    """A burst runs in one pass of just its tokens; held streams grow by one token each a pass."""
    shape = load_shape(str(ENGINE / "model"))
    with SglangEngine(lambda: attach(fleet_file), shape, is_attached=True) as engine:
        assert engine.facts.kv_capacity_tokens == 8192
        assert engine.facts.kv_bytes_per_token == 256
        assert engine.kv_reserve_tokens == 512
        with engine.open(Point(phase="prefill", batch_size=2, tokens=128)) as burst:
            window = burst.run(min_duration_s=0.0, min_iterations=2)
        assert 126 <= window.tokens <= 128  # a prefix cache may know each prompt's first token
        assert len(window.spans_ns) == len(window.iteration_s) == 2
        records = engine.records(engine.servers.decode)
        records.take()
        engine.client.start([40, 40], 48).result()
        with engine.open(Point(phase="decode", batch_size=2, tokens=128)) as streams:
            window = streams.run(min_duration_s=0.0, min_iterations=4)
        assert len(window.iteration_s) >= 4
        assert 2 * 40 < window.tokens < 2 * 128
        engine.client.start([40, 40], 48).result()
        runs = full_runs(records.take(), 2)
    steps = {b.sum_decode_kv_tokens - a.sum_decode_kv_tokens for r in runs for a, b in pairwise(r)}
    assert steps == {2}


@pytest.mark.engine
@pytest.mark.slow
def test_a_profile_of_the_real_engine_simulates(fleet_file: Path, tmp_path: Path) -> None:
    """The whole command: the tables, what serving adds, and a simulation that takes both."""
    out = tmp_path / "cpu"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "voltana.experiments.cli", "profile", "--engine", "sglang"),
            *("--attach", str(fleet_file), "--model", str(ENGINE / "model"), "--device", "cpu"),
            *("--power-w", "100", "--out", str(out), "--budget", "1s", "--window", "0.01"),
            *("--iterations", "2", "--trials", "1", "--max-batch", "2", "--max-tokens", "256"),
            *("--warm-up", "0", "--settle", "0"),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    profile = load_profile(out)
    provenance = profile.meta.provenance
    assert provenance["decode_time"].status == "measured"
    assert provenance["decode_power"].status == "modelled"
    assert "prefill and decode apart" in provenance["decode_time"].source
    assert profile.meta.engine.name == "sglang"
    assert set(profile.decode["batch_size"]) == {1, 2}
    keys = tomllib.loads((out / "serving.toml").read_text())["simulate"]
    config = make_config(
        keys | {"num_prefill": 1, "num_decode": 1, "extrapolate": True, "controller": "static",
                "router": "round-robin"}
    )  # fmt: skip
    assert config.kv_transfer_latency_s > 0
    record = simulate(config, profile, make_requests((0.0, 40, 9), (0.01, 30, 5)))
    summary = summarise(record)
    assert summary["requests_completed"] == 2
    assert summary["ttft_s"]["p50"] >= config.kv_transfer_latency_s
