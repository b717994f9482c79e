"""Latency predictors built from others."""

from __future__ import annotations

from sim.policies.base import Phase, Predictor


class ScaledPredictor:
    """A predictor that is wrong by a constant factor: for tests of robustness."""

    __slots__ = ("_factor", "_predictor")

    def __init__(self, predictor: Predictor, factor: float) -> None:
        self._predictor = predictor
        self._factor = factor

    @classmethod
    def wrap(cls, predictor: Predictor, factor: float) -> Predictor:
        """The predictor itself where there is nothing to scale."""
        return predictor if factor == 1.0 else cls(predictor, factor)

    def predict_s(self, phase: Phase, frequency_mhz: int, batch_size: int, tokens: int) -> float:
        return self._factor * self._predictor.predict_s(phase, frequency_mhz, batch_size, tokens)
