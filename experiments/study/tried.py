"""What was tried beyond EcoMin and brought too little: two policies and the table that says so.

python -m voltana.experiments.study.tried --out results/tried

Neither is in the list of policies; this module's name stands for either in a configuration.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from voltana.experiments.frontier.trial import Bench, Load
from voltana.experiments.script import run_script
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.markdown import markdown_table
from voltana.sim.policies.base import DECODE, InstanceState, PolicyContext, RequestView, States
from voltana.sim.policies.controllers.ecomin import EcoMin, EcoMinParameters
from voltana.sim.policies.parts.clocks import first_clock_mhz
from voltana.sim.policies.registry import Entry
from voltana.sim.policies.routers.consolidate import Consolidate, ConsolidateParameters

_MEMORY_S: Final = 8.0
_NEAR: Final = 1.0
"""Room, in deviations of a Poisson batch, below which the demand sets the clock."""
_AIM: Final = 0.2
_GAIN: Final = 0.1
"""Part of the demand more for each deviation that the room is below `_AIM`."""


class Forward(EcoMin):
    """EcoMin whose clock near the fullest batch follows a forecast of the demand, not the room.

    Demand: the token rate averaged over 8 s, plus a tenth for each deviation of the batch beyond
    its aim. The clock is the least that makes as many tokens at the batch that is to come.
    """

    __slots__ = ("_demand", "_seen_s")

    def __init__(self, parameters: EcoMinParameters, context: PolicyContext) -> None:
        super().__init__(parameters, context)
        self._demand = self._seen_s = 0.0

    def _for_decode(self, state: InstanceState) -> int:
        wanted_mhz = super()._for_decode(state)
        elapsed_s = min(state.now_s - self._seen_s, 1.0)
        self._seen_s = state.now_s
        if state.last_duration_s > 0.0:
            rate = state.last_batch_size / state.last_duration_s
            self._demand += (rate - self._demand) * elapsed_s / (elapsed_s + _MEMORY_S)
        batch = max(state.num_running, state.last_batch_size)
        tokens = max(state.kv_tokens, state.last_tokens)
        most = self._most(tokens / batch)
        here = max(batch + state.num_waiting, state.open_requests)
        room = (most - here) / math.sqrt(most)
        if room >= _NEAR:
            return wanted_mhz
        soon = max(min(here, most), batch)
        demand = self._demand * (1.0 + _GAIN * (_AIM - room))
        return first_clock_mhz(
            self._levels_mhz,
            lambda f: (
                f >= max(wanted_mhz, self._bottom_mhz)
                and soon / self._bound_s(f, soon, tokens * soon // batch) >= demand
            ),
        )


_STEP_S: Final = 1.0
_FAST_S: Final = 5.0
_SLOW_S: Final = 30.0
_FULL_J: Final = 1e5
"""What a plan pays for each second of a batch beyond the fullest."""


class Ahead(Consolidate):
    """Consolidation by model-predictive control: clocks and active set over the next `horizon`.

    Every look at the fleet plays the next seconds for each number of active instances: arrivals
    at the rate of the last 5 s go to the active ones, each instance runs the lowest clock that
    keeps ITL and leaves at n/(L·T), with L the tokens a request has had lately. Energy above idle,
    plus what the requests left behind will cost, is the price of that number.
    """

    horizon_s: Final = 20.0

    def __init__(self, parameters: ConsolidateParameters, context: PolicyContext) -> None:
        super().__init__(parameters, context)
        self._came = 0
        self._rps = self._slow_rps = self._slow_tokens = 0.0
        self._open: list[float] = []
        self._points: dict[tuple[int, int], tuple[float, float]] = {}

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        self._came += 1
        return super().route(request, prefill, decode)

    def _plan(self, decode: States, elapsed_s: float) -> None:
        rps = self._came / elapsed_s
        self._came = 0
        self._rps += (rps - self._rps) * elapsed_s / (elapsed_s + _FAST_S)
        slow = elapsed_s / (elapsed_s + _SLOW_S)
        self._slow_rps += (rps - self._slow_rps) * slow
        self._slow_tokens += (self._rate - self._slow_tokens) * slow
        self._open = [float(state.open_requests) for state in decode]
        super()._plan(decode, elapsed_s)

    def _cheapest(self, active: int, context_tokens: float, most: int) -> int:
        length = self._slow_tokens / self._slow_rps if self._slow_rps > 0.0 else 0.0
        if length <= 1.0:
            return super()._cheapest(active, context_tokens, most)
        context = int(context_tokens) // 32 * 32 + 32
        prices = {
            k: self._played_j(k, context, length)
            * (1.0 + self._settings.gain_frac if k < active else 1.0)
            for k in range(1, most + 1)
        }
        return min(prices, key=lambda k: prices[k])

    def _played_j(self, active: int, context: int, length: float) -> float:
        """Energy above idle of the next seconds and of what they leave behind."""
        here, spent_j = [*self._open], 0.0
        full = self._fullest.requests(context, self._limit_s)
        for _ in range(int(self.horizon_s / _STEP_S)):
            here = _filled(here, active, self._rps * _STEP_S)
            for i, requests in enumerate(here):
                if requests < 0.5:
                    here[i] = 0.0
                    continue
                time_s, above_w = self._point(min(requests, full), context)
                spent_j += above_w * _STEP_S + (_FULL_J if requests > 1.05 * full else 0.0)
                here[i] = max(requests - min(requests, full) / (length * time_s) * _STEP_S, 0.0)
        time_s, above_w = self._point(0.85 * full, context)
        return spent_j + sum(here) * length * above_w * time_s / (0.85 * full)

    def _point(self, requests: float, context: int) -> tuple[float, float]:
        """Time (s) and power above idle (W) at the lowest clock that keeps ITL."""
        batch = max(round(requests / 4.0) * 4, 1)
        if (batch, context) not in self._points:
            c, tokens = self._context, batch * context
            clock = first_clock_mhz(
                self._levels_mhz,
                lambda f: c.predictor.predict_s(DECODE, f, batch, tokens) <= self._limit_s,
            )
            self._points[batch, context] = (
                c.predictor.predict_s(DECODE, clock, batch, tokens),
                c.power.power_w(DECODE, clock, batch, tokens) - self._park_w,
            )
        return self._points[batch, context]


def _filled(here: list[float], active: int, more: float) -> list[float]:
    """The first `active` instances after so many more requests, each to the emptiest."""
    order = sorted(range(active), key=lambda i: here[i])
    filled = [*here]
    for rank in range(1, active + 1):  # raise the emptiest ones to the next level, together
        group = order[:rank]
        level = (sum(here[i] for i in group) + more) / rank
        if rank == active or level <= here[order[rank]]:
            for i in group:
                filled[i] = level
            break
    return filled


CONTROLLER: Final = Entry(make=Forward, parameters=EcoMinParameters)
ROUTER: Final = Entry(make=Ahead, parameters=ConsolidateParameters)

_HERE: Final = "voltana.experiments.study.tried"
BASE: Final = {
    "profile": "a100-80g-sxm/llama-3.1-8b", "workload": "sharegpt", "slo_ttft_s": 0.6,
    "slo_itl_s": 0.045, "metrics": "sketch",
}  # fmt: skip
LOADS: Final = (
    (Load(name="day, swing .6, 25/s", settings={
        "rate_rps": 25, "arrivals": "diurnal:swing=0.6", "duration_s": 900}), (1,)),
    (Load(name="step 12.5 to 37.5/s", settings={
        "rate_rps": 25, "arrivals": "step:ratio=3,at=0.5", "duration_s": 300}), (1,)),
    (Load(name="constant 40/s", settings={"rate_rps": 40, "duration_s": 120}), (1, 2, 3)),
)  # fmt: skip
TRIED: Final = (
    ("the default", "ecomin", "consolidate"),
    ("a reserve of half a deviation", "ecomin:reserve=0.5", "consolidate"),
    ("prompts gather up to 0.7 of TTFT", "ecomin:hold=0.7", "consolidate"),
    ("forecast of the demand sets the clock", f"{_HERE}:reserve=0.01", "consolidate"),
    ("model-predictive active set, 20 s", "ecomin", _HERE),
)


def table(out: Path) -> str:
    """Mean energy and the least attainment, by what was tried and load, as Markdown."""
    heads = ["tried"]
    for load, seeds in LOADS:
        heads += [f"{load.name}, seeds {seeds[0]} to {seeds[-1]}: kJ", "least kept %"]
    rows = []
    for name, controller, router in TRIED:
        cells = [name]
        for load, seeds in LOADS:
            bench = Bench(BASE, load, "attainment", out)
            settings = {"controller": controller, "router": router}
            trial = bench.run(settings, name, [{"seed": seed} for seed in seeds])
            if trial.error:
                raise VoltanaError(trial.error)
            cells += [f"{trial.energy_j / 1e3:.1f}", f"{100 * trial.worst_attainment:.2f}"]
        rows.append(cells)
    return markdown_table(heads, rows, numbers=range(1, len(heads)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What was tried and left out.")
    parser.add_argument("--out", type=Path, default=Path("results/tried"))
    sys.stdout.write(table(parser.parse_args(arguments).out) + "\n")


if __name__ == "__main__":
    run_script(main)
