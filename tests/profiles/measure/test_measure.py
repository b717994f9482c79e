"""Energy of a window, the grid, the journal: without a card and without an engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.device.constant import ConstantPowerGpu
from voltana.profiles.engines.base import Engine, EngineFacts, Point, Window
from voltana.profiles.measure.grid import batch_sizes, design, next_refinement
from voltana.profiles.measure.journal import Journal
from voltana.profiles.measure.power import PowerMeter, Sample, integrate_j, summarise
from voltana.profiles.measure.trial import (
    Protocol,
    Trial,
    measure_idle_w,
    measure_point,
    wait_for_tick,
)

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
    powers_w = [100.0] * 21 + [20.0] * 20 + [100.0] * 21  # one each 100 ms
    meter.samples.extend(sample(0.1 * n, power_w, None) for n, power_w in enumerate(powers_w))
    spans_ns = ((0, 2_000_000_000), (4_100_000_000, 6_100_000_000))
    reading, is_own = meter.reading_within(spans_ns)
    assert is_own
    assert reading.power_w == pytest.approx(100.0)
    assert reading.duration_s == pytest.approx(4.0)
    whole, is_own = meter.reading_within(((120_000_000, 180_000_000),))
    assert not is_own  # no two samples in so short a stretch
    assert whole == meter.reading
    assert whole.power_w < 90.0


def ticking_meter(tick_s: float, seconds: float) -> PowerMeter:
    """Samples each 50 ms of a card that draws 400 W and counts in ticks."""
    meter = PowerMeter([ConstantPowerGpu(1.0)])
    for n in range(round(seconds / 0.05) + 1):
        at_s = 0.05 * n
        count_j = 400.0 * tick_s * int((at_s + 0.013) / tick_s + 1e-9)
        meter.samples.append(sample(at_s, 400.0, count_j))
    return meter


@pytest.mark.parametrize("offset_s", [0.0, 0.02, 0.04, 0.06, 0.08])
def test_short_stretches_are_not_given_whole_ticks(offset_s: float) -> None:
    """60 ms in each 160 ms at a constant 400 W, ticks of 100 ms: 400 W, within a tick of 8 s.

    Counted stretch by stretch, those with a tick inside would have its 40 J in 60 ms.
    """
    starts_s = [offset_s + 0.16 * n for n in range(48)]
    spans_ns = [(round(at * 1e9), round((at + 0.06) * 1e9)) for at in starts_s]
    reading, is_own = ticking_meter(0.1, 8.0).reading_within(spans_ns)
    assert not is_own
    assert reading.power_w == pytest.approx(400.0, rel=0.1 / 8.0)


@pytest.mark.parametrize(
    ("tick_s", "span_s", "has_own"),
    [(0.1, 1.0, True), (0.1, 0.9, False), (0.05, 0.5, True), (0.05, 0.45, False), (0.5, 1.0, True)],
)
def test_a_stretch_of_ten_ticks_or_a_second_has_its_own_energy(
    tick_s: float, span_s: float, *, has_own: bool
) -> None:
    reading, is_own = ticking_meter(tick_s, 4.0).reading_within([(0, round(span_s * 1e9))])
    assert is_own is has_own
    assert reading.power_w == pytest.approx(400.0, rel=tick_s / span_s)


def test_the_clock_is_the_median_within_the_stretches() -> None:
    """The card boosts in the pauses; for a moment it reads something else within."""
    meter = PowerMeter([ConstantPowerGpu(1.0)])
    clocks_mhz = [1980] * 10 + [1005, 1005, 990, 1005] + [1980] * 10
    meter.samples.extend(
        replace(sample(0.1 * n, 1.0, None), clock_mhz=clock) for n, clock in enumerate(clocks_mhz)
    )
    reading, _ = meter.reading_within([(1_000_000_000, 1_300_000_000)])
    assert reading.median_clock_mhz == 1005
    assert meter.reading.median_clock_mhz == 1980


class Ticking(ConstantPowerGpu):
    """Its counter stands still for three reads in four."""

    num_reads = 0

    def energy_j(self) -> float:
        self.num_reads += 1
        return 10.0 * (self.num_reads // 4)


def test_a_trial_waits_for_the_counter_to_move_but_not_for_ever() -> None:
    card = Ticking(100.0)
    assert wait_for_tick([card])
    assert card.num_reads % 4 == 0  # seen at the moment of the move, and no read later
    stuck = ConstantPowerGpu(100.0)
    stuck.energy_j = lambda: 5.0  # type: ignore[method-assign]
    assert not wait_for_tick([stuck], limit_s=0.01)


class Stepping(ConstantPowerGpu):
    """Its counter is written every 0.1 s."""

    def energy_j(self) -> float:
        return 100.0 * (time.monotonic() // 0.1) * 0.1


@pytest.mark.parametrize("window_s", [0.03, 0.16])
def test_idle_power_does_not_hang_on_where_ticks_fall(window_s: float) -> None:
    """From one tick to another 100 W are 100 W; from anywhere a window of 0.03 s shows 0 or 333 W.

    30 %: a busy machine sees a tick late by some of its 100 ms.
    """
    protocol = Protocol(window_s=window_s, settle_s=0.0, num_trials=3)
    assert measure_idle_w([Stepping(100.0)], protocol) == pytest.approx([100.0] * 3, rel=0.3)


class Counting:
    """An engine and its workload that remember what they were asked to run."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, int]] = []

    def run(self, *, min_duration_s: float, min_iterations: int) -> Window:
        self.asked.append((min_duration_s, min_iterations))
        return Window(iteration_s=(0.01,), elapsed_s=0.01, tokens=8.0, spans_ns=((0, 1),))

    @contextmanager
    def open(self, point: Point) -> Iterator[Counting]:
        yield self


