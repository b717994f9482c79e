"""Generated workloads: arrival processes over joint length distributions, all seeded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from profiles.errors import VoltanaError
from sim.workload.lengths import draw_lengths, list_lengths
from sim.workload.workload import FloatArray, Workload

_STREAMS = {"arrivals": 101, "lengths": 102}
"""Spawn keys: arrivals and lengths are independent, so that one can change without the other."""

SWING: Final = 0.6
"""Relative amplitude of a day, ours: the day's highest rate is four times its lowest."""
DAY_S: Final = 86_400.0
PEAK_OF_PERIOD: Final = 14 / 24

Gaps = Callable[[np.random.Generator, int], FloatArray]
"""Draws that many gaps with mean 1."""


PART_REQUESTS: Final = 65_536
"""Requests that a stream draws at a time, each block from a seed of its own."""


def list_workloads() -> dict[str, str]:
    """Names that `make_workload` takes, with one line of explanation."""
    return list_lengths()


def make_workload(
    name: str, *, rate_rps: float, duration_s: float, seed: int, arrivals: str = "poisson"
) -> Workload:
    """Requests at a constant mean rate.

    As in the reference's benchmark there are exactly rate × duration requests (rounded, at least
    one), with independent gaps of mean 1/rate; the last arrival is near `duration_s`, not at it.

    Args:
        name: Length distribution, one of `list_workloads`.
        rate_rps: Mean rate, requests/s, > 0.
        duration_s: Nominal length, > 0.
        seed: Of two independent streams, one for arrivals and one for lengths.
        arrivals: `poisson`; `gamma:cv=2` for gaps with that coefficient of variation; or
            `diurnal:swing=0.6` for a Poisson process whose rate goes through one day in
            `duration_s`, see `diurnal_rate` (the number of requests is then random).

    Raises:
        VoltanaError: Unknown name or arrival process, or a number out of range.
    """
    _require_positive(rate_rps=rate_rps, duration_s=duration_s)
    swing = diurnal_swing(arrivals)
    if swing is not None:
        parts = stream_day(name, rate_rps=rate_rps, duration_s=duration_s, seed=seed, swing=swing)
        return _join(list(parts), f"{name}, a day of {rate_rps:g} requests/s on average")
    count = max(1, round(rate_rps * duration_s))
    gaps = parse_arrivals(arrivals)(_stream(seed, "arrivals"), count)
    inputs, outputs = draw_lengths(name, count, _stream(seed, "lengths"))
    return Workload(
        arrival_s=np.cumsum(gaps) / rate_rps,
        input_tokens=inputs,
        output_tokens=outputs,
        name=f"{name} at {rate_rps:g} requests/s",
    )


def parse_arrivals(text: str) -> Gaps:
    """The gap generator that `poisson` or `gamma:cv=X` names."""
    if text == "poisson":
        return lambda rng, count: rng.standard_exponential(count)
    cv = _argument(text, "gamma:cv=")
    if not (cv > 0 and math.isfinite(cv)):
        raise VoltanaError(
            "arrivals must be poisson or gamma:cv=NUMBER > 0, or diurnal or "
            f"diurnal:swing=NUMBER in [0, 1), got {text!r}"
        )
    shape = 1.0 / (cv * cv)
    return lambda rng, count: rng.gamma(shape, 1.0 / shape, count)


def diurnal_swing(text: str) -> float | None:
    """The swing that `diurnal` or `diurnal:swing=X` names; none for another arrival process."""
    if text == "diurnal":
        return SWING
    swing = _argument(text, "diurnal:swing=")
    return None if math.isnan(swing) else swing


def _argument(text: str, prefix: str) -> float:
    try:
        return float(text.removeprefix(prefix)) if text.startswith(prefix) else math.nan
    except ValueError:
        return math.nan


