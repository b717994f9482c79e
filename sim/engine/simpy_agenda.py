"""The agenda on SimPy: every step and every action is a timeout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import simpy
from simpy.events import NORMAL, EventPriority

from voltana.sim.engine.agenda import Action
from voltana.sim.engine.instance import Instance
from voltana.sim.engine.logs.exact import RunLog

_LAST: Final = EventPriority(2)
"""A priority after SimPy's URGENT (0) and NORMAL (1)."""


class SimpyAgenda:
    """See `voltana.sim.engine.agenda.Agenda`."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_events = 0
        self._env = _Environment()

    def step_at(self, instance: Instance, at_s: float) -> None:
        instance.step_number += 1
        number = instance.step_number

        def step(event: simpy.Event) -> None:
            if instance.step_number != number:
                return  # asked for again since
            self._begin(at_s)
            end_s = instance.step(at_s)
            if end_s is not None:
                self.step_at(instance, end_s)

        timeout = simpy.Timeout if instance.step_rank == 0 else _LastTimeout
        self._schedule(timeout, at_s, step)

    def call_at(self, at_s: float, action: Action) -> None:
        def call(event: simpy.Event) -> None:
            self._begin(at_s)
            action(at_s)

        self._schedule(simpy.Timeout, at_s, call)

    def play(self, until_s: float, log: RunLog | None = None) -> None:
        env = self._env
        while env.peek() < until_s and (log is None or log.unresolved):
            env.step()

    def _schedule(
        self, kind: type[simpy.Timeout], at_s: float, callback: Callable[[simpy.Event], None]
    ) -> None:
        # now + (at - now) may lie an ulp from `at`, which is what everybody is told
        kind(self._env, max(0.0, at_s - self._env.now)).callbacks.append(callback)

    def _begin(self, at_s: float) -> None:
        self.now_s = at_s
        self.num_events += 1


class _LastTimeout(simpy.Timeout):
    """It comes after all others of its instant."""


class _Environment(simpy.Environment):
    def schedule(
        self, event: simpy.Event, priority: EventPriority = NORMAL, delay: float = 0
    ) -> None:
        super().schedule(event, _LAST if isinstance(event, _LastTimeout) else priority, delay)
