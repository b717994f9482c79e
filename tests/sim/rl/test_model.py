"""The instance's chain: clocks tied to the state or moving, and the price of a full instance."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from profiles.catalog import load_profile
from profiles.errors import VoltanaError
from sim.policies.mdp.grid import StateGrid, batch_edges
from sim.rl.factored import solve_group
from sim.rl.model import InstanceModel, ModelParameters, build_instance
from tests.sim.policies.doubles import Formula
from tests.sim.rl.small import AffinePower

PARAMETERS = ModelParameters(
    slo_itl_s=0.15, input_tokens=5, output_tokens=10, context_tokens=15, penalty_j=2.0
)
TIED = dataclasses.replace(PARAMETERS, tied_mhz=(1000, 1400))


class ClockPower(AffinePower):
    """A tenth of a watt a MHz busy, so that the clock that is chosen shows."""

    def power_w(self, phase: str, frequency_mhz: int, batch_size: int, tokens: int) -> float:
        return 0.1 * frequency_mhz


def build(parameters: ModelParameters, levels_mhz: tuple[int, ...]) -> InstanceModel:
    """0.1 s a request at 1000 MHz, 0.06 s at 1400 MHz; up to 3 requests."""
    grid = StateGrid(
        batch_edges_requests=(0, 1, 2, 3, 4), kv_nodes_tokens=(15.0,), levels_mhz=levels_mhz
    )
    per_request = {1000: 0.1, 1400: 0.06}
    predictor = Formula(lambda p, f, b, t: per_request[f] * b)
    return build_instance(grid, parameters, predictor, ClockPower())


def test_tied_clocks_follow_the_rule_at_once() -> None:
    """EcoFreq at 150 ms: one request fits at 1000 MHz (100 ms, 100 W), two need 1400 MHz (120 ms,
    140 W), three are late there too (180 ms): 3 / 0.18 s late tokens of 2 J on top of 140 W."""
    model = build(TIED, (1400,))
    assert model.cost_w.tolist() == pytest.approx([40.0, 100.0, 140.0, 140.0 + 2.0 * 3 / 0.18])
    assert model.energy_w.tolist() == pytest.approx([40.0, 100.0, 140.0, 140.0])
    rates = model.generator.toarray()
    assert rates[1, 0] == pytest.approx(1 / (10 * 0.1))
    assert rates[2, 1] == pytest.approx(2 / (10 * 0.12))
    np.testing.assert_allclose(rates.sum(axis=1), 0.0, atol=1e-12)


def test_a_full_instance_has_its_price() -> None:
    """10 tokens of 2 J unless another price is given."""
    assert build(TIED, (1400,)).blocked_j.tolist() == [0.0, 0.0, 0.0, 20.0]
    dear = dataclasses.replace(TIED, turned_away_j=500.0)
    assert build(dear, (1400,)).blocked_j.tolist() == [0.0, 0.0, 0.0, 500.0]


def test_tied_clocks_cost_nearly_what_moving_ones_do() -> None:
    """On the A100 a change of clock takes one iteration of a request's 325: within 1 %."""
    profile = load_profile("a100-80g-sxm/llama-3.1-8b")
    levels = profile.meta.clocks.default_levels_mhz
    parameters = ModelParameters(
        slo_itl_s=0.035, input_tokens=200, output_tokens=325, context_tokens=470, penalty_j=0.1
    )
    costs = []
    for grid_levels, tied in ((levels, ()), (levels[-1:], levels)):
        grid = StateGrid(
            batch_edges_requests=batch_edges(300, 8),
            kv_nodes_tokens=(470.0,),
            levels_mhz=grid_levels,
        )
        model = build_instance(
            grid, dataclasses.replace(parameters, tied_mhz=tied), profile.predictor(),
            profile.truth(),
        )  # fmt: skip
        costs.append([solve_group(model, rate_rps, 1).cost_w for rate_rps in (3.0, 10.0, 18.0)])
    np.testing.assert_allclose(costs[1], costs[0], rtol=0.01)
    assert costs[0][2] > 1.2 * costs[0][0]


def test_contradictions_are_refused() -> None:
    with pytest.raises(VoltanaError, match="cannot be free"):
        dataclasses.replace(TIED, clock_rule="free")
    with pytest.raises(VoltanaError, match="a grid of one level"):
        build(TIED, (1000, 1400))
