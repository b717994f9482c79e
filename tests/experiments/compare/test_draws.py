"""--uncertainty on real runs: paired, repeatable, and refused where it means nothing."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from voltana.experiments.cli import make_app
from voltana.experiments.runs import run
from voltana.profiles.catalog import load_profile, write_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.metrics import summarise


def call(line: str) -> Result:
    return CliRunner().invoke(make_app(), shlex.split(line))


def test_simulate_holds_a_policy_against_static_max_on_the_same_draws() -> None:
    line = "--profile h100-sxm/llama-3.1-8b --rate 10 --controller static:f=1590 --router ecoroute"
    done = call(f"simulate {line} --set duration_s=4 --uncertainty 2 --json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)["against_static_max"]
    base = {"profile": "h100-sxm/llama-3.1-8b", "rate_rps": 10, "router": "ecoroute",
            "duration_s": 4}  # fmt: skip
    savings = []
    for number in (1, 2):
        mine, top = (
            summarise(run(make_config({**base, "controller": c, "profile_draw": number})))
            for c in ("static:f=1590", "static")
        )
        savings.append(100 * (1 - mine["energy_j"] / top["energy_j"]))
    assert savings[0] != savings[1]
    assert told["saving_pct"][1] == pytest.approx(sum(savings) / 2)
    assert (told["draws"], told["chance"], told["verdict"]) == (2, 1.0, "better")


@pytest.mark.slow
def test_frontier_judges_the_nominal_choice_on_draws(tmp_path: Path) -> None:
    line = "--rate 10 --set duration_s=4 --seeds 1 --policy 'static + round-robin' --uncertainty 2"
    done = call(f"frontier {line} --jobs 1 --out {tmp_path / 'f'}")
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "f" / "draws.csv")
    fleet = table[table["controller"] == "static fleet"].iloc[0]
    assert (fleet["against"], fleet["draws"]) == ("static-max", 2)
    assert fleet["saving_low_pct"] <= fleet["saving_pct"] <= fleet["saving_high_pct"]
    assert set(table["verdict"]) <= {"better", "not better", "undecided"}


def test_a_draw_is_not_drawn_again() -> None:
    done = call("simulate --set profile_draw=3 --uncertainty 2")
    assert isinstance(done.exception, VoltanaError)
    assert "draws profiles itself, got profile_draw=3" in str(done.exception)


@pytest.mark.slow
def test_policies_that_choose_clocks_refuse_a_profile_of_one(tmp_path: Path) -> None:
    """As an import without --clock-shape makes it; fixed clocks run."""
    known = load_profile("h100-sxm/llama-3.1-8b")
    top = known.clocks_mhz[-1]
    meta = dataclasses.replace(
        known.meta,
        clocks=dataclasses.replace(
            known.meta.clocks, supported_mhz=(top,), default_levels_mhz=(top,)
        ),
    )
    prefill, decode = (f[f["frequency_mhz"] == top] for f in (known.prefill, known.decode))
    idle = known.idle[known.idle["frequency_mhz"].isin((0, top))]
    write_profile(tmp_path / "one", meta, prefill, decode, idle)
    for verb in ("simulate", "frontier", "recommend --gpus 2"):
        policy = "'ecomin + ecoroute'"
        chosen = "--controller ecomin" if verb == "simulate" else f"--policy {policy}"
        profile = f"--set profile={tmp_path / 'one'}"
        out = f"--out {tmp_path / verb.split()[0]}"
        done = call(f"{verb} {chosen} {profile} --rate 5 --set duration_s=3 {out}")
        text = str(done.exception) if done.exception else done.output
        assert "must choose among clocks" in text, (verb, text)
    plain = call(f"simulate --controller static --profile {tmp_path / 'one'} --rate 5 "
                 "--set duration_s=3")  # fmt: skip
    assert plain.exit_code == 0
