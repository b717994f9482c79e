"""Online correction of a latency predictor by the iteration times that are observed."""

from __future__ import annotations

import math
from typing import Final

_MAX_SURPRISE: Final = 0.3
"""Largest deviation from the fit, as a part of the prediction, that one observation counts for."""
_MAX_X: Final = 10.0
"""Limit of x: an iteration far shorter than the scale says little about the others."""


class TimeCorrection:
    """Corrects predicted times by recursive least squares, and bounds what error remains.

    The model is observed = a·predicted + c: a clock or kernel slower than believed, and a fixed
    time an iteration that the profile lacks. Divided by the prediction, so that every observation
    counts for its relative error, it is y = a + c'·x with x = scale / predicted and c = c'·scale.
    The two are the least squares over all observations, each weighing `memory` times less with
    every later one, and over a prior (a = 1, c = 0) that keeps the weight of `prior` observations:
    where all observations are of one batch and cannot tell a from c, the correction is shared
    between them, and nothing winds up.

    The error quantile follows observed / corrected by stochastic approximation (Robbins and Monro):
    an observation above it raises it by step·quantile, one below lowers it by step·(1 - quantile).

    Args:
        scale_s: A typical time; in seconds, > 0.
        memory_iterations: Observations after which one has lost 63 % of its weight, > 1.
        prior_iterations: Weight of "the predictor is right", in observations, > 0.
        quantile_ratio: Which quantile of observed / corrected to follow, within (0, 1).
        quantile_step_ratio: The step of that; 0 holds the quantile at 1.

    Source: recursive least squares with exponential forgetting (Åström and Wittenmark, Adaptive
    Control, 1995, ch. 2), made a bounded one by not forgetting the prior; constants are ours.
    """

    __slots__ = (
        "_a", "_c", "_keep", "_prior", "_quantile", "_scale_s", "_step", "_sx", "_sxx", "_sxy",
        "_sy", "_weight", "ratio",
    )  # fmt: skip

    def __init__(
        self,
        scale_s: float,
        *,
        memory_iterations: float = 500.0,
        prior_iterations: float = 10.0,
        quantile_ratio: float = 0.95,
        quantile_step_ratio: float = 0.01,
    ) -> None:
        self._scale_s = scale_s
        self._keep = 1.0 - 1.0 / memory_iterations
        self._prior = prior_iterations
        self._quantile = quantile_ratio
        self._step = quantile_step_ratio
        self._weight = self._sx = self._sxx = self._sy = self._sxy = 0.0
        self._a, self._c = 1.0, 0.0
        self.ratio = 1.0
        """The followed quantile of observed / corrected time, within [0.5, 2]."""

    def observe(self, predicted_s: float, observed_s: float) -> None:
        """Learn from one iteration; times that are not positive and finite are ignored."""
        if not (0.0 < predicted_s < math.inf and 0.0 < observed_s < math.inf):
            return
        x = min(self._scale_s / predicted_s, _MAX_X)
        fitted = self._a + self._c * x
        measured = observed_s / predicted_s
        above = measured > self.ratio * fitted
        move = self._step * (self._quantile if above else self._quantile - 1.0)
        self.ratio = min(max(self.ratio + move, 0.5), 2.0)
        self._fit(x, min(max(measured - fitted, -_MAX_SURPRISE), _MAX_SURPRISE) + fitted)

    def _fit(self, x: float, y: float) -> None:
        keep = self._keep
        self._weight = keep * self._weight + 1.0
        self._sx = keep * self._sx + x
        self._sxx = keep * self._sxx + x * x
        self._sy = keep * self._sy + (y - 1.0)
        self._sxy = keep * self._sxy + x * (y - 1.0)
        weight, square = self._weight + self._prior, self._sxx + self._prior
        determinant = weight * square - self._sx * self._sx
        self._a = 1.0 + (self._sy * square - self._sxy * self._sx) / determinant
        self._c = (self._sxy * weight - self._sy * self._sx) / determinant

    def correct_s(self, predicted_s: float) -> float:
        """The expected time of an iteration for which `predicted_s` is predicted."""
        corrected_s = self._a * predicted_s + self._c * self._scale_s
        return min(max(corrected_s, 0.25 * predicted_s), 4.0 * predicted_s)

    def bound_s(self, predicted_s: float) -> float:
        """A time that the followed share of such iterations does not exceed."""
        return self.ratio * self.correct_s(predicted_s)
