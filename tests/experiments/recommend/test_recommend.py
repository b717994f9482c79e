"""`voltana recommend`: against an exhaustive search, within limits, and what it hands over."""

from __future__ import annotations

import dataclasses
import json
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from voltana.experiments.cli import make_app
from voltana.experiments.compare.draws import Drawn, Run, compare_drawn
from voltana.experiments.frontier.static.like import Side
from voltana.experiments.frontier.trial import Trial, pooled
from voltana.experiments.recommend.advice import CAPS, DYNAMIC, FIXED, NOW, Advice, Judged
from voltana.experiments.recommend.choose.desk import Desk, Means
from voltana.experiments.recommend.choose.fixed import FixedSearch, allows, fleet_peak_w
from voltana.experiments.recommend.hand_over import (
    dynamo_yaml,
    gpu_lines,
    replay_toml,
    roles,
    router_toml,
)
from voltana.experiments.recommend.judge import advise
from voltana.experiments.recommend.question import make_question
from voltana.experiments.recommend.ranges import ranges
from voltana.experiments.recommend.show import sentence
from voltana.experiments.study.advice import best_by_rule, exhaustive
from voltana.experiments.sweep.executors import Outcome
from voltana.hwreplay.replay.config import read_replay_config
from voltana.hwreplay.router.config import read_router_config
from voltana.profiles.catalog import load_profile
from voltana.profiles.common.errors import VoltanaError

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

LOAD = {"rate_rps": 14, "duration_s": 12, "slo_itl_s": 0.045}


def question(**more: Any) -> Any:  # noqa: ANN401 (options of make_question)
    options: dict[str, Any] = {
        "gpus": 3,
        "watts": None,
        "clocks_mhz": (705, 1005, 1410),
        "seeds": 3,
    }
    return make_question(LOAD, **(options | more))


@pytest.fixture(scope="module")
def advised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Desk, Advice]:
    asked = question(policies=("ecofreq + round-robin",), draws=2, is_capped=True)
    desk = Desk(asked, tmp_path_factory.mktemp("advice"), jobs=1)
    return desk, advise(desk)


@pytest.mark.slow
def test_as_good_as_an_exhaustive_search_and_kept_on_what_nobody_saw(
    advised: tuple[Desk, Advice],
) -> None:
    desk, advice = advised
    best = best_by_rule(desk, exhaustive(desk))
    assert best is not None
    assert advice.fixed.asked.energy_j <= 1.02 * best.energy_j
    # six further seeds, and requests of the same lengths that come in bursts
    seeds = [{**desk.question.judging[0], "seed": s} for s in range(901, 907)]
    for repeats in (seeds, [{**r, "arrivals": "gamma:cv=1.5"} for r in seeds]):
        for way in (advice.fixed, advice.dynamic):
            assert way is not None
            trial = desk.trial(way.settings, "", repeats)
            assert pooled(trial.rows, "attainment") >= 0.99


def test_the_advice_is_of_repeats_that_took_no_part_in_the_choice(
    advised: tuple[Desk, Advice],
) -> None:
    _, advice = advised
    assert set(advice.fixed.asked.rows["seed"]).isdisjoint(
        set(range(1, 4))  # on which was chosen
    )
    assert [len(t.energies_j) for t in advice.fixed.at_load.values()] == [2, 3, 2, 1]
    loads = {f: t.rows["rate_rps"].iloc[0] for f, t in advice.fixed.at_load.items()}
    assert loads == pytest.approx({0.8: 11.2, 1.0: 14.0, 1.2: 16.8, 1.5: 21.0})
    by_hand = 100 * (1 - advice.fixed.asked.energies_j[0] / advice.now.asked.energies_j[0])
    kept = [advice.saving(advice.fixed, advice.now).mean, by_hand]
    assert kept[0] == pytest.approx(kept[1], abs=5)
    assert set(advice.drawn) == {FIXED, CAPS, DYNAMIC}


def test_watts_bound_what_the_tables_can_draw(tmp_path: Path) -> None:
    profile = load_profile("a100-80g-sxm/llama-3.1-8b")

    def most_w(phase: str, clock: int) -> float:
        frame = profile.prefill if phase == "prefill" else profile.decode
        return float(frame.loc[frame["frequency_mhz"] == clock, "power_w"].max())

    least_w = most_w("prefill", 705) + most_w("decode", 705)
    asked = question(gpus=None, watts=least_w + 1)
    assert asked.instances == 2
    low, high = Side(1, 705), Side(1, 1410)
    assert fleet_peak_w(asked, (low, high)) == most_w("prefill", 705) + most_w("decode", 1410)
    assert allows(asked, (low, low))
    assert not allows(asked, (low, high))
    found = FixedSearch(Desk(asked, tmp_path, jobs=1), asked.tuning).find()
    assert found.fleet == (low, low)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"gpus": None}, "name the hardware: --gpus N, or --watts W"),
        ({"gpus": 1}, r"--gpus must be >= 2"),
        (
            {"gpus": None, "watts": 100.0},
            "--watts must allow a prefill and a decode instance at 705",
        ),
        ({"target": 1.0}, r"the target must be in \(0, 1\)"),
        ({"clocks_mhz": (700,)}, r"no clock of \[700\]"),
    ],
)
def test_mistakes(more: dict[str, Any], words: str) -> None:
    with pytest.raises(VoltanaError, match=words):
        question(**more)
    with pytest.raises(VoltanaError, match="--set num_decode is what the search decides"):
        make_question(LOAD | {"num_decode": 3}, gpus=4, watts=None)


