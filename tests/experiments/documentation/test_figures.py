"""What the notebooks draw, and the stand-in for hardware that one of them compares with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from voltana.experiments.compare.policies import BEST_PAIR
from voltana.experiments.documentation.wrong_profile import perturbed_profile
from voltana.experiments.draw.profiles import profile_figure, provenance_table
from voltana.experiments.draw.runs import best_of_pairs, energy_against_itl_slo, run_figure
from voltana.experiments.runs import run
from voltana.experiments.sweep.grid import expand
from voltana.experiments.sweep.run import run_sweep
from voltana.profiles.catalog import load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig

NAME = "a100-80g-sxm/llama-3.1-8b"


def lines(axes: Axes) -> dict[str, np.ndarray[Any, Any]]:
    return {str(line.get_label()): np.asarray(line.get_xydata()) for line in axes.get_lines()}


def test_profile_figure_draws_the_table() -> None:
    profile = load_profile(NAME)
    left, right = profile_figure(profile).axes
    batch, time_ms = lines(left)["1410"].T
    row = profile.decode.query("frequency_mhz == 1410 and batch_size == 64 and tokens == 65536")
    assert time_ms[batch == 64][0] == 1e3 * row["time_s"].iloc[0]
    # energy per token at the top clock is the unit, and the U has its bottom inside
    for drawn in lines(right).values():
        clock, relative = drawn.T
        assert relative[-1] == 1
        assert clock[0] < clock[np.argmin(relative)] < clock[-1]
    assert list(provenance_table(profile).index) == list(profile.meta.provenance)


def test_run_figure_needs_a_time_series() -> None:
    config = SimConfig(rate_rps=20, duration_s=3)
    with pytest.raises(VoltanaError, match="set timeline_interval_s"):
        run_figure(run(config))
    figure = run_figure(run(replace(config, timeline_interval_s=0.1)))
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "clock lock (MHz)", "batch (requests)", "power (W)",
    ]  # fmt: skip


def test_a_broken_promise_is_drawn_hollow(tmp_path: Path) -> None:
    grid = {
        "base": {"rate_rps": 20, "duration_s": 5},
        "grid": {
            "slo_itl_s": [0.001, 0.06],  # nothing takes 1 ms; 60 ms is ample
            "policy": [{"name": "static-max", "controller": "static"}],
        },
        "static_pairs": {"clocks_mhz": [1005, 1410]},
    }
    frame = run_sweep(expand(grid, "test"), tmp_path, jobs=1)
    best = best_of_pairs(frame).set_index(["policy", "slo_itl_s"])
    assert not best.loc[(BEST_PAIR, 0.001), "keeps_slo"]
    assert best.loc[(BEST_PAIR, 0.06), "keeps_slo"]
    assert best.loc[(BEST_PAIR, 0.06), "clocks"] == "1005/1005"
    (axes,) = energy_against_itl_slo(frame).axes
    dots = {
        (float(x), line.get_markerfacecolor() == "white")
        for line in axes.get_lines()
        if line.get_linestyle() == "None"
        for x in np.asarray(line.get_xdata(), dtype=float)
    }
    assert dots == {(1.0, True), (60.0, False)}


def test_the_stand_in_is_off_by_what_was_asked(tmp_path: Path) -> None:
    profile = load_profile(NAME)
    other = perturbed_profile(profile, tmp_path / "p", time_ratio=1.08, power_ratio=0.96)
    point = ("decode", 1200, 64, 65536)
    # tables are written with six digits
    rounding = 1e-5
    time_s = profile.iteration_time_s(*point)
    assert other.iteration_time_s(*point) == pytest.approx(1.08 * time_s, rel=rounding)
    assert other.power_w(*point) == pytest.approx(0.96 * profile.power_w(*point), rel=rounding)
    idle_w = profile.idle_power_w(0)
    assert other.idle_power_w(0) == pytest.approx(0.96 * idle_w, rel=rounding)
    # and policies still believe the original
    believed_s = profile.predictor().predict_s("decode", 1200, 64, 65536)
    assert other.predictor().predict_s("decode", 1200, 64, 65536) == pytest.approx(
        believed_s, rel=1e-4
    )


def test_its_noise_is_of_the_size_asked(tmp_path: Path) -> None:
    profile = load_profile(NAME)
    other = perturbed_profile(profile, tmp_path / "p", noise_frac=0.03)
    spread = np.log(other.decode["time_s"].to_numpy() / profile.decode["time_s"].to_numpy())
    # 5,100 points: the standard error of a standard deviation is 1 / sqrt(2 n) = 1 % of it
    assert np.std(spread) == pytest.approx(0.03, rel=0.04)
