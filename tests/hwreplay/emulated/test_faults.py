"""The fault campaign in short, and that it sees what it is for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from tests.profiles.device.standin import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the emulated card needs gcc"),
]
KILLS = ("actuator", "agent", "router", "server")
CARDS = ("refuses locks", "refuses to unlock", "lags 200 ms", "sags to 705 MHz", "disappears")
WITHOUT_WATCHDOG = """
import os, signal, sys
from benchmarks import fault_bench, faults
honest = faults.KILLS["actuator"]

async def both_at_once(bench, rng, number):
    await bench.all_locked()
    for pid in fault_bench._watchdogs():
        os.kill(pid, signal.SIGKILL)
    return await honest(bench, rng, number)

faults.KILLS["actuator"] = both_at_once
faults.UNLOCK_S = 2.0
sys.argv = ["faults", "--tries", "1", "--only", "kill -9 actuator", "--minutes", "60"]
sys.exit(faults.main())
"""


def campaign(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )


def test_every_fault_gives_its_clocks_back_and_accounts_for_each_request() -> None:
    done = campaign(
        "-m", "benchmarks.faults", "--tries", "2", "--card-tries", "1", "--minutes", "60"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every clock given back, every request accounted for" in done.stdout
    for fault, tries in [(f"kill -9 {k}", 2) for k in KILLS] + [(f"card {c}", 1) for c in CARDS]:
        assert re.search(rf"^{re.escape(fault)} +{tries} ", done.stdout, re.MULTILINE), fault


def test_a_clock_that_stays_locked_is_seen() -> None:
    """Actuator and watchdog killed at once: nobody is left who could give the clocks back."""
    done = campaign("-c", WITHOUT_WATCHDOG)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "must be unlocked" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("FAILED")