def test_runs_that_all_fail_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Outcome(error="an iteration lies outside the grid")
    monkeypatch.setattr("voltana.experiments.frontier.trial.run_point", lambda _: failed)
    asked = question(gpus=2)
    with pytest.raises(VoltanaError, match=r"^an iteration lies outside the grid$"):
        FixedSearch(Desk(asked, tmp_path, jobs=1), asked.tuning).find()


def test_windows_of_a_trace_choose_and_judge_apart(tmp_path: Path) -> None:
    arrivals = [i * 0.5 - (0.25 * (i - 400) if i > 400 else 0.0) for i in range(900)]
    path = tmp_path / "trace.csv"
    pd.DataFrame({"arrival_s": arrivals, "input_tokens": 100, "output_tokens": 20}).to_csv(
        path, index=False
    )
    asked = make_question({"trace": str(path)}, gpus=3, watts=None, seeds=7)
    chosen, judged = ([r["trace_start_s"] for r in rs] for rs in (asked.tuning, asked.judging))
    assert set(chosen).isdisjoint(judged)
    assert len(chosen) == 3
    assert chosen[0] > 200  # the busiest is where requests come twice as often
    with pytest.raises(VoltanaError, match="a trace must have 200 requests"):
        short = path.with_name("short.csv")
        short.write_text("\n".join(path.read_text().splitlines()[:150]) + "\n")
        make_question({"trace": str(short)}, gpus=3, watts=None)


def made(name: str, energies_j: tuple[float, ...], kept: float, template: Judged) -> Judged:
    rows = pd.DataFrame({
        "attainment": kept, "requests_total": 100, "energy_j": energies_j, "makespan_s": 10.0,
        "energy_per_request_j": energies_j,
    })  # fmt: skip
    trial = Trial(settings={}, label="", attainments=(kept,) * len(energies_j),
                  energies_j=energies_j, rows=rows)  # fmt: skip
    return dataclasses.replace(template, name=name, setting=name, at_load={1.0: trial, 1.5: trial})


@pytest.mark.parametrize(
    ("fixed_j", "fixed_kept", "dynamic_j", "dynamic_kept", "chance", "answer"),
    [
        ((100.0, 102.0, 98.0), 1.0, (90.0, 92.0, 88.0), 1.0, 1.0, "Yes: dynamic control is worth"),
        ((100.0, 102.0, 98.0), 1.0, (99.9, 101.8, 98.1), 1.0, 1.0, "No: dynamic control is not"),
        ((100.0, 102.0, 98.0), 1.0, (90.0, 92.0, 88.0), 1.0, 0.6, "Undecided: dynamic control"),
        ((100.0, 102.0, 98.0), 1.0, (80.0, 110.0, 90.0), 1.0, 1.0, "Undecided: dynamic control"),
        ((100.0, 102.0, 98.0), 1.0, (50.0, 51.0, 49.0), 0.9, 1.0, "No: dynamic control is not"),
        ((100.0, 102.0, 98.0), 0.9, (120.0, 121.0, 119.0), 1.0, 1.0, "Yes: dynamic policy keeps"),
        ((100.0, 102.0, 98.0), 0.9, (50.0, 51.0, 49.0), 0.9, 1.0, "Neither fixed clocks nor"),
    ],
)
def test_the_plain_sentence(
    advised: tuple[Desk, Advice], fixed_j: tuple[float, ...], fixed_kept: float,
    dynamic_j: tuple[float, ...], dynamic_kept: float, chance: float, answer: str,
) -> None:  # fmt: skip
    advice = advised[1]
    assert advice.dynamic is not None
    drawn = Drawn(draws=10, saving_pct=(0.0, 1.0, 2.0), chance=chance, kept=1.0, other_kept=1.0,
                  is_better=True)  # fmt: skip
    told = dataclasses.replace(
        advice, now=made(NOW, (200.0,) * 3, 1.0, advice.now),
        fixed=made(FIXED, fixed_j, fixed_kept, advice.fixed),
        dynamic=made(DYNAMIC, dynamic_j, dynamic_kept, advice.dynamic), drawn={DYNAMIC: drawn},
        caps=None,
    )  # fmt: skip
    assert sentence(told).startswith(answer)
    is_dynamic = answer.startswith("Yes")
    assert told.best.name == (DYNAMIC if is_dynamic else FIXED)


