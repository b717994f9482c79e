"""The key of a run changes with everything that can change the result, and with nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from voltana import profiles
from voltana.experiments.runs import cached_profile
from voltana.experiments.sweep.identity import bound_key, program_files, run_key
from voltana.sim.config import make_config


def key(**settings: object) -> str:
    cached_profile.cache_clear()
    return run_key(make_config(dict(settings)))


def test_the_configuration_counts() -> None:
    assert key() == key()
    assert len({key(), key(seed=2), key(controller="boost"), key(router="least-kv")}) == 4


def test_the_profile_s_numbers_count(tmp_path: Path) -> None:
    """A copy whose tables differ in one digit."""
    source = Path(profiles.__file__).parent / "data" / "a100-80g-sxm" / "llama-3.1-8b"
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    before = key(profile=str(copy))
    assert key(profile=str(copy)) == before
    table = copy / "idle.csv"
    header, first, *rest = table.read_text().splitlines()
    table.write_text("\n".join([header, f"{first}.5", *rest]) + "\n")
    assert key(profile=str(copy)) != before


def test_a_trace_s_rows_count(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,10,10\n")
    before = key(trace=str(trace))
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,10,11\n")
    assert key(trace=str(trace)) != before


def test_a_recorded_rate_counts(tmp_path: Path) -> None:
    curve = tmp_path / "rate.csv"
    arrivals = (f"curve:{curve}", f"curve:{curve},from=10")
    curve.write_text("window_start_s,rate_rps\n0,1\n60,2\n")
    before = [key(arrivals=text) for text in arrivals]
    curve.write_text("window_start_s,rate_rps\n0,1\n60,3\n")
    after = [key(arrivals=text) for text in arrivals]
    assert len({*before, *after}) == 4


def test_the_source_of_the_policy_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy of the user's own, in a package of its own."""
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    module = package / "policy.py"
    module.write_text("# one\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before, other = key(controller="mine.policy"), key(controller="ecofreq")
    module.write_text("# two\n")
    assert key(controller="mine.policy") != before
    assert key(controller="ecofreq") == other


def test_every_file_that_a_run_imports_counts() -> None:
    """All of voltana that is loaded after a run of each policy family, but for what makes the key
    and the tables' own folder, which the profile's hash stands for."""
    code = (
        "import sys, voltana.experiments.runs as r; from voltana.sim.config import make_config;"
        "r.run(make_config({'duration_s': 1, 'router': 'consolidate', 'controller': 'agft'}));"
        "print(*{m.__file__ for n, m in sys.modules.items()"
        " if n.partition('.')[0] == 'voltana' and m.__file__})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {Path(name) for name in done.stdout.split() if not name.endswith("__init__.py")}
    counted = set(program_files())
    assert len(loaded) > 40
    assert loaded <= counted, sorted(loaded - counted)


def test_what_cannot_run_has_a_key_too() -> None:
    assert len({key(profile="nowhere"), key(controller="nothing"), key(router="no.module")}) == 3


def test_a_bound_is_kept_by_its_world_and_not_by_a_policy(tmp_path: Path) -> None:
    def bound(attainment: float = 0.99, **settings: object) -> str:
        cached_profile.cache_clear()
        return bound_key(make_config(dict(settings)), attainment)

    assert bound() == bound(controller="boost", router="least-kv", aim_ratio=0.5)
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,10,10\n")
    first = bound(trace=str(trace))
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,10,11\n")
    source = Path(profiles.__file__).parent / "data" / "a100-80g-sxm" / "llama-3.1-8b"
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    before = bound(profile=str(copy))
    table = copy / "idle.csv"
    table.write_text(table.read_text().replace("\n0,", "\n0,1", 1))
    keys = [bound(), bound(0.9), bound(seed=2), first, bound(trace=str(trace)), before]
    assert len({*keys, bound(profile=str(copy))}) == 7
