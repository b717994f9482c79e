"""What controllers of colocated instances ask: how long both parts of an iteration take together.

Both are believed to take their time one after the other, as in `voltana.sim.engine.physics.mixed`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from voltana.sim.policies.base import DECODE, PREFILL, InstanceState, PolicyContext, Predictor
from voltana.sim.policies.parts.latency import LatencyWindow

_STEP: Final = 0.02
"""Weight of the last gap in the mean time that decoding stands in one, ours."""


def predicted_s(predictor: Predictor, state: InstanceState, clock_mhz: int) -> float:
    """Time of the iteration about to run, the sum of its parts."""
    time_s = 0.0
    if state.chunk_tokens:
        time_s += predictor.predict_s(PREFILL, clock_mhz, state.chunk_requests, state.chunk_tokens)
    if state.last_batch_size:
        time_s += predictor.predict_s(DECODE, clock_mhz, state.last_batch_size, state.last_tokens)
    return time_s


def predicted_gap_s(predictor: Predictor, state: InstanceState, clock_mhz: int) -> float:
    """Time until running requests have their next token, should nothing else come between.

    Where decoding stands while prompts run, that is the iteration about to run and one of decode.
    """
    time_s = predicted_s(predictor, state, clock_mhz)
    if state.num_running and not state.last_batch_size:
        time_s += predictor.predict_s(DECODE, clock_mhz, state.num_running, state.kv_tokens)
    return time_s


class GapWatch:
    """Tells which iteration made running requests wait, from what is shown at each decision."""

    __slots__ = ("_chunk_requests", "_gap_s", "_stood", "aside_s", "decoded")

    def __init__(self) -> None:
        self._chunk_requests = 0
        self._stood = False
        self._gap_s = 0.0
        self.aside_s = 0.0
        """Mean time in a gap in which decoding stood."""
        self.decoded: tuple[float, int] | None = None
        """Gap that the iteration just ended has made, and of how many requests; None if none."""

    def look(self, state: InstanceState) -> int:
        """Call at each decision, first of all.

        Returns:
            Requests whose prompts were in the iteration that has ended; 0 after a rest.
        """
        chunk_requests = self._chunk_requests if state.last_duration_s > 0.0 else 0
        self.decoded = None
        if state.last_duration_s > 0.0:
            if state.ended_batch_size:
                self.aside_s += _STEP * (self._gap_s - self.aside_s)
            self._gap_s += state.last_duration_s
            if state.ended_batch_size:
                self.decoded = self._gap_s, state.ended_batch_size
            if state.ended_batch_size or not self._stood:
                self._gap_s = 0.0
        else:
            self._gap_s = 0.0
        self._chunk_requests = state.chunk_requests
        self._stood = state.num_running > 0 and state.last_batch_size == 0
        return chunk_requests


class BothPhases:
    """Measured latency of both phases, each over its setpoint: the larger counts.

    Args:
        context: The promises.
        window_s: How far back it looks.
        quantile: Which quantile, within (0, 1].
        target_ratio: Setpoint as a part of each promise.
    """

    __slots__ = ("_gaps", "_prompts", "_setpoints_s", "_watch")

    def __init__(
        self, context: PolicyContext, window_s: float, quantile: float, target_ratio: float
    ) -> None:
        self._setpoints_s = tuple(
            replace(context, phase=phase).budget_s * target_ratio for phase in (PREFILL, DECODE)
        )
        self._prompts, self._gaps = (LatencyWindow(window_s, quantile) for _ in range(2))
        self._watch = GapWatch()

    def ratio(self, state: InstanceState) -> float | None:
        """Take the iteration that has ended; None before the first, or without a budget."""
        chunk_requests = self._watch.look(state)
        if chunk_requests:
            latency_s = state.last_duration_s + state.ended_queue_delay_s
            self._prompts.put(state.now_s, latency_s, chunk_requests)
        if self._watch.decoded is not None:
            self._gaps.put(state.now_s, *self._watch.decoded)
        if min(self._setpoints_s) <= 0.0:
            return None
        measured = zip((self._prompts, self._gaps), self._setpoints_s, strict=True)
        felt = [s / setpoint for w, setpoint in measured if (s := w.quantile_s()) is not None]
        return max(felt, default=None)