def test_caps_slow_only_what_would_draw_more(advised: tuple[Desk, Advice]) -> None:
    """From what the best clocks draw at most, where no batch is slower than under the lock."""
    desk, advice = advised
    caps, choice = advice.caps, advice.caps_choice
    assert caps is not None
    assert choice is not None
    means = Means(choice.means.router, is_cap=True)
    begun = desk.trial(means.settings(desk.question, advice.fixed_choice.fleet), "",
                       desk.question.tuning)  # fmt: skip
    capped, locked = begun.rows, advice.fixed_choice.trial.rows
    assert (capped["itl_mean_s"] <= locked["itl_mean_s"]).all()
    assert (capped["attainment"] >= locked["attainment"] - 0.01).all()
    assert choice.trial.energy_j <= begun.energy_j
    assert advice.keeps(caps)
    profile = load_profile("a100-80g-sxm/llama-3.1-8b")
    for role, frame in zip(roles(advice, caps), (profile.prefill, profile.decode), strict=True):
        assert frame["power_w"].min() <= role.cap_w <= frame["power_w"].max() + 1
        assert f"-pl {role.cap_w} " in "\n".join(gpu_lines(advice, advice.fixed))
        assert f'gpu-power-limit: "{role.cap_w}"' in dynamo_yaml(advice, caps)


def test_ranges_hold_what_was_played(advised: tuple[Desk, Advice]) -> None:
    _, advice = advised
    found = ranges(advice, advice.fixed)
    assert set(found) == {"seeds", "load", "profile"}
    savings = [
        100 * (1 - a / b)
        for f in (0.8, 1.0, 1.2)
        for a, b in zip(advice.fixed.at_load[f].energies_j, advice.now.at_load[f].energies_j,
                        strict=True)
    ]  # fmt: skip
    assert found["load"]["saving_vs_top_clocks_pct"] == pytest.approx((min(savings), max(savings)))
    whole = advice.saving(advice.fixed, advice.now)
    low, high = found["seeds"]["saving_vs_top_clocks_pct"]
    assert ((low + high) / 2, (high - low) / 2) == pytest.approx((whole.mean, whole.half))
    day = sum(found["seeds"]["kwh_a_day"]) / 2
    assert day == pytest.approx(advice.kwh_a_day(advice.fixed), rel=0.02)
    assert all(0 <= share <= 1 for each in found.values() for share in each["attainment"])


def test_what_is_handed_over_can_be_read(advised: tuple[Desk, Advice], tmp_path: Path) -> None:
    _, advice = advised
    for way in advice.ways:
        for name, text in (("replay", replay_toml(advice, way)),
                           ("router", router_toml(advice, way))):  # fmt: skip
            (tmp_path / f"{name}.toml").write_text(text)
        replay = read_replay_config(tmp_path / "replay.toml")
        router = read_router_config(tmp_path / "router.toml")
        for config in (replay.sim, router.sim):
            assert config.router == way.router
            assert config.slo_itl_s == 0.045
        assert (replay.sim.num_prefill, replay.sim.num_decode) == way.counts
        for phase in ("prefill", "decode"):
            wanted = way.settings.get(f"{phase}_controller", way.settings.get("controller"))
            assert getattr(replay.sim, f"{phase}_controller_spec") == wanted
    prefill, decode = roles(advice, advice.fixed)
    cards = [g for role in (prefill, decode) for instance in role.gpus for g in instance]
    assert cards == list(range(sum(advice.fixed.counts)))
    assert prefill.clock_mhz == advice.fixed_choice.fleet[0].clock_mhz


def test_draws_decide_only_when_nearly_all_agree() -> None:
    better, worse = (Run(90.0, True), Run(100.0, True)), (Run(110.0, True), Run(100.0, True))
    broken = (Run(50.0, False), Run(100.0, True))
    assert compare_drawn(better, [better] * 20).verdict == "better"
    assert compare_drawn(worse, [worse] * 20).verdict == "not better"
    assert compare_drawn(better, [better] * 18 + [broken] * 2).verdict == "undecided"
    found = compare_drawn(better, [better] * 19 + [worse])
    assert (found.verdict, found.chance) == ("better", 0.95)
    assert found.saving_pct[1] == pytest.approx(10.0)
    # who keeps the promise beats who does not, whatever it spends
    assert Run(110.0, True).beats(Run(100.0, False))
    assert not Run(50.0, False).beats(Run(100.0, True))


