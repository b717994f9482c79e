"""Arrival processes by name: gaps of a constant rate, and rates that change over the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.workload.arrivals.curves import read_curve
from voltana.sim.workload.workload import FloatArray

Gaps = Callable[[np.random.Generator, int], FloatArray]
"""Draws that many gaps with mean 1."""
Cumulative = Callable[[FloatArray], FloatArray]
"""Expected number of arrivals up to each time."""

SWING: Final = 0.6
"""Relative amplitude of a day, ours: the day's highest rate is four times its lowest."""
DAY_S: Final = 86_400.0
PEAK_OF_PERIOD: Final = 14 / 24
RATIO: Final = 2.0
"""Last rate over first rate of a step and a ramp; ours."""
STEP_AT: Final = 0.5
CURVE: Final = "curve:"
_FROM: Final = ",from="
RULE: Final = (
    "arrivals must be poisson, gamma:cv=NUMBER > 0, diurnal:swing=NUMBER in [0, 1), "
    "step:ratio=NUMBER > 0,at=NUMBER in (0, 1), ramp:ratio=NUMBER > 0, or curve:NAME or FILE.csv, "
    "with ,from=SECONDS"
)


def parse_arrivals(text: str) -> Gaps:
    """The gap generator that `poisson` or `gamma:cv=X` names."""
    name, numbers = _parse(text)
    if name == "poisson" and not numbers:
        return lambda rng, count: rng.standard_exponential(count)
    cv = numbers.pop("cv", math.nan)
    if name != "gamma" or numbers or not (cv > 0 and math.isfinite(cv)):
        raise VoltanaError(f"{RULE}, got {text!r}")
    shape = 1.0 / (cv * cv)
    return lambda rng, count: rng.gamma(shape, 1.0 / shape, count)


def rate_shape(text: str, *, mean_rps: float, duration_s: float) -> Cumulative | None:
    """The changing rate that `diurnal`, `step`, `ramp` or `curve` names; None for a constant one.

    Args:
        text: The process with its parameters, `step:ratio=2,at=0.5` say.
        mean_rps: Mean rate over the duration, requests/s, whatever the shape.
        duration_s: Length of the run.

    Raises:
        VoltanaError: A parameter is unknown or out of range.
    """
    if text.startswith(CURVE):
        name, start = _curve(text)
        return recorded_rate(
            name,
            mean_rps=mean_rps,
            duration_s=duration_s,
            start_s=_number(start, text) if start is not None else 0.0,
        )
    name, numbers = _parse(text)
    makers: dict[str, Callable[..., Cumulative]] = {
        "diurnal": lambda swing=SWING: diurnal_rate(mean_rps, swing=swing, period_s=duration_s),
        "step": lambda ratio=RATIO, at=STEP_AT: step_rate(
            mean_rps, ratio=ratio, at_s=at * duration_s, duration_s=duration_s
        ),
        "ramp": lambda ratio=RATIO: ramp_rate(mean_rps, ratio=ratio, duration_s=duration_s),
    }
    if name not in makers:
        return None
    known = {"diurnal": {"swing"}, "step": {"ratio", "at"}, "ramp": {"ratio"}}[name]
    if not set(numbers) <= known:
        raise VoltanaError(f"{RULE}, got {text!r}")
    return makers[name](**numbers)


def diurnal_rate(
    mean_rps: float,
    *,
    swing: float = SWING,
    peak_s: float | None = None,
    period_s: float = DAY_S,
) -> Cumulative:
    """Cumulative arrivals of a sinusoidal day: rate(t) = mean·(1 + swing·cos(2π(t - peak)/period)).

    Args:
        mean_rps: Mean over a period, requests/s.
        swing: Relative amplitude in [0, 1); default ours.
        peak_s: Time of the highest rate; by default 14/24 of the period (14:00).
        period_s: Length of the day.

    Returns:
        Expected number of arrivals up to each time.
    """
    require_positive(mean_rps=mean_rps, period_s=period_s)
    if not 0 <= swing < 1:
        raise VoltanaError(f"swing must be in [0, 1), got {swing}")
    omega = 2 * math.pi / period_s
    highest_s = PEAK_OF_PERIOD * period_s if peak_s is None else peak_s
    start = math.sin(-omega * highest_s)

    def cumulative(time_s: FloatArray) -> FloatArray:
        wave = (np.sin(omega * (time_s - highest_s)) - start) / omega
        return np.asarray(mean_rps * (time_s + swing * wave))

    return cumulative


