"""What the actuator acts on: clock locks, power limits, or a file that records what it would do."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import ClassVar, Final, Protocol, TextIO

from voltana.hwreplay.messages.actuation import Operation
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.device.cards import open_gpu
from voltana.profiles.device.gpu import (
    DeviceError,
    PermissionDeniedError,
    PowerLimitGpu,
    UnsupportedQueryError,
)
from voltana.profiles.device.watchdog import Watchdog

MILLI: Final = 1e-3


class Backend(Protocol):
    """Holds GPUs at a value (MHz or mW) and gives them back. Only values it allows reach `hold`."""

    @property
    def operation(self) -> Operation:
        """What this backend does: LOCK or CAP."""

    @property
    def is_dry(self) -> bool:
        """Whether it only writes down what it would do."""

    @property
    def gpus(self) -> Collection[int]: ...

    def uuid_of(self, gpu: int) -> str | None:
        """NVML's name of a card, the same on both sides of a container; None if not known."""

    def allows(self, gpu: int, value: int) -> bool: ...

    def hold(self, gpu: int, value: int) -> None: ...

    def restore(self, gpu: int) -> None: ...

    def close(self) -> None:
        """Restore whatever is still held, then end."""


class _Guarded(ABC):
    """GPUs of this process and the watchdog that restores them if it is killed."""

    is_dry: ClassVar[bool] = False

    def __init__(self, gpus: Mapping[int, PowerLimitGpu], watchdog: Watchdog) -> None:
        self._gpus = gpus
        self._watchdog = watchdog
        self._held: set[int] = set()

    @property
    def gpus(self) -> Collection[int]:
        return self._gpus.keys()

    def uuid_of(self, gpu: int) -> str | None:
        return self._gpus[gpu].identity.uuid

    def hold(self, gpu: int, value: int) -> None:
        if not self._held:
            self._watchdog.arm()
        is_first = gpu not in self._held
        self._held.add(gpu)  # before the call: a signal may arrive inside it
        try:
            self._set(gpu, value)
        except (PermissionDeniedError, UnsupportedQueryError):
            if is_first:
                self._forget(gpu)
            raise

    def restore(self, gpu: int) -> None:
        if gpu not in self._held:
            return
        self._reset(gpu)
        self._forget(gpu)

    def close(self) -> None:
        failed: list[DeviceError] = []
        for gpu in sorted(self._held):
            try:
                self._reset(gpu)
                self._held.discard(gpu)
            except DeviceError as error:
                failed.append(error)
        if not failed:
            with suppress(DeviceError):  # it was told to end too, and has given all back
                self._watchdog.disarm()
        self._watchdog.close()  # still armed if one failed: it tries again
        if failed:
            raise failed[0]

    def _forget(self, gpu: int) -> None:
        self._held.discard(gpu)
        if not self._held:
            self._watchdog.disarm()

    @abstractmethod
    def _set(self, gpu: int, value: int) -> None: ...

    @abstractmethod
    def _reset(self, gpu: int) -> None: ...


class ClockBackend(_Guarded):
    """Locks SM clocks through NVML."""

    operation: ClassVar[Operation] = Operation.LOCK

    def __init__(
        self,
        gpus: Mapping[int, PowerLimitGpu],
        *,
        clocks_mhz: Collection[int] | None = None,
        previous_clock_mhz: int | None = None,
        restores_first: bool = False,
        zeusd: str | None = None,
    ) -> None:
        """Start the watchdog; no clock is touched unless `restores_first`.

        Args:
            gpus: The allowed GPUs by index.
            clocks_mhz: The allowed clocks, each supported by every GPU. None allows all supported.
            previous_clock_mhz: Lock to return to. None returns control to the driver.
            restores_first: Give every clock back now: one that was killed together with its
                watchdog, as with its container, has left what it had locked.
            zeusd: Address of the daemon that sets the clocks; None sets them here.

        Raises:
            VoltanaError: A clock that a GPU does not support.
        """
        self._allowed = {i: frozenset(gpu.supported_clocks_mhz()) for i, gpu in gpus.items()}
        wanted = None if clocks_mhz is None else frozenset(clocks_mhz)
        for index, supported in self._allowed.items():
            if wanted is not None:
                if missing := sorted(wanted - supported):
                    raise VoltanaError(
                        f"--clocks must be clocks that GPU {index} supports, got {missing}: it has "
                        f"{min(supported, default=0)} to {max(supported, default=0)} MHz"
                    )
                self._allowed[index] = wanted
        self._previous_clock_mhz = previous_clock_mhz
        watchdog = Watchdog(list(gpus), previous_clock_mhz=previous_clock_mhz, zeusd=zeusd)
        super().__init__(gpus, watchdog)
        if restores_first:
            for index in gpus:
                self._reset(index)

    def allows(self, gpu: int, value: int) -> bool:
        return value in self._allowed[gpu]

    def _set(self, gpu: int, value: int) -> None:
        self._gpus[gpu].lock_clock(value)

    def _reset(self, gpu: int) -> None:
        if self._previous_clock_mhz is None:
            self._gpus[gpu].unlock_clock()
        else:
            self._gpus[gpu].lock_clock(self._previous_clock_mhz)


