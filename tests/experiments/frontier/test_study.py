"""What a frontier reads, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.experiments.frontier.fixtures import make_small_study
from tests.profiles.synthetic import write_synthetic_profile
from voltana.experiments.cli import make_app
from voltana.experiments.frontier.study import read_study
from voltana.profiles.common.errors import VoltanaError


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


def test_parts_of_a_trace_are_in_its_own_unit(tmp_path: Path) -> None:
    """Three requests from 0 to 4000 ms: two parts of 2 s."""
    path, trace = tmp_path / "f.toml", tmp_path / "t.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,10,2\n1000,10,2\n4000,10,2\n")
    base = f'[base]\ntrace = "{trace}"\ntrace_unit = "ms"\n[[load]]\nname = "all"\n'
    path.write_text(f'[frontier]\npolicies = ["ecofreq + ecoroute"]\ntrace_parts = 2\n{base}')
    chosen, _ = read_study(path)
    repeats = [*chosen.tuning, *chosen.judging]
    assert [(r["trace_start_s"], r["duration_s"]) for r in repeats] == [(0.0, 2.0), (2.0, 2.0)]


def test_another_profile_brings_its_own_clocks(tmp_path: Path) -> None:
    path, other = tmp_path / "f.toml", tmp_path / "profile"
    write_synthetic_profile(other)
    path.write_text(STUDY)
    chosen, _ = read_study(path, settings={"profile": str(other)})
    for (kind,) in chosen.kinds:
        assert kind.clocks_mhz == (700, 1000, 1400)
        assert set(kind.knots_mhz) <= {700, 1000, 1400}


def test_each_kind_of_card_has_clocks_of_its_own(tmp_path: Path) -> None:
    path, other = tmp_path / "f.toml", tmp_path / "profile"
    write_synthetic_profile(other)
    path.write_text(STUDY)
    chosen, _ = read_study(path, settings={"num_prefill": 2, "prefill_profiles": f"{other}*2"})
    (first,), (second,) = chosen.kinds
    assert first.clocks_mhz == (700, 1000, 1400)
    assert 1410 in second.clocks_mhz
    both = {"num_prefill": 2, "prefill_profiles": f"a100-80g-sxm/llama-3.1-8b+{other}"}
    chosen, _ = read_study(path, settings=both)
    assert [len(of_phase) for of_phase in chosen.kinds] == [2, 1]
    assert chosen.kinds[0][1].clocks_mhz == (700, 1000, 1400)
    path.write_text(STUDY.replace("[frontier]", "[frontier]\nstatic_one_clock = true"))
    with pytest.raises(VoltanaError, match="static_one_clock needs like cards within a phase"):
        read_study(path, settings=both)


def test_options_that_a_file_replaces_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text(STUDY)
    for extra in (["--rate", "3"], ["--policy", "boost + random"], ["--seeds", "2"]):
        done = CliRunner().invoke(make_app(), ["frontier", str(path), *extra])
        assert f"{extra[0]} is for a search without a file" in str(done.exception)
    done = CliRunner().invoke(make_app(), ["frontier", "--load", "low"])
    assert "--load picks from a frontier file" in str(done.exception)
