"""Sweeps: the store, a worker that dies, a shared store, a Ray cluster that loses a node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
import pytest

from voltana.experiments.sweep.executors import RayExecutor, run_point
from voltana.experiments.sweep.grid import Point, expand
from voltana.experiments.sweep.run import run_sweep
from voltana.experiments.sweep.store import FolderStore, UrlStore, open_store
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import Controller, InstanceState, PolicyContext
from voltana.sim.policies.controllers.fixed import NoParameters
from voltana.sim.policies.registry import CONTROLLERS, Entry

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

RAY_POINTS = 24
FAULTY = "tests.experiments.sweep.faulty"
NO_FSSPEC = "a store by URL needs fsspec: pip install 'voltana[ray]'"


def points(count: int, duration_s: float = 2.0) -> list[Point]:
    grid = {"base": {"duration_s": duration_s, "rate_rps": 10}, "grid": {"seed": [*range(count)]}}
    return expand(grid, "test")


def local(points: list[Point]) -> dict[str, Any]:
    """What the points give when nothing is in between."""
    return {p.key: run_point(p.config).summary for p in points}


def energies(frame: pd.DataFrame) -> dict[str, float]:
    return dict(zip(frame["hash"], frame["energy_j"], strict=True))


def test_static_pairs_of_a_colocated_fleet_are_clocks() -> None:
    """Two clocks make four pairs where the phases are apart, two clocks where they are not."""
    grid = {
        "grid": {"fleet": [{"name": "2P2D"}, {"name": "4C", "num_colocated": 4}]},
        "static_pairs": {"clocks_mhz": [1005, 1410]},
    }
    pairs = [p.config.decode_controller_spec for p in expand(grid, "test")]
    assert sorted(pairs) == ["static:f=1005"] * 3 + ["static:f=1410"] * 3
    together = [p.config for p in expand(grid, "test") if p.labels["fleet"] == "4C"]
    assert [c.controller for c in together] == ["static:f=1005", "static:f=1410"]


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_a_result_is_written_once(where: str, tmp_path: Path) -> None:
    if where == "memory":
        pytest.importorskip("fsspec", reason=NO_FSSPEC)
    store = open_store(tmp_path / "s" if where == "folder" else f"memory://{tmp_path.name}")
    assert isinstance(store, FolderStore if where == "folder" else UrlStore)
    assert not store.has("a")
    store.put("a", {"energy_j": 1.0, "lost_s": float("nan")})
    store.put("a", {"energy_j": 2.0})
    assert store.has("a")
    assert store.get("a") == {"energy_j": 1.0, "lost_s": None}
    with pytest.raises(VoltanaError, match="run the sweep again"):
        store.get("b")


def test_a_folder_without_hard_links_keeps_the_first_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    store = FolderStore(tmp_path)
    store.put("a", {"energy_j": 1.0})
    store.put("a", {"energy_j": 2.0})
    assert store.get("a") == {"energy_j": 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_url_without_exclusive_creation_gets_results_by_a_move(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec", reason=NO_FSSPEC)
    written: list[str] = []

    memory: Any = type(fsspec.filesystem("memory"))

    class Plain(memory):  # type: ignore[misc]
        protocol = "plain"
        store: ClassVar[dict[str, Any]] = {}

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:  # noqa: ANN401
            written.append(path)
            assert mode == "overwrite"
            super().pipe_file(path, value)

    fsspec.register_implementation("plain", Plain, clobber=True)
    store = open_store(f"plain://{tmp_path.name}")
    store.put("a", {"energy_j": 1.0})
    store.put("a", {"energy_j": 2.0})
    assert store.get("a") == {"energy_j": 1.0}
    assert len(written) == 2
    assert all("/." in path for path in written)
    assert len(Plain.store) == 1


def test_no_reader_sees_half_a_result(tmp_path: Path) -> None:
    """Eight writers of one key, and a reader that looks as fast as it can."""
    store, big = FolderStore(tmp_path), {str(k): float(k) for k in range(20_000)}
    seen = []
    writers = [threading.Thread(target=store.put, args=("k", big)) for _ in range(8)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if store.has("k"):
            seen.append(store.get("k") == big)
    assert all(seen)
    assert [p.name for p in tmp_path.iterdir()] == ["k.json"]


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"energy_j": ')
    with pytest.raises(VoltanaError, match=r"a\.json is no result"):
        FolderStore(tmp_path).get("a")


class Deadly(Controller):
    """Kills its process."""

    def __init__(self, parameters: NoParameters, context: PolicyContext) -> None: ...

    def decide(self, state: InstanceState) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


def test_a_worker_that_dies_loses_no_other_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers are forks of this process, so that they know the deadly controller too."""
    monkeypatch.setitem(
        CONTROLLERS,
        "deadly",
        Entry(make=Deadly, parameters=NoParameters),
    )
    good = points(6)
    bad = expand({"base": {"duration_s": 2.0, "controller": "deadly"}}, "test")
    with pytest.raises(VoltanaError, match=r"1 of 7 points failed.*process died"):
        run_sweep([*good[:3], *bad, *good[3:]], tmp_path, jobs=2)
    failures = json.loads((tmp_path / "failures.json").read_text())
    assert list(failures) == [bad[0].key]
    assert failures[bad[0].key]["config"]["controller"] == "deadly"
    want = {key: summary["energy_j"] for key, summary in local(good).items()}
    assert energies(pd.read_csv(tmp_path / "results.csv")) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("jobs", [1, 2])
