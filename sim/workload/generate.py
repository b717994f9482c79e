"""Generated workloads: arrival processes over joint length distributions, all seeded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.workload.arrivals.shapes import (
    DAY_S,
    SWING,
    Cumulative,
    diurnal_rate,
    parse_arrivals,
    rate_shape,
    require_positive,
)
from voltana.sim.workload.lengths import draw_lengths, list_lengths
from voltana.sim.workload.sessions.generate import KINDS, is_session_workload, make_sessions
from voltana.sim.workload.workload import FloatArray, Workload

_STREAMS = {"arrivals": 101, "lengths": 102}
"""Spawn keys: arrivals and lengths are independent, so that one can change without the other."""

PART_REQUESTS: Final = 65_536
"""Requests that a stream draws at a time, each block from a seed of its own."""


def list_workloads() -> dict[str, str]:
    """Names that `make_workload` takes, with one line of explanation."""
    return {**list_lengths(), **{name: line for name, (_, _, line) in KINDS.items()}}


def make_workload(
    name: str, *, rate_rps: float, duration_s: float, seed: int, arrivals: str = "poisson"
) -> Workload:
    """Requests at a mean rate.

    At a constant one, as in the reference's benchmark, there are exactly rate × duration requests
    (rounded, at least one), with independent gaps of mean 1/rate; the last arrival is near
    `duration_s`, not at it.

    Args:
        name: One of `list_workloads`: a length distribution, or sessions with their parameters
            (see `sessions.generate.make_sessions`).
        rate_rps: Mean rate, requests/s, > 0.
        duration_s: Nominal length, > 0.
        seed: Of two independent streams, one for arrivals and one for lengths.
        arrivals: `poisson`; `gamma:cv=2` for gaps with that coefficient of variation; or a Poisson
            process whose rate changes (the number of requests is then random):
            `diurnal:swing=0.6` goes through one day in `duration_s`, `step:ratio=2,at=0.5` and
            `ramp:ratio=2` end at that many times the rate they start with, `curve:NAME` follows
            a recorded rate; see `shapes`.

    Raises:
        VoltanaError: Unknown name or arrival process, or a number out of range.
    """
    if is_session_workload(name):
        if arrivals != "poisson":
            raise VoltanaError(f"sessions of {name} begin as arrivals=poisson, got {arrivals!r}")
        return make_sessions(name, rate_rps=rate_rps, duration_s=duration_s, seed=seed)
    require_positive(rate_rps=rate_rps, duration_s=duration_s)
    cumulative = rate_shape(arrivals, mean_rps=rate_rps, duration_s=duration_s)
    if cumulative is None:
        at = f" at {rate_rps:g} requests/s"
        parts = stream_steady(
            name, rate_rps=rate_rps, duration_s=duration_s, seed=seed, arrivals=arrivals
        )
    else:
        at = f", {arrivals}, {rate_rps:g} requests/s on average"
        parts = stream_shape(name, cumulative, duration_s=duration_s, seed=seed)
    return _join(list(parts), name + at)


def stream_steady(
    name: str, *, rate_rps: float, duration_s: float, seed: int, arrivals: str = "poisson"
) -> Iterator[Workload]:
    """The very requests of `make_workload` at a constant mean rate, part by part.

    Args:
        name: As of `make_workload`, and so are the others.
        rate_rps: Mean rate, requests/s.
        duration_s: Nominal length.
        seed: Of arrivals and lengths.
        arrivals: `poisson` or `gamma:cv=X`.

    Yields:
        Workloads of at most `PART_REQUESTS` requests that continue one another.

    Raises:
        VoltanaError: As `make_workload`.
    """
    require_positive(rate_rps=rate_rps, duration_s=duration_s)
    draw_gaps = parse_arrivals(arrivals)
    of_arrivals, of_lengths = _stream(seed, "arrivals"), _stream(seed, "lengths")
    left, reached = max(1, round(rate_rps * duration_s)), 0.0
    while left:
        count = min(left, PART_REQUESTS)
        # summed one after the other, from where the part before ended: as one sum over all
        sums = np.cumsum(np.concatenate(([reached], draw_gaps(of_arrivals, count))))[1:]
        inputs, outputs = draw_lengths(name, count, of_lengths)
        yield Workload(
            arrival_s=sums / rate_rps, input_tokens=inputs, output_tokens=outputs, name=name
        )
        left, reached = left - count, float(sums[-1])


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
    """Requests of a day whose rate is a sine; see `stream_shape` and `shapes.diurnal_rate`.

    Args:
        name: Length distribution.
        mean_rps: Mean rate over a period, requests/s.
        duration_s: Length of the run.
        seed: Of two independent streams, one for arrivals and one for lengths.
        swing: Relative amplitude in [0, 1).
        period_s: Length of a day.
        chunk_requests: The most requests of a part.

    Yields:
        Workloads of at most `chunk_requests` requests that continue one another.

    Raises:
        VoltanaError: Unknown name, or a number out of range.
    """
    cumulative = diurnal_rate(mean_rps, swing=swing, period_s=period_s)
    yield from stream_shape(
        name, cumulative, duration_s=duration_s, seed=seed, chunk_requests=chunk_requests
    )


def stream_shape(
    name: str,
    cumulative: Cumulative,
    *,
    duration_s: float,
    seed: int,
    chunk_requests: int = PART_REQUESTS,
) -> Iterator[Workload]:
    """An inhomogeneous Poisson process, chunk by chunk in bounded memory.

    Exact by time rescaling: unit-rate exponential gaps are summed and the cumulative rate is
    inverted at the sums (bisection to below a nanosecond). Every block of 65,536 requests draws
    from its own seed, so that the requests do not depend on `chunk_requests`.

    Args:
        name: Length distribution.
        cumulative: Expected arrivals up to a time, from 0, never falling.
        duration_s: Length, > 0.
        seed: Of two independent streams, one for arrivals and one for lengths.
        chunk_requests: The most requests of a part.

    Yields:
        Workloads of at most `chunk_requests` requests that continue one another.

    Raises:
        VoltanaError: Unknown name, or a number out of range.
    """
    require_positive(duration_s=duration_s, chunk_requests=chunk_requests)
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
                name=f"{name}, changing rate",
            )
        reached, block = float(sums[-1]), block + 1


def stream_arrivals(
    name: str, *, rate_rps: float, duration_s: float, seed: int, arrivals: str
) -> Iterator[Workload]:
    """The requests of `make_workload`, part by part in bounded memory.

    Args:
        name: As of `make_workload`, and so are the others.
        rate_rps: Mean rate, requests/s.
        duration_s: Nominal length.
        seed: Of arrivals and lengths.
        arrivals: Arrival process.

    Raises:
        VoltanaError: Unknown name, or a number out of range.
    """
    require_positive(rate_rps=rate_rps, duration_s=duration_s)
    cumulative = rate_shape(arrivals, mean_rps=rate_rps, duration_s=duration_s)
    if cumulative is None:
        return stream_steady(
            name, rate_rps=rate_rps, duration_s=duration_s, seed=seed, arrivals=arrivals
        )
    return stream_shape(name, cumulative, duration_s=duration_s, seed=seed)


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
