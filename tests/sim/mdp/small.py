"""Routing MDPs small enough to solve by hand or by another program."""

from __future__ import annotations

from dataclasses import replace

from tests.sim.policies.doubles import Formula, make_context
from voltana.sim.mdp.grid import StateGrid
from voltana.sim.mdp.model import InstanceModel, ModelParameters, build_instance

IDLE_W, BUSY_W, PER_REQUEST_W = 40.0, 100.0, 10.0


class AffinePower:
    """40 W idle, 100 W + 10 W a request busy."""

    def power_w(self, phase: str, clock_mhz: int, batch_size: int, tokens: int) -> float:
        return BUSY_W + PER_REQUEST_W * batch_size

    def idle_power_w(self, clock_mhz: int) -> float:
        return IDLE_W


def one_level(
    capacity: int, *, penalty_j: float = 0.0, slo_itl_s: float = 1.0, slope_s: float = 0.0
) -> InstanceModel:
    """T = 0.1 s + slope·n, 10 tokens a request: 1 request/s a request when the slope is 0."""
    grid = StateGrid(
        batch_edges_requests=tuple(range(capacity + 2)),
        kv_nodes_tokens=(15.0,),
        levels_mhz=(1000,),
    )
    parameters = ModelParameters(
        slo_itl_s=slo_itl_s,
        input_tokens=5,
        output_tokens=10,
        context_tokens=15,
        penalty_j=penalty_j,
    )
    predictor = Formula(lambda p, f, b, t: 0.1 + slope_s * b)
    context = replace(make_context(predictor, levels_mhz=(1000,)), power=AffinePower())
    return build_instance(grid, parameters, context)
