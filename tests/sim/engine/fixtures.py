"""Short ways to a run on a synthetic profile."""

from __future__ import annotations

from typing import Any

import numpy as np

from voltana.profiles.catalog import Profile
from voltana.sim.config import make_config
from voltana.sim.engine.simulate import simulate
from voltana.sim.metrics import summarise
from voltana.sim.policies.base import Controller, IdlePlan, InstanceState, PolicyContext
from voltana.sim.policies.controllers.fixed import NoParameters
from voltana.sim.records import RunRecord
from voltana.sim.workload.workload import Workload


def make_requests(*rows: tuple[float, int, int]) -> Workload:
    """Requests from (arrival_s, input_tokens, output_tokens)."""
    columns = list(zip(*rows, strict=True))
    return Workload(
        arrival_s=np.array(columns[0], dtype=np.float64),
        input_tokens=np.array(columns[1], dtype=np.int64),
        output_tokens=np.array(columns[2], dtype=np.int64),
    )


def run(profile: Profile, workload: Workload, **settings: Any) -> tuple[RunRecord, dict[str, Any]]:  # noqa: ANN401
    """Simulate with one instance a phase, static clocks and no actuation lag unless told."""
    values = {
        "num_prefill": 1,
        "num_decode": 1,
        "controller": "static",
        "router": "round-robin",
        "actuation_latency_s": 0.0,
        "kv_reserve_tokens": 0,
        "profile": "synthetic",
        **settings,
    }
    record = simulate(make_config(values), profile, workload)
    return record, summarise(record)


class Falling(Controller):
    """Unlocked at first; the lowest clock from its first decision on, or after 5 s of idleness."""

    def __init__(self, parameters: NoParameters, context: PolicyContext) -> None:
        self._lowest_mhz = context.clocks_mhz[0]

    def decide(self, state: InstanceState) -> int:
        return self._lowest_mhz

    def on_idle(self, state: InstanceState) -> IdlePlan:
        return IdlePlan(after_s=5.0, clock_mhz=self._lowest_mhz)
