"""The coalesced driver: one heap with one valid entry an instance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush

from profiles.catalog import Profile
from sim.config import SimConfig
from sim.engine.coalesced import CoalescedDecode
from sim.engine.fleet import Fleet
from sim.engine.instance import Instance
from sim.engine.log import RunLog
from sim.engine.request import SimRequest
from sim.policies.base import Controller, PolicyContext, Router
from sim.records import RunRecord
from sim.workload.workload import Workload

Action = Callable[[float], None]
_LAST = 1 << 60


class CoalescedFleet(Fleet):
    """Same results as the reference, in a fraction of its events.

    At one instant arrivals come first and steps of decode last; the rest in the order in which it
    was scheduled.
    """

    decode_class = CoalescedDecode

    def __init__(
        self,
        config: SimConfig,
        profile: Profile,
        requests: Iterable[Workload],
        log: RunLog,
        *,
        router: Router | None = None,
        decode_controller: Callable[[PolicyContext], Controller] | None = None,
    ) -> None:
        super().__init__(
            config, profile, requests, log, router=router, decode_controller=decode_controller
        )
        self._heap: list[tuple[float, int, Instance | None, Action | None]] = []
        self._order = 0
        self._limit_s = math.inf if config.run_limit_s is None else config.run_limit_s
        self.num_events = 0
        """Arrivals, steps and actions so far: the work that a run is."""
        for instance in self.instances:
            instance.on_work = self._wake
            if isinstance(instance, CoalescedDecode):
                instance.tie_rank = _LAST
                instance.on_cut = self._schedule
                instance.may_coalesce &= not self._cluster.is_observed

    def start(self) -> Iterator[SimRequest]:
        """Begin a run that the caller plays, one arrival after the other, in place of `run`.

        For each of the requests returned: `advance` to its arrival, look at the states, `accept`
        it. Then `finish`. What comes out is what `run` makes of the same decisions.
        """
        self._begin()
        return self._arrivals()

    def advance(self, until_s: float) -> None:
        """Let everything happen that is due before `until_s`; an arrival then comes first."""
        self._run(until_s, is_draining=False)

    def look(self, now_s: float) -> None:
        """Bring every instance's state, as a router sees it, and the log up to date."""
        for instance in self.instances:
            instance.catch_up(now_s)

    def accept(self, request: SimRequest) -> None:
        """The request arrives: it is rejected, or the router is asked and it is on its way."""
        self._now_s = request.arrival_s
        self._arrive(request, request.arrival_s)
        self.num_events += 1

    def finish(self) -> RunRecord:
        """End a run begun with `start`, after its last arrival."""
        return self._close(self._drain(), 0.0)

    def _begin(self) -> None:
        super()._begin()
        if self._timeline is not None:
            self._sample(0.0)

    def _play(self) -> float:
        limit_s = self._limit_s
        for request in self._arrivals():
            self._run(min(request.arrival_s, limit_s), is_draining=False)
            if request.arrival_s >= limit_s:
                return limit_s
            self.accept(request)
        return self._drain()

    def _drain(self) -> float:
        """Play until every request has ended, or to the limit; returns when that was."""
        self._run(self._limit_s, is_draining=True)
        return self._limit_s if self._log.unresolved else self._now_s

    def _run(self, until_s: float, *, is_draining: bool) -> None:
        heap, log = self._heap, self._log
        while heap and heap[0][0] < until_s and (log.unresolved or not is_draining):
            at_s, order, instance, action = heappop(heap)
            if instance is None:
                self._now_s = at_s
                assert action is not None
                action(at_s)
            elif instance.due == order:
                self._now_s = at_s
                end_s = instance.step(at_s)
                if end_s is not None:
                    self._schedule(instance, end_s)
            else:
                continue  # no longer valid
            self.num_events += 1

    def _wake(self, instance: Instance) -> None:
        self._schedule(instance, self._now_s)

    def _schedule(self, instance: Instance, at_s: float) -> None:
        self._order += 1
        instance.due = due = self._order + instance.tie_rank
        heappush(self._heap, (at_s, due, instance, None))

    def _later(self, at_s: float, action: Action) -> None:
        self._order += 1
        heappush(self._heap, (at_s, self._order, None, action))

    def _sample(self, now_s: float) -> None:
        assert self._timeline is not None
        self._later(self._timeline.sample(now_s), self._sample)
