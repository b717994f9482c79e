"""`import voltana`: cheap, typed, and the same numbers as the command line's."""

from __future__ import annotations

import linecache
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import voltana
from voltana.experiments.cli import make_app
from voltana.experiments.examples.own_policy import LoadRamp
from voltana.experiments.examples.own_router import LeastWork, LeastWorkParameters
from voltana.experiments.sweep.identity import run_key
from voltana.sim.policies import registry
from voltana.sim.results import read_json

RAMP = "voltana.experiments.examples.own_policy"
SHORT: dict[str, Any] = {"rate_rps": 10, "duration_s": 4}


@pytest.fixture(autouse=True)
def no_names_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", {"controller": {}, "router": {}})


def test_importing_it_loads_nothing_of_it() -> None:
    code = (
        "import sys, voltana\n"
        "loaded = [m for m in sys.modules if m.startswith('voltana.') or m == 'numpy']\n"
        "assert not loaded, loaded\n"
        "assert all(getattr(voltana, n) and n in dir(voltana) for n in voltana.__all__)\n"
        "assert 'matplotlib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        _ = voltana.simulat  # type: ignore[attr-defined]


def test_a_run_is_the_command_lines_run(tmp_path: Path) -> None:
    options = ["--rate", "10", "--duration", "4", "--controller", "ecomin"]
    make_app()(["simulate", *options, "--out", str(tmp_path / "cli")], standalone_mode=False)
    told = read_json(tmp_path / "cli" / "summary.json")
    profile = voltana.load_profile("a100-80g-sxm/llama-3.1-8b")
    run = voltana.simulate(profile=profile, controller="ecomin", **SHORT)
    assert (run.energy_j, run.itl_attainment) == (told["energy_j"], told["itl_attainment"])
    assert list(run.requests()["status"]) == ["completed"] * 40
    written = read_json(run.write(tmp_path / "api") / "summary.json")
    assert {**written, "wall_s": 0} == {**told, "wall_s": 0}
    with pytest.raises(voltana.VoltanaError, match="already holds a run"):
        run.write(tmp_path / "api")
    with pytest.raises(voltana.VoltanaError, match="timeline_interval_s"):
        run.timeline()
    with pytest.raises(voltana.VoltanaError, match="did you mean 'rate_rps'"):
        voltana.simulate(rate=10)


def test_requests_of_ones_own_and_a_configuration(tmp_path: Path) -> None:
    requests = voltana.make_workload("sharegpt", rate_rps=10, duration_s=4, seed=13)
    config = voltana.SimConfig(**SHORT)
    file = tmp_path / "run.toml"
    file.write_text("rate_rps = 10\nduration_s = 4\n")
    runs = [voltana.simulate(workload=requests), voltana.simulate(config), voltana.simulate(file)]
    assert len({run.energy_j for run in runs}) == 1
    slower = voltana.simulate(config, controller="static:f=1200")
    assert slower.config.rate_rps == 10
    assert slower.energy_j != runs[0].energy_j


@pytest.mark.slow
def test_frontier_and_advice_are_the_commands(tmp_path: Path) -> None:
    frame = voltana.frontier(
        rates_rps=[6], policies=["ecofreq + round-robin"], seeds=1, duration_s=4, jobs=1
    )
    assert set(frame["controller"]) == {"static-max", "static pair", "static fleet", "ecofreq"}
    top = frame.set_index("controller").loc["static-max"]
    assert top["saving_vs_static_max_pct"] == 0.0
    with pytest.raises(voltana.VoltanaError, match="search without a file"):
        voltana.frontier(tmp_path / "f.toml", seeds=2)
    with pytest.raises(voltana.VoltanaError, match="what the search decides"):
        voltana.recommend(gpus=2, router="random")


def test_a_registered_policy_is_the_modules_in_every_process() -> None:
    voltana.register_controller("my-ramp", LoadRamp)
    voltana.register_router("least-work", LeastWork, LeastWorkParameters)
    grid = {
        "base": SHORT,
        "grid": {"controller": ["my-ramp:high=40", f"{RAMP}:high=40", "static"]},
    }
    alone, together = (voltana.sweep(grid, jobs=jobs) for jobs in (1, 2))
    pd.testing.assert_frame_equal(
        alone.drop(columns="wall_s"), together.drop(columns="wall_s"), check_exact=True
    )
    mine, modules, top = alone["energy_j"]
    assert mine == modules != top
    assert voltana.simulate(router="least-work:weight=0.5", **SHORT).energy_j > 0


CELL = """
class Lowest(voltana.Controller):
    def __init__(self, parameters: Nothing, context: voltana.PolicyContext) -> None:
        self.clocks = context.clocks_mhz

    def decide(self, state: voltana.InstanceState) -> int:
        return self.clocks[{index}]
"""


def test_a_notebooks_class_is_kept_by_its_source() -> None:
    """As a cell's: its module has no file, its lines are known to linecache alone."""

    def run_cell(number: int, index: int) -> None:
        text = (
            "import dataclasses, voltana\n"
            "@dataclasses.dataclass(frozen=True)\nclass Nothing:\n    pass\n" + CELL
        ).format(index=index)
        name = f"<cell {number}>"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        names: dict[str, Any] = {"__name__": "a_notebook"}
        exec(compile(text, name, "exec"), names)
        voltana.register_controller("lowest", names["Lowest"])

    config = voltana.SimConfig(controller="lowest", **SHORT)
    keys, energies = [], []
    for number, index in enumerate([0, 0, -1]):
        run_cell(number, index)
        keys.append(run_key(config))
        energies.append(voltana.simulate(config).energy_j)
    assert keys[0] == keys[1] != keys[2]
    assert energies[0] == energies[1] != energies[2]
    linecache.cache.clear()
    with pytest.raises(voltana.VoltanaError, match="define it in a file or a notebook"):
        run_key(config)


def test_mistakes_of_registering_are_one_line() -> None:
    class Bare(voltana.Controller):
        def decide(self, state: voltana.InstanceState) -> int:
            return 0

    for name, make, words in (
        ("ecofreq", LoadRamp, "is a shipped one"),
        ("my ramp", LoadRamp, "words joined by dashes"),
        ("router", LeastWork, "derived from voltana.Controller"),
        ("bare", Bare, "must say its parameters"),
    ):
        with pytest.raises(voltana.VoltanaError, match=f"^[^\n]*{words}[^\n]*$"):
            voltana.register_controller(name, make)  # type: ignore[arg-type]
