"""Overload is said, in one line, where and only where top clocks cannot keep the promise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from voltana.experiments.cli import make_app
from voltana.experiments.compare.policies import keeps_promise
from voltana.experiments.control.tune import PidTuner
from voltana.experiments.promise import (
    overload_line,
    overload_of,
    overloads,
    overloads_at,
    static_max,
)
from voltana.experiments.runs import run
from voltana.experiments.sweep.grid import Point, expand
from voltana.experiments.sweep.run import run_sweep
from voltana.sim.config import SimConfig, make_config
from voltana.sim.metrics import summarise

# One prefill and one decode instance serve 60 ms between tokens at 20 requests/s (a sixth of what
# two of each serve at 36 in README's tables), and not at 60, when each second adds more prompts
# than prefill works off.
LIGHT, HEAVY = 5.0, 60.0
BASE = {"num_prefill": 1, "num_decode": 1, "duration_s": 8}
LOW = "static:f=705"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(make_app(), list(arguments))


def small(rate: float, *more: str) -> list[str]:
    return ["simulate", "--prefill", "1", "--decode", "1", "--duration", "8",
            "--rate", str(rate), "--json", *more]  # fmt: skip


def test_the_defaults_and_the_example_of_the_help_keep_their_promise() -> None:
    for policy in ("static", "ecofreq"):
        config = make_config({"controller": policy})
        assert keeps_promise(summarise(run(config))), policy
    shown = call("simulate", "--help").output
    words = shown[shown.index("Example: voltana") :].split("\n\n")[0].split()[2:]
    done = call(*words, "--require-slo")
    assert done.exit_code == 0, done.output
    assert "overload" not in done.output


def test_one_run_says_overload_and_a_missed_promise_is_an_exit_code_on_demand() -> None:
    done = call(*small(HEAVY))
    assert done.exit_code == 0
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("voltana: overload: even top clocks (static-max) keep less than")
    asked = call(*small(HEAVY, "--require-slo"))
    assert asked.exit_code == 1
    assert "the run misses its promise (--require-slo)" in asked.stderr


def test_a_promise_missed_by_a_low_clock_is_no_overload() -> None:
    # a promise between the ITL of the lowest clock and that of the top one
    config = make_config({**BASE, "rate_rps": LIGHT, "controller": LOW, "router": "round-robin"})
    low, top = summarise(run(config)), summarise(run(static_max(config)))
    between_s = 0.5 * (low["itl_s"]["p50"] + top["itl_s"]["p99"])
    assert top["itl_s"]["p99"] < between_s < low["itl_s"]["p50"]
    done = call(*small(LIGHT, "--controller", LOW, "--slo-itl-ms", str(1e3 * between_s)))
    assert done.exit_code == 0
    assert done.stderr == ""
    asked = call(
        *small(LIGHT, "--controller", LOW, "--slo-itl-ms", str(1e3 * between_s), "--require-slo")
    )
    assert asked.exit_code == 1


def test_what_is_said_of_one_run_are_the_numbers_of_static_max() -> None:
    config = make_config({**BASE, "rate_rps": HEAVY})
    found = overload_of(config, summarise(run(config)))
    assert found is not None
    by_hand = SimConfig(
        num_prefill=1, num_decode=1, duration_s=8, rate_rps=HEAVY, controller="static",
        router="round-robin",
    )  # fmt: skip
    top = summarise(run(by_hand))
    assert found.ttft_attainment == top["ttft_attainment"]
    assert found.itl_attainment == top["itl_attainment"]


def test_a_kept_promise_and_a_run_of_static_max_cost_no_second_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    light = make_config({**BASE, "rate_rps": LIGHT})
    top = make_config({**BASE, "rate_rps": HEAVY, "controller": "static", "router": "round-robin"})
    of_light, of_top = summarise(run(light)), summarise(run(top))

    def refuse(_: SimConfig) -> None:
        raise AssertionError("a run that was not needed")

    monkeypatch.setattr("voltana.experiments.promise.run", refuse)
    assert overload_of(light, of_light) is None
    assert overload_of(top, of_top) is not None


def test_a_fleet_that_idles_keeps_its_promise_at_any_policy() -> None:
    assert overloads_at(make_config(BASE), [LIGHT]) == []
    assert [o.load for o in overloads_at(make_config(BASE), [LIGHT, HEAVY])] == ["60 requests/s"]


def sweep(policies: Sequence[dict[str, Any]]) -> list[Point]:
    grid = {"base": BASE, "grid": {"rate_rps": [LIGHT, HEAVY], "policy": list(policies)}}
    return expand(grid, "test")


ECOFREQ = {"name": "ecofreq", "controller": "ecofreq"}
TOP = {"name": "static-max", "controller": "static", "router": "round-robin"}


@pytest.mark.parametrize("policies", [[ECOFREQ, TOP], [ECOFREQ]], ids=["with", "without"])
def test_a_sweep_names_its_overloaded_loads_with_and_without_static_max(
    tmp_path: Path, policies: list[dict[str, Any]]
) -> None:
    points = sweep(policies)
    table = run_sweep(points, tmp_path, jobs=1)
    kept = len(list((tmp_path / "points").glob("*.json")))
    (found,) = overloads(points, tmp_path, jobs=1)
    assert found.load == "60 requests/s"
    assert "overload: even top clocks" in overload_line([found])
    # static-max runs once more only at the load that nobody keeps, and only if it is not there
    added = len(list((tmp_path / "points").glob("*.json"))) - kept
    assert added == (0 if TOP in policies else 1)
    assert len(table) == len(points)


def test_many_loads_are_one_line() -> None:
    found = overloads_at(make_config(BASE), [60, 61, 62, 63])
    line = overload_line(found)
    assert "62 requests/s" in line
    assert "; and 1 more" in line
    assert "\n" not in line


def test_the_sweep_command_ends_with_1_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(
        "[base]\nnum_prefill = 1\nnum_decode = 1\nduration_s = 8\n[grid]\nrate_rps = [60]\n"
    )
    arguments = ["sweep", str(path), "--out", str(tmp_path / "out"), "--jobs", "1"]
    assert call(*arguments).exit_code == 0
    done = call(*arguments, "--require-slo")
    assert done.exit_code == 1
    assert "a load is too much for top clocks (--require-slo)" in done.stderr


@pytest.mark.slow
def test_tuning_says_what_it_reached_and_not_what_was_asked(tmp_path: Path) -> None:
    done = call(
        "tune", "pid", "--out", str(tmp_path / "out"), "--population", "5", "--generations", "1",
        "--seeds", "1", "--held-out", "1", "--jobs", "1", "--set", "duration_s=6",
        "--set", f"rate_rps={HEAVY}", "--set", "num_prefill=1", "--set", "num_decode=1",
        "--require-slo",
    )  # fmt: skip
    assert done.exit_code == 1
    text = (tmp_path / "out" / "pid.toml").read_text()
    assert "MISS the target of 99 % attainment" in text.splitlines()[0]
    assert text.splitlines()[1].startswith("# overload: even top clocks (static-max) keep ")
    tuner = PidTuner(
        {"duration_s": 6, "rate_rps": HEAVY, "num_prefill": 1, "num_decode": 1},
        tmp_path / "out", seeds=(11,), held_out=(21,), jobs=1,
    )  # fmt: skip
    top = tuner.judge([{"controller": "static"}], (21,))[0]
    assert f"keep {round(100 * top.attainment, 2):g} %" in text.splitlines()[1]
