"""A streamed day is the same day."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from voltana.experiments.runs import run, stream_of, workload_of
from voltana.sim.config import make_config
from voltana.sim.metrics import summarise
from voltana.sim.sketches import RELATIVE_ERROR
from voltana.sim.workload.workload import Workload

DAY = {"arrivals": "diurnal:swing=0.5", "rate_rps": 20.0, "duration_s": 120.0, "time_scale": 0.8}


def test_a_streamed_day_gives_what_the_whole_day_gives(tmp_path: Path) -> None:
    spill = tmp_path / "rows.parquet"
    exact = summarise(run(make_config(DAY)))
    seen = []

    def watch(parts: Iterator[Workload]) -> Iterator[Workload]:
        for part in parts:
            seen.append(len(part))
            yield part

    streamed = run(
        make_config({**DAY, "metrics": "sketch"}),
        spill=spill,
        watch=watch,
    )
    sketched = summarise(streamed)
    for name in ("energy_j", "makespan_s", "attainment", "itl_attainment"):
        assert sketched[name] == pytest.approx(exact[name], rel=1e-9), name
    assert sketched["ttft_s"]["p90"] == pytest.approx(
        exact["ttft_s"]["p90"], rel=2 * RELATIVE_ERROR
    )
    assert sum(seen) == len(pd.read_parquet(spill)) == len(workload_of(make_config(DAY)))


def test_only_a_sketched_run_is_streamed() -> None:
    assert stream_of(make_config(DAY)) is None
    assert stream_of(make_config({**DAY, "metrics": "sketch"})) is not None
