"""Energy of a window, the grid, the journal: without a card and without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profiles.device.constant import ConstantPowerGpu
from profiles.engines.base import EngineFacts, Point
from profiles.errors import VoltanaError
from profiles.measure.grid import batch_sizes, design, next_refinement
from profiles.measure.journal import Journal
from profiles.measure.power import PowerMeter, Sample, integrate_j, summarise
from profiles.measure.trial import Trial

FACTS = EngineFacts(
    engine_name="torch",
    engine_version="0",
    model_name="toy",
    tensor_parallel=1,
    kv_bytes_per_token=512,
    max_context_tokens=4096,
    max_prefill_tokens=16384,
    max_running_requests=1024,
    kv_capacity_tokens=400_000,
    graph_batch_sizes=(160,),
    notes={},
)
TRIAL = Trial(
    tokens=64.0,
    time_s=0.01,
    spread_s=0.001,
    power_w=300.0,
    energy_source="counter",
    temperature_c=50.0,
    clock_mhz=1005,
    num_iterations=32,
    flags=("throttle-power",),
)


def opened(path: Path, run: dict[str, Any]) -> Journal:
    log = Journal.open(path)
    log.describe(run)
    return log


def sample(at_s: float, power_w: float, energy_j: float | None, *flags: str) -> Sample:
    return Sample(
        at_ns=round(at_s * 1e9),
        power_w=power_w,
        energy_j=energy_j,
        clock_mhz=1005,
        temperature_c=50.0,
        throttle=frozenset(flags),
    )


def test_the_counter_is_used_when_it_rises() -> None:
    reading = summarise([sample(0.0, 1.0, 100.0), sample(0.5, 1.0, 250.0), sample(1.0, 1.0, 400.0)])
    assert (reading.energy_j, reading.source, reading.power_w) == (300.0, "counter", 300.0)


@pytest.mark.parametrize(
    "counts_j", [(100.0, 90.0, 400.0), (None, None, None), (100.0, 100.0, 100.0)]
)
def test_a_falling_stuck_or_absent_counter_gives_way_to_the_samples(
    counts_j: tuple[float | None, ...],
) -> None:
    powers_w = (100.0, 200.0, 300.0)
    reading = summarise(
        [sample(0.5 * i, p, e) for i, (p, e) in enumerate(zip(powers_w, counts_j, strict=True))]
    )
    assert (reading.energy_j, reading.source) == (200.0, "samples")


def test_throttling_anywhere_in_the_window_is_kept() -> None:
    parts = [sample(0.0, 1.0, 0.0), sample(0.5, 1.0, 1.0, "thermal"), sample(1.0, 1.0, 2.0)]
    assert summarise(parts).throttle == {"thermal"}


def test_a_gap_in_the_samples_is_an_error_and_not_an_interpolation() -> None:
    with pytest.raises(VoltanaError, match=r"at most 1 s apart.*2\.000 s"):
        integrate_j(np.array([0.0, 0.5, 2.5]), np.full(3, 100.0), max_gap_s=1.0)
    with pytest.raises(VoltanaError, match=">= 2 samples, got 1"):
        integrate_j(np.array([0.0]), np.array([100.0]), max_gap_s=1.0)


def test_a_meter_on_a_constant_device_reads_that_constant() -> None:
    """Mean power = energy / duration; both clocks are read within the same call, microseconds."""
    with PowerMeter([ConstantPowerGpu(120.0), ConstantPowerGpu(30.0)]) as meter:
        sum(range(2_000_000))
    assert meter.reading.power_w == pytest.approx(150.0, rel=0.02)


def test_energy_counts_within_the_stretches_alone() -> None:
    """100 W while the point is held, 20 W in the pause between: the pause must not count."""
    meter = PowerMeter([ConstantPowerGpu(1.0)])
    powers_w = {0: 100.0, 1: 100.0, 2: 100.0, 3: 20.0, 4: 20.0, 5: 100.0, 6: 100.0, 7: 100.0}
    meter._samples.extend(sample(0.1 * n, power_w, None) for n, power_w in powers_w.items())
    spans_ns = ((0, 200_000_000), (500_000_000, 700_000_000))
    reading, is_covered = meter.reading_within(spans_ns)
    assert is_covered
    assert reading.power_w == pytest.approx(100.0)
    assert reading.duration_s == pytest.approx(0.4)
    whole, is_covered = meter.reading_within(((120_000_000, 180_000_000),))
    assert not is_covered  # no two samples in so short a stretch
    assert whole == meter.reading
    assert whole.power_w < 90.0


def test_batch_sizes_straddle_every_suspected_step() -> None:
    sizes = batch_sizes(FACTS, limit=1024)
    for step in (8, 64, 120, 128, 256, 896, 160):
        assert {step, step + 1} <= set(sizes)
    assert (sizes[0], sizes[-1]) == (1, 1024)
    assert batch_sizes(FACTS, limit=4) == (1, 2, 4)


def test_the_design_stays_within_the_engine_and_starts_coarse() -> None:
    points = design(FACTS, "decode", max_batch_size=1024, max_tokens=10**9)
    assert len(set(points)) == len(points)
    assert max(p.tokens for p in points) <= 400_000
    assert all(p.tokens % p.batch_size == 0 and p.tokens // p.batch_size <= 4096 for p in points)
    first = points[:2]
    assert {p.batch_size for p in first} == {1, 1024}
    corners = {(p.batch_size, p.tokens) for p in points[:4]}
    assert corners == {(1, 1), (1, 4096), (1024, 1024), (1024, 1024 * 128)}
    prefill = design(FACTS, "prefill", max_batch_size=1024, max_tokens=10**9)
    assert {p.tokens for p in prefill} == {1, 4, *(2**power for power in range(4, 13))}


@pytest.mark.parametrize("num_points", [4, 7, 12, 40, 100])
def test_wherever_the_budget_ends_the_rows_span_their_range(num_points: int) -> None:
    """All batch sizes begun, but for the last, have their shortest and their longest context."""
    points = design(FACTS, "decode", max_batch_size=64, max_tokens=10**9)
    ends: dict[int, set[int]] = {}
    for point in points:
        ends.setdefault(point.batch_size, set()).add(point.tokens)
    begun: dict[int, set[int]] = {}
    for point in points[:num_points]:
        begun.setdefault(point.batch_size, set()).add(point.tokens)
    spanning = [b for b, seen in begun.items() if {min(ends[b]), max(ends[b])} <= seen]
    assert len(spanning) >= len(begun) - 1


def test_refinement_goes_where_the_line_is_most_wrong_and_stops() -> None:
    """A kink at 512 in one row, a straight line in the other."""
    kinked = {16: 1.0, 512: 1.0, 2048: 3.0}
    time_s = {Point(phase="prefill", batch_size=1, tokens=t): y for t, y in kinked.items()}
    straight = {Point(phase="prefill", batch_size=2, tokens=t): 1.0 + t for t in kinked}
    wanted = next_refinement(time_s | straight)
    assert wanted == Point(phase="prefill", batch_size=1, tokens=1280)
    assert next_refinement(straight) is None
    assert next_refinement(time_s | straight, frozenset({wanted})) is None


def test_a_journal_survives_a_torn_last_line_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    run = {"gpu": "a", "notes": {"dtype": "float32"}}
    done = Point(phase="decode", batch_size=4, tokens=64)
    failed = Point(phase="decode", batch_size=8, tokens=64)
    log = opened(path, run)
    log.add_point(1005, done, [TRIAL, TRIAL])
    log.add_failure(1005, failed, "out of memory")
    log.add_idle(0, is_loaded=True, power_w=[60.0])
    with path.open("a") as file:
        file.write('{"kind": "point", "clo')
    again = opened(path, run)
    assert again.points == {(1005, done): [TRIAL, TRIAL]}
    assert again.failures == {(1005, failed): "out of memory"}
    assert again.idle_w == {(0, True): [60.0]}
    assert again.is_done(1005, failed)
    assert not again.is_done(1410, done)
    again.add_idle(1005, is_loaded=True, power_w=[61.0])
    assert len(opened(path, run).idle_w) == 2


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    opened(path, {"gpu": "a", "model": "toy"})
    with pytest.raises(VoltanaError, match="got another gpu"):
        opened(path, {"gpu": "b", "model": "toy"})
