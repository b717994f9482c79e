"""PID tuning: no worse than the default gains on seeds it has not seen, and ready to be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from voltana.experiments.cli import make_app
from voltana.experiments.control.tune import PidTuner
from voltana.experiments.runs import run
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config, read_toml
from voltana.sim.metrics import summarise

BASE = {"rate_rps": 36, "duration_s": 15, "slo_itl_s": 0.04, "router": "least-requests"}


@pytest.mark.slow
def test_tuned_gains_are_no_worse_on_held_out_seeds(tmp_path: Path) -> None:
    tuner = PidTuner(
        BASE, tmp_path, seeds=(1,), held_out=(7, 8), population=6, generations=1, jobs=1
    )
    tuned = tuner.tune()
    # in the search the default is one of the settings tried
    assert tuned.tuning["tuned"].cost <= tuned.tuning["default"].cost
    assert tuned.held_out["tuned"].cost <= tuned.held_out["default"].cost
    # what is printed is what was judged
    alone = summarise(run(make_config({**BASE, **tuned.settings, "seed": 7})))
    beside = summarise(run(make_config({**BASE, **tuned.settings, "seed": 8})))
    mean_j = 0.5 * (alone["energy_j"] + beside["energy_j"])
    assert tuned.held_out["tuned"].energy_j == pytest.approx(mean_j, rel=1e-12)


@pytest.mark.slow
def test_the_command_writes_a_configuration(tmp_path: Path) -> None:
    arguments = ["tune", "pid", "--out", str(tmp_path), "--population", "5", "--generations", "1",
                 "--seeds", "1", "--held-out", "1", "--jobs", "1",
                 "--set", "duration_s=3", "--set", "rate_rps=10"]  # fmt: skip
    done = CliRunner().invoke(make_app(), arguments)
    assert done.exit_code == 0, done.output
    config = make_config(read_toml(tmp_path / "pid.toml"))
    assert config.decode_controller_spec.startswith("pid:target=")
    assert "held-out seeds, tuned" in (tmp_path / "pid.toml").read_text()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "points").iterdir()}
    CliRunner().invoke(make_app(), arguments)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "points").iterdir()} == kept


def test_judging_by_seeds_tuned_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VoltanaError, match="tuning and held-out seeds must be given and differ"):
        PidTuner(BASE, tmp_path, seeds=(1, 2), held_out=(2,))
    with pytest.raises(VoltanaError, match="population >= 5"):
        PidTuner(BASE, tmp_path, population=2)
