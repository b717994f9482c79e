"""Frontier: searches against closed forms and brute force, intervals against SciPy, a real run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from experiments.cli import make_app
from experiments.compare.intervals import saving_pct, t_interval
from experiments.compare.policies import BEST_PAIR, STATIC_MAX
from experiments.frontier.contenders import parse_contender
from experiments.frontier.report import frontier_table, markdown_table, text_table
from experiments.frontier.search import KnobSearch, Load, PairSearch, Search, search_frontier
from experiments.frontier.study import make_study, read_study
from experiments.runs import workload_of
from experiments.study.suite import CONFIGS
from experiments.sweep.grid import Point
from experiments.sweep.run import run_sweep
from profiles.errors import VoltanaError
from sim.config import make_config
from sim.workload.traces import open_trace
from tests.profiles.synthetic import write_synthetic_profile

Law = Callable[[Any], tuple[float, float]]
"""Key of a trial -> attainment and energy."""


def play(search: Search, law: Law) -> int:
    """Answer every proposal by the law; returns how many runs that took."""
    runs = 0
    while proposed := search.propose():
        for key, trial in proposed.items():
            trial.attainment, trial.energy_j = law(key)
            search.tried[key] = trial
            runs += trial.repeats
    return runs


def knob(repeats: int = 5, target: float = 0.99) -> KnobSearch:
    return KnobSearch(parse_contender("ecofreq:margin={0..1} + ecoroute"), repeats, target)


def test_bisection_closes_in_on_the_crossing() -> None:
    """Attainment falls through 0.99 at 0.613 of the range, energy falls throughout."""
    search = knob()
    play(search, lambda x: (1.0 if x <= 0.613 else 0.9, 100 - 50 * x))
    best = search.best()
    assert best is not None
    # five positions leave a bracket of 1/4, four halvings 1/64
    assert 0.613 - 1 / 64 <= float(best.value) <= 0.613
    assert search.is_monotone()


def test_an_island_of_attainment_is_not_missed_and_is_called_out() -> None:
    """Kept below 0.1 and again between 0.45 and 0.6, where energy is less."""
    search = knob()
    play(search, lambda x: (1.0 if x <= 0.1 or 0.45 <= x <= 0.6 else 0.5, 100 - 50 * x))
    best = search.best()
    assert best is not None
    assert 0.6 - 1 / 32 <= float(best.value) <= 0.6
    assert not search.is_monotone()


def test_energy_that_turns_up_again_is_followed_to_its_least() -> None:
    """Always kept; the least energy is inside the range, at 0.4."""
    search = knob()
    play(search, lambda x: (1.0, 10 + (x - 0.4) ** 2))
    best = search.best()
    assert best is not None
    assert float(best.value) == pytest.approx(0.4, abs=1 / 32)


def test_a_target_out_of_reach_ends_soon_without_an_answer() -> None:
    search = knob()
    runs = play(search, lambda x: (0.95 - (x - 0.3) ** 2, 100.0))
    assert search.best() is None
    assert float(search.nearest_miss().value) == pytest.approx(0.3, abs=0.1)
    assert runs <= 5 * (5 + 4)


def study(**changes: Any) -> Any:  # noqa: ANN401
    options: dict[str, Any] = {"target": 0.99, "attainment": "attainment", "seeds": (1, 2, 3)}
    base = {"duration_s": 8, "slo_itl_s": 0.045}
    loads = [Load(name="20 requests/s", settings={"rate_rps": 20})]
    contenders = [parse_contender(p) for p in ("ecofreq + ecoroute", "miad + round-robin")]
    options |= changes
    return make_study(options.pop("base", base), options.pop("loads", loads), contenders, **options)


def test_the_best_pair_is_that_of_all_pairs() -> None:
    """A U in each clock and a limit that ties the two: brute force over all 48 · 48 pairs."""
    chosen = study()

    def law(key: tuple[int, int, int]) -> tuple[float, float]:
        prefill, decode = key[0], key[1]
        energy = (prefill - 1010) ** 2 / 900 + (decode - 1090) ** 2 / 400 + 50
        return (1.0 if prefill + 2 * decode >= 3150 else 0.5), energy

    search = PairSearch(chosen)
    runs = play(search, law)
    every = [(law((p, d, 0))[1], p, d) for p, d in product(chosen.clocks_mhz, repeat=2)
             if law((p, d, 0))[0] == 1.0]  # fmt: skip
    best = search.best()
    assert best is not None
    assert best.energy_j <= min(every)[0] * 1.02
    assert runs < 64 + 3 * 40


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
    assert study(attainment=attainment).attained(runs) == pytest.approx(expected)


def test_a_knob_at_the_end_of_its_range_says_so() -> None:
    """Cheaper to the very end, and kept there; and a policy without a knob has no range."""
    search = knob()
    play(search, lambda x: (1.0, 100 - 50 * x))
    best = search.best()
    assert best is not None
    assert best.value == "1.0000 (end)"
    bare = KnobSearch(parse_contender("boost + random"), 1, 0.99)
    play(bare, lambda _: (1.0, 1.0))
    assert bare.complete()[0].value == ""


def test_a_setting_that_cannot_run_is_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The faulty controller fails; the other goes on for further rounds without it."""
    asked: list[list[str]] = []

    def note(points: list[Point], *args: Any, **options: Any) -> pd.DataFrame:  # noqa: ANN401
        asked.append([p.config.controller for p in points])
        return run_sweep(points, *args, **options)

    monkeypatch.setattr("experiments.frontier.search.run_sweep", note)
    chosen = study(base={"duration_s": 1}, seeds=(1,), static_clocks_mhz=[1410])
    chosen = replace(chosen, contenders=[
        parse_contender("ecofreq + ecoroute"), parse_contender("tests.experiments.faulty + random"),
    ])  # fmt: skip
    searches = search_frontier(chosen, tmp_path, jobs=1)
    assert len(asked) > 2
    assert [any("faulty" in c for c in row) for row in asked] == [True] * 3 + [False] * (
        len(asked) - 3
    )
    assert searches["20 requests/s"][3].best() is None


