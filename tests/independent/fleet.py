"""The second simulator: an event an iteration, a time stamp a token, lists and one heap.

It plays what docs/simulator.md says in the plainest way: every running request is touched in every
iteration. At one instant arrivals come first, then ends of prefill and arrivals of KV caches, then
decode.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from typing import Any, Protocol

from tests.independent.cable import Cable
from tests.independent.cache import Token, TokenCache
from tests.independent.card import Card
from tests.independent.hardware import Hardware
from tests.independent.policies import Controller
from tests.independent.staff import Staff

Noise = Callable[..., float]
"""From an iteration's start to the factor on its time; called once an iteration, in order. A server
of both phases tells whether prompts are in it."""

ARRIVAL, HANDOVER, DECODE = range(3)
"""Order of events at one instant."""


@dataclass(eq=False)
class Job:
    """One request."""

    arrival_s: float
    prompt: int
    wanted: int
    """Tokens to make."""
    done_prompt: int = 0
    steps: int = 0
    """Decode iterations so far; each wrote the keys and values of one token."""
    lost: int = 0
    """Tokens made before its cache was dropped, which it has to compute again like its prompt."""
    token_s: list[float] = field(default_factory=list)
    """When each token came out."""
    prefill: int = -1
    decode: int = -1
    is_rejected: bool = False
    tokens: Sequence[Hashable] = ()
    """What the prompt consists of; only a cache of prefixes asks."""
    said: Sequence[Hashable] = ()
    """The prompt and its answer."""
    next_turn: tuple[float, Job] | None = None
    """Seconds from its last token to the request that waited for it."""
    cached: int = 0
    """Tokens of the prompt that were there already."""
    is_cut: bool = False
    """A part of its prompt was in an earlier batch."""
    path: list[Token] | None = None
    """What it has locked in the cache."""

    @property
    def context(self) -> int:
        """Tokens in the KV cache of decode."""
        return self.prompt + self.lost + self.steps


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
        self._lock(job, path)
        job.cached = job.done_prompt = len(path)
        return True

    @staticmethod
    def _lock(job: Job, path: list[Token]) -> None:
        for token in path:
            token.locks += 1
        for token in job.path or ():
            token.locks -= 1
        job.path = path

    def _keep(self, job: Job) -> None:
        if self.cache is not None:
            self._lock(job, self.cache.keep(job.tokens[: job.done_prompt]))

    def let_go(self, job: Job, now_s: float) -> None:
        """Its keys and values are with decode."""
        if self.cache is not None:
            self.cache.keep(job.tokens)
            self._lock(job, [])
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
            latest = range(len(self.running))
            at = min(latest, key=lambda i: (self.running[i].steps, -self.running[i].prompt, -i))
            self.retracted.append(self.running.pop(at))
            self.retractions += 1

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


class Router(Protocol):
    """Picks a prefill and a decode server for a request at its arrival."""

    def route(self, job: Job, fleet: Fleet, now_s: float) -> tuple[int, int]: ...


class Fleet:
    """Plays a list of requests to their end.

    Args:
        settings: Keys of docs/configuration.md with their values, all of them.
        controller: Makes the controller of a server from its phase.
        noise: Makes the stream of factors on iteration times of a server from phase and number.
        colocated: Makes servers of both phases, where they are all there is.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        hardware: Hardware,
        router: Router,
        controller: Callable[[str], Controller],
        noise: Callable[[str, int], Noise],
        colocated: Callable[[Fleet, int], Decode] | None = None,
    ) -> None:
        self.settings, self.hardware, self._router = settings, hardware, router
        self.prefill_makes_first = settings["first_token"] == "prefill"
        self.cable_free_s: dict[int, float] = {}
        self.cables: defaultdict[int, Cable] = defaultdict(
            lambda: Cable(
                settings["kv_transfer_bytes_per_s"],
                lambda at_s, action: self.at(at_s, HANDOVER, action),
            )
        )
        """Shared ones, by number."""
        self.staff: Staff | None = None
        """Sends servers away; None: all serve."""
        self._num_ended = 0
        self._events: list[tuple[float, int, int, Callable[[float], None]]] = []
        self._count = 0
        self.end_s = 0.0
        self.prefill = [
            Prefill(self, controller("prefill"), noise("prefill", i))
            for i in range(settings["num_prefill"])
        ]
        self.decode = [
            Decode(self, controller("decode"), noise("decode", i))
            for i in range(settings["num_decode"])
        ]
        if colocated is not None:
            self.decode = [colocated(self, i) for i in range(settings["num_colocated"])]

    def limit(self, key: str) -> int:
        """A limit of the engine: the configured one, else the profile's."""
        value = self.settings.get(key)
        return int(self.hardware.limits[key] if value is None else value)

    def at(self, when_s: float, order: int, action: Callable[[float], None]) -> None:
        self._count += 1
        heappush(self._events, (when_s, order, self._count, action))

    def play(self, jobs: Sequence[Job]) -> None:
        turns = {id(job.next_turn[1]) for job in jobs if job.next_turn is not None}
        for job in jobs:
            if id(job) in turns:
                continue
            self.at(job.arrival_s, ARRIVAL, lambda now_s, job=job: self._arrive(job, now_s))  # type: ignore[misc]
        while self._events and self._num_ended < len(jobs):
            now_s, _, _, action = heappop(self._events)
            action(now_s)
            self.end_s = now_s
        for server in (*self.prefill, *self.decode):
            server.card.pass_idle(self.end_s)

    def _arrive(self, job: Job, now_s: float) -> None:
        memory = int(self.settings.get("prefix_cache_tokens") or 0)
        if job.prompt + job.wanted > self.limit("kv_capacity_tokens") or (
            memory and job.prompt + 2 >= memory
        ):
            job.is_rejected = True
            self._num_ended += 1
            return
        job.prefill, job.decode = self._router.route(job, self, now_s)
        self.decode[job.decode].open_jobs += 1
        if not self.prefill:
            self._reach_both(job, self.decode[job.decode], now_s)
            return
        server = self.prefill[job.prefill]
        server.open_jobs += 1
        server.coming += 1
        delay_s = float(self.settings["serving_latency_s"])
        if delay_s > 0:
            self.at(now_s + delay_s, HANDOVER, lambda at_s: self._reach(job, server, at_s))
        else:
            self._reach(job, server, now_s)

    def _reach_both(self, job: Job, server: Decode, now_s: float) -> None:
        def join(at_s: float) -> None:
            server.queue.append(job)
            server.wake(at_s)

        delay_s = float(self.settings["serving_latency_s"])
        if delay_s > 0:
            self.at(now_s + delay_s, HANDOVER, join)
        else:
            join(now_s)

    def _reach(self, job: Job, server: Prefill, now_s: float) -> None:
        """The request has come to its servers; decode may have to end an iteration first."""
        decode = self.decode[job.decode]
        if self.settings["prefill_starts"] == "arrival":
            server.let_in(job, now_s)
        elif decode.is_busy:
            decode.visitors.append(lambda at_s: self._shake_hands(job, server, at_s))
        else:
            self._shake_hands(job, server, now_s)

    def _shake_hands(self, job: Job, server: Prefill, now_s: float) -> None:
        """Decode has reserved room and tells prefill."""
        delay_s = float(self.settings["handshake_latency_s"])
        if delay_s > 0:
            self.at(now_s + delay_s, HANDOVER, lambda at_s: server.let_in(job, at_s))
        else:
            server.let_in(job, now_s)

    def hand_over(self, job: Job, now_s: float) -> None:
        """Prefill is done: the KV cache moves, then decode may take the request up."""
        if self.staff is not None:
            self.staff.sending[id(self.prefill[job.prefill])] += 1
        delay_s = float(self.settings["kv_transfer_latency_s"])
        bandwidth = self.settings.get("kv_transfer_bytes_per_s")
        if self.settings["kv_transfers"].startswith("shared_by_"):
            number = {"prefill": job.prefill, "decode": job.decode, "fleet": 0}
            cable = self.cables[number[self.settings["kv_transfers"].removeprefix("shared_by_")]]
            num_bytes = job.prompt * self.hardware.kv_bytes_per_token
            self.at(
                now_s + delay_s,
                HANDOVER,
                lambda at_s: cable.begin(partial(self._deliver, job), num_bytes, at_s),
            )
            return
        if bandwidth is not None:
            delay_s += job.prompt * self.hardware.kv_bytes_per_token / bandwidth
        start_s = now_s
        if self.settings["kv_transfers"] == "in_turn":  # the cable is taken until the last one ends
            start_s = max(start_s, self.cable_free_s.get(job.prefill, 0.0))
            self.cable_free_s[job.prefill] = start_s + delay_s
        if start_s + delay_s > now_s:
            self.at(start_s + delay_s, HANDOVER, lambda at_s: self._deliver(job, at_s))
        else:
            self._deliver(job, now_s)

    def answered(self, job: Job, now_s: float) -> None:
        """Its last token is out: whoever waited for it reads, and asks on."""
        self._num_ended += 1
        if job.next_turn is not None:
            think_s, turn = job.next_turn
            turn.arrival_s = now_s + think_s
            self.at(turn.arrival_s, ARRIVAL, lambda at_s: self._arrive(turn, at_s))

    def _deliver(self, job: Job, now_s: float) -> None:
        self.prefill[job.prefill].let_go(job, now_s)
        if self.staff is not None:
            self.staff.sending[id(self.prefill[job.prefill])] -= 1
            self.staff.rested(self.prefill[job.prefill], now_s)
        server = self.decode[job.decode]
        if self.prefill_makes_first and job.wanted == 1:
            job.token_s.append(now_s)
            server.open_jobs -= 1
            self.answered(job, now_s)
            return
        server.queue.append(job)
        server.wake(now_s)
