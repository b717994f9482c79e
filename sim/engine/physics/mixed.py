"""Time, power and noise of an iteration that computes prompts, beside decoding or alone.

No profile has a column for such an iteration yet: it is modelled by the sum of its parts. A part is
what the profile has measured, the chunk of prompts alone and the decode batch alone. Energy is the
parts' own. What kernels that run both at once save is `overlap_frac`: the shorter part takes that
share less of its time, at the mean power of both.
"""

from __future__ import annotations

from voltana.profiles.step_model import StepModel
from voltana.sim.engine.physics.noise import IterationNoise
from voltana.sim.engine.physics.track import GpuTrack
from voltana.sim.policies.base import COLOCATED, DECODE, PREFILL, Phase


class MixedTrack(GpuTrack):
    """A track whose iterations may have a chunk of prompts; without one it is decode's."""

    __slots__ = ("_chunk_batch", "_chunk_tokens", "_overlap_frac")

    def __init__(
        self,
        model: StepModel,
        phase: Phase,
        *,
        clock_mhz: int,
        actuation_s: float,
        stall_s: float,
        noise: IterationNoise | None,
        overlap_frac: float,
    ) -> None:
        """See the class.

        Args:
            model: As of `GpuTrack`, and so are the others.
            phase: "colocated".
            clock_mhz: The clock at first.
            actuation_s: From a decision to the clock's change.
            stall_s: Of a busy instance at a change.
            noise: Multipliers of iteration times.
            overlap_frac: See the module; 0 is the sum of parts.
        """
        assert phase == COLOCATED
        super().__init__(
            model, DECODE, clock_mhz=clock_mhz, actuation_s=actuation_s, stall_s=stall_s,
            noise=noise,
        )  # fmt: skip
        self._overlap_frac = overlap_frac
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
        model, noise = self._model, self._noise
        time_s, power_w = model.time_and_power(
            PREFILL, clock_mhz, self._chunk_batch, self._chunk_tokens
        )
        if batch_size:
            beside_s, beside_w = model.time_and_power(DECODE, clock_mhz, batch_size, tokens)
            total_s = time_s + beside_s
            power_w = (power_w * time_s + beside_w * beside_s) / total_s
            time_s = total_s - self._overlap_frac * min(time_s, beside_s)
        if noise is not None:
            time_s *= noise.slowness * noise.multiplier(PREFILL, clock_mhz, self._chunk_batch)
        return time_s, power_w
