"""A card under a power limit: its own controller lowers the clock until power fits, with a lag.

Beside the lock there is a limit of the clock, which the card moves on its own. While an iteration
runs, the limit goes towards the highest clock at which that iteration's power fits the cap, or
towards the top where it fits at the lock and at rest, exponentially with one time constant: what
is left of the distance after t is exp(-t / time constant). An iteration runs at the lower of lock
and limit as of its start, so that its power may exceed the cap while the limit is on its way.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from voltana.profiles.step_model import Line, StepModel
from voltana.sim.engine.physics.noise import IterationNoise
from voltana.sim.engine.physics.run import Run
from voltana.sim.engine.physics.track import GpuTrack
from voltana.sim.policies.base import IdlePlan, Phase


class LimitedModel(StepModel):
    """Another step model, whose clocks stay at or below a limit that moves.

    Args:
        model: The truth.
        clocks_mhz: Of the profile, ascending; the limit begins at the last and stays within them.
    """

    __slots__ = ("clocks_mhz", "limit_mhz", "model")

    def __init__(self, model: StepModel, clocks_mhz: tuple[int, ...]) -> None:
        self.model = model
        self.clocks_mhz = clocks_mhz
        self.limit_mhz = float(clocks_mhz[-1])

    def within(self, clock_mhz: int) -> int:
        """The clock at which work is done under a lock (0: none): a supported one."""
        lock_mhz = clock_mhz or self.clocks_mhz[-1]
        if self.limit_mhz >= lock_mhz:
            return lock_mhz
        return self.clocks_mhz[bisect_right(self.clocks_mhz, self.limit_mhz) - 1]

    def time_and_power(
        self, phase: str, clock_mhz: int, batch_size: float, tokens: float
    ) -> tuple[float, float]:
        return self.model.time_and_power(phase, self.within(clock_mhz), batch_size, tokens)

    def decode_line(self, clock_mhz: int, batch_size: int, tokens: int) -> Line:
        return self.model.decode_line(self.within(clock_mhz), batch_size, tokens)

    def idle_power_w(self, clock_mhz: int) -> float:
        return self.model.idle_power_w(clock_mhz)

    def rest_power_w(self, clock_mhz: int) -> float:
        return self.model.rest_power_w(clock_mhz)


class CappedTrack(GpuTrack):
    """A `GpuTrack` under a power limit; see the module."""

    __slots__ = ("_cap_w", "_limited", "_since_s", "_target_mhz", "_time_s")

    def __init__(
        self,
        model: StepModel,
        phase: Phase,
        *,
        clock_mhz: int,
        actuation_s: float,
        stall_s: float,
        noise: IterationNoise | None,
        cap_w: float,
        time_s: float,
        clocks_mhz: tuple[int, ...],
    ) -> None:
        """See the class.

        Args:
            model: As of `GpuTrack`, and so are the others.
            phase: Which of its tables.
            clock_mhz: The clock at first.
            actuation_s: From a decision to the clock's change.
            stall_s: Of a busy instance at a change.
            noise: Multipliers of iteration times.
            cap_w: Of the instance, all its cards.
            time_s: Time constant of the limit; 0: it is where it goes at once.
            clocks_mhz: Of the profile, ascending.
        """
        self._limited = LimitedModel(model, clocks_mhz)
        super().__init__(
            self._limited,
            phase,
            clock_mhz=clock_mhz,
            actuation_s=actuation_s,
            stall_s=stall_s,
            noise=noise,
        )
        self._cap_w = cap_w
        self._time_s = time_s
        self._target_mhz = float(clocks_mhz[-1])
        self._since_s = 0.0

    def begin(self, start_s: float, batch_size: float, tokens: int) -> Run:
        self._follow(start_s)
        self._apply_due(start_s)
        limited = self._limited
        lock_mhz = self.clock_mhz or limited.clocks_mhz[-1]
        self._target_mhz = self._fitting_mhz(lock_mhz, batch_size, tokens)
        if self._time_s == 0.0:
            limited.limit_mhz = self._target_mhz
        run = super().begin(start_s, batch_size, tokens)
        if min(limited.limit_mhz, self._target_mhz) < lock_mhz:
            run.line_end_tokens = float(tokens)  # the next iteration is another matter
        elif run.step_w > 0.0:  # it is one where the cap is reached
            until = (self._cap_w - run.first_w) / run.step_w * batch_size
            run.line_end_tokens = min(run.line_end_tokens, tokens + max(until, 0.0))
        return run

    def enter_idle(self, now_s: float, plan: IdlePlan | None) -> float:
        self._follow(now_s)
        self._target_mhz = float(self._limited.clocks_mhz[-1])
        return super().enter_idle(now_s, plan)

    def _follow(self, now_s: float) -> None:
        """Bring the limit to the present."""
        limited, target_mhz = self._limited, self._target_mhz
        left = math.exp((self._since_s - now_s) / self._time_s) if self._time_s > 0.0 else 0.0
        limited.limit_mhz = target_mhz + (limited.limit_mhz - target_mhz) * left
        self._since_s = now_s

    def _fitting_mhz(self, lock_mhz: int, batch_size: float, tokens: int) -> float:
        """Where the limit goes: the top if the lock's power fits, else the highest that fits."""
        clocks = self._limited.clocks_mhz
        if self._fits(lock_mhz, batch_size, tokens):
            return float(clocks[-1])
        low, high = 0, bisect_right(clocks, lock_mhz) - 1  # high does not fit
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(clocks[middle], batch_size, tokens):
                low = middle
            else:
                high = middle
        return float(clocks[low])

    def _fits(self, clock_mhz: int, batch_size: float, tokens: int) -> bool:
        model = self._limited.model
        return model.time_and_power(self._phase, clock_mhz, batch_size, tokens)[1] <= self._cap_w
