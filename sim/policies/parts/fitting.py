"""The lowest clock that fits a latency limit, remembered as token counts."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from voltana.sim.policies.base import LinePredictor, Phase, Predictor
from voltana.sim.policies.parts.clocks import first_clock_mhz

FOREVER: Final = 1 << 62
"""More iterations or tokens than any run has: the answer of a controller that never changes."""


class LowestFitting:
    """For one phase and one limit: the first clock with T(clock, batch, tokens) <= limit.

    Where the predictor is a rising line in tokens, "fits" means "at most so many tokens"; those
    counts are found once a batch size, checked against the predictor itself to the last token, and
    then a decision is a bisection among integers. Elsewhere the predictor is asked each time.

    Args:
        predictor: Predicts iteration times.
        phase: "prefill" or "decode".
        clocks_mhz: In order of preference; the last is taken when none fits.
        limit_s: The longest iteration allowed, in predicted seconds.
    """

    __slots__ = ("_clocks_mhz", "_limit_s", "_limits", "_line", "_phase", "_predictor")

    def __init__(
        self, predictor: Predictor, phase: Phase, clocks_mhz: tuple[int, ...], limit_s: float
    ) -> None:
        self._predictor = predictor
        self._line = predictor if isinstance(predictor, LinePredictor) else None
        self._phase = phase
        self._clocks_mhz = clocks_mhz
        self._limit_s = limit_s
        self._limits: dict[int, list[int] | None] = {}
        """By batch size: for each clock but the last, the most tokens that it or an earlier clock
        fits. These rise, so that bisection finds the first clock that fits. None if the number of
        tokens alone does not decide it."""

    def clock_mhz(self, batch_size: int, tokens: int) -> int:
        """The first clock that fits, else the last."""
        try:
            limits = self._limits[batch_size]
        except KeyError:
            limits = self._find_limits(batch_size)
        if limits is None:
            return self._ask_mhz(batch_size, tokens)
        return self._clocks_mhz[bisect_left(limits, tokens)]

    def fitting_mhz(self, batch_size: int, tokens: int) -> int | None:
        """The first clock that fits, None if none does."""
        clock = self.clock_mhz(batch_size, tokens)
        if clock == self._clocks_mhz[-1] and not self._fits(clock, batch_size, tokens):
            return None
        return clock

    def steady_iterations(self, clock_mhz: int, batch_size: int, tokens: int, step: int) -> int:
        """For how many k = 1, 2, … `clock_mhz(batch_size, tokens + k·step)` is sure to be the same.

        Args:
            clock_mhz: The clock now.
            batch_size: Requests.
            tokens: Tokens of the batch now.
            step: Tokens that each further iteration adds.
        """
        try:
            limits = self._limits[batch_size]
        except KeyError:
            limits = self._find_limits(batch_size)
        if limits is None:  # a line might fall, and a clock that does not fit might come to fit
            return 0
        at = bisect_left(limits, tokens)
        if self._clocks_mhz[at] != clock_mhz:
            return 0
        if at == len(limits) or limits[at] >= FOREVER or step == 0:
            return FOREVER
        return (limits[at] - tokens) // step

    def _ask_mhz(self, batch_size: int, tokens: int) -> int:
        return first_clock_mhz(self._clocks_mhz, lambda f: self._fits(f, batch_size, tokens))

    def _find_limits(self, batch_size: int) -> list[int] | None:
        limits: list[int] = []
        highest = -1
        for clock in self._clocks_mhz[:-1]:
            most = self._most_tokens(clock, batch_size)
            if most is None:
                self._limits[batch_size] = None
                return None
            highest = max(highest, most)
            limits.append(highest)
        self._limits[batch_size] = limits
        return limits

    def _most_tokens(self, clock: int, batch_size: int) -> int | None:
        """The most tokens that fit, -1 if none do; None if tokens alone do not decide it."""
        if self._line is None:
            return None
        constant_s, slope_s = self._line.predict_line(self._phase, clock, batch_size)
        if slope_s < 0.0 or constant_s <= 0.0:
            return None
        if slope_s == 0.0:
            return FOREVER if constant_s <= self._limit_s else -1
        most = min(max(int((self._limit_s - constant_s) / slope_s), -1), FOREVER)
        while most >= 0 and not self._fits(clock, batch_size, most):
            most -= 1
        while most < FOREVER and self._fits(clock, batch_size, most + 1):
            most += 1
        return most

    def _fits(self, clock: int, batch_size: int, tokens: int) -> bool:
        return self._predictor.predict_s(self._phase, clock, batch_size, tokens) <= self._limit_s
