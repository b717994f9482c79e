"""The servers of the second simulator: a queue, a batch and a card each.

Every running request is touched in every iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tests.independent.cache import TokenCache
from tests.independent.card import Card
from tests.independent.job import DECODE, HANDOVER, Job
from tests.independent.policies import Controller

if TYPE_CHECKING:
    from tests.independent.fleet import Fleet

Noise = Callable[..., float]
"""From an iteration's start to the factor on its time; called once an iteration, in order. A server
of both phases tells whether prompts are in it."""


class Server:
    """Queue, batch and card of one instance."""

    phase: str

    def __init__(self, fleet: Fleet, controller: Controller, noise: Noise) -> None:
        settings = fleet.settings
        self.fleet, self.controller, self.noise = fleet, controller, noise
        lag_s = float(settings["actuation_latency_s"])
        stall_s = float(settings["clock_stall_s"])
        self.card = Card(fleet.hardware, self.phase, controller.first_mhz, lag_s, stall_s)
        self.card.rest(0.0, controller.idle_plan)
        self.queue: list[Job] = []
        self.is_busy = False
        self.is_woken = False
        self.open_jobs = 0
        self._boundary_mhz = controller.first_mhz

    def seen_clock_mhz(self, now_s: float) -> int:
        """A router sees a busy server's clock as of its last iteration boundary."""
        if not self.is_busy:
            self.card.pass_idle(now_s)
            return self.card.clock
        return self._boundary_mhz

    def wake(self, now_s: float) -> None:
        """Work has come: if idle, begin after all else of this instant."""
        if not self.is_busy and not self.is_woken:
            self.is_woken = True
            self.fleet.at(now_s, HANDOVER if self.phase == "prefill" else DECODE, self._begin)

    def run(self, now_s: float, batch: float, tokens: int) -> float:
        """Start one iteration; returns when it ends."""
        return self.card.work(now_s, batch, tokens, self.noise(now_s))

    def _begin(self, now_s: float) -> None:
        self.is_woken = False
        self.card.pass_idle(now_s)
        self._boundary_mhz = self.card.clock
        self.is_busy = True
        self.next_iteration(now_s, is_first=True)

    def go_on(self, now_s: float) -> None:
        """An iteration has ended."""
        self._boundary_mhz = self.card.clock
        self.next_iteration(now_s, is_first=False)

    def next_iteration(self, now_s: float, *, is_first: bool) -> None:
        raise NotImplementedError

    def rest(self, now_s: float) -> None:
        self.is_busy = False
        self.card.rest(now_s, self.controller.idle_plan)
        if self.fleet.staff is not None:
            self.fleet.staff.rested(self, now_s)


class Prefill(Server):
    """Prompts in order of arrival, as many as the token budget holds; the last may be cut."""

    phase = "prefill"

    def __init__(self, fleet: Fleet, controller: Controller, noise: Noise) -> None:
        super().__init__(fleet, controller, noise)
        self.coming = 0
        """Requests that count as waiting and may not start yet."""
        memory = int(fleet.settings.get("prefix_cache_tokens") or 0)
        self.cache = TokenCache(memory) if memory else None

    def let_in(self, job: Job, now_s: float) -> None:
        self.coming -= 1
        self.queue.append(job)
        self._start(now_s)

    def _start(self, now_s: float) -> None:
        if not self.is_busy and self.queue and self._fits(self.queue[0], 0):
            self.wake(now_s)

    def _fits(self, job: Job, others: int) -> bool:
        """Two tokens a request stay free, beside what others of the batch take."""
        if self.cache is None or job.path is not None:
            return True
        path = self.cache.find(job.tokens[: job.prompt - 1])
        fresh = sum(t.locks == 0 for t in path)
        if job.prompt - len(path) + 2 >= self.cache.room() - fresh - others:
            return False
        job.lock(path)
        job.cached = job.done_prompt = len(path)
        return True

    def _keep(self, job: Job) -> None:
        if self.cache is not None:
            job.lock(self.cache.keep(job.tokens[: job.done_prompt]))

    def let_go(self, job: Job, now_s: float) -> None:
        """Its keys and values are with decode."""
        if self.cache is not None:
            self.cache.keep(job.tokens)
            job.lock([])
            self._start(now_s)

    def next_iteration(self, now_s: float, *, is_first: bool) -> None:
        if not self.queue or not self._fits(self.queue[0], 0):
            self.rest(now_s)
            return
        budget = self.fleet.limit("max_prefill_tokens")
        taken: list[tuple[Job, int]] = []
        for job in self.queue[: self.fleet.limit("max_prefill_requests")]:
            others = sum(chunk + 2 for _, chunk in taken)
            is_full = self.cache is not None and self.cache.room() <= others
            if not budget or (is_full and any(not j.is_cut for j, _ in taken)):
                break
            if not self._fits(job, others):
                break
            chunk = min(job.prompt - job.done_prompt, budget)
            budget -= chunk
            taken.append((job, chunk))
        tokens = sum(chunk for _, chunk in taken)
        if self.cache is not None:
            self.cache.take(tokens)
        equal = tokens**2 / sum(chunk * (chunk + 2 * job.done_prompt) for job, chunk in taken)
        for job, chunk in taken:
            job.done_prompt += chunk
        ready = [job for job, _ in taken if job.done_prompt == job.prompt]
        del self.queue[: len(ready)]
        delay_s = now_s - min(job.arrival_s for job, _ in taken)
        clock = self.controller.decide(len(taken), tokens, len(self.queue) + self.coming, delay_s)
        self.card.ask(now_s, clock)
        end_s = self.run(now_s, equal, tokens)
        cut = [job for job, _ in taken if job.done_prompt < job.prompt]
        self.fleet.at(end_s, HANDOVER, lambda at_s: self._end(at_s, ready, cut, tokens))

    def _end(self, now_s: float, ready: Sequence[Job], cut: Sequence[Job], tokens: int) -> None:
        if self.cache is not None:
            self.cache.computing -= tokens
        for job in ready:
            self._keep(job)
        for job in ready:
            self.open_jobs -= 1
            self.fleet.hand_over(job, now_s)
        for job in cut:
            job.is_cut = True
            self._keep(job)
        self.go_on(now_s)


