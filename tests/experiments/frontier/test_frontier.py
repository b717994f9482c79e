"""A frontier: attainment and intervals against SciPy, real runs, and the command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from tests.experiments.frontier.fixtures import make_small_study
from voltana.experiments.cli import make_app
from voltana.experiments.compare.intervals import saving_pct, t_interval
from voltana.experiments.frontier.search import (
    DEFAULT,
    STATIC_FLEET,
    STATIC_MAX,
    STATIC_PAIR,
    Found,
    search_frontier,
)
from voltana.experiments.frontier.search_page import HEADINGS, table_rows, text_table
from voltana.experiments.frontier.table import COLUMNS, frontier_table
from voltana.experiments.frontier.trial import pooled
from voltana.experiments.report.collect import collect
from voltana.profiles.common.markdown import markdown_table


@pytest.mark.parametrize(
    ("attainment", "expected"),
    [
        ("attainment", (100 * 0.90 + 300 * 1.00) / 400),
        ("ttft_attainment", (100 * 1.00 + 300 * 0.96) / 400),
        ("itl_attainment", (9000 * 0.95 + 1000 * 1.00) / 10_000),
        ("worse", 0.955),  # of 0.97 and 0.955
    ],
)
def test_attainment_is_of_all_repeats_together(attainment: str, expected: float) -> None:
    """A run of 100 requests and 9,000 gaps, and one of 300 requests and 1,000 gaps."""
    runs = pd.DataFrame(
        {
            "requests_total": [100, 300], "gaps_total": [9000, 1000], "attainment": [0.9, 1.0],
            "ttft_attainment": [1.0, 0.96], "itl_attainment": [0.95, 1.0],
        }
    )  # fmt: skip
    assert pooled(runs, attainment) == pytest.approx(expected)


def test_intervals_are_those_of_scipy() -> None:
    rng = np.random.default_rng(5)
    ours, theirs = rng.normal(90, 2, 7), rng.normal(100, 2, 7)
    interval = saving_pct(list(ours), list(theirs))
    expected = stats.ttest_1samp(100 * (1 - ours / theirs), 0.0).confidence_interval(0.95)
    assert interval.mean - interval.half == pytest.approx(expected.low, rel=1e-12)
    assert interval.mean + interval.half == pytest.approx(expected.high, rel=1e-12)
    # one repeat says nothing of the spread
    assert np.isnan(t_interval([3.0]).half)


def frontier(study: Any, directory: Path) -> tuple[list[Found], pd.DataFrame]:  # noqa: ANN401
    ((_, found),) = search_frontier(study, directory, jobs=1)
    return found, frontier_table(study, found, directory, jobs=1)


@pytest.mark.slow
def test_a_setting_that_cannot_run_says_why(tmp_path: Path) -> None:
    chosen = make_small_study(
        base={"duration_s": 2}, policies=["static:f=1007 + round-robin"], static_clocks_mhz=[1410]
    )
    found, frame = frontier(chosen, tmp_path)
    assert "1007" in found[-1].judged.error
    assert frame.iloc[-1][["attainment", "energy_kj"]].isna().all()


@pytest.mark.slow
def test_a_real_frontier(tmp_path: Path) -> None:
    """8 s at 20 requests/s: kept, above the bound, paired by seed as done by hand, resumable."""
    chosen = make_small_study(
        policies=["ecofreq + ecoroute", "boost + round-robin"], static_clocks_mhz=[1005, 1410]
    )
    found, frame = frontier(chosen, tmp_path)
    assert tuple(frame.columns) == COLUMNS
    assert set(frame["router"]) == {"round-robin", "ecoroute"}
    assert (frame["times_bound"].dropna() > 1.0).all()
    fleets = frame[frame["controller"] == STATIC_FLEET].set_index("router")
    pairs = frame[frame["controller"] == STATIC_PAIR].set_index("router")
    assert (fleets["saving_vs_static_max_pct"] >= pairs["saving_vs_static_max_pct"] - 0.5).all()
    # the saving against the pair of the same router, by hand
    mine = next(f for f in found if f.controller == "ecofreq" and f.knob == DEFAULT)
    pair = next(f for f in found if f.controller == STATIC_FLEET and f.router == "ecoroute")
    savings = [
        100 * (1 - a / b)
        for a, b in zip(mine.judged.energies_j, pair.judged.energies_j, strict=True)
    ]
    told = frame[(frame["controller"] == "ecofreq") & (frame["knob"] == DEFAULT)].iloc[0]
    assert told["saving_vs_best_pair_same_router_pct"] == pytest.approx(np.mean(savings))
    interval = stats.ttest_1samp(savings, 0.0).confidence_interval(0.95)
    assert told["ci_pct"] == pytest.approx((interval.high - interval.low) / 2)
    # chosen on other seeds than it is judged on
    tuned = next(f for f in found if f.controller == STATIC_FLEET).tuned
    assert tuned is not None
    assert set(tuned.rows["seed"]) == {1, 2}
    assert set(mine.judged.rows["seed"]) == {11, 12, 13}
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "points").iterdir()}
    _, repeated = frontier(chosen, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "points").iterdir()} == kept
    pd.testing.assert_frame_equal(repeated, frame)


@pytest.mark.slow
def test_no_saving_is_quoted_where_the_target_is_missed(tmp_path: Path) -> None:
    """A promise of 1 ms between tokens: nobody keeps it, and nobody is said to save."""
    chosen = make_small_study(base={"duration_s": 2, "slo_itl_s": 0.001}, static_clocks_mhz=[1410])
    _, frame = frontier(chosen, tmp_path)
    columns = ["saving_vs_static_max_pct", "saving_vs_best_pair_same_router_pct", "times_bound"]
    assert frame[columns].isna().all(axis=None)
    assert (frame["attainment"] < 0.99).all()
    for text in (markdown_table(HEADINGS, table_rows(frame)), text_table(frame, "t")):
        assert "–" in text


@pytest.mark.slow
def test_the_command_writes_table_and_figure(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(
        "[frontier]\nseeds = [11, 12]\ntuning_seeds = [1]\nstatic_clocks_mhz = [1005]\n"
        'policies = ["boost + random"]\n'
        'question = "Who?"\n[base]\nduration_s = 3\nrate_rps = 10\n[[load]]\nname = "low"\n'
        '[[policy]]\nrule = "ecofreq + ecoroute"\nname = "exact"\npredictor = "table"\n'
    )
    out = tmp_path / "out"
    done = CliRunner().invoke(
        make_app(), ["frontier", str(path), "--out", str(out), "--jobs", "1", "--target", "0.9"]
    )
    assert done.exit_code == 0, done.output
    assert re.search(r"random +boost +default", done.output)
    assert {p.name for p in out.glob("frontier.*")} == {
        "frontier.csv", "frontier.md", "frontier.png", "frontier.svg",
    }  # fmt: skip
    assert (out / "frontier.md").read_text().startswith("Who?\n\n**low: least energy")
    # the report reads the judged runs: one load, a line a policy, its seeds put together
    results = collect(out)
    assert results.loads == ()
    assert set(results.table["policy"]) >= {STATIC_MAX, "exact + ecoroute"}
    assert set(results.table["seed"]) == {11, 12}
