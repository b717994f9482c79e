"""`voltana list controllers|routers`: complete, and readable on a narrow and a wide terminal."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pandas as pd
import pytest

from tests.conftest import ROOT
from voltana.experiments.profile_columns import status_of
from voltana.profiles.catalog import list_profiles, load_profile
from voltana.profiles.schema import Provenance
from voltana.sim.policies import reconstructed
from voltana.sim.policies.registry import CONSTANTS, CONTROLLERS, ROUTERS, Entry
from voltana.sim.policies.spec import describe_parameters

KINDS: dict[str, Mapping[str, Entry[Any]]] = {"controllers": CONTROLLERS, "routers": ROUTERS}


def show(*arguments: str, columns: int = 100) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "voltana.experiments.cli", "list", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | {"COLUMNS": str(columns)},
    )  # fmt: skip


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_rule_parameters_and_source_within_the_width(kind: str, columns: int) -> None:
    done = show(kind, columns=columns)
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= columns
    parts = done.stdout.split("\n\n")
    assert [part.partition(":")[0] for part in parts] == list(KINDS[kind])
    for part, (name, entry) in zip(parts, KINDS[kind].items(), strict=True):
        text = " ".join(part.split())
        assert text.startswith(f"{name}: {entry.rule}")
        assert entry.source
        assert text.endswith(f"source: {entry.source}")
        is_marked = f" constants: {CONSTANTS[entry.constants]} source: " in text
        assert is_marked is (entry.constants in ("partly", "invented"))
        for info in entry.parameter_infos:
            assert f" {info.key}={info.default} {info.unit} {info.meaning}" in text
            assert info.meaning


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_policy_that_says_ours_is_marked_so(kind: str) -> None:
    """Whose source begins with ours has no source of its constants, and the other way round."""
    for name, entry in KINDS[kind].items():
        is_own = entry.source.startswith("ours") or name == "pid"
        assert (entry.constants == "ours") is is_own, name
        if entry.constants == "published" and name != "ecofreq":
            assert "are ours" not in entry.source, name


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_invented_constants_have_a_room_that_names_its_policies(kind: str) -> None:
    for name, entry in KINDS[kind].items():
        is_there = entry.make.__module__.startswith(f"{reconstructed.__name__}.")
        assert (entry.constants == "invented") is is_there, name
        assert not is_there or f"- `{name}`: " in str(reconstructed.__doc__)


def test_no_headline_table_holds_them() -> None:
    invented = {n for kind in KINDS.values() for n, e in kind.items() if e.constants == "invented"}
    invented -= {name for name, entry in ROUTERS.items() if entry.constants == "published"}
    contest = pd.read_csv(ROOT / "results" / "contest.csv")
    assert not invented & {*contest["controller"], *contest["router"]}
    for path in (ROOT / "experiments" / "configs").glob("*.toml"):
        named = re.findall(r'"([a-z-]+)[":]', path.read_text(encoding="utf-8"))
        assert not invented & {*named}, path.name


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", ["agft", "greenllm", "static"])
def test_the_whole_rule_of_one_policy(name: str, columns: int) -> None:
    entry = CONTROLLERS[name]
    done = show("controllers", name, columns=columns)
    assert max(len(line) for line in done.stdout.splitlines()) <= columns
    assert " ".join(entry.description.split()) in " ".join(done.stdout.split())
    assert done.stdout.startswith(f"{name}: ")
    assert re.search(r"^    source: ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["controllers", "ecofrek"], "unknown controller 'ecofrek': did you mean 'ecofreq'"),
        (["routers", "ecorute"], "unknown router 'ecorute': did you mean 'ecoroute'"),
        (["workloads", "a"], "workloads are listed all at once, got 'a': leave it out"),
        (["traces", "a"], "traces are listed all at once, got 'a': leave it out"),
        (["controllers", "no.module"], "no module 'no'; set PYTHONPATH to its folder"),
    ],
)
def test_mistakes(arguments: list[str], words: str) -> None:
    done = show(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_profiles_say_of_each_column_what_it_is() -> None:
    text = show("profiles", columns=100).stdout
    assert max(map(len, text.splitlines())) <= 100
    told = {p["name"]: p for p in json.loads(show("profiles", "--json").stdout)}
    assert list(told) == list_profiles()
    status = told["h100-sxm/qwen3-32b-tp2"]["status"]
    assert (status["decode_time"], status["decode_power"]) == ("modelled", "calibrated")
    assert told["rtx-pro-6000/llama-3.1-8b"]["status"]["clock_dependence"] == "calibrated"
    assert all(p["errors"] for p in told.values())
    row = text.splitlines()[[*told].index("h100-sxm/qwen3-32b-tp2") * 2 + 2]
    words = {"modelled": "model", "calibrated": "calib."}
    assert row.split()[2:10] == [words[s] for s in status.values()]


def test_a_card_that_a_profile_emulates_is_not_called_measured() -> None:
    profile = load_profile("a100-80g-sxm/llama-3.1-8b")
    entry = Provenance(status="measured", source="voltana profile on A100, driver emulated; x")
    meta = dataclasses.replace(
        profile.meta, provenance={**profile.meta.provenance, "decode_time": entry}
    )
    made = dataclasses.replace(profile, meta=meta)
    assert status_of(made, "decode_time") == "emulated"
    assert status_of(profile, "decode_time") == "calibrated"


def test_units_come_from_names() -> None:
    entries: list[Entry[Any]] = [*CONTROLLERS.values(), *ROUTERS.values()]
    units = {
        info.name: info.unit for entry in entries for info in describe_parameters(entry.parameters)
    }
    assert units["ki_mhz_per_s"] == "MHz/s"
    assert units["floor_tokens_per_s"] == "tokens/s"
    assert units["margin_frac"] == "fraction"
    assert units["idle_s"] == "s"
    assert units["num_levels"] == "integer"
    assert units["mode"] == "pack|spread"
