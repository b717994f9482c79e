"""Energy of a window: the card's own counter, or integrated power samples where it has none.

meter   start ──────────────── samples every 50 ms ──────────────── stop
work            boundary  iteration  iteration … iteration  boundary

The counter moves in ticks (100 ms on many cards). A stretch of work is given its own energy only if
it is long against a tick: in a short one, a whole tick's energy may fall within or beside it.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.device.gpu import DeviceError, Gpu, UnsupportedQueryError

SAMPLE_S: Final = 0.05
MAX_GAP_S: Final = 1.0
EDGE_NS: Final = 10_000_000
"""A sample so close to a stretch belongs to it: those taken at start and stop of the meter do."""
MIN_COVERED: Final = 0.5
"""Share of the time at a point that samples must span, for its power to be the point's own."""
MIN_SPAN_S: Final = 1.0
MIN_TICKS: Final = 10
"""A stretch has an energy of its own if it lasts `MIN_SPAN_S` or as many ticks of the counter."""


class SampleGapError(VoltanaError):
    """The sampler was kept from running: this window has no energy, another one may."""


def integrate_j(
    sampled_s: npt.NDArray[np.float64], power_w: npt.NDArray[np.float64], *, max_gap_s: float
) -> float:
    """Integrate sampled power over time with the trapezoid rule.

    Args:
        sampled_s: Sample times, strictly increasing. Shape (n,), n >= 2.
        power_w: Power at those times. Shape (n,).
        max_gap_s: Longest gap that is still believed: a stalled sampler is no quiet GPU.

    Returns:
        Energy in J from the first to the last sample.

    Raises:
        SampleGapError: Too few samples, time does not increase, or a gap is too long.

    Example:
        >>> integrate_j(np.array([0.0, 1.0, 3.0]), np.array([100.0, 300.0, 300.0]), max_gap_s=5.0)
        800.0
    """
    if len(sampled_s) < 2:
        raise SampleGapError(f"power needs >= 2 samples, got {len(sampled_s)}: lengthen --window")
    gaps_s = np.diff(sampled_s)
    if gaps_s.min() <= 0 or gaps_s.max() > max_gap_s:
        raise SampleGapError(
            f"power samples must be at most {max_gap_s:g} s apart, in order; got a step of "
            f"{gaps_s.min():.3f} to {gaps_s.max():.3f} s: the machine is overloaded, measure again"
        )
    return float(np.trapezoid(power_w, sampled_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One look at the cards; sums over them, the lowest clock, the highest temperature."""

    at_ns: int
    power_w: float
    energy_j: float | None
    clock_mhz: int
    temperature_c: float
    throttle: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a meter saw between start and stop."""

    energy_j: float
    duration_s: float
    source: str
    """"counter" or "samples"."""
    throttle: frozenset[str]
    median_clock_mhz: int
    """Over the samples; of several cards, that of the slowest."""
    highest_temperature_c: float

    @property
    def power_w(self) -> float:
        """Mean power."""
        return self.energy_j / self.duration_s


def take_sample(gpus: Sequence[Gpu], *, has_counter: bool) -> Sample:
    """Read every card once."""
    return Sample(
        at_ns=time.monotonic_ns(),
        energy_j=sum(gpu.energy_j() for gpu in gpus) if has_counter else None,
        power_w=sum(gpu.power_w() for gpu in gpus),
        clock_mhz=min(gpu.clock_mhz() for gpu in gpus),
        temperature_c=max(gpu.temperature_c() for gpu in gpus),
        throttle=frozenset().union(*(gpu.throttle_reasons() for gpu in gpus)),
    )


def summarise(samples: Sequence[Sample]) -> Reading:
    """Energy by the counter if it exists and never falls, else by integrating the samples."""
    first, last = samples[0], samples[-1]
    duration_s = (last.at_ns - first.at_ns) * 1e-9
    counts_j = [sample.energy_j for sample in samples if sample.energy_j is not None]
    is_rising = len(counts_j) == len(samples) and all(a <= b for a, b in pairwise(counts_j))
    if is_rising and counts_j[-1] > counts_j[0]:
        energy_j, source = counts_j[-1] - counts_j[0], "counter"
    else:
        at_s = np.array([(sample.at_ns - first.at_ns) * 1e-9 for sample in samples])
        power_w = np.array([sample.power_w for sample in samples])
        energy_j, source = integrate_j(at_s, power_w, max_gap_s=MAX_GAP_S), "samples"
    return Reading(
        energy_j=energy_j,
        duration_s=duration_s,
        source=source,
        throttle=frozenset().union(*(sample.throttle for sample in samples)),
        median_clock_mhz=_median_clock_mhz(samples),
        highest_temperature_c=max(sample.temperature_c for sample in samples),
    )


def _median_clock_mhz(samples: Sequence[Sample]) -> int:
    """A clock that was read, not one between two."""
    return statistics.median_low(sample.clock_mhz for sample in samples)


def shortest_span_s(samples: Sequence[Sample]) -> float:
    """Length from which on a stretch has an energy of its own, by the ticks that the samples show.

    A tick shorter than the sampling period counts as that period: no finer one can be seen.
    """
    moved_ns = [
        b.at_ns
        for a, b in pairwise(samples)
        if (a.energy_j, a.power_w if a.energy_j is None else 0.0)
        != (b.energy_j, b.power_w if b.energy_j is None else 0.0)
    ]
    ticks_s = [(b - a) * 1e-9 for a, b in pairwise(moved_ns)]
    tick_s = max(statistics.median(ticks_s), SAMPLE_S) if ticks_s else math.inf
    return min(MIN_SPAN_S, MIN_TICKS * tick_s)


def has_energy_counter(gpus: Sequence[Gpu]) -> bool:
    """Whether every card answers for its energy counter."""
    try:
        for gpu in gpus:
            gpu.energy_j()
    except UnsupportedQueryError:
        return False
    return True


@dataclass(slots=True)
class PowerMeter:
    """Samples in a thread while the with-block runs; `reading` afterwards."""

    gpus: Sequence[Gpu]
    samples: list[Sample] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _error: DeviceError | None = None
    _has_counter: bool = False

    def __enter__(self) -> Self:
        self._has_counter = has_energy_counter(self.gpus)
        self.samples.append(take_sample(self.gpus, has_counter=self._has_counter))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        if error is None and self._error is None:
            self.samples.append(take_sample(self.gpus, has_counter=self._has_counter))

    @property
    def reading(self) -> Reading:
        """Energy and conditions from start to stop. Raises what the sampler ran into."""
        if self._error is not None:
            raise self._error
        return summarise(self.samples)

    @property
    def shortest_span_s(self) -> float:
        """See `shortest_span_s`, by the samples of this meter."""
        return shortest_span_s(self.samples)

    def reading_within(self, spans_ns: Sequence[tuple[int, int]]) -> tuple[Reading, bool]:
        """The same of the stretches alone that held a point.

        Args:
            spans_ns: Start and end of each, monotonic clock.

        Returns:
            The reading, and whether its energy is of the stretches alone. Where they are too short
            for that (`shortest_span_s`), it is the whole window's, pauses included. The clock is
            that within the stretches wherever a sample fell into one.
        """
        whole = self.reading
        inside = [
            (end - start, self._samples_within(start - EDGE_NS, end + EDGE_NS))
            for start, end in spans_ns
        ]
        busy = [sample for _, samples in inside for sample in samples] or self.samples
        whole = replace(whole, median_clock_mhz=_median_clock_mhz(busy))
        shortest_ns = self.shortest_span_s * 1e9
        parts = [
            summarise(samples)
            for length_ns, samples in inside
            if length_ns >= shortest_ns and len(samples) > 1
        ]
        covered_s = sum(part.duration_s for part in parts)
        if covered_s < max(MIN_COVERED * sum(length for length, _ in inside) * 1e-9, SAMPLE_S):
            return whole, False
        own = replace(
            whole,
            energy_j=sum(part.energy_j for part in parts),
            duration_s=covered_s,
            source=" and ".join(sorted({part.source for part in parts})),
        )
        return own, True

    def _samples_within(self, start_ns: int, end_ns: int) -> list[Sample]:
        return [sample for sample in self.samples if start_ns <= sample.at_ns <= end_ns]

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            try:
                self.samples.append(take_sample(self.gpus, has_counter=self._has_counter))
            except DeviceError as error:
                self._error = error
                return