def test_warm_up_keeps_both_minima() -> None:
    engine = Counting()
    rules = Protocol(window_s=0.5, num_trials=1, min_iterations=3)
    point = Point(phase="decode", batch_size=1, tokens=8)
    measure_point(cast(Engine, engine), [ConstantPowerGpu(1.0)], point, rules)
    assert engine.asked == [(1.0, 5), (0.5, 3)]


def test_idle_power_is_that_of_a_settled_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is read before the rest is over."""
    events: list[object] = []

    class Watched(ConstantPowerGpu):
        def energy_j(self) -> float:
            events.append("read")
            return super().energy_j()

    card = Watched(50.0)
    monkeypatch.setattr(time, "sleep", events.append)
    measure_idle_w([card], Protocol(window_s=0.1, num_trials=1, settle_s=7.0))
    assert events[0] == 7.0


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
    assert corners == {(1, 1), (1, 4096), (1024, 1024), (1024, 1024 * 390)}
    prefill = design(FACTS, "prefill", max_batch_size=1024, max_tokens=10**9)
    assert {p.tokens for p in prefill} == {1, 4, *(2**power for power in range(4, 13))}


def test_chunks_beside_decoding_begin_with_the_corners_of_all_three() -> None:
    """The first four have both ends of each, so that the least a run measures spans the grid."""
    points = design(FACTS, "mixed", max_batch_size=64, max_tokens=100_000)
    whole, first = (
        [(p.chunk_tokens, p.batch_size, p.tokens // p.batch_size) for p in of]
        for of in (points, points[:4])
    )
    for axis in range(2):
        values = {point[axis] for point in whole}
        assert {min(values), max(values)} == {point[axis] for point in first}
    assert len(whole) == len(set(whole)) == 27
    for point in points:
        assert point.tokens + point.chunk_tokens <= FACTS.kv_capacity_tokens
        assert point.batch_size + point.chunk_tokens <= FACTS.max_prefill_tokens


def test_every_batch_size_reaches_the_end_of_the_cache_or_of_the_context() -> None:
    """400,000 tokens of cache, 4,096 of context: beyond the grid a simulation refuses to go."""
    ends: dict[int, int] = {}
    for point in design(FACTS, "decode", max_batch_size=1024, max_tokens=10**9):
        ends[point.batch_size] = max(ends.get(point.batch_size, 0), point.tokens)
    for batch_size, tokens in ends.items():
        assert tokens == batch_size * min(400_000 // batch_size, 4096)
    assert ends[97] == 97 * 4096  # the largest batch of full contexts: 397,312 of 400,000
    tight = replace(FACTS, kv_capacity_tokens=40, min_context_tokens=17)
    assert {p.batch_size for p in design(tight, "decode", max_batch_size=8, max_tokens=99)} == {
        1,
        2,
    }


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


def test_a_narrow_gap_is_left_alone() -> None:
    """A spike of 50 % between points 4 % apart: noise, which no further point makes straight."""
    spiked = {1000: 1.0, 1040: 1.5, 1080: 1.0}
    time_s = {Point(phase="prefill", batch_size=1, tokens=t): y for t, y in spiked.items()}
    assert next_refinement(time_s) is None


def row(batch_size: int, time_s: Callable[[int, int], float], *contexts: int) -> dict[Point, float]:
    """Decode points of a batch size at these contexts, their time given by (batch, tokens)."""
    return {
        Point(phase="decode", batch_size=batch_size, tokens=batch_size * context): time_s(
            batch_size, batch_size * context
        )
        for context in contexts
    }


def test_refinement_bisects_batch_sizes_too_and_gives_a_new_one_both_ends() -> None:
    """Linear in tokens, with a step at batch 100 that the rows 1, 64 and 256 do not show.

    Of the gaps beside 64 the one to 256 is longer: 160 is next, first to the 4,096 tokens that
    256 requests were held at (25 tokens each), then to the context of 1 that all rows begin at.
    """

    def stepped(batch_size: int, tokens: int) -> float:
        return 1.0 + 1e-4 * tokens + (1.0 if batch_size > 100 else 0.0)

    known = row(1, stepped, 1, 64) | row(64, stepped, 1, 64) | row(256, stepped, 1, 16)
    first = next_refinement(known)
    assert first == Point(phase="decode", batch_size=160, tokens=160 * 25)
    second = next_refinement(known | {first: stepped(160, first.tokens)})
    assert second == Point(phase="decode", batch_size=160, tokens=160)
    assert next_refinement(known | {first: 2.4}, frozenset({second})) != second

    def smooth(batch_size: int, tokens: int) -> float:
        return 1.0 + 1e-3 * batch_size + 1e-4 * tokens

    straight = row(1, smooth, 1, 64) | row(64, smooth, 1, 64) | row(256, smooth, 1, 16)
    assert next_refinement(straight) is None


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
