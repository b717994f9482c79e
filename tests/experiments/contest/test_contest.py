"""The shipped contest: its loads, its table, and what it leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from voltana.experiments.contest.run import (
    contest_files,
    read_contest,
    run_contest,
    write_contest,
)
from voltana.experiments.frontier.search import (
    DEFAULT,
)
from voltana.experiments.frontier.study import load_names_of, read_study
from voltana.experiments.frontier.table import COLUMNS
from voltana.experiments.runs import workload_of
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config, read_toml
from voltana.sim.workload.traces import open_trace


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