def test_intervals_are_those_of_scipy() -> None:
    rng = np.random.default_rng(5)
    ours, theirs = rng.normal(90, 2, 7), rng.normal(100, 2, 7)
    interval = saving_pct(list(ours), list(theirs))
    expected = stats.ttest_1samp(100 * (1 - ours / theirs), 0.0).confidence_interval(0.95)
    assert interval.mean - interval.half == pytest.approx(expected.low, rel=1e-12)
    assert interval.mean + interval.half == pytest.approx(expected.high, rel=1e-12)
    # one repeat says nothing of the spread
    assert np.isnan(t_interval([3.0]).half)


@pytest.mark.parametrize(
    ("text", "knob", "cheap"),
    [
        ("ecofreq + ecoroute", "margin", {"controller": "ecofreq:margin=0.5000"}),
        ("ecofreq:idle=1 + ecoroute", "margin", {"controller": "ecofreq:idle=1,margin=0.5000"}),
        ("ecofreq:margin=0 + ecoroute", "aim_ratio", {"aim_ratio": "1.6000"}),
        ("window + least-kv", "aim_ratio", {"controller": "window", "aim_ratio": "1.6000"}),
        ("static:f=1005 + round-robin", "", {"controller": "static:f=1005"}),
        ("ecomin:headroom={0.4..0.1} + slo-pack:headroom={}", "headroom",
         {"controller": "ecomin:headroom=0.1000", "router": "slo-pack:headroom=0.1000"}),
    ],
)  # fmt: skip
def test_every_policy_has_its_knob(text: str, knob: str, cheap: dict[str, str]) -> None:
    contender = parse_contender(text)
    assert contender.knob == knob
    assert contender.at(1.0).items() >= cheap.items()


@pytest.mark.parametrize(
    "text", ["ecofreq", "ecofreq+ecoroute", "ecofreq:margin={0..1} + ecoroute:margin={0..1}"]
)
def test_what_is_no_contender_is_refused(text: str) -> None:
    with pytest.raises(VoltanaError, match="a contender"):
        parse_contender(text)


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text("[frontier]\npolicys = []\n")
    with pytest.raises(VoltanaError, match=r"unknown key 'policys'.*policies"):
        read_study(path)
    path.write_text('[frontier]\npolicies = ["ecofreq + ecoroute"]\ntrace_parts = 3\n')
    with pytest.raises(VoltanaError, match="trace_parts needs a trace"):
        read_study(path)
    with pytest.raises(VoltanaError, match="attainment must be one of"):
        study(attainment="goodput")


