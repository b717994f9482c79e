"""Iterations do not take the same time twice: the multipliers of one instance's iteration times.

Each iteration draws one normal number from the instance's own stream, whoever plays it. Its time
is the table's times exp(s·z - s²/2): lognormal with mean 1, so that time and energy stay the
table's on average and a run with noise compares with one without. s belongs to the clock and batch
of the iteration (`voltana.profiles.optional.spread`). Beside that the instance may sag: for some
seconds, at random instants, every iteration that begins is slower by a constant factor.

Numbers are drawn in blocks, and a block has running sums of its multipliers, so that the time and
energy of any stretch of it take a few additions (`voltana.sim.engine.physics.run`).
"""

from __future__ import annotations

import math
from array import array
from typing import Final, TypeAlias

import numpy as np

from voltana.profiles.optional.spread import IterationSpread
from voltana.sim.config import SimConfig
from voltana.sim.policies.base import COLOCATED, DECODE, PREFILL, Phase

BLOCK: Final = 1024
"""Numbers drawn at once; a run of iterations ends with its block."""

Multipliers: TypeAlias = "tuple[array[float], list[float], list[float], list[float]]"
"""m of each iteration of a block, and running sums of m, k·m and k²·m: entry k is over 0 … k-1."""

_STREAMS: Final = {"prefill": 4, "decode": 5, "colocated": 7}
"""Spawn keys beside those of the policies in `voltana.sim.engine.fleet`."""


class IterationNoise:
    """The noise of one instance; `at` is the place in the block of its next iteration."""

    __slots__ = (
        "_constant", "_generator", "_kept", "_normals", "_phase", "_sag_depth", "_sag_rng",
        "_scale", "_spread", "_wait_s", "at", "sag_change_s", "slowness",
    )  # fmt: skip

    def __init__(
        self, config: SimConfig, spread: IterationSpread, phase: Phase, instance_id: int
    ) -> None:
        """See the class.

        Args:
            config: Seed, scale and sags.
            spread: Of the profile's iteration times.
            phase: Of the instance; it has a stream of its own.
            instance_id: Its index within the phase.
        """
        seeds = np.random.SeedSequence(config.seed, spawn_key=(_STREAMS[phase], instance_id))
        normals, sags = seeds.spawn(2)
        self._spread = spread
        self._phase = DECODE if phase == COLOCATED else phase
        self._scale = config.noise_scale
        self._constant = spread.constant(self._phase)
        self._generator = np.random.default_rng(normals)
        self._normals = self._generator.standard_normal(BLOCK)
        self._kept: dict[float, Multipliers] = {}
        self.at = 0
        self._sag_rng = np.random.default_rng(sags)
        self._sag_depth = config.sag_depth
        self._wait_s = (config.sag_interval_s, config.sag_duration_s)
        self.slowness = 1.0
        """What the sag that holds stretches iterations by; see `move_to`."""
        self.sag_change_s = math.inf
        """When the sag that holds ends, or the next one begins."""
        if config.sag_depth:
            self.sag_change_s = self._sag_rng.exponential(self._wait_s[0])

    @classmethod
    def make(
        cls, config: SimConfig, spread: IterationSpread, phase: Phase, instance_id: int
    ) -> IterationNoise | None:
        """None where every iteration takes exactly what the table says.

        Args:
            config: As in `__init__`, like the others.
            spread: Of the profile's iteration times.
            phase: Of the instance.
            instance_id: Its index within the phase.
        """
        phases = (PREFILL, DECODE) if phase == COLOCATED else (phase,)
        is_still = config.noise_scale == 0 or all(spread.is_zero(each) for each in phases)
        if config.sag_depth == 0 and is_still:
            return None
        return cls(config, spread, phase, instance_id)

    def multiplier(self, phase: Phase, clock_mhz: int, batch_size: float) -> float:
        """That of the next iteration, if it has the spread of this phase.

        Args:
            phase: "prefill" or "decode".
            clock_mhz: SM clock.
            batch_size: Requests; in prefill the effective number of equal prompts.
        """
        spread = self._spread.relative(phase, clock_mhz, batch_size) * self._scale
        if spread not in self._kept:
            self._kept[spread] = _multipliers(self._normals, spread)
        return self._kept[spread][0][self.at]

    def multipliers(self, clock_mhz: int, batch_size: float) -> Multipliers:
        """Those of the present block, if its iterations run at this clock and batch size."""
        spread = self._constant
        if spread is None:
            spread = self._spread.relative(self._phase, clock_mhz, batch_size)
        spread *= self._scale
        made = self._kept.get(spread)
        if made is None:
            made = self._kept[spread] = _multipliers(self._normals, spread)
        return made

    def move_to(self, start_s: float) -> None:
        """Bring `slowness` up to an iteration that begins then: due from `sag_change_s` on."""
        while self.sag_change_s <= start_s:
            ends = self.slowness > 1.0
            self.slowness = 1.0 if ends else 1.0 + self._sag_depth
            self.sag_change_s += self._sag_rng.exponential(self._wait_s[0 if ends else 1])

    @property
    def left(self) -> int:
        """Numbers of the block that are still to be used."""
        return BLOCK - self.at

    def use(self, count: int) -> None:
        """Go on by that many iterations, which lie in this block; at its end draw the next one."""
        self.at += count
        if self.at >= BLOCK:
            self.refill()

    def refill(self) -> None:
        """Draw the next block."""
        self.at = 0
        self._normals = self._generator.standard_normal(BLOCK)
        self._kept = {}


def _multipliers(normals: np.ndarray, relative_spread: float) -> Multipliers:
    variance = math.log1p(relative_spread * relative_spread)
    factors = np.exp(math.sqrt(variance) * normals - 0.5 * variance)
    k = np.arange(BLOCK)
    sums = [[0.0, *np.cumsum(part).tolist()] for part in (factors, k * factors, k * k * factors)]
    return array("d", factors.tobytes()), sums[0], sums[1], sums[2]
