"""A server that computes prompts and decodes: an iteration at a time, as docs/simulator.md says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.independent.card import Card
from tests.independent.fleet import Fleet
from tests.independent.hardware import Hardware
from tests.independent.job import DECODE, Job
from tests.independent.policies import Controller
from tests.independent.server import Decode, Noise


class Both:
    """A card's tables, with prompts beside what it decodes."""

    def __init__(self, hardware: Hardware, settings: Mapping[str, Any]) -> None:
        self._hardware = hardware
        self._told = settings.get("mixed_overlap_frac")
        self.cards = hardware.cards
        self.prompts: tuple[float, int] | None = None

    def iteration(self, phase: str, clock: int, batch: float, tokens: int) -> tuple[float, float]:
        parts = []
        if self.prompts is not None:
            parts.append(self._hardware.iteration("prefill", clock, *self.prompts))
        if batch:
            parts.append(self._hardware.iteration("decode", clock, batch, tokens))
        total_s = sum(time_s for time_s, _ in parts)
        mean_w = sum(time_s * power_w for time_s, power_w in parts) / total_s
        if len(parts) == 2:
            hidden, of_time, of_power = self._shared(clock, batch, tokens)
            total_s = (total_s - hidden * min(time_s for time_s, _ in parts)) * of_time
            mean_w *= of_power
        return total_s, mean_w

    def _shared(self, clock: int, batch: float, tokens: int) -> list[float]:
        """Overlap and ratios: as told, else as measured."""
        assert self.prompts is not None
        measured = self._hardware.mixed if self._told is None else None
        if measured is None:
            return [float(self._told or 0.0), 1.0, 1.0]
        return measured.at(clock, self.prompts[1], batch, tokens)

    def idle_w(self, clock: int) -> float:
        return self._hardware.idle_w(clock)

    def awake_w(self, clock: int) -> float:
        return self._hardware.awake_w(clock)


class Colocated(Decode):
    """`running` is what decodes, `begun` whose prompts are under way."""

    phase = "colocated"

    def __init__(self, fleet: Fleet, controller: Controller, noise: Noise) -> None:
        super().__init__(fleet, controller, noise)
        self.tables = Both(fleet.hardware, fleet.settings)
        settings = fleet.settings
        lag_s, stall_s = (float(settings[k]) for k in ("actuation_latency_s", "clock_stall_s"))
        self.card = Card(self.tables, self.phase, controller.first_mhz, lag_s, stall_s)
        self.card.rest(0.0, controller.idle_plan)
        self.order = settings.get("colocated_order") or "sglang"
        self.begun: list[Job] = []

    @property
    def waiting(self) -> int:
        return super().waiting + sum(job.done_prompt < self._length(job) for job in self.begun)

    @staticmethod
    def _length(job: Job) -> int:
        """Of what has to be computed before it decodes: the prompt and all tokens made so far."""
        return job.prompt + job.lost

    @property
    def used(self) -> int:
        return sum(job.context for job in self.running) + sum(map(self._length, self.begun))

    def _overflows(self) -> bool:
        return bool(self.running) and self.used + len(self.running) > self.capacity

    def next_iteration(self, now_s: float, *, is_first: bool) -> None:
        was_full, is_vllm = self._overflows(), self.order == "vllm"
        if was_full and is_vllm:
            self._put_back()
        chunks = self._chunks(lets_in=not (was_full and is_vllm))
        if was_full and not chunks:
            self._put_back()
            chunks = self._chunks(lets_in=False)
        if not chunks and not self.running:
            self.rest(now_s)
            return
        stands = bool(chunks) and (self.order == "sglang" or self._overflows())
        steps = [] if stands else list(self.running)
        tokens = sum(chunk for _, chunk in chunks)
        work = sum(chunk * (chunk + 2 * job.done_prompt) for job, chunk in chunks)
        self.tables.prompts = (tokens**2 / work, tokens) if chunks else None
        for job, chunk in chunks:
            job.done_prompt += chunk
        context = sum(job.context for job in steps)
        new = [job.arrival_s for job, _ in chunks if not job.token_s]
        clock = self.controller.decide_both(
            (len(chunks), tokens), (len(steps), context), len(self.running), self.waiting,
            now_s - min(new, default=now_s),
        )  # fmt: skip
        self.card.ask(now_s, clock)
        factor = self.noise(now_s, bool(chunks))
        end_s = self.card.work(now_s, len(steps), context, factor)
        self.fleet.at(end_s, DECODE, lambda at_s: self._end_both(steps, at_s))

    def _chunks(self, *, lets_in: bool) -> list[tuple[Job, int]]:
        budget = self.fleet.limit("max_prefill_tokens")
        if self.order != "sglang":
            budget -= len(self.running)
        taken: list[tuple[Job, int]] = []
        while budget > 0 and len(taken) < self.fleet.limit("max_prefill_requests"):
            cut = [job for job in self.begun if job.done_prompt < self._length(job)]
            fresh = [job for job in cut if job not in [j for j, _ in taken]]
            if not fresh and lets_in and self._has_room():
                fresh = [(self.retracted or self.queue).pop(0)]
                self.begun.append(fresh[0])
            if not fresh:
                break
            chunk = min(self._length(fresh[0]) - fresh[0].done_prompt, budget)
            taken.append((fresh[0], chunk))
            budget -= chunk
        return taken

    def _has_room(self) -> bool:
        line = self.retracted or self.queue
        here = len(self.running) + len(self.begun)
        if not line or here >= self.fleet.limit("max_running_requests"):
            return False
        reserve = max(int(self.fleet.settings["kv_reserve_tokens"]), 1)
        needed = self.used + self._length(line[0]) + reserve * (here + 1)
        return here == 0 or needed <= self.capacity

    def _put_back(self) -> None:
        freed = int(self.fleet.settings["kv_retract_tokens"])
        fewest = 0 if self.begun else 1
        while len(self.running) > fewest and self.used + freed * len(self.running) > self.capacity:
            at = len(self.running) - 1
            if self.order != "vllm":
                every = range(len(self.running))
                at = min(every, key=lambda i: (len(self.running[i].token_s),
                                               -self.running[i].prompt, -i))  # fmt: skip
            job = self.running.pop(at)
            self._drop(job)
            job.lost, job.steps, job.done_prompt = len(job.token_s), 0, 0
            self.retracted.insert(0 if self.order == "vllm" else len(self.retracted), job)
            self.retractions += 1

    def _drop(self, job: Job) -> None:
        """Its cache is lost."""

    def _end_both(self, steps: list[Job], now_s: float) -> None:
        for job in steps:
            job.steps += 1
            job.token_s.append(now_s)
        done = [job for job in self.begun if job.done_prompt == self._length(job)]
        self.begun = [job for job in self.begun if job not in done]
        for job in done:
            job.token_s.append(now_s)
        here = [*self.running, *done]
        self.running = [job for job in here if len(job.token_s) < job.wanted]
        for job in here:
            if len(job.token_s) == job.wanted:
                self.open_jobs -= 1
                self.fleet.answered(job, now_s)
        self.go_on(now_s)
