"""`voltana profile` end to end: torch on the CPU, the card a constant or the emulated card."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from tests.profiles.device.standin import ROOT, Standin
from tests.profiles.measure.test_measure import FACTS
from tests.profiles.measure.test_measure import TRIAL as PLAIN
from tests.sim.engine.fixtures import make_requests
from tests.sim.engine.fixtures import run as simulate_run
from voltana.experiments.cli import make_app
from voltana.profiles.catalog import Profile, load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.device.constant import ConstantPowerGpu
from voltana.profiles.engines.base import PHASES, Point
from voltana.profiles.measure.assemble import assemble
from voltana.profiles.measure.journal import Journal
from voltana.profiles.measure.trial import GAPS

pytest.importorskip("torch")

TRIAL = replace(PLAIN, flags=(GAPS,))
SMALL = (
    *("--model", "toy", "--device", "cpu", "--dtype", "float32", "--budget", "2s"),
    *("--window", "0.02", "--iterations", "2", "--trials", "2"),
    *("--warm-up", "0", "--settle", "0"),
    *("--max-batch", "2", "--max-tokens", "512"),
)


def command(out: Path, *extra: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "voltana.experiments.cli",
        "profile",
        *SMALL,
        "--out",
        str(out),
        *extra,
    ]


def run(out: Path, env: dict[str, str], *extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(out, *extra), env=env, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def quiet_env() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_without_a_card_the_power_is_never_called_measured(
    tmp_path: Path, quiet_env: dict[str, str]
) -> None:
    told = ("--power-w", "100", "--phases", "prefill,decode,mixed")
    done = run(tmp_path / "toy", quiet_env, *told)
    assert done.returncode == 0, done.stderr
    profile = load_profile(tmp_path / "toy")
    assert profile.meta.provenance["decode_time"].status == "measured"
    for quantity in ("prefill_power", "decode_power", "idle_power", "mixed_power"):
        assert profile.meta.provenance[quantity].status == "modelled"
    assert profile.meta.provenance["mixed_time"].status == "measured"
    _meets_its_mixed_iterations(profile)
    assert profile.power_w("decode", 1000, 1, 1) == pytest.approx(100.0, rel=0.2)
    assert set(profile.decode["trial"]) == {0, 1}
    assert (profile.decode["spread_s"] >= 0).all()
    assert profile.decode["spread_s"].max() > 0
    names = {path.name for path in (tmp_path / "toy" / "report").iterdir()}
    # This grid has one decode batch at the contexts that two of the figures are drawn for.
    assert names == {"power_surface.png", "fit_report.csv"}
    _simulates_at_constant_power(profile)
    before = (tmp_path / "toy" / "journal.jsonl").read_text()
    again = run(tmp_path / "toy", quiet_env, *told)
    assert again.returncode == 0, again.stderr
    after = (tmp_path / "toy" / "journal.jsonl").read_text()
    assert after.startswith(before)
    keys = [line.split(', "trials"')[0] for line in after.splitlines()]
    assert len(set(keys)) == len(keys)  # no finished point was measured again


def _meets_its_mixed_iterations(profile: Profile) -> None:
    """Each row as the simulator has it; the table's six digits are all that is lost."""
    assert profile.mixed is not None
    key = ["frequency_mhz", "chunk_tokens", "batch_size", "tokens"]
    step = profile.mixed_step(extrapolate=True)
    medians = profile.mixed.groupby(key)["time_s"].median().reset_index()
    for row in medians.to_dict("records"):
        clock, chunk, batch, tokens = (int(row[name]) for name in key)
        time_s, _ = step.time_and_power(clock, (1.0, chunk), (batch, tokens))
        assert time_s == pytest.approx(row["time_s"], rel=1e-4)
    requests = make_requests((0.0, 40, 9), (0.001, 30, 5), (0.002, 20, 7))
    _, summary = simulate_run(
        profile, requests, num_colocated=1, num_prefill=0, num_decode=0, extrapolate=True,
        colocated_order="sglang-mixed", kv_capacity_tokens=200, max_prefill_tokens=64,
    )  # fmt: skip
    assert summary["requests_completed"] == 3


def _simulates_at_constant_power(profile: Profile) -> None:
    """The simulator runs on it as it is, and 100 W a busy or idle instance is 100 W.

    Within 5 %: the counter is read a moment before and after each 20 ms window.
    """
    requests = make_requests((0.0, 40, 9), (0.001, 30, 5), (0.002, 20, 7))
    record, summary = simulate_run(
        profile, requests, max_running_requests=2, kv_capacity_tokens=200, max_prefill_tokens=128
    )
    assert summary["requests_completed"] == 3
    assert summary["energy_j"] == pytest.approx(100.0 * 2 * record.makespan_s, rel=0.05)


