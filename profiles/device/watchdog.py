"""Puts clocks (or power limits) back when their owner is killed by what no handler sees (SIGKILL).

A small process of its own holds the other end of a pipe (`voltana.profiles.common.owner`). The
owner writes one byte when it locks a clock (`ARMED`) and one when it has put it back (`DISARMED`).
When it has gone the watchdog unlocks if the last byte was ARMED. Nothing is deserialised: single
bytes in, nothing out but one hello.

    owner    spawn ── hello? ── ARMED ── lock … ── unlock ── DISARMED ── close
    watchdog         hello ──── read ──────────────── (end of file while armed: unlock)
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Final

from voltana.profiles.common.owner import (
    HELLO_TIMEOUT_S,
    end_guard,
    has_said_hello,
    receive_until_gone,
    say_hello,
    start_guard,
)
from voltana.profiles.device.gpu import DeviceError

ARMED: Final = b"A"
DISARMED: Final = b"D"
DIRECTLY: Final = "-"
"""In place of zeusd's address: NVML sets clocks and limits."""
NUM_RESTORE_TRIES: Final = 5
RESTORE_RETRY_S: Final = 0.5


class Watchdog:
    """The owner's handle on its watchdog process."""

    def __init__(
        self,
        gpu_indices: Sequence[int],
        *,
        previous_clock_mhz: int | None = None,
        power_limits_w: Mapping[int, float] | None = None,
        zeusd: str | None = None,
    ) -> None:
        """Start the process and wait for its hello, so that it stands before the first lock.

        Args:
            gpu_indices: The GPUs to put back.
            previous_clock_mhz: Lock to return to. None: the driver's control.
            power_limits_w: By GPU, the power limit to return to. Given, it guards the limits and
                leaves clocks alone.
            zeusd: Address of the daemon that sets clocks and limits; None sets them here.

        Raises:
            DeviceError: It did not come up, for instance because NVML refused it.
        """
        targets = [_target(index, power_limits_w) for index in gpu_indices]
        self._process = start_guard(
            "voltana.profiles.device.watchdog",
            [str(previous_clock_mhz or 0), zeusd or DIRECTLY, *targets],
        )
        if not has_said_hello(self._process):
            raise DeviceError(
                f"the clock watchdog must start within {HELLO_TIMEOUT_S:.0f} s, it did not "
                f"(exit status {self._process.returncode}): no clock was touched; see its message "
                "above"
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def arm(self) -> None:
        """From now on death means: unlock. Call before the lock."""
        self._send(ARMED)

    def disarm(self) -> None:
        """The clocks are the driver's again."""
        self._send(DISARMED)

    def close(self) -> None:
        """End the process; it restores first if it is still armed."""
        end_guard(self._process)

    def _send(self, byte: bytes) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            os.write(stdin.fileno(), byte)
        except BrokenPipeError as error:
            raise DeviceError(
                "the clock watchdog must outlive the clock lock, it has died "
                f"(pid {self.pid}): start again; `nvidia-smi -rgc` unlocks by hand"
            ) from error


def _target(index: int, power_limits_w: Mapping[int, float] | None) -> str:
    """`3`, or `3=400000` to guard GPU 3's power limit of 400000 mW."""
    return str(index) if power_limits_w is None else f"{index}={power_limits_w[index] * 1e3:.0f}"


def _restore(targets: Sequence[str], previous_clock_mhz: int, zeusd: str | None) -> bool:
    """Put every GPU back (0: unlock), trying each a few times. True if all did."""
    pending = list(targets)
    for _ in range(NUM_RESTORE_TRIES):
        for target in list(pending):
            try:
                _restore_one(target, previous_clock_mhz, zeusd)
                pending.remove(target)
            except DeviceError as error:
                sys.stderr.write(f"voltana watchdog: GPU {target}: {error}\n")
        if not pending:
            return True
        time.sleep(RESTORE_RETRY_S)
    return False


def _restore_one(target: str, previous_clock_mhz: int, zeusd: str | None) -> None:
    from voltana.profiles.device.cards import open_gpu

    index, _, limit_mw = target.partition("=")
    with open_gpu(int(index), may_be_partitioned=True, zeusd=zeusd) as gpu:
        if limit_mw:
            gpu.set_power_limit(int(limit_mw) / 1e3)
        elif previous_clock_mhz:
            gpu.lock_clock(previous_clock_mhz)
        else:
            gpu.unlock_clock()


def _watch(parent_pid: int) -> bytes:
    """Wait for the owner to go. Returns the last state byte."""
    state = DISARMED
    for received in receive_until_gone(parent_pid):
        state = received[-1:]
    return state


def _on_terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def main(arguments: Sequence[str]) -> int:
    """Run the watchdog.

    Args:
        arguments: Clock to return to (0: unlock), zeusd's address or "-", what `_target` writes.
    """
    parent_pid = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _on_terminate)
    first, address, *targets = arguments
    previous_clock_mhz = int(first)
    zeusd = None if address == DIRECTLY else address
    from voltana.profiles.device.cards import open_gpu

    for target in targets:
        open_gpu(int(target.partition("=")[0]), may_be_partitioned=True, zeusd=zeusd).close()
    state = ARMED
    try:
        say_hello()  # from here on the owner may lock
        state = _watch(parent_pid)
    finally:  # told to terminate: restore rather than leave a lock without a guard
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        is_restored = state != ARMED or _restore(targets, previous_clock_mhz, zeusd)
    return 0 if is_restored else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
