"""Where time passes: what is due when, and in which order at one instant.

At one instant arrivals come first (the fleet plays up to each of them), then ends of prefill,
deliveries and samples in the order in which they were asked for, and boundaries of decode last.
Two agendas keep this order: a heap here, and SimPy (`voltana.sim.engine.simpy_agenda`).
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Protocol

from voltana.sim.engine.instance import Instance
from voltana.sim.engine.logs.exact import RunLog

Action = Callable[[float], None]
"""Takes the time when it is called."""


class Agenda(Protocol):
    """What a fleet asks of either."""

    now_s: float
    """The present; the fleet sets it when a request arrives."""
    num_events: int
    """Arrivals, steps and actions so far: the work that a run is."""

    def step_at(self, instance: Instance, at_s: float) -> None:
        """Step this instance then, in place of what was asked for before, and so on from there."""

    def call_at(self, at_s: float, action: Action) -> None:
        """Call `action` then."""

    def play(self, until_s: float, log: RunLog | None = None) -> None:
        """Let happen what is due before `until_s`; with a log, while it has open requests."""


class HeapAgenda:
    """One heap, with one entry an instance that counts."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_events = 0
        self._heap: list[tuple[float, int, Instance | None, Action | None]] = []
        self._number = 0

    def step_at(self, instance: Instance, at_s: float) -> None:
        self._number += 1
        number = self._number + (instance.step_rank << 60)
        instance.step_number = number
        heappush(self._heap, (at_s, number, instance, None))

    def call_at(self, at_s: float, action: Action) -> None:
        self._number += 1
        heappush(self._heap, (at_s, self._number, None, action))

    def play(self, until_s: float, log: RunLog | None = None) -> None:
        heap = self._heap
        while heap and heap[0][0] < until_s and (log is None or log.unresolved):
            at_s, number, instance, action = heappop(heap)
            if instance is None:
                assert action is not None
                self.now_s = at_s
                action(at_s)
            elif instance.step_number == number:
                self.now_s = at_s
                end_s = instance.step(at_s)
                if end_s is not None:
                    self.step_at(instance, end_s)
            else:
                continue  # asked for again since
            self.num_events += 1
