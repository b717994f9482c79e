"""Energy of an instance's GPUs, read by a thread of its own: a driver's call may take long."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Final, Protocol

from voltana.profiles.device.gpu import DeviceError, NoAnswerError, UnsupportedQueryError

PERIOD_S: Final = 0.1
"""Counters of data-centre cards move every 20 to 100 ms."""


class Card(Protocol):
    """What a meter asks of a card."""

    def energy_j(self) -> float: ...

    def power_w(self) -> float: ...


class CardMeter:
    """Energy of one card: counted by it, or integrated from its power by the trapezoid rule."""

    def __init__(self, gpu: Card) -> None:
        """Read once. Raises DeviceError if the card can tell neither energy nor power."""
        self._gpu = gpu
        self._energy_j = 0.0
        self._last_ns = time.monotonic_ns()
        self._has_counter = True
        try:
            gpu.energy_j()
        except UnsupportedQueryError:
            self._has_counter = False
            self._last_w = gpu.power_w()

    def energy_j(self) -> float:
        """The counter, or the integral since this meter was made."""
        if self._has_counter:
            return self._gpu.energy_j()
        now_ns, power_w = time.monotonic_ns(), self._gpu.power_w()
        self._energy_j += (power_w + self._last_w) / 2 * (now_ns - self._last_ns) * 1e-9
        self._last_ns, self._last_w = now_ns, power_w
        return self._energy_j


class EnergyMeter:
    """The sum of the cards' counters since it was made."""

    def __init__(
        self, gpus: Sequence[Card], *, period_s: float = PERIOD_S, repeats: bool = False
    ) -> None:
        """Read once, then start the thread.

        Args:
            gpus: What to add up.
            period_s: Between two readings.
            repeats: A reading that has not changed is an old one, repeated: it counts as of when it
                came.

        Raises:
            DeviceError: A card can tell neither energy nor power.
        """
        self._meters = [CardMeter(gpu) for gpu in gpus]
        self._period_s = period_s
        self._repeats = repeats
        self._start_j = self._total_j()
        self._reading = (time.monotonic_ns(), 0.0)
        self._error: DeviceError | None = None
        self._is_ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="energy", daemon=True)
        self._thread.start()

    @property
    def energy_j(self) -> float | None:
        """Last reading in J, at most a period old; None once a card has stopped answering."""
        return None if self._error else self._reading[1]

    @property
    def read_ns(self) -> int:
        """When that was, on CLOCK_MONOTONIC."""
        return self._reading[0]

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
                now_ns, energy_j = time.monotonic_ns(), self._total_j() - self._start_j
            except NoAnswerError:
                continue
            except DeviceError as error:
                self._error = error
                return
            if not self._repeats or energy_j != self._reading[1]:
                self._reading = (now_ns, energy_j)

    def _total_j(self) -> float:
        return sum(meter.energy_j() for meter in self._meters)
