"""Rates that were recorded, as arrivals of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.workload.arrivals.curves import SHIPPED, read_curve
from voltana.sim.workload.generate import make_workload
from voltana.sim.workload.lengths import DATA


def test_arrivals_follow_the_curve_window_by_window(tmp_path: Path) -> None:
    """40,000 requests: each window's count is Poisson, so within 4 deviations of its mean."""
    path = tmp_path / "mine.csv"
    path.write_text("window_start_s,rate_rps\n0,10\n100,30\n200,0\n300,20\n")
    made = make_workload("lmsys", rate_rps=100, duration_s=400, seed=3, arrivals=f"curve:{path}")
    counts = np.histogram(made.arrival_s, bins=4, range=(0, 400))[0]
    expected = 40_000 * np.array([1, 3, 0, 2]) / 6
    assert counts.sum() == len(made)
    assert counts[2] == 0
    assert np.all(np.abs(counts - expected) <= 4 * np.sqrt(expected))
    # the mean is that of the run, not of the whole curve
    half = make_workload("lmsys", rate_rps=100, duration_s=200, seed=3, arrivals=f"curve:{path}")
    assert len(half) == pytest.approx(20_000, abs=4 * np.sqrt(20_000))


def test_a_run_may_begin_inside_the_curve(tmp_path: Path) -> None:
    """From 150 s on: 50 s at 30, 100 s at none, 50 s at 20, scaled to 100 a second over 200 s."""
    path = tmp_path / "mine.csv"
    path.write_text("window_start_s,rate_rps\n0,10\n100,30\n200,0\n300,20\n")

    def made(start: str) -> np.ndarray:
        arrivals = f"curve:{path},from={start}"
        return make_workload(
            "lmsys", rate_rps=100, duration_s=200, seed=3, arrivals=arrivals
        ).arrival_s

    counts = np.histogram(made("150"), bins=4, range=(0, 200))[0]
    expected = 20_000 * np.array([3, 0, 0, 2]) / 5
    assert np.all(np.abs(counts - expected) <= 4 * np.sqrt(expected))
    for start, words in (
        ("-1", "from must be >= 0, got -1"),
        ("201", "ends after 400 s, got duration_s=200 from 201 s on"),
        ("noon", "got 'curve:"),
    ):
        with pytest.raises(VoltanaError, match=words):
            made(start)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("window_start_s,rate_rps\n0,10\n", "must rise from 0, in two rows"),
        ("window_start_s,rate_rps\n0,10\n0,10\n", "must rise from 0"),
        ("window_start_s,rate_rps\n5,10\n6,10\n", "must rise from 0"),
        ("window_start_s,rate_rps\n0,10\n1,-1\n", "rate_rps must be finite and >= 0"),
        ("window_start_s,rate_rps\n0,0\n1,0\n", "not 0 throughout"),
        ("window_start_s,rate_rps\n0,ten\n1,1\n", "must be a CSV with numbers"),
        ("time,rate_rps\n0,1\n1,1\n", "must be a CSV with numbers in window_start_s and rate_rps"),
        ("window_start_s,rate_rps\n0,10\n1,10\n", "ends after 2 s, got duration_s=3"),
        ("window_start_s,rate_rps\n0,0\n3,10\n", "no request in 3 s from 0 s on"),
    ],
)
def test_bad_curves_are_told(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(VoltanaError, match=words):
        make_workload("lmsys", rate_rps=1, duration_s=3, seed=1, arrivals=f"curve:{path}")


def test_an_unknown_curve_names_those_that_ship() -> None:
    with pytest.raises(VoltanaError, match=r"no such rate curve: week; shipped: alibaba-m-large"):
        make_workload("lmsys", rate_rps=1, duration_s=3, seed=1, arrivals="curve:week")


def test_the_shipped_curve_is_its_source(shared_data: Path) -> None:
    """Two weeks in windows of ten minutes; 48 to 583 requests/s, as its source says."""
    rates = pd.read_csv(shared_data / "traces" / "servegen_rates.csv.gz")
    source = rates[rates["pool"] == "m-large"]
    shipped = pd.read_csv(DATA / SHIPPED["alibaba-m-large"])
    np.testing.assert_allclose(shipped["rate_rps"], source["rate_rps"], atol=5e-4)
    curve = read_curve("alibaba-m-large")
    assert curve.end_s == 14 * 86_400
    mean = source["rate_rps"].mean()
    assert curve(np.array([curve.end_s]))[0] == pytest.approx(mean * curve.end_s, rel=1e-5)
