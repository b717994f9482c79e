"""The instance's chain: clocks tied to the state or moving, and the price of a full instance."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import pytest

from tests.sim.mdp.small import AffinePower
from tests.sim.policies.doubles import Formula, decode_state, make_context
from voltana.experiments.study.train import policy_context
from voltana.profiles.catalog import load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.mdp.clock_rule import ControllerClock
from voltana.sim.mdp.factored import solve_group
from voltana.sim.mdp.grid import StateGrid, batch_edges
from voltana.sim.mdp.model import (
    InstanceModel,
    ModelParameters,
    bucket_loads,
    build_instance,
)
from voltana.sim.policies.base import Controller, IdlePlan, InstanceState, PolicyContext
from voltana.sim.policies.controllers.fixed import NoParameters
from voltana.sim.policies.parts.clocks import levels_of
from voltana.sim.policies.registry import CONTROLLERS, Entry, make_controller

PARAMETERS = ModelParameters(
    slo_itl_s=0.15, input_tokens=5, output_tokens=10, context_tokens=15, penalty_j=2.0
)
TIED = dataclasses.replace(PARAMETERS, is_tied=True)


class ClockPower(AffinePower):
    """A tenth of a watt a MHz busy, so that the clock that is chosen shows."""

    def power_w(self, phase: str, clock_mhz: int, batch_size: int, tokens: int) -> float:
        return 0.1 * clock_mhz


PER_REQUEST_S = {1000: 0.1, 1200: 0.08, 1400: 0.06}
CONTEXT = dataclasses.replace(
    make_context(Formula(lambda p, f, b, t: PER_REQUEST_S[f] * b), slo_itl_s=0.15),
    power=ClockPower(),
)


def build(
    parameters: ModelParameters,
    levels_mhz: tuple[int, ...],
    kv_nodes_tokens: tuple[float, ...] = (15.0,),
) -> InstanceModel:
    """0.1 s a request at 1000 MHz, 0.06 s at 1400 MHz; up to 3 requests."""
    grid = StateGrid(
        batch_edges_requests=(0, 1, 2, 3, 4), kv_nodes_tokens=kv_nodes_tokens, levels_mhz=levels_mhz
    )
    return build_instance(grid, parameters, CONTEXT)


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
    context = policy_context(make_config({"slo_itl_s": 0.035}), profile)
    parameters = ModelParameters(
        slo_itl_s=0.035, input_tokens=200, output_tokens=325, context_tokens=470, penalty_j=0.1
    )
    costs = []
    for grid_levels, tied in ((levels, False), (levels[-1:], True)):
        grid = StateGrid(
            batch_edges_requests=batch_edges(300, 8),
            kv_nodes_tokens=(470.0,),
            levels_mhz=grid_levels,
        )
        model = build_instance(grid, dataclasses.replace(parameters, is_tied=tied), context)
        costs.append([solve_group(model, rate_rps, 1).cost_w for rate_rps in (3.0, 10.0, 18.0)])
    np.testing.assert_allclose(costs[1], costs[0], rtol=0.01)
    assert costs[0][2] > 1.2 * costs[0][0]


def test_context_grows_with_tokens_and_falls_with_prompts() -> None:
    """KV nodes 10 and 20 tokens a request, prompts of 5, outputs of 10, mean context 15.

    A running request gains (15 - 5) / 10 = 1 token an iteration, so that ten iterations of the
    batch carry it to the next node. An arrival makes the mean (n·k + 5) / (n + 1): a batch of one
    at 20 falls to 12.5, three quarters of the way to 10, a batch of two to 15.
    """
    model = build(TIED, (1400,), kv_nodes_tokens=(10.0, 20.0))
    rates = model.generator.toarray()
    at = {(n, kv): 2 * n + kv for n in range(4) for kv in range(2)}
    for n, time_s in ((1, 0.1), (2, 0.12), (3, 0.18)):
        assert rates[at[n, 0], at[n, 1]] == pytest.approx(1 / time_s / 10)
        assert rates[at[n, 1], at[n, 0]] == 0.0
    assert rates[at[0, 0], at[0, 1]] == 0.0
    arrival = model.arrival.toarray()
    for n in (1, 2):
        after = {k: arrival[at[n, 1], at[n + 1, k]] for k in (0, 1)}
        mean_tokens = 10.0 * after[0] + 20.0 * after[1]
        assert mean_tokens == pytest.approx((n * 20.0 + 5.0) / (n + 1))
        assert arrival[at[n, 0], at[n + 1, 0]] == 1.0  # there is no lower node
    assert arrival[at[0, 0], at[1, 0]] == 1.0


def test_half_the_growth_of_context_where_it_is_half_as_long() -> None:
    """Mean context 10: (10 - 5) / 10 tokens an iteration, whatever the mean prompt and output."""
    short = dataclasses.replace(TIED, context_tokens=10)
    rates = build(short, (1400,), kv_nodes_tokens=(10.0, 20.0)).generator.toarray()
    assert rates[2, 3] == pytest.approx(0.5 / 0.1 / 10)


@pytest.mark.parametrize("spec", ["ecofreq", "ecomin:headroom=0.0,reserve=0.01", "static:f=1200"])
def test_clocks_are_the_controllers_own(spec: str) -> None:
    """Watts are a tenth of the clock here, so that a tied model's power tells which clock it is.

    In each state that must be what a controller of that name, made for it, answers at that clock.
    """
    model = build(dataclasses.replace(TIED, clock_rule=spec), (1400,))
    for n in (1, 2, 3):
        clock = round(10.0 * model.energy_w[n])
        made = make_controller(spec, CONTEXT)
        state = decode_state(batch=n, tokens=15 * n, kv=15 * n, opened=n, clock=clock)
        state.now_s, state.num_running = 100.0, n
        assert made.decide(state) == clock, n


def test_ecomin_has_more_than_two_clocks() -> None:
    """On the A100 it moves among eight, whatever the profile's two default levels."""
    profile = load_profile("a100-80g-sxm/llama-3.1-8b")
    context = policy_context(make_config({"slo_itl_s": 0.045}), profile)
    loads = [(n, 500 * n) for n in range(8, 321, 24)]
    clocks = ControllerClock("ecomin", context).reachable_mhz(loads)
    eight = levels_of(context, (), 8, "")
    assert set(clocks) <= set(eight)
    assert len(clocks) > 2
    assert ControllerClock("ecofreq", context).reachable_mhz(loads) == (1005, 1410)


