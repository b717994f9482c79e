"""The lowest clock that fits a latency limit, remembered as token counts."""

from __future__ import annotations

from typing import Final

from sim.policies.base import LinePredictor, Phase, Predictor

FOREVER: Final = 1 << 62
"""More iterations or tokens than any run has: of a controller that will not change its mind."""

Limits = tuple[tuple[int, int | None], ...]


class LowestFitting:
    """For one phase and one limit: the first clock with T(clock, batch, tokens) <= limit.

    Where the predictor is a rising line in tokens, "fits" means "at most so many tokens"; those
    counts are found once a batch size, checked against the predictor itself to the last token, and
    then a decision is a comparison of integers. Elsewhere the predictor is asked each time.

    Args:
        predictor: What is believed of iteration times.
        clocks_mhz: In order of preference; the last is taken when none fits.
        limit_s: The latency to keep.
    """

    __slots__ = ("_clocks_mhz", "_limit_s", "_limits", "_line", "_phase", "_predictor", "_top_mhz")

    def __init__(
        self, predictor: Predictor, phase: Phase, clocks_mhz: tuple[int, ...], limit_s: float
    ) -> None:
        self._predictor = predictor
        self._line = predictor if isinstance(predictor, LinePredictor) else None
        self._phase = phase
        self._clocks_mhz = clocks_mhz[:-1]
        self._top_mhz = clocks_mhz[-1]
        self._limit_s = limit_s
        self._limits: dict[int, Limits] = {}

    def clock_mhz(self, batch_size: int, tokens: int) -> int:
        """The first clock that fits, else the last."""
        limits = self._limits.get(batch_size)
        if limits is None:
            limits = self._find_limits(batch_size)
        for clock, most in limits:
            if tokens <= most if most is not None else self._fits(clock, batch_size, tokens):
                return clock
        return self._top_mhz

    def steady_iterations(self, clock_mhz: int, batch_size: int, tokens: int, step: int) -> int:
        """For how many k = 1, 2, … `clock_mhz(batch_size, tokens + k·step)` is sure to be that."""
        if self.clock_mhz(batch_size, tokens) != clock_mhz:
            return 0
        for clock, most in self._limits[batch_size]:
            if most is None:  # its line might fall, and a clock that does not fit might come to fit
                return 0
            if clock == clock_mhz:
                return FOREVER if most >= FOREVER or step == 0 else (most - tokens) // step
        return FOREVER

    def _find_limits(self, batch_size: int) -> Limits:
        limits = tuple((clock, self._most_tokens(clock, batch_size)) for clock in self._clocks_mhz)
        self._limits[batch_size] = limits
        return limits

    def _most_tokens(self, clock: int, batch_size: int) -> int | None:
        """Most tokens that fit (-1: none do); None where tokens do not decide it alone."""
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