def diurnal_rate(
    mean_rps: float,
    *,
    swing: float = SWING,
    peak_s: float | None = None,
    period_s: float = DAY_S,
) -> Callable[[FloatArray], FloatArray]:
    """Cumulative arrivals of a sinusoidal day: rate(t) = mean·(1 + swing·cos(2π(t - peak)/period)).

    Args:
        mean_rps: Mean over a period, requests/s.
        swing: Relative amplitude in [0, 1); default ours.
        peak_s: Time of the highest rate; by default 14/24 of the period (14:00).
        period_s: Length of the day.

    Returns:
        Expected number of arrivals up to each time.
    """
    _require_positive(mean_rps=mean_rps, period_s=period_s)
    if not 0 <= swing < 1:
        raise VoltanaError(f"swing must be in [0, 1), got {swing}")
    omega = 2 * math.pi / period_s
    highest_s = PEAK_OF_PERIOD * period_s if peak_s is None else peak_s
    start = math.sin(-omega * highest_s)

    def cumulative(time_s: FloatArray) -> FloatArray:
        wave = (np.sin(omega * (time_s - highest_s)) - start) / omega
        return np.asarray(mean_rps * (time_s + swing * wave))

    return cumulative


def stream_diurnal(
    name: str,
    *,
    mean_rps: float,
    duration_s: float,
    seed: int,
    swing: float = SWING,
    period_s: float = DAY_S,
    chunk_requests: int = PART_REQUESTS,
) -> Iterator[Workload]:
    """An inhomogeneous Poisson day, chunk by chunk in bounded memory.

    Exact by time rescaling: unit-rate exponential gaps are summed and the cumulative rate is
    inverted at the sums (bisection to below a nanosecond). Every block of 65,536 requests draws
    from its own seed, so that the requests do not depend on `chunk_requests`.

    Yields:
        Workloads of at most `chunk_requests` requests that continue one another.

    Raises:
        VoltanaError: Unknown name, or a number out of range.
    """
    _require_positive(duration_s=duration_s, chunk_requests=chunk_requests)
    cumulative = diurnal_rate(mean_rps, swing=swing, period_s=period_s)
    total = float(cumulative(np.array([duration_s]))[0])
    reached, block = 0.0, 0
    while reached < total:
        gaps = _stream(seed, "arrivals", block).standard_exponential(PART_REQUESTS)
        inputs, outputs = draw_lengths(name, PART_REQUESTS, _stream(seed, "lengths", block))
        sums = reached + np.cumsum(gaps)
        kept = int(np.searchsorted(sums, total, side="left"))
        times = _invert(cumulative, sums[:kept], duration_s)
        for at in range(0, kept, chunk_requests):
            part = slice(at, min(at + chunk_requests, kept))
            yield Workload(
                arrival_s=times[part],
                input_tokens=inputs[part],
                output_tokens=outputs[part],
                name=f"{name}, diurnal",
            )
        reached, block = float(sums[-1]), block + 1


def stream_day(
    name: str, *, rate_rps: float, duration_s: float, seed: int, swing: float
) -> Iterator[Workload]:
    """`stream_diurnal` of one day squeezed into `duration_s`: what `diurnal` arrivals mean."""
    return stream_diurnal(
        name,
        mean_rps=rate_rps,
        duration_s=duration_s,
        seed=seed,
        swing=swing,
        period_s=duration_s,
    )


def _join(parts: list[Workload], name: str) -> Workload:
    if not parts:
        raise VoltanaError(f"{name}: no request arrives, raise rate_rps or duration_s")
    return Workload(
        arrival_s=np.concatenate([p.arrival_s for p in parts]),
        input_tokens=np.concatenate([p.input_tokens for p in parts]),
        output_tokens=np.concatenate([p.output_tokens for p in parts]),
        name=name,
    )


def _invert(
    cumulative: Callable[[FloatArray], FloatArray], targets: FloatArray, end_s: float
) -> FloatArray:
    low, high = np.zeros_like(targets), np.full_like(targets, end_s)
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = cumulative(middle) < targets
        low = np.where(below, middle, low)
        high = np.where(below, high, middle)
    return np.maximum.accumulate(high)


def _stream(seed: int, purpose: str, block: int = 0) -> np.random.Generator:
    if seed < 0:
        raise VoltanaError(f"seed must be >= 0, got {seed}")
    sequence = np.random.SeedSequence(seed, spawn_key=(_STREAMS[purpose], block))
    return np.random.default_rng(sequence)


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise VoltanaError(f"{name} must be > 0 and finite, got {value}")