def test_any_error_of_a_point_is_its_own(jobs: int, tmp_path: Path) -> None:
    good = points(3)
    bad = expand({"base": {"duration_s": 2.0, "controller": FAULTY}}, "test")
    with pytest.raises(VoltanaError, match=r"1 of 4 points failed.*KeyError: \('prefill', "):
        run_sweep([*good[:1], *bad, *good[1:]], tmp_path, jobs=jobs)
    assert set(energies(pd.read_csv(tmp_path / "results.csv"))) == {p.key for p in good}
    failures = json.loads((tmp_path / "failures.json").read_text())
    assert "\n" not in failures[bad[0].key]["error"]


def test_two_sweeps_share_a_store(tmp_path: Path) -> None:
    chosen = points(30)
    store, frames = tmp_path / "store", []

    def sweep(name: str) -> None:
        frames.append(run_sweep(chosen, tmp_path / name, jobs=1, store=str(store)))

    threads = [threading.Thread(target=sweep, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert energies(frames[0]) == energies(frames[1])
    assert len(frames[0]) == len(list(store.glob("*.json"))) == 30
    assert not list(store.glob(".*"))


def test_a_store_may_be_a_url(tmp_path: Path) -> None:
    pytest.importorskip("fsspec", reason=NO_FSSPEC)
    chosen = points(2)
    first = run_sweep(chosen, tmp_path / "a", jobs=1, store=f"memory://{tmp_path.name}")
    again = run_sweep(chosen, tmp_path / "b", jobs=1, store=f"memory://{tmp_path.name}")
    assert not (tmp_path / "a" / "points").exists()
    pd.testing.assert_frame_equal(first, again)


@pytest.mark.parametrize("address", [None, "127.0.0.1:1"])
def test_ray_without_a_cluster_is_one_clear_line(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(VoltanaError, match="RAY_ADDRESS") as caught:
        RayExecutor()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_that_loses_a_node_loses_no_point(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    """The command runs on the cluster; a worker node is killed once some points are done."""
    duration_s = 200.0
    file = tmp_path / "sweep.toml"
    file.write_text(
        f"[base]\nduration_s = {duration_s}\nrate_rps = 10\n[grid]\nseed = {[*range(RAY_POINTS)]}\n"
    )
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "voltana.experiments.cli",
        "sweep",
        str(file),
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        [*command, "--engine", "ray"],
        env={**os.environ, "RAY_ADDRESS": ray_cluster.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for_points(out, 3, process)
    victim = next(n for n in ray_cluster.list_all_nodes() if n is not ray_cluster.head_node)
    ray_cluster.remove_node(victim, allow_graceful=False)
    done_at_death = len(list(out.glob("points/*.json")))
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert f"{RAY_POINTS} points" in stdout
    assert done_at_death < RAY_POINTS, "the node died too late to prove anything"
    frame = pd.read_csv(out / "results.csv")
    chosen = points(RAY_POINTS, duration_s)
    some = local(chosen[::8])
    got = energies(frame)
    assert set(got) == {p.key for p in chosen}
    for key, summary in some.items():
        assert got[key] == pytest.approx(summary["energy_j"], rel=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_error_on_a_ray_cluster_is_the_point_s_own(
    ray_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    good, bad = points(2), expand({"base": {"duration_s": 2.0, "controller": FAULTY}}, "test")
    said = r"1 of 3 points failed, the first with: .*Faulty \(prefill 1\): decide raised KeyError"
    with pytest.raises(VoltanaError, match=said):
        run_sweep([*bad, *good], tmp_path, executor="ray")
    assert set(energies(pd.read_csv(tmp_path / "results.csv"))) == {p.key for p in good}


def _wait_for_points(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + 120
    while len(list(out.glob("points/*.json"))) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline_s, "no point was done on the cluster"
        time.sleep(0.05)
