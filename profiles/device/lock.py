"""Locking clocks so that they always come back.

NVML can set and reset a clock lock but not read one, so the state a session returns to is stated,
not guessed: the driver's own control, or the clock the caller says was locked before.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Final, Self

from voltana.profiles.device.gpu import (
    ClockTimeoutError,
    DeviceError,
    Gpu,
    GpuBusyError,
    PermissionDeniedError,
    UnsupportedQueryError,
)
from voltana.profiles.device.watchdog import Watchdog

POLL_S: Final = 0.005
_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def check_free(gpu: Gpu, *, allowed_pids: frozenset[int] = frozenset()) -> None:
    """Refuse a card that other processes use; call it before an own process opens the card.

    Own processes (this one and its descendants) and `allowed_pids` do not count. In a container
    NVML may number processes as the host does, or as 0: such a process is in no list that can be
    read here, so it counts as foreign. An own one cannot be among them while none has been started.

    Raises:
        GpuBusyError: The message lists the foreign process ids.
    """
    foreign = sorted(pid for pid in gpu.process_ids() - allowed_pids if not _is_own(pid))
    if not foreign:
        return
    hidden = [pid for pid in foreign if not Path(f"/proc/{pid}").exists()]
    where = (
        f"; {hidden} are not in this container's process list (another PID namespace): look with "
        "nvidia-smi on the host"
        if hidden
        else ""
    )
    raise GpuBusyError(
        f"GPU {gpu.identity.index} must be free, got processes {foreign} on it{where}: "
        "end them, or pass --allow-shared and accept wrong power"
    )


def _is_own(pid: int) -> bool:
    """Whether `pid` descends from this process, by /proc."""
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        pid = int(stat.rpartition(")")[2].split()[1])
    return False


def wait_for_clock(
    gpu: Gpu, clock_mhz: int, *, timeout_s: float = 5.0, tolerance_mhz: int = 15
) -> float:
    """Read the clock back until it is there.

    Args:
        gpu: The card.
        clock_mhz: What it should reach.
        timeout_s: Longest wait, in s.
        tolerance_mhz: How far off still counts.

    Returns:
        Seconds it took.

    Raises:
        ClockTimeoutError: It was not reached; the message says where it stands and why.
    """
    start_ns = time.monotonic_ns()
    while True:
        now_mhz = gpu.clock_mhz()
        waited_s = (time.monotonic_ns() - start_ns) * 1e-9
        if abs(now_mhz - clock_mhz) <= tolerance_mhz:
            return waited_s
        if waited_s > timeout_s:
            reasons = ", ".join(sorted(gpu.throttle_reasons())) or "none"
            raise ClockTimeoutError(
                f"GPU {gpu.identity.index} must reach {clock_mhz} MHz within {timeout_s:g} s, "
                f"it stands at {now_mhz} MHz (throttling: {reasons}): let it cool, raise its power "
                "limit, or drop this clock from --frequencies"
            )
        time.sleep(POLL_S)


class ClockSession:
    """The right to lock the clocks of some GPUs; leaving it puts them back.

    They come back on normal exit, on an exception, on SIGINT, SIGTERM and SIGHUP (turned into
    exceptions while the session lasts, main thread only), and on SIGKILL by the watchdog process,
    which stands before the first lock. A session that never locks starts nothing and touches
    nothing.

    Example:
        with ClockSession([gpu]) as clocks:
            clocks.lock(1005)
            ...
    """

    def __init__(
        self,
        gpus: Sequence[Gpu],
        *,
        previous_clock_mhz: int | None = None,
        timeout_s: float = 5.0,
        tolerance_mhz: int = 15,
        allow_shared: bool = False,
        allowed_pids: frozenset[int] = frozenset(),
        has_watchdog: bool = True,
        handle_signals: bool = True,
    ) -> None:
        """Remember what to do; nothing is touched before `lock`.

        Args:
            gpus: The GPUs whose clocks move together.
            previous_clock_mhz: Lock to return to. None returns control to the driver.
            timeout_s: How long a clock may take to be reached.
            tolerance_mhz: How far off still counts as reached; one clock step.
            allow_shared: Skip the check that no other process uses the cards.
            allowed_pids: Foreign processes that may use them (an attached engine).
            has_watchdog: Guard against SIGKILL too. Off only where no NVML exists.
            handle_signals: False where the caller's event loop handles signals and unwinds.
        """
        self._gpus = tuple(gpus)
        self._previous_clock_mhz = previous_clock_mhz
        self._timeout_s = timeout_s
        self._tolerance_mhz = tolerance_mhz
        self._allow_shared = allow_shared
        self._allowed_pids = allowed_pids
        self._has_watchdog = has_watchdog
        self._handle_signals = handle_signals
        self._watchdog: Watchdog | None = None
        self._old_handlers: dict[signal.Signals, object] = {}
        self._locked: list[Gpu] = []

    def __enter__(self) -> Self:
        self.check_free()
        if self._handle_signals and threading.current_thread() is threading.main_thread():
            self._install_handlers()
        return self

    def __exit__(self, *_: object) -> None:
        for signum in self._old_handlers:
            signal.signal(signum, signal.SIG_IGN)  # a second Ctrl-C must not stop the restoring
        try:
            self.release()
        finally:
            if self._watchdog is not None:
                self._watchdog.close()
                self._watchdog = None
            self._restore_handlers()

    def unknown_pids(self) -> frozenset[int]:
        """Processes on the cards that cannot be told apart, own ones among them.

        None where NVML and this process number processes alike, as then own ones are known by
        descent. Else (a container) all that are there: taken just after an own one has started on a
        free card, they are its.
        """
        seen: frozenset[int] = frozenset().union(*(gpu.process_ids() for gpu in self._gpus))
        return frozenset() if any(map(_is_own, seen)) else seen

    def check_free(self, known_pids: frozenset[int] = frozenset()) -> None:
        """As on entering: no other process may be on the cards, unless they may be shared.

        Args:
            known_pids: Own ones that are not known by descent (`unknown_pids` after their start).

        Raises:
            GpuBusyError: Another one has come.
        """
        if not self._allow_shared:
            for gpu in self._gpus:
                check_free(gpu, allowed_pids=self._allowed_pids | known_pids)

    @property
    def watchdog_pid(self) -> int | None:
        return None if self._watchdog is None else self._watchdog.pid

    def lock(self, clock_mhz: int, *, wait: bool = True) -> float:
        """Lock every GPU at `clock_mhz`, one of the supported clocks.

        Returns:
            Seconds until the slowest GPU had reached it (0 without `wait`).

        Raises:
            DeviceError: Not a supported clock, no permission, or not reached in time.
        """
        self._check_supported(clock_mhz)
        self._guard()
        for gpu in self._gpus:
            self._lock_one(gpu, clock_mhz)
        return self.wait(clock_mhz) if wait else 0.0

    def wait(self, clock_mhz: int) -> float:
        """Wait until every GPU has reached `clock_mhz`; seconds the slowest took."""
        return max(
            wait_for_clock(
                gpu, clock_mhz, timeout_s=self._timeout_s, tolerance_mhz=self._tolerance_mhz
            )
            for gpu in self._gpus
        )

    def unlock(self) -> None:
        """Driver's control for now, the session goes on."""
        for gpu in self._locked:
            gpu.unlock_clock()

    def release(self) -> None:
        """Return every GPU to its state before the session; all are tried even if one fails."""
        if not self._locked:
            return
        failed: list[DeviceError] = []
        for gpu in self._locked:
            try:
                if self._previous_clock_mhz is None:
                    gpu.unlock_clock()
                else:
                    gpu.lock_clock(self._previous_clock_mhz)
            except DeviceError as error:
                failed.append(error)
        if failed:
            raise failed[0]  # still armed: the watchdog tries again when it is closed
        self._locked.clear()
        if self._watchdog is not None:
            self._watchdog.disarm()

    def _lock_one(self, gpu: Gpu, clock_mhz: int) -> None:
        """Lock one GPU, counted as locked before the call unless it turns out to be refused."""
        is_first = gpu not in self._locked
        if is_first:
            self._locked.append(gpu)
        try:
            gpu.lock_clock(clock_mhz)
        except (PermissionDeniedError, UnsupportedQueryError):
            if is_first:
                self._locked.remove(gpu)
            if not self._locked and self._watchdog is not None:
                self._watchdog.disarm()
            raise

    def _check_supported(self, clock_mhz: int) -> None:
        for gpu in self._gpus:
            clocks_mhz = gpu.supported_clocks_mhz()
            if clock_mhz not in clocks_mhz:
                near = min(clocks_mhz, key=lambda clock: abs(clock - clock_mhz), default=None)
                raise DeviceError(
                    f"a locked clock must be one that GPU {gpu.identity.index} supports, got "
                    f"{clock_mhz} MHz: the nearest is {near} MHz"
                )

    def _guard(self) -> None:
        if not self._has_watchdog:
            return
        if self._watchdog is None:
            indices = [gpu.identity.index for gpu in self._gpus]
            self._watchdog = Watchdog(indices, previous_clock_mhz=self._previous_clock_mhz)
        if not self._locked:
            self._watchdog.arm()

    def _install_handlers(self) -> None:
        for signum in _SIGNALS:
            current = signal.getsignal(signum)
            is_default = current in (signal.SIG_DFL, signal.default_int_handler)
            if is_default:  # an ignored or custom signal stays as its owner wants it
                self._old_handlers[signum] = current
                signal.signal(signum, _raise_exit)

    def _restore_handlers(self) -> None:
        for signum, handler in self._old_handlers.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._old_handlers.clear()


def _raise_exit(signum: int, frame: FrameType | None) -> None:
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signum)
