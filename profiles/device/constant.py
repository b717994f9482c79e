"""A stand-in for the card of a machine that has none: constant, stated power; no clock control."""

from __future__ import annotations

import time

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.device.gpu import GpuIdentity, UnsupportedQueryError


class ConstantPowerGpu:
    """Draws `power_w` always. Its power is a model and is reported as one, never as measured."""

    def __init__(self, power_w: float, *, clock_mhz: int = 1000, name: str = "none") -> None:
        """Start the energy counter at 0.

        Args:
            power_w: Stated power, > 0.
            clock_mhz: The one clock the profile will name, > 0.
            name: What to call the device in the profile.
        """
        if power_w <= 0:
            raise VoltanaError(f"power_w must be > 0, got {power_w} (--power-w): state a power")
        self._power_w = power_w
        self._clock_mhz = clock_mhz
        self._start_ns = time.monotonic_ns()
        self._identity = GpuIdentity(
            index=0,
            name=name,
            uuid="constant-power",
            driver_version="none",
            memory_bytes=0,
            power_limit_w=power_w,
            is_power_measured=False,
        )

    @property
    def identity(self) -> GpuIdentity:
        return self._identity

    def supported_clocks_mhz(self) -> tuple[int, ...]:
        return (self._clock_mhz,)

    def clock_mhz(self) -> int:
        return self._clock_mhz

    def power_w(self) -> float:
        return self._power_w

    def energy_j(self) -> float:
        return self._power_w * (time.monotonic_ns() - self._start_ns) * 1e-9

    def temperature_c(self) -> float:
        return 25.0

    def throttle_reasons(self) -> frozenset[str]:
        return frozenset()

    def process_ids(self) -> frozenset[int]:
        return frozenset()

    def lock_clock(self, clock_mhz: int) -> None:
        raise UnsupportedQueryError(
            f"a constant-power device has no clock to lock, got {clock_mhz} MHz: "
            "use --frequencies current"
        )

    def unlock_clock(self) -> None:
        raise UnsupportedQueryError("a constant-power device has no clock to unlock")
