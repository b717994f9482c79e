"""The plain driver: SimPy, a process an instance, an event an iteration."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from functools import partial

import simpy
from simpy.core import StopSimulation
from simpy.events import URGENT, EventPriority

from profiles.catalog import Profile
from sim.config import SimConfig
from sim.engine.fleet import Fleet
from sim.engine.instance import Instance
from sim.engine.log import RunLog
from sim.engine.timeline import Timeline
from sim.policies.base import PREFILL
from sim.workload.workload import Workload

_LAST = EventPriority(2)
"""A priority after SimPy's URGENT (0) and NORMAL (1)."""


class SimpyFleet(Fleet):
    """The readable reference; the coalesced driver is held against it by differential tests.

    At one instant arrivals come first, then prefill, deliveries and samples, then decode.
    """

    def __init__(
        self, config: SimConfig, profile: Profile, requests: Iterable[Workload], log: RunLog
    ) -> None:
        super().__init__(config, profile, requests, log)
        self.env = simpy.Environment()
        self._all_sent = False

    def _play(self) -> float:
        env = self.env
        self._all_ended = env.event()
        for instance in self.instances:
            env.process(self._serve(instance))
        if self._timeline is not None:
            env.process(self._sample(self._timeline))
        env.process(self._send())
        if self._config.run_limit_s is not None:
            limit = _happening(env)
            limit.callbacks.append(StopSimulation.callback)
            env.schedule(limit, URGENT, self._config.run_limit_s)
        env.run(until=self._all_ended)
        return float(env.now)

    def _send(self) -> Generator[simpy.Event, None, None]:
        env = self.env
        for request in self._arrivals():
            delay_s = request.arrival_s - env.now
            if delay_s > 0:
                arrival = _happening(env)
                env.schedule(arrival, URGENT, delay_s)
                yield arrival
            self._arrive(request, env.now)
        self._all_sent = True
        self._check_end()

    def _serve(self, instance: Instance) -> Generator[simpy.Event, None, None]:
        env = self.env
        while True:
            work = env.event()
            instance.on_work = partial(_start, work)
            yield work
            end_s = instance.step(env.now)
            while end_s is not None:
                yield self._end_of_iteration(instance, end_s)
                end_s = instance.step(env.now)
                self._check_end()

    def _end_of_iteration(self, instance: Instance, end_s: float) -> simpy.Event:
        """A timeout; at one instant decode comes last, so that what prefill ends there joins."""
        env = self.env
        if instance.state.phase == PREFILL:
            return env.timeout(end_s - env.now)
        event = _happening(env)
        env.schedule(event, priority=_LAST, delay=end_s - env.now)
        return event

    def _check_end(self) -> None:
        if self._all_sent and self._log.unresolved == 0 and not self._all_ended.triggered:
            self._all_ended.succeed()

    def _make_refresh(self, instance: Instance) -> Callable[[], None]:
        return lambda: instance.refresh(self.env.now)

    def _sample(self, timeline: Timeline) -> Generator[simpy.Event, None, None]:
        while True:
            yield self.env.timeout(timeline.sample(self.env.now) - self.env.now)

    def _later(self, at_s: float, action: Callable[[float], None]) -> None:
        timeout = self.env.timeout(at_s - self.env.now)

        def arrive(_: simpy.Event) -> None:
            action(self.env.now)
            self._check_end()

        timeout.callbacks.append(arrive)


def _happening(env: simpy.Environment) -> simpy.Event:
    """An event to be scheduled with a priority of our own, which SimPy's timeouts do not take."""
    event = simpy.Event(env)
    event._ok, event._value = True, None
    return event


def _start(work: simpy.Event, instance: Instance) -> None:
    work.succeed()
