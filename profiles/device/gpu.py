"""What the profiler and the replay harness ask of a GPU, and the errors it may answer with.

`NvmlGpu` is the real one; `ConstantPowerGpu` stands for a machine without a card.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from voltana.profiles.common.errors import VoltanaError

THERMAL: Final = "thermal"
POWER: Final = "power"


class DeviceError(VoltanaError):
    """A GPU cannot do what was asked. Subclasses say why."""


class DriverMissingError(DeviceError):
    """No NVIDIA driver, or no such GPU."""


class PermissionDeniedError(DeviceError):
    """Setting a clock needs rights this process does not have."""


class GpuLostError(DeviceError):
    """The GPU fell off the bus or needs a reset."""


class UnsupportedQueryError(DeviceError):
    """This card or driver does not offer the reading or the setting."""


class NoAnswerError(DeviceError):
    """Who reads the card for us does not answer now; it may later."""


class ClockTimeoutError(DeviceError):
    """A locked clock was not reached in time."""


class GpuBusyError(DeviceError):
    """Other processes use the card."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuIdentity:
    """What does not change while the process runs."""

    index: int
    name: str
    uuid: str
    driver_version: str
    memory_bytes: int
    power_limit_w: float
    is_power_measured: bool
    """False where the power is a stated constant; such a profile must never be called measured."""


class Gpu(Protocol):
    """One GPU. Any method may raise a `DeviceError`."""

    @property
    def identity(self) -> GpuIdentity: ...

    def supported_clocks_mhz(self) -> tuple[int, ...]:
        """SM clocks that can be locked, ascending. Empty where none can."""

    def clock_mhz(self) -> int:
        """SM clock now."""

    def power_w(self) -> float:
        """Board power now, as the driver averages it."""

    def energy_j(self) -> float:
        """Energy counter since the driver was loaded. UnsupportedQueryError where there is none."""

    def temperature_c(self) -> float: ...

    def throttle_reasons(self) -> frozenset[str]:
        """Subset of {THERMAL, POWER}: why the clock is below what was asked for."""

    def process_ids(self) -> frozenset[int]:
        """Processes with a context on the card, this one included."""

    def lock_clock(self, clock_mhz: int) -> None:
        """Pin the SM clock. Use `ClockSession`, which also puts it back."""

    def unlock_clock(self) -> None:
        """Give the clock back to the driver."""


class PowerLimitGpu(Gpu, Protocol):
    """A GPU whose board power can be limited."""

    def power_limit_w(self) -> float:
        """Limit in force."""

    def power_limit_range_w(self) -> tuple[float, float]:
        """Lowest and highest limit the card takes."""

    def set_power_limit(self, limit_w: float) -> None:
        """Set the limit. Whoever does it must set the old one again at the end."""