def test_the_clock_in_force_is_part_of_the_question() -> None:
    """A controller with hysteresis keeps its clock from 50 to 100 requests, wherever it is."""
    profile = load_profile("a100-80g-sxm/llama-3.1-8b")
    context = policy_context(make_config({"slo_itl_s": 0.045}), profile)
    rule = ControllerClock("tests.sim.mdp.sticky", context)
    low_mhz, top_mhz = context.clocks_mhz[0], context.clocks_mhz[-1]
    for n, from_low, from_top in [
        (49, low_mhz, low_mhz), (50, low_mhz, top_mhz), (100, low_mhz, top_mhz),
        (101, top_mhz, top_mhz),
    ]:  # fmt: skip
        assert rule.next_mhz(n, 500 * n, low_mhz) == from_low
        assert rule.next_mhz(n, 500 * n, top_mhz) == from_top


def test_moving_clocks_go_where_the_controller_says() -> None:
    """EcoFreq at 150 ms: one request wants 1000 MHz, two want 1400, an empty instance 1000 after
    5 s; the change takes an iteration and the 3 ms of actuation."""
    rates = build(PARAMETERS, (1000, 1400)).generator.toarray()
    assert rates[3, 2] == pytest.approx(1 / (0.060 + 0.003))
    assert rates[4, 5] == pytest.approx(1 / (0.200 + 0.003))
    assert rates[1, 0] == pytest.approx(1 / 5.0)
    assert rates[2, 3] == rates[5, 4] == rates[0, 1] == 0.0


