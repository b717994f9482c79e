"""Awake power: what an instance draws, from its first iteration on, above rest and tables alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from voltana.experiments.runs import workload_of
from voltana.profiles.catalog import DATA, Profile, load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.engine.simulate import simulate
from voltana.sim.records import RunRecord

PLAIN = "a100-80g-sxm/llama-3.1-8b"
SAID = '\n[provenance.awake_power]\nstatus = "modelled"\nsource = "a test"\n'


def awake_profile(folder: Path, watts: float, said: str = SAID) -> Profile:
    """The plain profile with as much awake power at every clock."""
    made = folder / "awake"
    shutil.copytree(DATA / PLAIN, made)
    idle = pd.read_csv(made / "idle.csv").assign(awake_power_w=watts)
    idle.to_csv(made / "idle.csv", index=False)
    text = (made / "profile.toml").read_text()
    (made / "profile.toml").write_text(text + said)
    return load_profile(made)


def run(profile: Profile, controller: str) -> RunRecord:
    config = make_config({
        "rate_rps": 20, "duration_s": 6, "num_decode": 3, "active_decode": 2,
        "controller": controller, "record_iterations": True, "timeline_interval_s": 0.5,
    })  # fmt: skip
    return simulate(config, profile, workload_of(config))


@pytest.mark.parametrize("controller", ["static:f=1410", "ecofreq"])
def test_awake_power_times_time_adds_exactly(controller: str, tmp_path: Path) -> None:
    """50 W from the first start to the last end of an iteration; nothing where nobody worked.

    All else is as without it: awake power changes no time and no decision of these policies.
    """
    plain, awake = (
        run(p, controller) for p in (load_profile(PLAIN), awake_profile(tmp_path, 50.0))
    )
    table = awake.iterations
    assert table is not None
    worked = 0
    for without, with_it in zip(plain.instances, awake.instances, strict=True):
        assert with_it.busy_s == without.busy_s
        assert with_it.clock_busy_s == without.clock_busy_s
        assert with_it.busy_energy_j - without.busy_energy_j == pytest.approx(50 * without.busy_s)
        mine = (table.phase == with_it.phase) & (table.instance_id == with_it.instance_id)
        if not mine.any():
            assert with_it.idle_energy_j == without.idle_energy_j
            continue
        worked += 1
        start_s, end_s = table.start_s[mine], table.start_s[mine] + table.duration_s[mine]
        added_j = with_it.busy_window_energy_j - without.busy_window_energy_j
        assert added_j == pytest.approx(50 * (end_s.max() - start_s.min()), rel=1e-9)
        idle_s = without.idle_s - start_s.min()
        added_j = with_it.idle_energy_j - without.idle_energy_j
        assert added_j == pytest.approx(50 * idle_s, abs=1e-6)
    assert worked == 4


def test_between_given_clocks_it_is_linear_and_unlocked_has_its_own(tmp_path: Path) -> None:
    """40 W at 1005 MHz and 60 W at 1095 MHz make 50 W at 1050 MHz, in work and between."""
    awake_profile(tmp_path, 40.0)
    idle = pd.read_csv(tmp_path / "awake" / "idle.csv")
    idle.loc[idle["frequency_mhz"] > 1005, "awake_power_w"] = 60.0
    idle.loc[idle["frequency_mhz"] == 0, "awake_power_w"] = 7.0
    idle.to_csv(tmp_path / "awake" / "idle.csv", index=False)
    awake, plain = load_profile(tmp_path / "awake").truth(), load_profile(PLAIN).truth()
    for phase in ("prefill", "decode"):
        added_w = awake.power_w(phase, 1050, 8, 4000) - plain.power_w(phase, 1050, 8, 4000)
        assert added_w == pytest.approx(50)
    for clock, added_w in ((1050, 50), (1410, 60), (0, 7)):
        assert awake.idle_power_w(clock) - plain.idle_power_w(clock) == pytest.approx(added_w)
        assert awake.rest_power_w(clock) == plain.idle_power_w(clock)


@pytest.mark.parametrize(
    ("watts", "said", "words"),
    [(-1.0, SAID, "awake_power_w must be a number >= 0"),
     (np.nan, SAID, "awake_power_w must be a number >= 0"),
     (50.0, "", "provenance must be stated for awake_power")],
)  # fmt: skip
def test_bad_awake_power_is_named(watts: float, said: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(VoltanaError, match=words):
        awake_profile(tmp_path, watts, said)
