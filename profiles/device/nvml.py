"""The one module that talks to NVML. Its mW and mJ end here: W and J leave."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import pynvml

from voltana.profiles.device.gpu import (
    POWER,
    THERMAL,
    DeviceError,
    DriverMissingError,
    GpuIdentity,
    GpuLostError,
    PermissionDeniedError,
    UnsupportedQueryError,
)

P = ParamSpec("P")
R = TypeVar("R")

_ERRORS: dict[int, tuple[type[DeviceError], str]] = {
    pynvml.NVML_ERROR_NO_PERMISSION: (
        PermissionDeniedError,
        "run as root (a container's needs CAP_SYS_ADMIN), or profile with --frequencies current",
    ),
    pynvml.NVML_ERROR_GPU_IS_LOST: (
        GpuLostError,
        "reset the card (nvidia-smi -r) or the machine, then re-run: finished points are kept",
    ),
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
        DriverMissingError,
        "install the NVIDIA driver, or state a constant power with --power-w",
    ),
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: (
        DriverMissingError,
        "load the NVIDIA kernel driver, or state a constant power with --power-w",
    ),
    pynvml.NVML_ERROR_NOT_SUPPORTED: (
        UnsupportedQueryError,
        "this card or driver does not offer it",
    ),
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: (
        UnsupportedQueryError,
        "the driver is older than this query: update it",
    ),
}
_THERMAL_BITS = (
    pynvml.nvmlClocksThrottleReasonSwThermalSlowdown
    | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
)
_POWER_BITS = (
    pynvml.nvmlClocksThrottleReasonSwPowerCap
    | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
    | pynvml.nvmlClocksThrottleReasonHwSlowdown
)


def _translate(error: pynvml.NVMLError, call: str) -> DeviceError:
    kind, remedy = _ERRORS.get(error.value, (DeviceError, "see the driver's log (dmesg)"))
    return kind(f"NVML must answer {call}, got {error}: {remedy}")


def _typed(function: Callable[P, R]) -> Callable[P, R]:
    """Turn NVML codes into typed errors that name the call and a remedy."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except pynvml.NVMLError as error:
            raise _translate(error, function.__name__.strip("_")) from error

    return wrapper


class NvmlGpu:
    """One GPU behind NVML. `close` (or the with statement) ends the NVML session."""

    @_typed
    def __init__(self, index: int = 0) -> None:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        if not 0 <= index < count:
            pynvml.nvmlShutdown()
            raise DriverMissingError(
                f"GPU index must be in 0..{count - 1}, got {index}: list the cards with nvidia-smi"
            )
        self._handle: Any = pynvml.nvmlDeviceGetHandleByIndex(index)
        self._identity = GpuIdentity(
            index=index,
            name=str(pynvml.nvmlDeviceGetName(self._handle)),
            uuid=str(pynvml.nvmlDeviceGetUUID(self._handle)),
            driver_version=str(pynvml.nvmlSystemGetDriverVersion()),
            memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).total),
            power_limit_w=pynvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1e3,
            is_power_measured=True,
        )

    def __enter__(self) -> NvmlGpu:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End this object's NVML session."""
        pynvml.nvmlShutdown()

    @property
    def identity(self) -> GpuIdentity:
        return self._identity

    @_typed
    def supported_clocks_mhz(self) -> tuple[int, ...]:
        """SM clocks at the highest memory clock, ascending."""
        memory_clocks_mhz = pynvml.nvmlDeviceGetSupportedMemoryClocks(self._handle)
        clocks_mhz = pynvml.nvmlDeviceGetSupportedGraphicsClocks(
            self._handle, max(memory_clocks_mhz)
        )
        return tuple(sorted(int(clock_mhz) for clock_mhz in clocks_mhz))

    @_typed
    def num_cards(self) -> int:
        """How many cards this process sees."""
        return int(pynvml.nvmlDeviceGetCount())

    def is_partitioned(self) -> bool:
        """Whether MIG mode is on; a card without MIG is never partitioned."""
        try:
            return self._mig_mode() == int(pynvml.NVML_DEVICE_MIG_ENABLE)
        except UnsupportedQueryError:
            return False

    @_typed
    def _mig_mode(self) -> int:
        current, _pending = pynvml.nvmlDeviceGetMigMode(self._handle)
        return int(current)

    @_typed
    def clock_mhz(self) -> int:
        return int(pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM))

    @_typed
    def power_w(self) -> float:
        return float(pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3)

    @_typed
    def energy_j(self) -> float:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3)

    @_typed
    def temperature_c(self) -> float:
        return float(pynvml.nvmlDeviceGetTemperature(self._handle, pynvml.NVML_TEMPERATURE_GPU))

    @_typed
    def throttle_reasons(self) -> frozenset[str]:
        bits = int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle))
        found = ((THERMAL, bits & _THERMAL_BITS), (POWER, bits & _POWER_BITS))
        return frozenset(name for name, hit in found if hit)

    @_typed
    def process_ids(self) -> frozenset[int]:
        compute = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        graphics = pynvml.nvmlDeviceGetGraphicsRunningProcesses(self._handle)
        return frozenset(int(process.pid) for process in (*compute, *graphics))

    @_typed
    def lock_clock(self, clock_mhz: int) -> None:
        pynvml.nvmlDeviceSetGpuLockedClocks(self._handle, clock_mhz, clock_mhz)

    @_typed
    def unlock_clock(self) -> None:
        pynvml.nvmlDeviceResetGpuLockedClocks(self._handle)

    @_typed
    def power_limit_w(self) -> float:
        return float(pynvml.nvmlDeviceGetPowerManagementLimit(self._handle) / 1e3)

    @_typed
    def power_limit_range_w(self) -> tuple[float, float]:
        low_mw, high_mw = pynvml.nvmlDeviceGetPowerManagementLimitConstraints(self._handle)
        return low_mw / 1e3, high_mw / 1e3

    @_typed
    def set_power_limit(self, limit_w: float) -> None:
        pynvml.nvmlDeviceSetPowerManagementLimit(self._handle, round(limit_w * 1e3))
