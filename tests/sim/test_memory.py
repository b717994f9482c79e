"""Runs that would not fit into memory are refused before they take it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from voltana.experiments.runs import run, stream_of, workload_of
from voltana.profiles.common.errors import VoltanaError
from voltana.sim import memory
from voltana.sim.config import SimConfig, make_config
from voltana.sim.memory import memory_bytes, watch_backlog
from voltana.sim.workload.generate import PART_REQUESTS, make_workload, stream_steady
from voltana.sim.workload.workload import Workload


def test_a_billion_requests_are_refused_with_the_remedy() -> None:
    with pytest.raises(VoltanaError, match=r"^[^\n]*$") as caught:
        run(SimConfig(rate_rps=1e9 * memory_bytes() / 1e10, duration_s=100))
    assert "requests would take some" in str(caught.value)
    assert "metrics=sketch" in str(caught.value)


def test_the_bound_is_on_rate_times_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_bytes", lambda: 2_000_000)  # room for 1000 requests
    assert len(workload_of(SimConfig(rate_rps=100, duration_s=10))) == 1000
    for rate, duration in ((101.0, 10.0), (100.0, 10.1), (10.0, None)):
        with pytest.raises(VoltanaError, match=r"a run may have 0\.0 GB \(1,000 requests"):
            workload_of(SimConfig(rate_rps=rate, duration_s=duration))


@pytest.mark.parametrize("arrivals", ["poisson", "gamma:cv=2"])
@pytest.mark.parametrize("name", ["sharegpt", "lmsys"])
def test_a_stream_is_the_workload_to_the_bit(name: str, arrivals: str) -> None:
    count = 2 * PART_REQUESTS + 77
    settings = {"rate_rps": 30.0, "duration_s": count / 30.0, "seed": 5, "arrivals": arrivals}
    parts = list(stream_steady(name, **settings))  # type: ignore[arg-type]
    assert [len(part) for part in parts] == [PART_REQUESTS, PART_REQUESTS, 77]
    whole = make_workload(name, **settings)  # type: ignore[arg-type]
    for column in ("arrival_s", "input_tokens", "output_tokens"):
        joined = np.concatenate([getattr(part, column) for part in parts])
        assert (joined == getattr(whole, column)).all()
    assert len(whole) / whole.duration_s == pytest.approx(
        30, rel=0.03
    )  # spread of the mean: 2/√131149
    if arrivals == "poisson":  # drawn and summed in one go
        rng = np.random.default_rng(np.random.SeedSequence(5, spawn_key=(101, 0)))
        at_once = np.cumsum(rng.standard_exponential(count)) / 30.0
        assert (whole.arrival_s == at_once).all()


def test_a_sketched_run_streams_whatever_its_arrivals() -> None:
    config = SimConfig(rate_rps=40, duration_s=5, metrics="sketch")
    parts = stream_of(config)
    assert parts is not None
    (part,) = parts
    assert part.content_hash == workload_of(config).content_hash
    assert stream_of(SimConfig(rate_rps=40, duration_s=5)) is None


def test_a_stream_that_the_fleet_cannot_carry_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_bytes", lambda: 2000 * 2 * PART_REQUESTS)
    config = make_config({"rate_rps": 5000, "duration_s": 60, "metrics": "sketch"})
    with pytest.raises(VoltanaError, match=r"requests wait .* more than the fleet can carry"):
        run(config)


def test_the_backlog_is_what_waits_and_what_comes() -> None:
    parts = [
        Workload(
            arrival_s=np.full(10, 1.0 * k),
            input_tokens=np.ones(10, dtype=np.int64),
            output_tokens=np.ones(10, dtype=np.int64),
        )
        for k in range(4)
    ]
    waiting = itertools.count(0, 5).__next__  # 0, 5, 10, … at each look
    passed: list[float] = []
    with pytest.raises(VoltanaError, match=r"requests wait 3 s after the start"):
        passed.extend(part.arrival_s[0] for part in watch_backlog(iter(parts), waiting, 20))
    assert list(watch_backlog(iter(parts), lambda: 10, 20)) == parts
