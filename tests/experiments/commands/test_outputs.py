"""What commands write: never over another's results, whole or not at all, one line if refused."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.conftest import ROOT
from tests.experiments.grids import TWO_POLICIES
from voltana.experiments.cli import make_app
from voltana.experiments.runs import run
from voltana.experiments.sweep.grid import expand
from voltana.experiments.sweep.run import run_sweep
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.results import read_run, write_run

GRID = TWO_POLICIES.format(duration=3, rates=[5])
CONFIG = SimConfig(rate_rps=5, duration_s=3, timeline_interval_s=0.5)


def call(*arguments: str) -> str:
    """The one line that a refused command ends with."""
    with pytest.raises(VoltanaError, match=r"^[^\n]*$") as caught:
        make_app()(list(arguments), standalone_mode=False)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def sweep_file(tmp_path: Path) -> str:
    path = tmp_path / "sweep.toml"
    path.write_text(GRID)
    return str(path)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    points = expand({"base": {"duration_s": 3}, "grid": {"rate_rps": [5]}}, "test")
    run_sweep(points, tmp_path / "sweep", jobs=1)
    return tmp_path / "sweep"


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    write_run(run(CONFIG), tmp_path / "run")
    return tmp_path / "run"


def test_no_command_writes_into_a_sweep(sweep: Path) -> None:
    before, out = contents(sweep), str(sweep)
    for arguments in (
        ["frontier", "--rate", "5", "--seeds", "1", "--set", "duration_s=3", "--out", out],
        ["tune", "pid", "--out", out],
        ["simulate", "--rate", "5", "--duration", "3", "--out", out],
        ["compare-profiles", "a100-80g-sxm/llama-3.1-8b", "a100-80g-sxm/llama-3.1-8b",
         "--out", out],
    ):  # fmt: skip
        assert f"{out} holds a sweep, not a " in call(*arguments)
        assert contents(sweep) == before, arguments


def test_no_command_writes_into_a_run(run_directory: Path, sweep_file: str) -> None:
    before, out = contents(run_directory), str(run_directory)
    for arguments in (
        ["sweep", sweep_file, "--out", out],
        ["demo", "--out", out],
        ["frontier", "--out", out],
        ["validate", out, out, "--out", out],
        ["simulate", "--out", out],
    ):
        assert "holds a run" in call(*arguments)
        assert contents(run_directory) == before, arguments


def test_no_sweep_is_written_among_files_of_the_user(tmp_path: Path, sweep_file: str) -> None:
    assert "files that are of no sweep (sweep.toml)" in call(
        "sweep", sweep_file, "--out", str(tmp_path)
    )
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.toml"]


def test_an_unknown_engine_is_refused_even_if_all_points_are_kept(
    tmp_path: Path, sweep_file: str
) -> None:
    arguments = ["sweep", sweep_file, "--out", str(tmp_path / "out"), "--jobs", "1"]
    assert CliRunner().invoke(make_app(), arguments).exit_code == 0
    assert call(*arguments, "--engine", "nosuch").startswith("engine must be one of processes, ray")


@pytest.mark.parametrize("name", ["requests.parquet", "itl.parquet", "timeline.parquet"])
def test_a_file_cut_short_is_one_line_in_validate_and_report(
    run_directory: Path, name: str
) -> None:
    path = run_directory / name
    os.truncate(path, path.stat().st_size // 2)
    for verb in (["validate", str(run_directory)], ["report"]):
        said = call(*verb, str(run_directory))
        assert said.startswith(f"cannot read {path}, is it cut short?")
    assert not (run_directory / "report.html").exists()
    assert not (run_directory / "validation").exists()


def test_a_file_broken_in_its_middle_is_one_line_too(run_directory: Path) -> None:
    path = run_directory / "timeline.parquet"
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = b"\xff" * (len(data) // 2 - 4)
    path.write_bytes(data)
    assert f"cannot read {path}" in call("report", str(run_directory))


def limited(limit_bytes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command whose files may not grow beyond a limit: it fails where a full disk would."""
    return subprocess.run(
        [sys.executable, "-m", "voltana.experiments.cli", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)),
    )  # fmt: skip


def test_where_there_is_no_room_commands_name_the_file_and_leave_none(
    tmp_path: Path, run_directory: Path
) -> None:
    before = contents(run_directory)
    page = run_directory / "report.html"
    done = limited(100_000, "report", str(run_directory), "--no-series")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"voltana: cannot write {page}: ")
    assert contents(run_directory) == before
    spill = tmp_path / "rows.parquet"
    done = limited(
        1000, "simulate", "--rate", "20", "--duration", "5", "--set", "metrics=sketch",
        "--spill", str(spill),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"voltana: cannot write {spill}: File too large; make room or name another place"
    )
    assert not spill.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_results_of_a_run_are_those_before_the_marker(run_directory: Path) -> None:
    assert read_run(run_directory).makespan_s == run(CONFIG).makespan_s