class _Page(HTMLParser):
    """Every address and every tag of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href") and v is not None]


@pytest.mark.slow
def test_the_command_writes_text_json_and_a_page(tmp_path: Path) -> None:
    out = tmp_path / "advice"
    line = (
        "recommend --gpus 2 --rate 6 --slo-itl-ms 60 --set duration_s=8 --seeds 2 --uncertainty 2 "
        f"--jobs 1 --price 0.5 --carbon 400 --policy 'ecofreq + round-robin' --out {out}"
    )
    runner = CliRunner()
    done = runner.invoke(make_app(), shlex.split(line))
    assert done.exit_code == 0, done.output
    told = json.loads((out / "recommend.json").read_text())["advices"][0]
    assert told["sentence"].split()[0] in done.output
    fixed = next(w for w in told["ways"] if w["name"] == FIXED)
    assert fixed["money_a_day"] == pytest.approx(0.5 * fixed["kwh_a_day"])
    assert fixed["co2_kg_a_day"] == pytest.approx(0.4 * fixed["kwh_a_day"])
    assert fixed["keeps"]
    clocks = [int(str(fixed["settings"][f"{p}_controller"])[9:]) for p in ("prefill", "decode")]
    if told["advised"] == FIXED:
        for gpu, clock in enumerate(clocks):
            assert f"sudo nvidia-smi -i {gpu} -lgc {clock},{clock}" in done.output
    dynamo = yaml.safe_load((out / "ready" / "dynamo.yaml").read_text())
    for worker in dynamo["spec"]["components"]:
        template = worker["podTemplate"]
        limit_w = int(template["metadata"]["annotations"]["dynamo.nvidia.com/gpu-power-limit"])
        assert 100 <= limit_w <= 400
        assert template["spec"]["nodeSelector"] == {
            "nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"
        }
    page = _Page()
    page.feed((out / "recommend.html").read_text())
    assert page.tags.count("table") == 3
    assert [s[:22] for s in page.sources] == ["data:image/png;base64,"]
    runs = len(list((out / "points").iterdir()))
    again = runner.invoke(make_app(), [*shlex.split(line), "--json"])
    assert json.loads(again.output) == json.loads((out / "recommend.json").read_text())
    assert len(list((out / "points").iterdir())) == runs


@pytest.mark.slow
def test_two_cards_within_a_budget_of_watts(tmp_path: Path) -> None:
    """The least energy of those that keep the promise is named; nothing may draw more than W."""
    out, watts = tmp_path / "advice", 1000.0
    names = ("a100-80g-sxm/llama-3.1-8b", "h100-sxm/llama-3.1-8b")
    line = (
        f"recommend --profile {names[0]} --profile {names[1]} --watts {watts} --rate 4 --caps "
        "--slo-itl-ms 60 --set duration_s=6 --seeds 2 --uncertainty 0 --jobs 1 "
        f"--policy 'ecofreq + round-robin' --out {out}"
    )
    done = CliRunner().invoke(make_app(), shlex.split(line))
    assert done.exit_code == 0, done.output
    told = json.loads((out / "recommend.json").read_text())
    assert [a["question"]["profile"] for a in told["advices"]] == [*names]
    days = {}
    for number, advice in enumerate(told["advices"], 1):
        profile = load_profile(names[number - 1])
        assert [w["name"] for w in advice["ways"]] == [NOW, FIXED, CAPS, DYNAMIC]
        for way in advice["ways"]:
            most_w = 0.0
            for role, frame in zip(way["roles"], (profile.prefill, profile.decode), strict=True):
                each_w = role["cap_w"]
                if role["clock_mhz"] is not None:  # locked: what the tables draw up to there
                    below = frame["frequency_mhz"] <= role["clock_mhz"]
                    each_w = frame.loc[below, "power_w"].max()
                most_w += len(role["gpus"]) * each_w
            assert most_w <= watts + 10 * len(names)  # caps are told in steps of 5 W
            assert way["peak_w"] <= watts + 2
        best = next(w for w in advice["ways"] if w["name"] == advice["advised"])
        assert best["keeps"]
        days[names[number - 1]] = best["kwh_a_day"]
        assert (out / f"ready-{number}" / "gpus.sh").is_file()
    assert told["best_profile"] == min(days, key=lambda name: days[name])
    assert f"Least energy: {told['best_profile']}" in done.output


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_on_ray_as_on_this_machine(
    ray_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    told = []
    for more in ("--engine ray", "--jobs 1"):
        out = tmp_path / more.split()[-1]
        line = (
            "recommend --gpus 2 --rate 6 --slo-itl-ms 60 --set duration_s=6 --seeds 2 "
            f"--uncertainty 0 --policy 'ecofreq + round-robin' --out {out} {more} --json"
        )
        done = CliRunner().invoke(make_app(), shlex.split(line))
        assert done.exit_code == 0, done.output
        told.append((out / "recommend.json").read_text())
    assert told[0] == told[1]
