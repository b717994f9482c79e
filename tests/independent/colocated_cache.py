"""A server of both phases that keeps what was asked and answered, token by token."""

from __future__ import annotations

from tests.independent.cache import TokenCache
from tests.independent.colocated import Colocated
from tests.independent.fleet import Fleet
from tests.independent.job import Job
from tests.independent.policies import Controller
from tests.independent.server import Noise


class Keeping(Colocated):
    """What a job has in the tree is its `path`; all else of its context is its own."""

    def __init__(self, fleet: Fleet, controller: Controller, noise: Noise) -> None:
        super().__init__(fleet, controller, noise)
        self.cache = TokenCache(self.capacity)
        self.found = self.computed = 0
        self._chunk = 0

    @property
    def used(self) -> int:
        decoding = sum(job.context - len(job.path or ()) for job in self.running)
        begun = sum(self._length(job) - len(job.path or ()) for job in self.begun)
        return decoding + begun + sum(t.locks > 0 for t in self.cache.all())

    def _has_room(self) -> bool:
        line = self.retracted or self.queue
        here = len(self.running) + len(self.begun)
        if not line or here >= self.fleet.limit("max_running_requests"):
            return False
        job, reserve = line[0], max(int(self.fleet.settings["kv_reserve_tokens"]), 1)
        path = self.cache.find(job.said[: self._length(job) - 1])
        fresh = self._length(job) - sum(t.locks > 0 for t in path)
        if here and self.used + fresh + reserve * (here + 1) > self.capacity:
            return False
        job.lock(path)
        job.done_prompt = len(path)
        self.found += len(path)
        return True

    def _chunks(self, *, lets_in: bool) -> list[tuple[Job, int]]:
        chunks = super()._chunks(lets_in=lets_in)
        self._chunk = sum(chunk for _, chunk in chunks)
        self.computed += self._chunk
        self.cache.take(self._chunk)
        return chunks

    def _put_back(self) -> None:
        self.cache.free(len(self.running))
        super()._put_back()

    def _drop(self, job: Job) -> None:
        self.cache.computing -= job.context - len(job.path or ())
        job.lock([])
        self.cache.free(int(self.fleet.settings["kv_retract_tokens"]) * len(self.running))

    def _end_both(self, steps: list[Job], now_s: float) -> None:
        self.cache.take(len(steps))
        self.cache.computing -= self._chunk
        done = [job for job in self.begun if job.done_prompt == self._length(job)]
        for job in done:
            self._keep(job, job.done_prompt)
        for job in steps:
            if len(job.token_s) + 1 == job.wanted:
                self.cache.computing -= job.context + 1 - len(job.path or ())
                self._keep(job, job.context + 1)
        for job in self.begun if self._chunk else ():
            if job not in done:
                self._keep(job, job.done_prompt)
        super()._end_both(steps, now_s)

    def _keep(self, job: Job, known: int) -> None:
        """So much of it is in the tree, for whoever comes once its last token is out."""
        path = self.cache.keep(job.said[:known])
        self.cache.find(job.said[: min(known, job.prompt)])
        job.lock(path)
        if known == len(job.said) - 1:
            job.lock([])