def test_clocks_are_locked_in_turn_and_given_back(standin: Standin, tmp_path: Path) -> None:
    env = standin.env | {"OMP_NUM_THREADS": "1"}
    done = run(tmp_path / "p", env, "--frequencies", "1005,1410")
    assert done.returncode == 0, done.stderr
    profile = load_profile(tmp_path / "p")
    assert profile.clocks_mhz == (1005, 1410)
    power = profile.meta.provenance["decode_power"]
    assert power.status == "modelled"  # the card's, while the CPU computed
    assert "not the power of this work" in power.source
    assert profile.idle_power_w(0) == pytest.approx(250.0, rel=0.1)
    assert "at most 0:0" in done.stderr
    assert "voltana: the engine starts and loads its model" in done.stderr.splitlines()
    bare = pd.read_csv(tmp_path / "p" / "idle_bare.csv")
    assert set(bare["frequency_mhz"]) == {0, 1005, 1410}
    assert bare["power_w"].to_numpy() == pytest.approx(250.0, rel=0.1)
    assert standin["locked_mhz"] == 0
    assert standin["num_locks"] > 0


def test_current_touches_no_clock_even_without_permission(standin: Standin, tmp_path: Path) -> None:
    standin["deny_lock"] = 1
    standin["stuck_mhz"] = 1305
    env = standin.env | {"OMP_NUM_THREADS": "1"}
    done = run(tmp_path / "p", env, "--frequencies", "current")
    assert done.returncode == 0, done.stderr
    profile = load_profile(tmp_path / "p")
    assert profile.clocks_mhz == (1305,)
    assert "no clock was ever touched" in profile.meta.provenance["clocks"].source
    assert (standin["num_locks"], standin["num_resets"]) == (0, 0)
    refused = run(tmp_path / "q", env, "--frequencies", "1005")
    assert refused.returncode == 2
    *before, last = refused.stderr.splitlines()
    assert "--frequencies current" in last
    assert "CAP_SYS_ADMIN" in last
    assert before == ["voltana: idle power without the model is measured"]


def test_the_clock_locked_before_is_locked_again(standin: Standin, tmp_path: Path) -> None:
    env = standin.env | {"OMP_NUM_THREADS": "1"}
    wrong = run(tmp_path / "p", env, "--frequencies", "1005", "--restore-clock", "1001")
    assert "--restore-clock must be a clock the card supports" in wrong.stderr
    done = run(tmp_path / "p", env, "--frequencies", "1005", "--restore-clock", "1200")
    assert done.returncode == 0, done.stderr
    assert standin["locked_mhz"] == 1200


def test_power_of_a_card_is_measured_where_the_engine_runs_on_it(tmp_path: Path) -> None:
    """And of all its cards, each of them named."""
    log = Journal.open(tmp_path / "journal.jsonl")
    for tokens in (8, 16):
        for phase in PHASES:
            log.add_point(0, Point(phase=phase, batch_size=1, tokens=tokens), [TRIAL])
    log.add_idle(0, is_loaded=True, power_w=[60.0])
    card = replace(ConstantPowerGpu(100.0).identity, is_power_measured=True, memory_bytes=2**30)
    made = assemble(tmp_path, log, [card, card], replace(FACTS, is_on_gpu=True))
    power = made.meta.provenance["decode_power"]
    assert power.status == "measured"
    assert power.source == "NVML energy by counter, board power of all 2 GPUs"
    assert "in 2 of 2 trials pauses were taken out at the idle power" in power.uncertainty
    elsewhere = assemble(tmp_path, log, [card], replace(FACTS, is_on_gpu=False))
    assert elsewhere.meta.provenance["decode_power"].status == "modelled"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "cuda:1"), "choose the card with --gpu"),
        (("--engine", "sglang", "--device", "cuda", "--pair"), "--pair must go with --device cpu"),
        (("--gpu", "0,0"), "--gpu must be distinct"),
    ],
)
def test_what_would_mislead_is_refused_in_one_line(
    tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    asked = ["profile", "--model", "toy", "--out", str(tmp_path / "p"), *options]
    done = CliRunner().invoke(make_app(), asked)
    assert isinstance(done.exception, VoltanaError)
    assert said in str(done.exception)
    assert "\n" not in str(done.exception)


def test_kill_9_of_the_profiler_gives_the_clock_back(standin: Standin, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path / "p", "--frequencies", "1005", "--window", "30"),
        env=standin.env | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert _eventually(standin, 1005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    assert _eventually(standin, 0)


def _eventually(standin: Standin, locked_mhz: int) -> bool:
    for _ in range(1200):
        if standin["locked_mhz"] == locked_mhz:
            return True
        time.sleep(0.05)
    return False
