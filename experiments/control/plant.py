"""Decode as a plant: from the clock to the iteration time, linear around an operating point.

Little's law closes a loop inside the engine. With arrivals λ (requests/s), L tokens a request and
T(f, b) the iteration time of b requests at clock f,

    db/dt = λ - b/(L·T),        T = T(f, b).

Around a steady b = λ·L·T, with e = (b/T)·∂T/∂b the elasticity of the time in the batch,

    ΔT(s)/Δf(s) = ∂T/∂f · (s + 1/(L·T)) / (s + (1 - e)/(L·T)) · exp(-θ·s):

a clock acts at once by ∂T/∂f and then, while the batch follows, by ∂T/∂f/(1 - e) with the time
constant L·T/(1 - e). Where e >= 1 the plant is unstable: the token rate b/T falls with b, so that
more requests make the batch grow. That is a stair of the table. θ is the dead time: the decision
acts on the iteration after the one it has seen, `actuation_s` late, and a window of w seconds shows
a change half a window late on average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import signal

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import DECODE, Truth

FloatArray = npt.NDArray[np.float64]
ComplexArray = npt.NDArray[np.complex128]

_FREQUENCIES: Final[FloatArray] = np.geomspace(1e-3, 1e3, 4001)
"""Of the open loop, rad/s; no margin of these plants lies outside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plant:
    """Iteration time against clock at one operating point."""

    clock_mhz: int
    batch_size: int
    time_s: float
    gain_s_per_mhz: float
    """∂T/∂f at a fixed batch, negative: what a clock does at once."""
    elasticity_ratio: float
    """e above."""
    residence_s: float
    """L·T: how long a request stays."""
    dead_time_s: float

    @property
    def pole_per_s(self) -> float:
        """Of the batch; negative means stable."""
        return -(1.0 - self.elasticity_ratio) / self.residence_s

    @property
    def time_constant_s(self) -> float:
        """Of the batch; infinite or negative where it runs away."""
        return -1.0 / self.pole_per_s if self.pole_per_s else math.inf

    @property
    def settled_gain_s_per_mhz(self) -> float:
        """What a clock does once the batch has settled; meaningless without a settled batch."""
        return self.gain_s_per_mhz / (1.0 - self.elasticity_ratio)

    def response(self, omega_rad_per_s: FloatArray) -> ComplexArray:
        """ΔT/Δf at those frequencies, dead time included."""
        _, found = signal.freqresp(self.transfer(), omega_rad_per_s)
        delay = np.exp(-1j * omega_rad_per_s * self.dead_time_s)
        return np.asarray(found * delay, dtype=np.complex128)

    def transfer(self) -> tuple[list[float], list[float]]:
        """Numerator and denominator of ΔT/Δf without its dead time, in falling powers of s."""
        gain = self.gain_s_per_mhz
        return [gain, gain / self.residence_s], [1.0, -self.pole_per_s]


def linearise(
    truth: Truth,
    *,
    clock_mhz: int,
    step_mhz: int,
    batch_size: int,
    context_tokens: float,
    output_tokens: float,
    dead_time_s: float,
) -> Plant:
    """Slopes of the table by differences: `step_mhz` to both sides, and one request more.

    One request, since that is what an arrival adds; across a stair it is the stair.

    Args:
        truth: Times of iterations.
        clock_mhz: Of the operating point.
        step_mhz: Both neighbours have to be profiled clocks or between two.
        batch_size: Of the operating point.
        context_tokens: Mean context of a running request.
        output_tokens: Mean tokens of a request: L.
        dead_time_s: θ.
    """

    def time_s(clock: int, batch: int) -> float:
        return truth.time_and_power(DECODE, clock, batch, batch * context_tokens)[0]

    here_s = time_s(clock_mhz, batch_size)
    slope = (
        time_s(clock_mhz + step_mhz, batch_size) - time_s(clock_mhz - step_mhz, batch_size)
    ) / (2.0 * step_mhz)
    more_s = time_s(clock_mhz, batch_size + 1) - here_s
    return Plant(
        clock_mhz=clock_mhz,
        batch_size=batch_size,
        time_s=here_s,
        gain_s_per_mhz=slope,
        elasticity_ratio=batch_size / here_s * more_s,
        residence_s=output_tokens * here_s,
        dead_time_s=dead_time_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Margins:
    """How far a loop is from instability."""

    gain_ratio: float
    """Factor that the loop gain may grow by."""
    phase_deg: float
    crossover_rad_per_s: float
    """Where the loop gain is 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gains:
    """PI gains of `pid`, which acts on the error relative to the setpoint."""

    kp_mhz: float
    ki_mhz_per_s: float


def open_loop(plant: Plant, gains: Gains, setpoint_s: float) -> tuple[FloatArray, ComplexArray]:
    """Frequencies (rad/s) and the complex open loop at them.

    Args:
        plant: What the clock acts on.
        gains: Of the controller.
        setpoint_s: ITL that the controller holds, in s.
    """
    omega = _FREQUENCIES
    controller = gains.kp_mhz + gains.ki_mhz_per_s / (1j * omega)
    return omega, np.asarray(-plant.response(omega) * controller / setpoint_s)


def margins(plant: Plant, gains: Gains, setpoint_s: float) -> Margins:
    """Gain and phase margin of the loop that `pid` closes around a stable plant.

    Args:
        plant: What the clock acts on.
        gains: Of the controller.
        setpoint_s: ITL that the controller holds, in s.

    Raises:
        VoltanaError: The plant is unstable: margins of its open loop say nothing.
    """
    if plant.pole_per_s >= 0.0:
        raise VoltanaError(
            f"margins need a stable plant, its pole is {plant.pole_per_s:.3g}/s at "
            f"{plant.batch_size} requests: choose a batch that is not on a stair"
        )
    omega, loop = open_loop(plant, gains, setpoint_s)
    size, phase = np.abs(loop), np.unwrap(np.angle(loop))
    above = np.nonzero(size >= 1.0)[0]
    at_one = int(above[-1]) if len(above) else 0
    turned = np.nonzero(phase <= -math.pi)[0]
    gain = 1.0 / float(size[turned[0]]) if len(turned) else math.inf
    return Margins(
        gain_ratio=gain,
        phase_deg=180.0 + math.degrees(float(phase[at_one])),
        crossover_rad_per_s=float(omega[at_one]),
    )


def tune_pi(
    plant: Plant, setpoint_s: float, *, phase_deg: float = 60.0, gain_ratio: float = 2.0
) -> Gains:
    """The PI gains with the plant's own zero cancelled and both margins at least as given.

    The batch answers far more slowly than the dead time, so that the plant is a gain beyond its
    pole; the integral time is the dead time and Kp is the largest that keeps both margins.

    Args:
        plant: What the clock acts on.
        setpoint_s: ITL that the controller holds, in s.
        phase_deg: Least phase margin, in degrees.
        gain_ratio: Least gain margin, as a factor.
    """
    low, high = 0.0, 1e5
    for _ in range(60):
        kp = 0.5 * (low + high)
        gains = Gains(kp_mhz=kp, ki_mhz_per_s=kp / plant.dead_time_s)
        found = margins(plant, gains, setpoint_s)
        if found.phase_deg >= phase_deg and found.gain_ratio >= gain_ratio:
            low = kp
        else:
            high = kp
    return Gains(kp_mhz=low, ki_mhz_per_s=low / plant.dead_time_s)