def test_a_wide_bucket_keeps_the_mean_of_its_moves_and_of_its_tables() -> None:
    """Batches 0, 1 and 2 to 4, nodes 0, 1 and 3, at 1000 MHz, 0.1 s a request: the last takes 0.2,
    0.3 and 0.4 s, 0.3 on average, two of three are late of 0.25 s, ten tokens a second.

    Requests of ten tokens leave the node 3 at 3/(10·0.3) a second, half of that by steps of two. An
    arrival lifts the node 1 by two with probability 1/2; the last bucket turns it away."""
    grid = StateGrid(batch_edges_requests=(0, 1, 2, 5), kv_nodes_tokens=(15.0,), levels_mhz=(1000,))
    slow = dataclasses.replace(PARAMETERS, slo_itl_s=0.25, clock_rule="static:f=1000")
    model = build_instance(grid, slow, CONTEXT)
    assert model.energy_w.tolist() == pytest.approx([40.0, 100.0, 100.0])
    assert model.cost_w.tolist() == pytest.approx([40.0, 100.0, 100.0 + 2.0 * 10.0 * 2 / 3])
    rates = np.array([[0, 0, 0], [1, -1, 0], [0, 0.5, -0.5]])
    np.testing.assert_allclose(model.generator.toarray(), rates, atol=1e-12)
    after = np.array([[0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]])
    np.testing.assert_allclose(model.arrival.toarray(), after)
    assert model.exit_rate == pytest.approx(1.0)
    assert model.clock_rate.tolist() == [0.0, 0.0, 0.0]


def test_an_iteration_of_just_the_promise_is_not_late() -> None:
    """0.1 s for one request at 1000 MHz, of 0.1 s; two take 0.2."""
    tight = dataclasses.replace(PARAMETERS, slo_itl_s=0.1, clock_rule="static:f=1000")
    model = build(tight, (1000,))
    assert model.cost_w[1] == model.energy_w[1]
    assert model.cost_w[2] > model.energy_w[2]


class KvPower(ClockPower):
    """A watt a token beside."""

    def power_w(self, phase: str, clock_mhz: int, batch_size: int, tokens: int) -> float:
        return 0.1 * clock_mhz + tokens


def test_loads_of_a_bucket_have_the_node_s_context_each() -> None:
    """Two to four requests of 12.5 tokens: 25, 38 (37.5) and 50, 37.67 on average; in the middle of
    the bucket three of 38."""
    grid = StateGrid(
        batch_edges_requests=(0, 1, 2, 5), kv_nodes_tokens=(12.5, 20.0), levels_mhz=(1000,)
    )
    assert bucket_loads(grid) == [(1, 12), (1, 20), (3, 38), (3, 60)]
    static = dataclasses.replace(PARAMETERS, clock_rule="static:f=1000")
    model = build_instance(grid, static, dataclasses.replace(CONTEXT, power=KvPower()))
    assert model.energy_w.tolist() == pytest.approx([40, 40, 112, 120, 100 + 113 / 3, 160])


def test_free_clocks_may_change_after_each_iteration_and_when_they_have_waited() -> None:
    """1/(T + 3 ms) where busy, 1/5 s where idle; no move of the chain's own changes the clock. One
    that parks at once is given a millisecond, one that never does waits for the model's 5 s."""
    free = build(dataclasses.replace(PARAMETERS, clock_rule="free"), (1000, 1400))
    busy = [1 / (t * n + 0.003) for n in (1, 2, 3) for t in (0.1, 0.06)]
    assert free.clock_rate.tolist() == pytest.approx([0.2, 0.2, *busy])
    rates = free.generator.toarray()
    assert rates[2, 0] == pytest.approx(1.0)
    assert rates[3, 2] == rates[2, 3] == rates[1, 0] == 0.0
    assert free.exit_rate == pytest.approx(max(free.clock_rate - free.generator.diagonal()))
    for spec, wait_s in (("oracle", 0.001), ("ecofreq:idle=2", 2.0)):
        made = build(dataclasses.replace(PARAMETERS, clock_rule=spec), (1000, 1400))
        assert np.abs(made.generator.toarray()[:2, :2]).max() == pytest.approx(1 / wait_s), spec
    held = build(dataclasses.replace(PARAMETERS, clock_rule="static:f=1000"), (1000, 1400))
    assert not held.generator.toarray()[:2, :2].any()


