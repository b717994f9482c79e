"""Confidence intervals over repeats; policies are compared pairwise, on the same requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the half width of its confidence interval, in the sample's unit."""

    mean: float
    half: float
    """NaN for a single repeat: then nothing is known of the spread."""


def t_interval(sample: Sequence[float], *, level: float = 0.95) -> Interval:
    """Student's interval of the mean.

    Example:
        >>> t_interval([1.0, 2.0, 3.0]).mean
        2.0
    """
    values = np.asarray(sample, dtype=float)
    count = len(values)
    mean = float(values.mean()) if count else float("nan")
    if count < 2:
        return Interval(mean, float("nan"))
    error = float(values.std(ddof=1)) / count**0.5
    return Interval(mean, float(stats.t.ppf(0.5 + level / 2, count - 1)) * error)


def saving_pct(energy_j: Sequence[float], reference_j: Sequence[float]) -> Interval:
    """Energy saved in %, repeat by repeat on the same requests, with the interval of its mean."""
    pairs = zip(energy_j, reference_j, strict=True)
    return t_interval([100.0 * (1.0 - mine / theirs) for mine, theirs in pairs])
