"""Clock, energy and time of GPUs whose iterations may compute prompts, beside decoding or alone.

What such an iteration takes is `voltana.profiles.optional.mixed`'s to say.
"""

from __future__ import annotations

from voltana.profiles.optional.mixed import MixedStep
from voltana.profiles.step_model import StepModel
from voltana.sim.engine.physics.noise import IterationNoise
from voltana.sim.engine.physics.track import GpuTrack
from voltana.sim.policies.base import COLOCATED, DECODE, PREFILL, Phase


class MixedTrack(GpuTrack):
    """A track whose iterations may have a chunk of prompts; without one it is decode's."""

    __slots__ = ("_chunk_batch", "_chunk_tokens", "_step")

    def __init__(
        self,
        model: StepModel,
        phase: Phase,
        *,
        clock_mhz: int,
        actuation_s: float,
        stall_s: float,
        noise: IterationNoise | None,
        step: MixedStep,
    ) -> None:
        """See the class.

        Args:
            model: As of `GpuTrack`, and so are the others.
            phase: "colocated".
            clock_mhz: The clock at first.
            actuation_s: From a decision to the clock's change.
            stall_s: Of a busy instance at a change.
            noise: Multipliers of iteration times.
            step: The truth about iterations with prompts in them.
        """
        assert phase == COLOCATED
        super().__init__(
            model, DECODE, clock_mhz=clock_mhz, actuation_s=actuation_s, stall_s=stall_s,
            noise=noise,
        )  # fmt: skip
        self._step = step
        self._chunk_batch = 0.0
        self._chunk_tokens = 0

    def take_chunk(self, batch_size: float, tokens: int) -> None:
        """What the next iteration computes of prompts.

        Args:
            batch_size: The effective number of equal prompts.
            tokens: New tokens; 0 without a chunk.
        """
        self._chunk_batch, self._chunk_tokens = batch_size, tokens
        self.is_mixed = tokens > 0

    def mixed_point(self, clock_mhz: int, batch_size: float, tokens: int) -> tuple[float, float]:
        noise = self._noise
        chunk = self._chunk_batch, self._chunk_tokens
        time_s, power_w = self._step.time_and_power(clock_mhz, chunk, (batch_size, tokens))
        if noise is not None:
            time_s *= noise.slowness * noise.multiplier(PREFILL, clock_mhz, self._chunk_batch)
        return time_s, power_w
