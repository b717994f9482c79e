"""The coalesced driver: one heap with one valid entry an instance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from heapq import heappop, heappush

from profiles.catalog import Profile
from sim.config import SimConfig
from sim.engine.coalesced import CoalescedDecode
from sim.engine.fleet import Fleet
from sim.engine.instance import Instance
from sim.engine.log import RunLog
from sim.policies.base import PREFILL
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
        self, config: SimConfig, profile: Profile, requests: Iterable[Workload], log: RunLog
    ) -> None:
        super().__init__(config, profile, requests, log)
        self._heap: list[tuple[float, int, Instance | None, Action | None]] = []
        self._order = 0
        self.num_events = 0
        """Arrivals, steps and actions so far: the work that a run is."""
        for instance in self.instances:
            instance.on_work = self._wake
            if isinstance(instance, CoalescedDecode):
                instance.on_cut = self._schedule
                instance.may_coalesce &= not self._cluster.is_observed

    def _play(self) -> float:
        heap, log = self._heap, self._log
        limit_s = math.inf if self._config.run_limit_s is None else self._config.run_limit_s
        arrivals = self._arrivals()
        coming = next(arrivals, None)
        if self._timeline is not None:
            self._sample(0.0)
        while coming is not None or log.unresolved:
            if coming is not None and (not heap or coming.arrival_s <= heap[0][0]):
                if coming.arrival_s >= limit_s:
                    return limit_s
                self._now_s = coming.arrival_s
                self._arrive(coming, coming.arrival_s)
                coming = next(arrivals, None)
            else:
                at_s, order, instance, action = heappop(heap)
                if at_s >= limit_s:
                    return limit_s
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
                    continue
            self.num_events += 1
        return self._now_s

    def _wake(self, instance: Instance) -> None:
        self._schedule(instance, self._now_s)

    def _schedule(self, instance: Instance, at_s: float) -> None:
        self._order += 1
        instance.due = self._order if instance.state.phase == PREFILL else self._order + _LAST
        heappush(self._heap, (at_s, instance.due, instance, None))

    def _later(self, at_s: float, action: Action) -> None:
        self._order += 1
        heappush(self._heap, (at_s, self._order, None, action))

    def _sample(self, now_s: float) -> None:
        assert self._timeline is not None
        self._later(self._timeline.sample(now_s), self._sample)