class Flapping(Controller):
    """1200 MHz at 1000, 1000 at 1200, 1200 at any other; parks at 1000 MHz."""

    def __init__(self, parameters: NoParameters, context: PolicyContext) -> None: ...

    def decide(self, state: InstanceState) -> int:
        return 1000 if state.clock_mhz == 1200 else 1200

    def on_idle(self, state: InstanceState) -> IdlePlan:
        return IdlePlan(after_s=1.0, clock_mhz=1000)


def test_where_a_controller_settles(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that goes on changing: the faster of its two clocks. Empty: where it parks, or at the top
    if it does not; what it may set at all is what it says at the clocks that it may set."""
    made = Entry(make=Flapping, parameters=NoParameters)
    monkeypatch.setitem(CONTROLLERS, "flapping", made)
    rule = ControllerClock("flapping", CONTEXT)
    assert rule.settled_mhz(2, 30) == 1200
    assert rule.settled_mhz(0, 0) == 1000
    assert rule.idle_plan == IdlePlan(after_s=1.0, clock_mhz=1000)
    assert rule.reachable_mhz([(1, 15)]) == (1000, 1200, 1400)
    boost = ControllerClock("boost", CONTEXT)
    assert boost.settled_mhz(0, 0) == boost.settled_mhz(3, 45) == 1400  # no lock is the top clock
    assert boost.reachable_mhz([(3, 45)]) == (1400,)


class Asked(Flapping):
    """Keeps what it is shown."""

    seen: ClassVar[list[InstanceState]] = []

    def decide(self, state: InstanceState) -> int:
        self.seen.append(state)
        return 1000


def test_a_controller_is_asked_about_a_batch_that_has_run_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(CONTROLLERS, "asked", Entry(make=Asked, parameters=NoParameters))
    Asked.seen.clear()
    ControllerClock("asked", CONTEXT).next_mhz(3, 45, 1200)
    (state,) = Asked.seen
    assert state.now_s > 3600.0
    assert (state.phase, state.clock_mhz, state.is_busy) == ("decode", 1200, True)
    assert (state.num_running, state.open_requests, state.last_batch_size) == (3, 3, 3)
    assert (state.kv_tokens, state.last_tokens, state.kv_capacity_tokens) == (45, 45, 100_000)
    assert (state.ended_batch_size, state.ended_tokens) == (3, 45)


BAD: list[tuple[dict[str, float | str], str]] = [
    ({"slo_itl_s": 0.0}, "slo_itl_s must be > 0, got 0.0"),
    ({"input_tokens": 0}, "input_tokens must be > 0, got 0"),
    ({"output_tokens": -1}, "output_tokens must be > 0, got -1"),
    ({"idle_wait_s": 0.0}, "idle_wait_s must be > 0, got 0.0"),
    ({"context_tokens": 5}, "context_tokens must exceed the mean prompt, 5, got 5"),
    ({"penalty_j": -1.0}, "penalty_j must be >= 0, got -1.0"),
    ({"actuation_s": -0.5}, "actuation_s must be >= 0, got -0.5"),
    ({"clock_rule": "free", "is_tied": True}, "clocks that are tied to the state cannot be free"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_parameters_are_one_line(number: int) -> None:
    changes, line = BAD[number]
    with pytest.raises(VoltanaError) as caught:
        dataclasses.replace(PARAMETERS, **changes)  # type: ignore[arg-type]
    assert str(caught.value) == line
    dataclasses.replace(PARAMETERS, penalty_j=0.0, actuation_s=0.0, context_tokens=6)


def test_contradictions_are_refused() -> None:
    with pytest.raises(VoltanaError, match="cannot be free"):
        dataclasses.replace(TIED, clock_rule="free")
    with pytest.raises(VoltanaError) as caught:
        build(TIED, (1000, 1400))
    assert str(caught.value) == "tied clocks need a grid of one level, got (1000, 1400)"