class PowerBackend(_Guarded):
    """Lowers power limits, where clocks cannot be locked. Never above the limit found at start."""

    operation: ClassVar[Operation] = Operation.CAP

    def __init__(self, gpus: Mapping[int, PowerLimitGpu], *, zeusd: str | None = None) -> None:
        """Remember the limits in force and start the watchdog; no limit is touched.

        Args:
            gpus: The allowed GPUs by index.
            zeusd: Address of the daemon that sets the limits; None sets them here.
        """
        self._limits_w = {index: gpu.power_limit_w() for index, gpu in gpus.items()}
        self._lowest_w = {index: gpu.power_limit_range_w()[0] for index, gpu in gpus.items()}
        watchdog = Watchdog(list(gpus), power_limits_w=self._limits_w, zeusd=zeusd)
        super().__init__(gpus, watchdog)

    def allows(self, gpu: int, value: int) -> bool:
        return self._lowest_w[gpu] <= value * MILLI <= self._limits_w[gpu]

    def _set(self, gpu: int, value: int) -> None:
        self._gpus[gpu].set_power_limit(value * MILLI)

    def _reset(self, gpu: int) -> None:
        self._gpus[gpu].set_power_limit(self._limits_w[gpu])


class RecordingBackend:
    """Touches nothing: writes one JSON line a change, with its time (s on CLOCK_MONOTONIC)."""

    is_dry: ClassVar[bool] = True
    operation: ClassVar[Operation] = Operation.LOCK

    def __init__(self, file: TextIO, *, gpus: Collection[int], clocks_mhz: Collection[int]) -> None:
        self._file = file
        self._gpus = frozenset(gpus)
        self._clocks_mhz = frozenset(clocks_mhz)
        self._held: set[int] = set()

    @property
    def gpus(self) -> Collection[int]:
        return self._gpus

    def uuid_of(self, gpu: int) -> str | None:
        return None

    def allows(self, gpu: int, value: int) -> bool:
        return gpu in self._gpus and (not self._clocks_mhz or value in self._clocks_mhz)

    def hold(self, gpu: int, value: int) -> None:
        self._held.add(gpu)
        self._write(gpu, value)

    def restore(self, gpu: int) -> None:
        if gpu in self._held:
            self._held.discard(gpu)
            self._write(gpu, 0)

    def close(self) -> None:
        for gpu in sorted(self._held):
            self.restore(gpu)
        self._file.close()

    def _write(self, gpu: int, value: int) -> None:
        line = {"at_s": time.monotonic_ns() * 1e-9, "gpu": gpu, "clock_mhz": value}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def open_backend(
    gpu_indices: Collection[int],
    *,
    clocks_mhz: Collection[int] | None = None,
    previous_clock_mhz: int | None = None,
    is_power_cap: bool = False,
    restores_first: bool = False,
    zeusd: str | None = None,
    dry_run: Path | None = None,
) -> Backend:
    """The backend a command line asks for. With `dry_run` no driver is needed.

    Args:
        gpu_indices: Cards that may be set, as NVML numbers them.
        clocks_mhz: Clocks that may be locked; None for all.
        previous_clock_mhz: Lock to return to; None gives the clock back to the driver.
        is_power_cap: Lower power limits where clocks cannot be locked.
        restores_first: Give the clocks back before anything else.
        zeusd: Address of the daemon that sets them; None sets them here.
        dry_run: File that records each change; nothing is touched then.

    Raises:
        VoltanaError: No such GPU, no driver, or a clock the card does not have.
    """
    if is_power_cap and restores_first:
        raise VoltanaError(
            "--restore-first is for clocks: a power limit that was left lowered cannot be told "
            "from one that was meant; set yours with nvidia-smi -pl before the start"
        )
    if dry_run is not None:
        file = dry_run.open("w", encoding="utf-8")
        return RecordingBackend(file, gpus=gpu_indices, clocks_mhz=clocks_mhz or ())
    with ExitStack() as opened:
        gpus = {i: opened.enter_context(open_gpu(i, zeusd=zeusd)) for i in gpu_indices}
        backend: Backend
        if is_power_cap:
            backend = PowerBackend(gpus, zeusd=zeusd)
        else:
            backend = ClockBackend(
                gpus,
                clocks_mhz=clocks_mhz,
                previous_clock_mhz=previous_clock_mhz,
                restores_first=restores_first,
                zeusd=zeusd,
            )
        opened.pop_all()  # the NVML sessions live as long as the process
    return backend
