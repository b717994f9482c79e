"""DualScale's fine tier: look a few prefill batches ahead; slow decode down to its promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from voltana.sim.policies.base import DECODE, Controller, IdlePlan, InstanceState, PolicyContext
from voltana.sim.policies.parts.clocks import least_energy_clock_mhz, levels_of
from voltana.sim.policies.parts.fitting import LowestFitting
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class DualScaleParameters:
    """Parameters of `dualscale-mpc`."""

    num_batches: int = parameter(8, "prefill batches looked ahead (K of the paper)", low=1)
    num_levels: int = parameter(
        7, "clocks considered, spread from the phase's clock of least energy to the top", low=1
    )
    frequencies_mhz: tuple[int, ...] = parameter((), "clocks considered, instead of num_levels")
    batch_tokens: int = parameter(16_384, "token budget of a projected batch", low=1)
    kv_limit_frac: float = parameter(
        0.9, "part of the KV cache above which decode runs at the top clock (ours)", low=0, high=1
    )
    idle_s: float = parameter(5.0, "idle time before the lowest level is locked (ours)", low=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectedBatch:
    """A prefill batch that is about to run or expected to follow."""

    num_requests: int
    tokens: int
    waited_s: float
    """How long its oldest request has waited until now."""


class DualScale(Controller):
    """Prefill: cheapest clocks for the next K batches that keep every TTFT; decode: lowest fitting.

    Prefill: the batch at hand and the queue, packed first come first served under the token
    budget, make up to K batches, all at the top clock at first. Then, again and again, one level is
    taken off the prefix or the suffix of the sequence that saves the most energy (P·T summed) while
    every batch still ends within what the TTFT promise leaves its oldest request for prefill. The
    first batch's clock is applied. Decode: the lowest clock with T <= SLO; above `kv_limit` of the
    KV cache or with requests waiting, the top one.

    Source: DualScale (formerly BiScale), arXiv 2602.18755, tier 2. Which segments its
    search tries is not known to us: prefixes and suffixes, greedily, are ours, and so are the top
    clock while requests wait in decode and that no level is below the clock of least energy.
    """

    __slots__ = ("_context", "_decision_mhz", "_fitting", "_levels_mhz", "_parameters")

    def __init__(self, parameters: DualScaleParameters, context: PolicyContext) -> None:
        self._levels_mhz = levels_of(
            context,
            parameters.frequencies_mhz,
            parameters.num_levels,
            "dualscale-mpc",
            low_mhz=least_energy_clock_mhz(context),
        )
        self._fitting = LowestFitting(
            context.predictor, DECODE, self._levels_mhz, context.slo_itl_s
        )
        self._parameters = parameters
        self._context = context
        self._decision_mhz = self._levels_mhz[-1]

    def initial_clock_mhz(self) -> int:
        return self._levels_mhz[-1]

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return IdlePlan(after_s=self._parameters.idle_s, clock_mhz=self._levels_mhz[0])

    def decide(self, state: InstanceState) -> int:
        if state.last_batch_size > 0:
            if self._context.phase == DECODE:
                self._decision_mhz = self._for_decode(state)
            else:
                plan_mhz = self.plan_mhz(self._project(state))
                self._decision_mhz = plan_mhz[0]
        return self._decision_mhz

    def _for_decode(self, state: InstanceState) -> int:
        context = self._context
        pressed = state.kv_tokens > self._parameters.kv_limit_frac * context.kv_capacity_tokens
        if state.num_waiting > 0 or pressed:
            return self._levels_mhz[-1]
        return self._fitting.clock_mhz(state.last_batch_size, state.last_tokens)

    def _project(self, state: InstanceState) -> list[ProjectedBatch]:
        batches = [
            ProjectedBatch(
                num_requests=state.last_batch_size,
                tokens=state.last_tokens,
                waited_s=state.last_queue_delay_s,
            )
        ]
        budget, count, tokens, oldest_s = self._parameters.batch_tokens, 0, 0, 0.0
        for request in state.list_waiting() if state.num_waiting else ():
            if count and tokens + request.input_tokens > budget:
                batches.append(ProjectedBatch(num_requests=count, tokens=tokens, waited_s=oldest_s))
                count, tokens, oldest_s = 0, 0, 0.0
                if len(batches) >= self._parameters.num_batches:
                    return batches
            count += 1
            tokens = min(tokens + request.input_tokens, budget)
            oldest_s = max(oldest_s, state.now_s - request.arrival_s)
        if count and len(batches) < self._parameters.num_batches:
            batches.append(ProjectedBatch(num_requests=count, tokens=tokens, waited_s=oldest_s))
        return batches

    def plan_mhz(self, batches: Sequence[ProjectedBatch]) -> list[int]:
        """One clock a batch: see the class docstring."""
        times_s, energies_j = self._tables(batches)
        num = len(batches)
        levels = [len(self._levels_mhz) - 1] * num
        segments = [(0, i) for i in range(1, num + 1)] + [(i, num) for i in range(1, num)]
        while True:
            best, best_j = levels, _total(energies_j, levels)
            for start, end in segments:
                tried = [k - 1 if start <= i < end else k for i, k in enumerate(levels)]
                if min(tried) < 0 or not self._fits(batches, times_s, tried):
                    continue
                energy_j = _total(energies_j, tried)
                if energy_j < best_j:
                    best, best_j = tried, energy_j
            if best is levels:
                return [self._levels_mhz[k] for k in levels]
            levels = best

    def _tables(
        self, batches: Sequence[ProjectedBatch]
    ) -> tuple[list[list[float]], list[list[float]]]:
        """Time (s) and energy (J) of each batch at each level."""
        c = self._context
        times_s = [
            [c.predictor.predict_s(c.phase, f, b.num_requests, b.tokens) for f in self._levels_mhz]
            for b in batches
        ]
        energies_j = [
            [
                c.power.power_w(c.phase, f, b.num_requests, b.tokens) * time_s
                for f, time_s in zip(self._levels_mhz, row, strict=True)
            ]
            for b, row in zip(batches, times_s, strict=True)
        ]
        return times_s, energies_j

    def _fits(
        self, batches: Sequence[ProjectedBatch], times_s: list[list[float]], levels: list[int]
    ) -> bool:
        ends_s = 0.0
        for batch, row, level in zip(batches, times_s, levels, strict=True):
            ends_s += row[level]
            if batch.waited_s + ends_s > self._context.prefill_budget_s:
                return False
        return True


def _total(energies_j: list[list[float]], levels: list[int]) -> float:
    return sum(row[level] for row, level in zip(energies_j, levels, strict=True))