def step_rate(mean_rps: float, *, ratio: float, at_s: float, duration_s: float) -> Cumulative:
    """Cumulative arrivals of one step: from `at_s` on the rate is `ratio` times that before.

    Args:
        mean_rps: Mean over the duration, requests/s.
        ratio: Rate after the step over the rate before it, > 0.
        at_s: When it happens, inside the duration.
        duration_s: Of the run.
    """
    require_positive(mean_rps=mean_rps, ratio=ratio, duration_s=duration_s)
    if not 0 < at_s < duration_s:
        raise VoltanaError(f"a step must lie in (0, 1) of the duration, got {at_s / duration_s:g}")
    first_rps = mean_rps * duration_s / (at_s + ratio * (duration_s - at_s))

    def cumulative(time_s: FloatArray) -> FloatArray:
        after_s = np.maximum(time_s - at_s, 0.0)
        return np.asarray(first_rps * (time_s + (ratio - 1.0) * after_s))

    return cumulative


def ramp_rate(mean_rps: float, *, ratio: float, duration_s: float) -> Cumulative:
    """Cumulative arrivals of a rate that changes evenly until it is `ratio` times the first one.

    Args:
        mean_rps: Mean over the duration, requests/s.
        ratio: Last rate over the first, > 0; below 1 the load falls.
        duration_s: Of the run.
    """
    require_positive(mean_rps=mean_rps, ratio=ratio, duration_s=duration_s)
    first_rps = 2.0 * mean_rps / (1.0 + ratio)
    growth = 0.5 * (ratio - 1.0) / duration_s

    def cumulative(time_s: FloatArray) -> FloatArray:
        return np.asarray(first_rps * time_s * (1.0 + growth * time_s))

    return cumulative


def recorded_rate(
    name_or_path: str, *, mean_rps: float, duration_s: float, start_s: float = 0.0
) -> Cumulative:
    """Cumulative arrivals of a part of a recorded rate, scaled to a mean.

    Args:
        name_or_path: As of `curves.read_curve`.
        mean_rps: Mean over the duration, requests/s.
        duration_s: Of the run.
        start_s: Where in the curve the run begins, >= 0; the run ends no later than the curve.

    Raises:
        VoltanaError: There is no such part, or no request in it.
    """
    require_positive(mean_rps=mean_rps, duration_s=duration_s)
    curve = read_curve(name_or_path)
    if not start_s >= 0:
        raise VoltanaError(f"{name_or_path}: from must be >= 0, got {start_s:g}")
    if start_s + duration_s > curve.end_s:
        raise VoltanaError(
            f"{name_or_path}: the curve ends after {curve.end_s:g} s, got "
            f"duration_s={duration_s:g} from {start_s:g} s on"
        )
    before, until = curve(np.array([start_s, start_s + duration_s])).tolist()
    if until == before:
        raise VoltanaError(
            f"{name_or_path}: no request in {duration_s:g} s from {start_s:g} s on, raise "
            "duration_s"
        )
    factor = mean_rps * duration_s / (until - before)
    return lambda time_s: factor * (curve(start_s + time_s) - before)


def curve_of(text: str) -> str | None:
    """The name or file of the recorded rate that arrivals follow; None if they follow none."""
    return _curve(text)[0] if text.startswith(CURVE) else None


def _curve(text: str) -> tuple[str, str | None]:
    """Name, and where in it the run begins, if that is said."""
    name, comma, start = text.removeprefix(CURVE).rpartition(_FROM)
    return (name, start) if comma else (start, None)


def require_positive(**values: float) -> None:
    """Raise VoltanaError for the first number that is not positive and finite."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise VoltanaError(f"{name} must be > 0 and finite, got {value}")


def _parse(text: str) -> tuple[str, dict[str, float]]:
    """`name:key=number,…` as a name and numbers."""
    name, _, rest = text.partition(":")
    numbers: dict[str, float] = {}
    for part in rest.split(",") if rest else ():
        key, _, value = part.partition("=")
        numbers[key] = _number(value, text)
    return name, numbers


def _number(value: str, text: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise VoltanaError(f"{RULE}, got {text!r}") from None