class Decode(Server):
    """Continuous batching: every iteration gives every running request one token."""

    phase = "decode"

    def __init__(self, fleet: Fleet, controller: Controller, noise: Noise) -> None:
        super().__init__(fleet, controller, noise)
        self.running: list[Job] = []
        """In order of joining."""
        self.retracted: list[Job] = []
        """Put back for want of room; they come before the queue."""
        self.retractions = 0
        self.capacity = fleet.limit("kv_capacity_tokens")
        self._ended = (0, 0)
        self.visitors: list[Callable[[float], None]] = []
        """What happens at the end of the running iteration besides."""

    def visit(self, job: Job, start: Callable[[float], None], now_s: float) -> None:
        """A request that may be prefilled once the running iteration has ended."""
        if self.is_busy:
            self.visitors.append(start)
        else:
            start(now_s)

    def let_go(self, job: Job, now_s: float) -> None:
        """Its only token was prefill's: it will not come."""

    @property
    def waiting(self) -> int:
        """Requests that are here and do not run."""
        return len(self.retracted) + len(self.queue)

    @property
    def kv_tokens(self) -> int:
        """Context of the batch, as of the start of the running iteration."""
        return sum(job.context for job in self.running)

    def next_iteration(self, now_s: float, *, is_first: bool) -> None:
        self._admit(now_s)
        self._make_room()
        if not self.running:
            self.rest(now_s)
            return
        if not is_first:
            self.card.ask(now_s, self.controller.decide(*self._ended, self.waiting, 0.0))
        tokens = self.kv_tokens
        self._ended = (len(self.running), tokens)
        self.fleet.at(self.run(now_s, len(self.running), tokens), DECODE, self._end)

    def _admit(self, now_s: float) -> None:
        """Retracted requests first; each needs its context and a reserve for all, itself too."""
        reserve = max(int(self.fleet.settings["kv_reserve_tokens"]), 1)
        while self.waiting and len(self.running) < self.fleet.limit("max_running_requests"):
            line = self.retracted or self.queue
            needed = self.kv_tokens + line[0].context + reserve * (len(self.running) + 1)
            if self.running and needed > self.capacity:
                return
            job = line.pop(0)
            self.running.append(job)
            if not job.token_s and self.fleet.prefill_makes_first:
                job.token_s.append(now_s)

    def _make_room(self) -> None:
        """If the next tokens do not fit: out with the fewest outputs, of these the longest prompt,
        of these the latest joiner, until so many tokens a request are free."""
        if self.kv_tokens + len(self.running) <= self.capacity:
            return
        freed = int(self.fleet.settings["kv_retract_tokens"])
        while len(self.running) > 1 and self.kv_tokens + freed * len(self.running) > self.capacity:
            job = self._least_done()
            self.running.remove(job)
            self.retracted.append(job)
            self.retractions += 1

    def _least_done(self) -> Job:
        def rank(i: int) -> tuple[int, int, int]:
            return self.running[i].steps, -self.running[i].prompt, -i

        return self.running[min(range(len(self.running)), key=rank)]

    def _end(self, now_s: float) -> None:
        for job in self.running:
            job.steps += 1
            job.token_s.append(now_s)
        finished = [job for job in self.running if len(job.token_s) == job.wanted]
        self.running = [job for job in self.running if len(job.token_s) < job.wanted]
        self.open_jobs -= len(finished)
        for job in finished:
            self.fleet.answered(job, now_s)
        visitors, self.visitors = self.visitors, []
        for visit in visitors:
            visit(now_s)
        self.go_on(now_s)
