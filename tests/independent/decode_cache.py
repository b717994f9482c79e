"""A decode server that keeps what was asked and answered, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tests.independent.cache import Token, TokenCache
from tests.independent.job import Job
from tests.independent.policies import Controller
from tests.independent.server import Decode, Noise

if TYPE_CHECKING:
    from tests.independent.fleet import Fleet


class Remembering(Decode):
    """Who waits for memory is in `line`; who has some and does not run, in `aside`."""

    def __init__(self, fleet: Fleet, controller: Controller, noise: Noise) -> None:
        super().__init__(fleet, controller, noise)
        self.cache = TokenCache(self.capacity)
        self.line: list[tuple[Job, Callable[[float], None]]] = []
        self.aside: dict[Job, int] = {}
        """The tokens set aside for each."""
        self.ready: list[Job] = []
        """Of these, those that need a place in the batch alone."""
        self.joined_with: dict[Job, int] = {}
        """Of those that run, the tokens that were in the tree when they joined."""
        self._left_out: list[Job] = []
        self._held: dict[Job, Sequence[Token]] = {}
        """What each has locked."""
        self._reserve = max(int(fleet.settings["kv_reserve_tokens"]), 1)

    @property
    def waiting(self) -> int:
        return super().waiting + len(self.ready)

    @property
    def _used(self) -> int:
        return self.capacity - self.cache.room()

    def visit(self, job: Job, start: Callable[[float], None], now_s: float) -> None:
        self.line.append((job, start))
        if self._rests:
            self._give_memory(now_s)

    def let_go(self, job: Job, now_s: float) -> None:
        self._left_out.append(job)
        if self._rests:
            self._keep_left_out()
            self._give_memory(now_s)

    @property
    def _rests(self) -> bool:
        return not self.is_busy and not self.is_woken

    def _keep_left_out(self) -> None:
        for job in self._left_out:
            self.cache.computing -= self.aside.pop(job)
            self.cache.keep(job.tokens)
            self._lock(job, [])
        self._left_out = []

    def _give_memory(self, now_s: float) -> None:
        """To those that go on, else to the first in line, as long as there is some."""
        while self.retracted and self._goes_on(self.retracted[0]):
            job = self.retracted.pop(0)
            self._set_aside(job, job.context)
            self.ready.append(job)
        while self.line and not self.retracted:
            job, start = self.line[0]
            path = self.cache.find(job.tokens)
            if not self._fits(job, path):
                return
            del self.line[0]
            self._lock(job, path)
            job.unsent = len(path)
            self._set_aside(job, job.prompt - len(path))
            start(now_s)

    def _set_aside(self, job: Job, tokens: int) -> None:
        self.aside[job] = tokens
        self.cache.take(tokens)

    def _goes_on(self, job: Job) -> bool:
        if len(self.running) + len(self.ready) >= self.fleet.limit("max_running_requests"):
            return False
        here = len(self.running) + len(self.aside)
        needed = self._used + job.context + self._reserve * (here + 1)
        return not (self.running or self.ready) or needed <= self.capacity

    def _fits(self, job: Job, path: Sequence[Token]) -> bool:
        here = len(self.running) + len(self.aside)
        if not here:
            return True
        fresh = job.prompt - sum(token.locks > 0 for token in path)
        if self._used + fresh + self._reserve * (here + 1) > self.capacity:
            return False
        still = [*self.aside, job]
        ends = [j.prompt + j.wanted - j.context for j in still]
        ends += [j.prompt + j.wanted for j in self.running]
        return sum(j.context for j in still) + max(ends) <= self.capacity

    def _admit(self, now_s: float) -> None:
        self._give_memory(now_s)
        if not self.retracted:
            self.ready += self.queue
            self.queue.clear()
        while self.ready and len(self.running) < self.fleet.limit("max_running_requests"):
            job = self.ready.pop(0)
            self.cache.computing -= self.aside.pop(job)
            self._lock(job, self.cache.keep(job.said[: job.context]))
            self.cache.find(job.tokens)  # a piece ends where the prompt does
            self.joined_with[job] = job.context
            self.running.append(job)
            if not job.token_s and self.fleet.prefill_makes_first:
                job.token_s.append(now_s)

    def _make_room(self) -> None:
        if self.cache.room() < len(self.running):
            self.cache.free(len(self.running))
            freed = int(self.fleet.settings["kv_retract_tokens"])
            while len(self.running) > 1 and self.cache.room() < freed * len(self.running):
                job = self._least_done()
                self.running.remove(job)
                self.retracted.append(job)
                self.retractions += 1
                self.cache.computing -= job.context - self.joined_with.pop(job)
                self._lock(job, [])
                self.cache.free(freed * len(self.running))
        self.cache.take(len(self.running))

    def _end(self, now_s: float) -> None:
        for job in self.running:
            if len(job.token_s) + 1 == job.wanted:
                known = job.context + 1
                self.cache.computing -= known - self.joined_with.pop(job)
                self.cache.keep(job.said[:known])
                self._lock(job, [])
        self._keep_left_out()
        super()._end(now_s)

    def _lock(self, job: Job, path: Sequence[Token]) -> None:
        for token in path:
            token.locks += 1
        for token in self._held.pop(job, ()):
            token.locks -= 1
        self._held[job] = path
