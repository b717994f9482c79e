"""Experiments as files: what --quick makes of them, what is compared, and that each one runs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from voltana.experiments.cli import make_app
from voltana.experiments.study import suite
from voltana.experiments.study.suite import (
    MATCHED_PAIR,
    FigureSpec,
    find_experiment,
    list_experiments,
    read_experiment,
    with_saving,
)
from voltana.profiles.common.errors import VoltanaError

SMALL = """
question = "Is it so?"
[figure]
x = "rate_rps"
x_label = "rate"
series = "policy"
rows = ["saving"]
baseline = "a"
[quick]
num_decode = 1
[base]
profile = "a100-80g-sxm/llama-3.1-8b"
[grid]
seed = [1, 2]
[[grid.policy]]
name = "a"
controller = "static"
duration_s = 900
[static_pairs]
clocks_mhz = [1005, 1200, 1410]
[[panel]]
name = "left"
rate_rps = [1, 2, 3, 4, 5]
[[panel]]
name = "right"
duration_s = 300
rate_rps = [7]
slo_itl_s = 0.1
"""


def test_a_file_becomes_panels_times_axes(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    full = read_experiment(path)
    assert len(full.points) == (5 + 1) * 2 * (1 + 9)
    right = [p.config for p in full.points if p.labels["panel"] == "right"]
    assert {(c.rate_rps, c.slo_itl_s) for c in right} == {(7.0, 0.1)}
    quick = read_experiment(path, quick=True)
    assert len(quick.points) == (3 + 1) * 1 * (1 + 4)
    assert {p.config.duration_s for p in quick.points} == {10.0}
    assert {p.config.num_decode for p in quick.points} == {1}
    assert {p.config.rate_rps for p in quick.points} == {1, 3, 5, 7}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('question = "Is it so?"', "", "needs a question"),
        ("[quick]", "[quik]", r"unknown section 'quik'.*did you mean 'quick'"),
        ('x = "rate_rps"', 'x = "rate"', r"x of \[figure\].*'rate'.*did you mean 'rate_rps'"),
        ('series = "policy"', 'series = "polcy"', r"series of \[figure\].*did you mean 'policy'"),
        ('rows = ["saving"]', 'rows = ["savings"]', "no measure 'savings'.*did you mean 'saving'"),
        ('rows = ["saving"]', "rows = 3", "rows must be a list, got 3"),
        ('x_label = "rate"', "x_label = 3", "x_label must be a text, got 3"),
        ('baseline = "a"', 'baseline = "b"', r"baseline of \[figure\] is no policy: 'b'"),
        ("[base]", "[[base]]", r"\[base\] must be a table of keys"),
        (
            "[quick]\nnum_decode = 1\n[base]",
            "[base]\nnum_decode = 'x'",
            "num_decode must be a whole number",
        ),
        ("[grid]\nseed = [1, 2]", "[grid]\nseed = 1", "grid.seed must be a list"),
        ('baseline = "a"', 'basline = "a"', r"unknown key 'basline'.*did you mean 'baseline'"),
        ('name = "left"\nrate_rps', 'name = "left"\nrate', r"unknown key 'rate' in \[\[panel\]\]"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(SMALL.replace(old, new))
    with pytest.raises(VoltanaError, match=words):
        read_experiment(path)


def test_what_is_no_experiment_names_its_own_command() -> None:
    with pytest.raises(VoltanaError, match="run voltana frontier --contest"):
        find_experiment("contest-3-day")
    with pytest.raises(VoltanaError, match="run voltana demo"):
        find_experiment("demo")


def test_one_failure_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, controller in (("broken", "static:f=1007"), ("good", "static")):
        text = SMALL.replace('controller = "static"', f'controller = "{controller}"')
        (tmp_path / f"{name}.toml").write_text(text.partition('[[panel]]\nname = "right"')[0])
    monkeypatch.setattr(suite, "CONFIGS", tmp_path)
    arguments = [
        "experiment",
        "run",
        "all",
        "--quick",
        "--out",
        str(tmp_path / "out"),
        "--jobs",
        "1",
    ]
    done = CliRunner().invoke(make_app(), arguments)
    assert "1 of 2 experiments failed: broken" in str(done.exception)
    assert "1007 MHz" in done.stderr
    assert (tmp_path / "out" / "good-quick" / "good.png").exists()


def results() -> pd.DataFrame:
    """Two rates, hand-made: at 20 requests/s no pair reaches what `p` attains."""
    rows = [
        (10, "base", 100, 1.0, 1.0),
        (10, "p", 70, 0.99, 0.98),
        (10, "static pair 1005/1005", 60, 0.90, 1.0),
        (10, "static pair 1005/1410", 80, 0.987, 0.976),
        (10, "static pair 1200/1200", 75, 0.985, 0.99),
        (20, "base", 200, 1.0, 1.0),
        (20, "p", 150, 1.0, 1.0),
        (20, "static pair 1005/1005", 120, 0.5, 1.0),
    ]
    columns = ["rate_rps", "policy", "energy_j", "ttft_attainment", "itl_attainment"]
    return pd.DataFrame(rows, columns=columns)


def spec(*, baseline: str = "base", match: str = "p") -> FigureSpec:
    return FigureSpec(
        x="rate_rps", x_label="", series="policy", rows=("saving",), baseline=baseline, match=match
    )


def test_savings_and_the_matched_pair_by_hand() -> None:
    """At 10: 75 J reaches .985 (half a point below .99 counts), 60 J does not, 80 J is dearer."""
    made = with_saving(results(), spec())
    saved = {(r, p): s for r, p, s in made[["rate_rps", "policy", "saving_pct"]].to_numpy()}
    assert saved == pytest.approx(
        {(10, "base"): 0, (10, "p"): 30, (20, "base"): 0, (20, "p"): 25, (10, MATCHED_PAIR): 25}
    )
    assert made.loc[made["policy"] == MATCHED_PAIR, "clocks"].tolist() == ["1200/1200"]


def test_seeds_are_compared_pairwise() -> None:
    frame = pd.concat([results().assign(seed=s) for s in (1, 2)], ignore_index=True)
    frame["energy_j"] *= frame["seed"]  # other requests: everything costs more
    made = with_saving(frame, spec())
    saved = made[made["policy"] == "p"].set_index(["rate_rps", "seed"])["saving_pct"]
    assert saved.to_dict() == pytest.approx({(10, 1): 30, (10, 2): 30, (20, 1): 25, (20, 2): 25})


@pytest.mark.parametrize("figure", [spec(baseline="nobody"), spec(match="nobody")])
def test_a_named_series_must_have_run(figure: FigureSpec) -> None:
    with pytest.raises(VoltanaError, match="no policy called 'nobody'"):
        with_saving(results(), figure)


def test_unknown_experiment_suggests_the_nearest() -> None:
    with pytest.raises(VoltanaError, match="did you mean 'scale-out'"):
        find_experiment("scaleout")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(list_experiments()))
def test_every_experiment_runs_at_smoke_size(name: str, tmp_path: Path) -> None:
    """The command itself: runs, table, figure; a second call finds every run done."""
    arguments = ["experiment", "run", name, "--quick", "--out", str(tmp_path), "--jobs", "1"]
    first = CliRunner().invoke(make_app(), arguments, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    directory = tmp_path / f"{name}-quick"
    frame = pd.read_csv(directory / "results.csv")
    points = read_experiment(find_experiment(name), quick=True).points
    assert len(frame) == len(points)
    assert (frame["requests_completed"] > 0).all()
    assert (directory / f"{name}.png").stat().st_size > 10_000
    stored = {p: p.stat().st_mtime_ns for p in (directory / "points").iterdir()}
    again = CliRunner().invoke(make_app(), arguments, catch_exceptions=False)
    assert again.exit_code == 0, again.output
    assert {p: p.stat().st_mtime_ns for p in (directory / "points").iterdir()} == stored
