"""The second simulator: an event an iteration, a time stamp a token, lists and one heap.

It plays what docs/simulator.md says in the plainest way: every running request is touched in every
iteration. At one instant arrivals come first, then ends of prefill and arrivals of KV caches, then
decode.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from heapq import heappop, heappush
from typing import Any, Protocol

from tests.independent.cable import Cable
from tests.independent.decode_cache import Remembering
from tests.independent.hardware import Hardware
from tests.independent.job import ARRIVAL, HANDOVER, Job
from tests.independent.policies import Controller
from tests.independent.server import Decode, Noise, Prefill
from tests.independent.staff import Staff


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
        kind = Remembering if settings.get("decode_cache") else Decode
        self.decode = [
            kind(self, controller("decode"), noise("decode", i))
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
        else:
            decode.visit(job, lambda at_s: self._shake_hands(job, server, at_s), now_s)

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
            num_bytes = (job.prompt - job.unsent) * self.hardware.kv_bytes_per_token
            self.at(
                now_s + delay_s,
                HANDOVER,
                lambda at_s: cable.begin(partial(self._deliver, job), num_bytes, at_s),
            )
            return
        if bandwidth is not None:
            delay_s += (job.prompt - job.unsent) * self.hardware.kv_bytes_per_token / bandwidth
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
            server.let_go(job, now_s)
            return
        server.queue.append(job)
        server.wake(now_s)
