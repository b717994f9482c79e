"""Two pinned runs, without noise and with. They move only when the simulator, a profile or the
workload means to.

`python -m tests.sim.test_golden` rewrites the file; the commit says why it moved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from voltana.experiments.runs import run
from voltana.sim.config import make_config
from voltana.sim.metrics import summarise

FILES = {"golden.json": 0.0, "golden_noise.json": 1.0}
"""Beside this file, with the noise of each: multiples of what the profile states."""
CONFIG = {"rate_rps": 36, "duration_s": 30, "seed": 13, "slo_itl_s": 0.045}
KEYS = (
    "requests_completed", "makespan_s", "energy_j", "energy_busy_window_j", "prefill_energy_j",
    "decode_energy_j", "idle_energy_j", "ttft_s", "itl_s", "tpot_s", "e2e_s", "ttft_attainment",
    "itl_attainment", "attainment", "clock_changes", "iterations",
)  # fmt: skip


def golden(noise_scale: float) -> dict[str, Any]:
    summary = summarise(run(make_config(CONFIG | {"noise_scale": noise_scale})))
    return {key: summary[key] for key in KEYS}


@pytest.mark.parametrize("name", FILES)
def test_golden_run(name: str) -> None:
    """Rounding may differ between C libraries: 1e-9; counts are exact."""
    pinned = json.loads((Path(__file__).parent / name).read_text())
    made = golden(FILES[name])
    assert set(made) == set(pinned)
    for key, value in pinned.items():
        assert made[key] == pytest.approx(value, rel=1e-9), key


if __name__ == "__main__":
    for name, noise_scale in FILES.items():
        text = json.dumps(golden(noise_scale), indent=1) + "\n"
        (Path(__file__).parent / name).write_text(text)
