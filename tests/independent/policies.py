"""Routers and controllers written anew from their published rules and docs/policies.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from tests.independent.hardware import Hardware

if TYPE_CHECKING:
    from tests.independent.fleet import Fleet
    from tests.independent.job import Job
    from tests.independent.server import Decode, Server

REFERENCE_LEVELS_MHZ = (1005, 1095, 1200, 1305, 1410)
TILE = 128


Batch = tuple[int, int]
"""Requests, and their new tokens (prompts) or context (steps)."""


class Controller(Protocol):
    """Decides the clock of one server."""

    first_mhz: int
    idle_plan: tuple[float, int] | None
    """After so many seconds without work, lock this clock."""

    def decide(self, batch: int, tokens: int, waiting: int, delay_s: float) -> int: ...

    def decide_both(
        self, prompts: Batch, steps: Batch, running: int, waiting: int, delay_s: float
    ) -> int: ...


class Static:
    """One clock for the whole run."""

    idle_plan: tuple[float, int] | None = None

    def __init__(self, clock: int) -> None:
        self.first_mhz = clock

    def decide(self, batch: int, tokens: int, waiting: int, delay_s: float) -> int:
        return self.first_mhz

    def decide_both(
        self, prompts: Batch, steps: Batch, running: int, waiting: int, delay_s: float
    ) -> int:
        return self.first_mhz


class EcoFreq:
    """A queue: the top level. Else the lowest level whose believed time fits the promise less the
    longest wait in the batch (prefill; 0 in decode), else the top one. It begins at the lowest."""

    def __init__(
        self,
        hardware: Hardware,
        phase: str,
        levels: list[int],
        promises_s: dict[str, float],
        idle_s: float,
    ) -> None:
        self._hardware, self._phase = hardware, phase
        self._levels, self._promises_s = sorted(levels), promises_s
        self._promise_s = promises_s.get(phase, 0.0)
        self.first_mhz = self._levels[0]
        self.idle_plan: tuple[float, int] | None = (idle_s, self._levels[0])

    def decide(self, batch: int, tokens: int, waiting: int, delay_s: float) -> int:
        believed_s = self._hardware.believed_s
        if waiting == 0:
            for clock in self._levels:
                if believed_s(self._phase, clock, batch, tokens) <= self._promise_s - delay_s:
                    return clock
        return self._levels[-1]

    def decide_both(
        self, prompts: Batch, steps: Batch, running: int, waiting: int, delay_s: float
    ) -> int:
        """Both parts' time within the promises of those who wait for it."""
        limits_s = [self._promises_s["prefill"] - delay_s] if prompts[0] else []
        limits_s += [self._promises_s["decode"]] if running else []
        parts = {"prefill": prompts, "decode": steps}
        for clock in self._levels if waiting == 0 else []:
            time_s = sum(
                self._hardware.believed_s(p, clock, *part) for p, part in parts.items() if part[0]
            )
            if time_s <= min(limits_s):
                return clock
        return self._levels[-1]


class RoundRobin:
    """Prefill and decode in turn."""

    def __init__(self) -> None:
        self._turn = -1

    def route(self, job: Job, fleet: Fleet, now_s: float) -> tuple[int, int]:
        self._turn += 1
        return self._turn % len(fleet.prefill or fleet.decode), self._turn % len(fleet.decode)


class EcoRoute:
    """VoltanaLLM's router `fadr`: prefill by dice, decode by what a request would do to the clock.

    Below a tile everywhere: lowest clock, then fewest requests. Else by tags: the level that the
    request would force an instance to, or minus the present one if it forces none.
    """

    def __init__(self, hardware: Hardware, promise_s: float, seed: int) -> None:
        self._hardware, self._promise_s = hardware, promise_s
        # the stream of routers: docs/simulator.md
        self._dice = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, 0)))

    def route(self, job: Job, fleet: Fleet, now_s: float) -> tuple[int, int]:
        many = len(fleet.prefill)
        prefill = int(self._dice.integers(many)) if many > 1 else 0
        servers = fleet.decode
        if max(s.open_jobs for s in servers) < TILE:
            return prefill, min(range(len(servers)), key=lambda i: self._calm(servers[i], now_s))
        tags = [self._tag(s, job) for s in servers]
        sizes = [abs(tag) for tag in tags]
        steps = [REFERENCE_LEVELS_MHZ.index(size) for size in sizes]
        allowed = list(range(len(servers)))
        if max(steps) - min(steps) > 1:
            allowed = [i for i in allowed if sizes[i] == min(sizes)]
        return prefill, min(allowed, key=lambda i: (tags[i], *_fill(servers[i]), i))

    def _calm(self, server: Server, now_s: float) -> tuple[int, int]:
        clock = self._hardware.top_if_unlocked_mhz(server.seen_clock_mhz(now_s))
        return clock, server.open_jobs

    def _tag(self, server: Decode, job: Job) -> int:
        n = server.open_jobs
        load = server.kv_tokens + sum(j.context for j in (*server.retracted, *server.queue))
        present = self._lowest_mhz(n, load + 2 * n)
        raised = self._lowest_mhz(n + 1, load + job.prompt + 50 * n)
        return raised if raised > present or raised == REFERENCE_LEVELS_MHZ[-1] else -present

    def _lowest_mhz(self, batch: int, tokens: int) -> int:
        for clock in REFERENCE_LEVELS_MHZ:
            if self._hardware.believed_s("decode", clock, batch, tokens) <= self._promise_s:
                return clock
        return REFERENCE_LEVELS_MHZ[-1]


def _fill(server: Server) -> tuple[int, int]:
    """Fewest tiles first, of those the fullest."""
    return -(-server.open_jobs // TILE), -server.open_jobs
