"""Bounded memory: counts equal the exact log's, quantiles within the stated error, rows on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from tests.profiles.synthetic import write_synthetic_profile
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.engine.simulate import simulate
from voltana.sim.metrics import summarise, weighted_quantile
from voltana.sim.records import COMPLETED, IN_FLIGHT, REJECTED
from voltana.sim.results import read_run, write_run
from voltana.sim.sketches import RELATIVE_ERROR, Sketch
from voltana.sim.workload.generate import make_workload, stream_diurnal
from voltana.sim.workload.workload import Workload

QUANTILES = ("p50", "p90", "p99")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile"))


def parts(workload: Workload, size: int) -> Iterator[Workload]:
    for at in range(0, len(workload), size):
        part = slice(at, at + size)
        yield Workload(
            arrival_s=workload.arrival_s[part],
            input_tokens=workload.input_tokens[part],
            output_tokens=workload.output_tokens[part],
        )


def short(count: int) -> Workload:
    rng = np.random.default_rng(3)
    return Workload(
        arrival_s=np.cumsum(rng.exponential(0.02, count)),
        input_tokens=rng.integers(1, 300, count),
        output_tokens=rng.integers(1, 120, count),
    )


def test_a_sketched_run_counts_exactly_and_spills_every_row(
    profile: Profile, tmp_path: Path
) -> None:
    settings = {"profile": "synthetic", "kv_capacity_tokens": 390, "slo_ttft_s": 0.05,
                "slo_itl_s": 0.006, "kv_reserve_tokens": 0}  # fmt: skip
    workload = short(600)
    exact = simulate(make_config(settings), profile, workload)
    config = make_config(settings | {"metrics": "sketch"})
    sketched = simulate(config, profile, parts(workload, 7), spill=tmp_path / "rows.parquet")
    a, b = summarise(exact), summarise(sketched)
    assert b["clock_residency"] == a["clock_residency"]
    numbers = [n for n, v in a.items() if not isinstance(v, dict) and n != "wall_s"]
    assert {n: b[n] for n in numbers} == pytest.approx({n: a[n] for n in numbers}, rel=1e-12)
    for name in ("ttft_s", "itl_s", "tpot_s", "e2e_s"):
        assert b[name]["mean"] == pytest.approx(a[name]["mean"], rel=1e-9)
    rows = pd.read_parquet(tmp_path / "rows.parquet").sort_values("request_id")
    assert a["requests_rejected"] > 0
    assert rows["status"].tolist() == exact.requests.status.tolist()
    assert rows["finish_s"].to_numpy() == pytest.approx(exact.requests.finish_s, nan_ok=True)


def test_rows_are_written_in_groups_and_those_in_flight_too(
    profile: Profile, tmp_path: Path
) -> None:
    """Most requests are too large for the cache, and the run is cut while some go on."""
    settings = {"profile": "synthetic", "kv_capacity_tokens": 100, "kv_reserve_tokens": 0}
    workload = short(300)
    cut = settings | {"run_limit_s": float(workload.arrival_s[-1]) + 1e-6}
    exact = simulate(make_config(cut), profile, workload)
    simulate(make_config(cut | {"metrics": "sketch"}), profile, workload,
             spill=tmp_path / "rows.parquet")  # fmt: skip
    rows = pd.read_parquet(tmp_path / "rows.parquet").sort_values("request_id")
    assert {IN_FLIGHT, COMPLETED, REJECTED} == set(rows["status"])
    assert rows["status"].tolist() == exact.requests.status.tolist()
    assert rows["decode_id"].tolist() == exact.requests.decode_id.tolist()
    first_s = rows["first_token_s"].to_numpy()
    assert first_s == pytest.approx(exact.requests.first_token_s, nan_ok=True)
    assert pq.ParquetFile(tmp_path / "rows.parquet").num_row_groups == 1


@pytest.mark.parametrize("spread", [1.01, 3.0])
def test_quantiles_are_of_the_nearest_rank(spread: float) -> None:
    """1 to 40 values whose neighbours lie further apart than the error: each rank is hit."""
    rng = np.random.default_rng(2)
    for count in range(1, 41):
        values = (spread ** rng.permutation(count) * 0.01).astype(np.float64)
        weights = rng.integers(1, 4, count)
        sketch = Sketch()
        sketch.add(values, weights)
        for level in (0.001, 0.01, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0):
            exact = weighted_quantile(values, weights, level)
            assert sketch.quantile(level) == pytest.approx(exact, rel=RELATIVE_ERROR), count


def test_quantiles_are_within_the_stated_error(profile: Profile) -> None:
    workload = make_workload("sharegpt", rate_rps=20, duration_s=60, seed=1)
    settings = {"extrapolate": True, "kv_capacity_tokens": 90_000, "max_running_requests": 64}
    exact = summarise(simulate(make_config(settings), profile, workload))
    sketch = summarise(simulate(make_config(settings | {"metrics": "sketch"}), profile, workload))
    for name in ("ttft_s", "itl_s", "e2e_s", "tpot_s"):
        for level in QUANTILES:
            assert sketch[name][level] == pytest.approx(exact[name][level], rel=RELATIVE_ERROR), (
                name,
                level,
            )


def test_a_sketch_is_within_its_error_of_the_nearest_rank() -> None:
    rng = np.random.default_rng(1)
    values, weights = rng.lognormal(-4, 1, 20_001), rng.integers(1, 50, 20_001)
    sketch = Sketch()
    sketch.add(values, weights)
    for fraction in (0.01, 0.5, 0.9, 0.99, 0.999):
        exact = weighted_quantile(values, weights, fraction)
        assert sketch.quantile(fraction) == pytest.approx(exact, rel=RELATIVE_ERROR)
    assert sketch.count == weights.sum()


def test_merged_sketches_are_the_sketch_of_the_whole() -> None:
    values = np.random.default_rng(2).exponential(1.0, 5_000)
    whole, first, second = Sketch(), Sketch(), Sketch()
    whole.add(values)
    first.add(values[:1_234])
    second.add(values[1_234:])
    first.merge(second)
    for fraction in (0.0, 0.25, 0.5, 0.99, 1.0):
        assert first.quantile(fraction) == whole.quantile(fraction)
    assert first.count == whole.count
    assert first.total == pytest.approx(whole.total, rel=1e-12)


def test_a_stream_needs_sketches(profile: Profile) -> None:
    stream = stream_diurnal("sharegpt", mean_rps=1, duration_s=60, seed=1)
    with pytest.raises(VoltanaError, match="metrics=sketch"):
        simulate(make_config({}), profile, stream)


def test_a_sketched_run_directory_has_percentiles_and_no_rows(
    profile: Profile, tmp_path: Path
) -> None:
    config = make_config({"metrics": "sketch"})
    write_run(simulate(config, profile, short(50)), tmp_path / "run")
    assert (tmp_path / "run" / "percentiles.json").exists()
    with pytest.raises(VoltanaError, match="keeps numbers and no rows"):
        read_run(tmp_path / "run")