STUDY = """
[frontier]
policies = ["ecofreq + ecoroute"]
[[load]]
name = "low"
rate_rps = 10
[[load]]
name = "high"
rate_rps = 20
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[frontier]", "base = 3\n[frontier]", r"\[base\] must be a table of keys, got 3"),
        ("[frontier]", "frontier = 1\n[other]", r"\[frontier\] must be a table of keys, got 1"),
        ("[frontier]", '[frontier]\ntarget = "x"', "target must be a number, got 'x'"),
        ("[frontier]", "[frontier]\nseeds = 3", "seeds must be a list, got 3"),
        ("[frontier]", '[frontier]\nseeds = ["a"]', "seeds must be a whole number, got 'a'"),
        ("[frontier]", '[frontier]\nstatic_router = "eco"', "unknown router 'eco'"),
        ("ecofreq + ecoroute", "ecofrek + ecoroute", "unknown controller 'ecofrek': did you mean"),
        ("ecofreq + ecoroute", "ecofreq + ecoroot", "unknown router 'ecoroot': did you mean"),
        ("ecofreq + ecoroute", "ecofreq:idel=1 + ecoroute", "no parameter 'idel'"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "f.toml"
    path.write_text(STUDY.replace(old, new))
    with pytest.raises(VoltanaError, match=words) as caught:
        read_study(path)
    assert "\n" not in str(caught.value)


def test_loads_are_chosen_by_name_and_settings_that_do_nothing_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text(STUDY)
    chosen, _ = read_study(path, load_names=["high"], target=0.9)
    assert [load.name for load in chosen.loads] == ["high"]
    assert chosen.target == 0.9
    with pytest.raises(VoltanaError, match=r"unknown load 'hi'.*did you mean 'high'"):
        read_study(path, load_names=["hi"])
    for key, owner in (("rate_rps", "loads"), ("seed", "repeats"), ("router", "policies")):
        with pytest.raises(VoltanaError, match=f"--set {key} would change nothing: the {owner}"):
            read_study(path, settings={key: "1"})
    read_study(path, settings={"trace_start_s": 1.0})  # its repeats are seeds
    path.write_text(STUDY.replace("[frontier]", "[frontier]\ntrace_parts = 2"))
    with pytest.raises(VoltanaError, match="--set duration_s would change nothing: the repeats"):
        read_study(path, settings={"duration_s": 60.0})


def test_another_profile_brings_its_own_clocks(tmp_path: Path) -> None:
    path, other = tmp_path / "f.toml", tmp_path / "profile"
    write_synthetic_profile(other)
    path.write_text(STUDY)
    chosen, _ = read_study(path, settings={"profile": str(other)})
    assert chosen.clocks_mhz == (700, 1000, 1400)
    assert set(chosen.coarse_mhz) <= {700, 1000, 1400}


def test_options_that_a_file_replaces_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text(STUDY)
    for extra in (["--rate", "3"], ["--policy", "boost + random"], ["--seeds", "2"]):
        done = CliRunner().invoke(make_app(), ["frontier", str(path), *extra])
        assert f"{extra[0]} is for a search without a file" in str(done.exception)
    done = CliRunner().invoke(make_app(), ["frontier", "--load", "low"])
    assert "--load picks from a frontier file" in str(done.exception)


@pytest.mark.slow
def test_a_setting_that_cannot_run_says_why(tmp_path: Path) -> None:
    chosen = study(seeds=(1,), static_clocks_mhz=[1410], base={"duration_s": 2})
    chosen = replace(chosen, contenders=[parse_contender("static:f=1007 + round-robin")])
    searches = search_frontier(chosen, tmp_path, jobs=1)
    note = frontier_table(chosen, searches, tmp_path, jobs=1)["note"].iloc[-1]
    assert "1 settings could not run: " in note
    assert "1007" in note


@pytest.mark.slow
def test_a_real_frontier(tmp_path: Path) -> None:
    """8 s at 20 requests/s: kept, above the bound, better than the top clock, and resumable."""
    chosen = study(static_clocks_mhz=[1005, 1410])
    searches = search_frontier(chosen, tmp_path, jobs=1)
    frame = frontier_table(chosen, searches, tmp_path, jobs=1).set_index("policy")
    assert frame["reached"].all()
    assert (frame["attainment"] >= 0.99).all()
    assert (frame["bound_ratio"] > 1.0).all()
    assert frame["energy_j"][BEST_PAIR] <= frame["energy_j"][STATIC_MAX]
    assert frame["saving_max_pct"][BEST_PAIR] > 20.0
    assert np.isnan(frame["saving_pair_pct"][BEST_PAIR])
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "points").iterdir()}
    again = search_frontier(chosen, tmp_path, jobs=1)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "points").iterdir()} == kept
    repeated = frontier_table(chosen, again, tmp_path, jobs=1).set_index("policy")
    assert repeated["energy_j"].equals(frame["energy_j"])


@pytest.mark.slow
def test_no_saving_is_quoted_where_the_target_is_missed(tmp_path: Path) -> None:
    """A promise of 1 ms between tokens: nobody keeps it, and nobody is said to save."""
    chosen = study(base={"duration_s": 2, "slo_itl_s": 0.001}, static_clocks_mhz=[1410])
    searches = search_frontier(chosen, tmp_path, jobs=1)
    frame = frontier_table(chosen, searches, tmp_path, jobs=1)
    assert not frame["reached"].any()
    assert frame[["saving_max_pct", "saving_pair_pct", "goodput_per_j"]].isna().all(axis=None)
    assert frame["note"].str.contains("target not reached").all()
    for text in (markdown_table(frame), text_table(frame, "t")):
        assert "target not" in text


@pytest.mark.slow
def test_the_command_writes_table_and_figure(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(
        '[frontier]\nseeds = [1, 2]\nstatic_clocks_mhz = [1005]\npolicies = ["boost + random"]\n'
        'question = "Who?"\n[base]\nduration_s = 3\nrate_rps = 10\n[[load]]\nname = "low"\n'
        '[[policy]]\nrule = "ecofreq + ecoroute"\nname = "exact"\npredictor = "table"\n'
    )
    out = tmp_path / "out"
    done = CliRunner().invoke(
        make_app(), ["frontier", str(path), "--out", str(out), "--jobs", "1", "--target", "0.9"]
    )
    assert done.exit_code == 0, done.output
    assert "boost + random" in done.output
    assert {p.name for p in out.glob("frontier.*")} == {
        "frontier.csv", "frontier.md", "frontier.png", "frontier.svg",
    }  # fmt: skip
    assert (out / "frontier.md").read_text().startswith("Who?\n\n**low: least energy")


@pytest.mark.parametrize("name", ["contest-sharegpt", "contest-sharegpt-large"])
def test_the_contests_are_studies(name: str) -> None:
    """The shipped files are read, and compare what the document says they compare."""
    chosen, question = read_study(CONFIGS / f"{name}.toml")
    assert "calibrated" in question
    assert len(chosen.repeats) == 5
    assert {c.name for c in chosen.contenders} >= {"ecofreq + ecoroute", "ecomin + consolidate"}
    assert {c.name: c.knob for c in chosen.contenders}["ecomin + consolidate"] == "headroom"


def test_parts_of_a_trace_are_its_repeats(shared_data: Path, monkeypatch: Any) -> None:  # noqa: ANN401
    monkeypatch.setenv("VOLTANA_DATA", str(shared_data))
    chosen, _ = read_study(CONFIGS / "contest-azure.toml")
    parts = [workload_of(make_config({**chosen.base, **r})) for r in chosen.repeats]
    whole = open_trace("azure-conv-2023")
    # the last request arrives at the very end of the last part, which is open there
    assert sum(len(p) for p in parts) == len(whole) - 1
    assert min(len(p) for p in parts) > 1000
