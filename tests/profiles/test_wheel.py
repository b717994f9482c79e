"""The built wheel in an empty folder: the command, its data, a page, the Python interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.experiments.grids import TWO_POLICIES

GRID = TWO_POLICIES.format(duration=3, rates=[5])
LOOK = """
import json, voltana
from voltana.experiments.sweep.grid import CONFIGS, read_sweep
print(json.dumps({
    "file": voltana.__file__,
    "energy_j": voltana.simulate(rate_rps=5, duration_s=3).energy_j,
    "demo": len(read_sweep(CONFIGS / "demo.toml")),
    "profiles": len(voltana.list_profiles()),
}))
"""


@pytest.mark.slow
def test_what_is_installed_needs_no_repository(tmp_path: Path) -> None:
    wheels = pytest.importorskip("hatchling.builders.wheel")
    (wheel,) = wheels.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(site), wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, timeout=600)

    def call(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=empty, capture_output=True, text=True, check=False,
            timeout=600, env=os.environ | {"PYTHONPATH": str(site)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    program = str(site / "bin" / "voltana")
    assert call(program, "--version").startswith("voltana ")
    told = json.loads(call(program, "simulate", "--rate", "5", "--duration", "3", "--json"))
    looked = json.loads(call("-c", LOOK))
    assert Path(looked["file"]).parent == site / "voltana"
    assert looked["energy_j"] == told["energy_j"]
    assert looked["demo"] > 100
    assert looked["profiles"] == len(list(ROOT.glob("profiles/data/*/*/profile.toml")))
    assert (site / "voltana" / "py.typed").exists()
    (empty / "grid.toml").write_text(GRID)
    call(program, "sweep", "grid.toml", "--out", "swept", "--jobs", "1")
    call(program, "plot", "swept")
    page = json.loads(call(program, "report", "swept", "--json"))
    assert page["without_series"] == []
    assert page["bytes"] > 1_000_000
