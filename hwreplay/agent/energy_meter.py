"""Energy of an instance's GPUs, read by a thread of its own: a driver's call may take long."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final, Protocol

from profiles.device.gpu import DeviceError

PERIOD_S: Final = 0.1
"""Counters of data-centre cards move every 20 to 100 ms."""


class EnergyCounter(Protocol):
    """A card that counts its energy."""

    def energy_j(self) -> float: ...


class EnergyMeter:
    """The sum of the cards' counters since it was made."""

    def __init__(self, gpus: Sequence[EnergyCounter], *, period_s: float = PERIOD_S) -> None:
        """Read once, then start the thread.

        Raises:
            DeviceError: A card does not count its energy.
        """
        self._gpus = gpus
        self._period_s = period_s
        self._start_j = self._total_j()
        self._energy_j = 0.0
        self._error: DeviceError | None = None
        self._is_ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="energy", daemon=True)
        self._thread.start()

    @property
    def energy_j(self) -> float | None:
        """Last reading in J, at most a period old; None once a card has stopped answering."""
        return None if self._error else self._energy_j

    @property
    def error(self) -> DeviceError | None:
        """Why the readings have stopped."""
        return self._error

    def close(self) -> None:
        """End the thread."""
        self._is_ended.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._is_ended.wait(self._period_s):
            try:
                self._energy_j = self._total_j() - self._start_j
            except DeviceError as error:
                self._error = error
                return

    def _total_j(self) -> float:
        return sum(gpu.energy_j() for gpu in self._gpus)
