"""Frontier: searches against closed forms and brute force, intervals against SciPy, a real run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from tests.experiments.frontier.fixtures import make_small_study
from tests.profiles.synthetic import write_synthetic_profile
from voltana.experiments.cli import make_app
from voltana.experiments.compare.intervals import saving_pct, t_interval
from voltana.experiments.contest.run import (
    contest_files,
    read_contest,
    run_contest,
    write_contest,
)
from voltana.experiments.frontier.contenders import parse_contender
from voltana.experiments.frontier.knob import search_knob
from voltana.experiments.frontier.search import (
    DEFAULT,
    STATIC_FLEET,
    STATIC_MAX,
    STATIC_PAIR,
    Found,
    search_frontier,
)
from voltana.experiments.frontier.search_page import HEADINGS, table_rows, text_table
from voltana.experiments.frontier.study import load_names_of, read_study
from voltana.experiments.frontier.table import COLUMNS, frontier_table
from voltana.experiments.frontier.trial import Trial, pooled
from voltana.experiments.report.collect import collect
from voltana.experiments.runs import workload_of
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.markdown import markdown_table
from voltana.sim.config import make_config, read_toml
from voltana.sim.workload.traces import open_trace

Law = Callable[[float, int], tuple[float, float]]
"""Position of the knob and number of the repeat -> attainment and energy."""
REPEATS = 3


def play(law: Law, target: float = 0.99) -> tuple[Trial, list[tuple[float, bool]]]:
    """Search the knob of a law; returns what was found, and what was asked for."""
    asked = []

    def attempt(position: float, on_all: bool) -> Trial:
        asked.append((position, on_all))
        points = [law(position, r) for r in range(REPEATS if on_all else 1)]
        attainments, energies = zip(*points, strict=True)
        return Trial(settings={}, label=f"{position:.4f}", attainments=attainments,
                     energies_j=energies)  # fmt: skip

    return search_knob(attempt, target), asked


def test_the_knob_closes_in_on_the_crossing() -> None:
    """Attainment falls through 0.99 at 0.613 of the range, energy falls throughout."""
    found, _ = play(lambda x, _: (1.0 if x <= 0.613 else 0.9, 100 - 50 * x))
    # five positions leave a bracket of 1/4, three halvings 1/32
    assert 0.613 - 1 / 32 <= float(found.label) <= 0.613


def test_energy_that_turns_up_again_is_followed_to_its_least() -> None:
    found, _ = play(lambda x, _: (1.0, 10 + (x - 0.4) ** 2))
    assert float(found.label) == pytest.approx(0.4, abs=1 / 32)


def test_a_setting_that_keeps_the_first_repeat_alone_is_not_chosen() -> None:
    """Beyond 0.5 the other repeats miss: the choice is the cheapest that keeps all of them."""
    found, asked = play(lambda x, r: (1.0 if x <= 0.5 or r == 0 else 0.98, 100 - 50 * x))
    assert float(found.label) <= 0.5
    assert found.keeps(0.99)
    assert any(on_all for x, on_all in asked if x > 0.5)


def test_a_target_out_of_reach_ends_soon_with_the_nearest_miss() -> None:
    found, asked = play(lambda x, _: (0.95 - (x - 0.3) ** 2, 100.0))
    assert not found.keeps(0.99)
    assert float(found.label) == pytest.approx(0.3, abs=0.1)
    assert len(asked) <= 5 + 2 * 3 + 1


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
    assert "{" not in "".join([contender.controller, contender.router, *contender.plain.values()])


def test_a_policy_at_its_default_has_no_knob_set() -> None:
    chosen = parse_contender("ecomin:headroom={0.4..0.1},dwell=0 + slo-pack:headroom={}")
    assert chosen.plain == {"controller": "ecomin:dwell=0", "router": "slo-pack"}
    assert parse_contender("window + least-kv").plain == {
        "controller": "window", "router": "least-kv",
    }  # fmt: skip


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
    with pytest.raises(VoltanaError, match="trace_parts needs one trace"):
        read_study(path)
    with pytest.raises(VoltanaError, match="attainment must be one of"):
        make_small_study(attainment="goodput")
    path.write_text('[frontier]\npolicies = ["boost + random"]\nseeds = [1, 7]\n')
    with pytest.raises(VoltanaError, match="seed 1 is in tuning_seeds and in seeds"):
        read_study(path)


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
        ("[frontier]", '[frontier]\nrouters = ["eco"]', "unknown router 'eco'"),
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
    assert chosen.clocks_mhz == ((700, 1000, 1400),) * 2
    assert all(set(knots) <= {700, 1000, 1400} for knots in chosen.knots_mhz)


def test_each_phase_has_the_clocks_of_its_own_cards(tmp_path: Path) -> None:
    path, other = tmp_path / "f.toml", tmp_path / "profile"
    write_synthetic_profile(other)
    path.write_text(STUDY)
    chosen, _ = read_study(path, settings={"num_prefill": 2, "prefill_profiles": f"{other}*2"})
    assert chosen.clocks_mhz[0] == (700, 1000, 1400)
    assert 1410 in chosen.clocks_mhz[1]
    both = {"num_prefill": 2, "prefill_profiles": f"{other}+a100-80g-sxm/llama-3.1-8b"}
    with pytest.raises(VoltanaError, match="prefill_profiles must be of one kind here"):
        read_study(path, settings=both)


def test_options_that_a_file_replaces_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text(STUDY)
    for extra in (["--rate", "3"], ["--policy", "boost + random"], ["--seeds", "2"]):
        done = CliRunner().invoke(make_app(), ["frontier", str(path), *extra])
        assert f"{extra[0]} is for a search without a file" in str(done.exception)
    done = CliRunner().invoke(make_app(), ["frontier", "--load", "low"])
    assert "--load picks from a frontier file" in str(done.exception)


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


def found_at(load: str) -> pd.DataFrame:
    values = ["sharegpt", "2P2D", load, "round-robin", "ecofreq", DEFAULT]
    return pd.DataFrame([[*values, *[1.0] * (len(COLUMNS) - 6)]], columns=[*COLUMNS])


def test_a_load_takes_the_place_of_its_lines_of_before(tmp_path: Path) -> None:
    csv = tmp_path / "contest.csv"
    for load in ("c", "a", "b"):
        write_contest(found_at(load), csv, ["a", "b", "c"])
    twice = pd.concat([found_at("b"), found_at("b")]).assign(energy_kj=7.0)
    write_contest(twice, csv, ["a", "b", "c"])
    table = read_contest(csv)
    assert list(table["load"]) == ["a", "b", "b", "c"]
    assert list(table["energy_kj"]) == [1.0, 7.0, 7.0, 1.0]
    csv.write_text("load\na\n")
    with pytest.raises(VoltanaError, match="must have the columns workload, fleet, load"):
        read_contest(csv)


@pytest.mark.slow
def test_the_contest_leaves_out_what_it_has_no_data_for(tmp_path: Path, monkeypatch: Any) -> None:  # noqa: ANN401
    monkeypatch.delenv("VOLTANA_DATA", raising=False)
    here, away = tmp_path / "contest-1.toml", tmp_path / "contest-2.toml"
    text = (
        '[frontier]\npolicies = ["boost + round-robin"]\nseeds = [11]\ntuning_seeds = [1]\n'
        "static_clocks_mhz = [1410]\n[base]\nduration_s = 2\nrate_rps = 5\nslo_itl_s = 0.1\n"
    )
    here.write_text(f'{text}[[load]]\nname = "low"\n')
    away.write_text(f'{text}trace = "no_such_trace.csv.gz"\n[[load]]\nname = "its hour"\n')
    csv = tmp_path / "contest.csv"
    said: list[str] = []
    table = run_contest(tmp_path / "out", csv, said.append, jobs=1, files=[here, away])
    assert set(table["load"]) == {"low"}
    assert said[-1].startswith("left out for want of data: its hour (no such trace file: no_such")
    with pytest.raises(VoltanaError, match=r"unknown load 'lo'.*did you mean 'low'"):
        run_contest(tmp_path / "out", csv, said.append, only=["lo"], files=[here, away])


def test_the_contest_has_its_loads_controllers_and_routers() -> None:
    """All shipped files: loads by name, the whole grid of routers for static pairs."""
    names = [name for path in contest_files() for name in load_names_of(path)]
    assert len(names) == len(set(names)) == 19
    for path in contest_files():
        if "trace" in read_toml(path)["base"]:
            continue  # needs data
        chosen, question = read_study(path)
        assert "calibrated" in question
        assert set(chosen.routers) >= {"round-robin", "consolidate"}
        assert len(chosen.tuning) >= 2
        assert len(chosen.judging) == 5
        controllers = {c.controller for c in chosen.contenders if c.router == "consolidate"}
        assert controllers >= {
            "ecofreq, 2 levels", "ecofreq, 8 levels", "ecomin, 8 levels",
        }  # fmt: skip


def test_parts_of_a_trace_are_its_repeats(shared_data: Path, monkeypatch: Any) -> None:  # noqa: ANN401
    monkeypatch.setenv("VOLTANA_DATA", str(shared_data))
    chosen, _ = read_study(next(p for p in contest_files() if "azure-conv" in p.name))
    repeats = [*chosen.tuning, *chosen.judging]
    parts = [workload_of(make_config({**chosen.base, **r})) for r in repeats]
    whole = open_trace("azure-conv-2023")
    # the last request arrives at the very end of the last part, which is open there
    assert sum(len(p) for p in parts) == len(whole) - 1
    assert min(len(p) for p in parts) > 1000
    assert len({r["trace_start_s"] for r in repeats}) == len(repeats) == 8
