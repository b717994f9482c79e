"""Phases apart or together: what is chosen where, and held against what."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tests.experiments.frontier.fixtures import make_small_study
from voltana.experiments.frontier.search import (
    DEFAULT,
    STATIC_CLOCK,
    STATIC_FLEET,
    Found,
    Study,
)
from voltana.experiments.frontier.study import read_study
from voltana.experiments.frontier.trial import Trial
from voltana.experiments.study.disaggregation import CONFIG, main, rows_of
from voltana.sim.config import make_config


@pytest.fixture
def study() -> Study:
    return make_small_study()


def found(
    fleet: str, controller: str, tuned: tuple[float, float], judged_j: tuple[float, ...],
    *, knob: str = "1005 MHz",
) -> Found:  # fmt: skip
    rows = pd.DataFrame({"attainment": [0.995] * 3, "requests_total": [100] * 3})
    attained, energy_j = tuned
    return Found(
        load=f"chat 15/s: {fleet}", router="consolidate", controller=controller, knob=knob,
        tuned=None if knob == DEFAULT else Trial(
            settings={}, label=knob, attainments=(attained,) * 2, energies_j=(energy_j,) * 2
        ),
        judged=Trial(settings={}, label=knob, energies_j=judged_j, rows=rows),
    )  # fmt: skip


def test_the_tuning_seeds_choose_and_the_others_judge(study: Study) -> None:
    """3P1D is cheaper than 2P2D where it is chosen, dearer where it is judged; a colocated fleet of
    chunks is cheaper but misses. Savings of 10, 20 and 30 % are 20 ± 24.84 (t of 2 degrees)."""
    every = [
        found("4C", STATIC_FLEET, (0.996, 900.0), (100.0, 100.0, 100.0)),
        found("4C, chunks of 512", STATIC_FLEET, (0.994, 500.0), (50.0, 50.0, 50.0)),
        found("2P2D", STATIC_FLEET, (1.0, 800.0), (1.0, 1.0, 1.0)),
        found("3P1D", STATIC_FLEET, (1.0, 700.0), (90.0, 80.0, 70.0)),
        found("2P2D", "ecomin", (1.0, 800.0), (1.0, 1.0, 1.0), knob=DEFAULT),
        found("2P2D", STATIC_CLOCK, (0.9, 1.0), (1.0, 1.0, 1.0)),
    ]
    rows = {name: rest for _, name, *rest in rows_of(study, "chat 15/s", every)}
    assert rows["together, a static clock"] == ["4C, 1005 MHz", "0.1", "99.50", ""]
    apart = rows["apart, a static clock a phase"]
    assert apart == ["3P1D, 1005 MHz", "0.1", "99.50", "20.0 ± 24.8"]
    for nobody in ("apart, one static clock", "apart, `ecomin`", "together, `ecomin`"):
        assert rows[nobody][0] == "none keeps it"


def test_the_shipped_loads_are_fleets_of_as_many_gpus() -> None:
    study, question = read_study(CONFIG)
    assert "splitting" in question
    for load in study.loads:
        config = make_config({**study.base, **load.settings})
        assert (config.num_colocated or config.num_prefill + config.num_decode) == 4
        assert ("C" in load.name.partition(": ")[2]) == bool(config.num_colocated)
    assert not {r["seed"] for r in study.tuning} & {r["seed"] for r in study.judging}


def test_a_small_study_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.toml"
    path.write_text(
        """
[frontier]
tuning_seeds = [1]
seeds = [11, 12]
routers = ["least-requests"]
controllers = ["boost"]
static_one_clock = true
static_clocks_mhz = [1005, 1410]
[base]
profile = "a100-80g-sxm/llama-3.1-8b"
duration_s = 3
rate_rps = 5
slo_ttft_s = 5
slo_itl_s = 1
[[load]]
name = "few: 1P1D"
num_prefill = 1
num_decode = 1
[[load]]
name = "few: 2C"
num_colocated = 2
"""
    )
    main(["--config", str(path), "--out", str(tmp_path / "out"), "--jobs", "1"])
    told = capsys.readouterr().out
    assert told.count("| few | ") == 5
    assert "2C, 1005 MHz, 1C | " in told
    assert "1P1D, 1005 MHz | " in told
