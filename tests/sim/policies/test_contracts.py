"""What every registered policy keeps: supported clocks, purity, seeds, calm, and wrong models."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from tests.sim.policies.doubles import (
    CLOCKS,
    Formula,
    Known,
    LineFormula,
    make_cluster,
    make_context,
)
from voltana.sim.mdp.grid import StateGrid
from voltana.sim.mdp.policy_file import PolicyFile
from voltana.sim.policies.base import (
    UNLOCKED_MHZ,
    InstanceState,
    Phase,
    PolicyContext,
    RequestView,
    RunningRequest,
    WaitingRequest,
)
from voltana.sim.policies.registry import CONTROLLERS, ROUTERS, make_controller, make_router

PHASES: tuple[Phase, ...] = ("prefill", "decode")
ALLOWED = {UNLOCKED_MHZ, *CLOCKS}


class Power:
    """A power model that is the given function of the clock."""

    def __init__(self, function: Callable[[int], float]) -> None:
        self._function = function

    def power_w(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        return self._function(clock_mhz)

    def idle_power_w(self, clock_mhz: int) -> float:
        return self._function(clock_mhz) / 2


RISING = Power(lambda f: 50.0 + 250.0 * ((f or CLOCKS[-1]) / 1400) ** 3)
POWERS = [
    RISING, Power(lambda f: 0.0), Power(lambda f: 1e12), Power(lambda f: -100.0),
    Power(lambda f: 1e5 / (f or 1400)), Power(lambda f: math.nan),
]  # fmt: skip
TIMES = [
    LineFormula(), Formula(lambda p, f, b, t: 1e-9), Formula(lambda p, f, b, t: 1e9),
    Formula(lambda p, f, b, t: 1e-3 * b + 1e-6 * t),  # the clock does not matter
    Formula(lambda p, f, b, t: (1e-3 * b + 1e-6 * t) * f / 1000),  # faster is slower
    Formula(lambda p, f, b, t: 0.1 / (1 + b)),  # more work is less
]  # fmt: skip


def context_of(times: Formula, power: Power, phase: Phase) -> PolicyContext:
    return dataclasses.replace(
        make_context(times, phase=phase), power=power, truth=Known(times, power),
        cluster=make_cluster(2, 2), num_prefill=2, num_decode=2,
    )  # fmt: skip


def busy_state(phase: Phase, batch: int, tokens: int, waiting: int = 0) -> InstanceState:
    """An instance whose batch and queue are in every field that tells of them."""
    state = InstanceState(instance_id=0, phase=phase, kv_capacity_tokens=100_000)
    state.is_busy = batch > 0
    state.last_batch_size = state.ended_batch_size = state.num_running = batch
    state.last_tokens = state.ended_tokens = state.kv_tokens = tokens
    state.num_waiting, state.waiting_tokens = waiting, 100 * waiting
    state.open_requests = batch + waiting
    state.list_waiting = lambda: [
        WaitingRequest(request_id=k, arrival_s=state.now_s - 0.01, input_tokens=100)
        for k in range(waiting)
    ]
    state.list_running = lambda: [
        RunningRequest(
            request_id=k, arrival_s=state.now_s - 0.1, input_tokens=tokens // batch,
            generated_tokens=0, output_tokens=None, first_token_s=state.now_s,
        )
        for k in range(batch)
    ]  # fmt: skip
    return state


def fields_of(state: InstanceState) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


STEP = st.tuples(
    st.integers(0, 300), st.integers(0, 10**6), st.integers(0, 5),
    st.sampled_from([1e-6, 0.01, 0.3, 7.0, 1e4]),  # time to the next call
    st.sampled_from([0.0, 1e-9, 0.02, 5.0, 1e6]),  # duration and delay seen
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(CONTROLLERS))
@settings(max_examples=60)
@given(
    steps=st.lists(STEP, min_size=1, max_size=25), phase=st.sampled_from(PHASES),
    times=st.sampled_from(TIMES), power=st.sampled_from(POWERS),
)  # fmt: skip
def test_controllers_name_supported_clocks_and_leave_the_state_alone(
    name: str, steps: list[tuple[int, int, int, float, float]], phase: Phase, times: Formula,
    power: Power,
) -> None:  # fmt: skip
    """Whatever the load, the clock of the caller, the measurements and the models say."""
    made = make_controller(name, context_of(times, power, phase))
    clock = made.initial_clock_mhz()
    assert clock in ALLOWED
    now_s = energy_j = 0.0
    for batch, tokens, waiting, elapsed_s, seen_s in steps:
        state = busy_state(phase, batch, tokens, waiting)
        now_s, energy_j = now_s + elapsed_s, energy_j + 100.0 * elapsed_s
        state.now_s, state.energy_j, state.clock_mhz = now_s, energy_j, clock
        state.last_duration_s, state.last_queue_delay_s = seen_s, seen_s
        before = fields_of(state)
        clock = made.decide(state)
        assert clock in ALLOWED
        assert isinstance(clock, int)
        assert made.steady_iterations(state, batch, tokens) >= 0
        plan = made.on_idle(state)
        assert plan is None or (plan.clock_mhz in ALLOWED and 0.0 <= plan.after_s < math.inf)
        assert fields_of(state) == before


@pytest.mark.parametrize("name", sorted(CONTROLLERS))
@pytest.mark.parametrize("phase", PHASES)
def test_a_controller_that_has_seen_nothing_does_no_harm(name: str, phase: Phase) -> None:
    made = make_controller(name, context_of(LineFormula(), RISING, phase))
    idle = InstanceState(instance_id=0, phase=phase)
    assert made.decide(idle) in ALLOWED
    made.on_idle(idle)
    assert made.decide(busy_state(phase, 4, 400)) in ALLOWED


def play_constant(name: str, phase: Phase, batch: int, seconds: float) -> list[tuple[float, int]]:
    """The same batch again and again, as long as the model says at the clock in force."""
    context = context_of(LineFormula(), RISING, phase)
    made = make_controller(name, context)
    state = busy_state(phase, batch, 1000 * batch)
    fleet = context.cluster
    assert fleet is not None
    setattr(fleet, phase, [state, InstanceState(instance_id=1, phase=phase)])
    clock, history = made.initial_clock_mhz(), []
    state.last_duration_s = 0.0
    while state.now_s < seconds:
        state.clock_mhz = clock
        clock = made.decide(state)
        history.append((state.now_s, clock))
        at = clock or CLOCKS[-1]
        took_s = context.predictor.predict_s(phase, at, batch, 1000 * batch)
        state.last_duration_s = took_s
        state.energy_j += took_s * context.power.power_w(phase, at, batch, 0)
        state.now_s += took_s
    return history


MOST_CHANGES_PER_S = {
    # a controller without a model seeks its setpoint between two clocks: never within its dwell
    "pid": 1 / 0.1,
    # additive fall, multiplicative rise: a sawtooth, one step a period
    "miad": 1.0,
    # the clock that the KV cache asks for starves a stream, the top one does not: one hold a cycle
    "kairos": 2 / 1.0,
    # a cap that misses the promise is released for a second, and then misses it again
    "powercap": 2 / 1.0,
    # it explores, a window and a rest at the fastest
    "agft": 1 / 1.1,
}
"""Of the controllers that may go on changing the clock under a constant load."""


@pytest.mark.parametrize("name", sorted(CONTROLLERS))
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("batch", [5, 20, 25, 33, 90])
def test_a_constant_load_is_left_in_peace(name: str, phase: Phase, batch: int) -> None:
    """2 ms a request at 1000 MHz, promise 50 ms in decode: slack, near and past the limit of each
    clock, overload. Most controllers have settled after 10 s (two windows of the slowest)."""
    history = play_constant(name, phase, batch, 40.0)
    settled = [clock for now_s, clock in history if now_s >= 10.0]
    changes = sum(a != b for a, b in pairwise(settled))
    most = MOST_CHANGES_PER_S.get(name, 0.0) * 30.0
    assert changes <= most, (changes, settled[:50])


DWELL_S = {"pid": ("dwell", 0.5), "ecomin": ("dwell", 0.5), "miad": ("period", 0.5)}


@pytest.mark.parametrize("name", sorted(DWELL_S))
@given(batches=st.lists(st.integers(1, 60), min_size=20, max_size=120))
def test_falls_respect_the_dwell(name: str, batches: list[int]) -> None:
    """A load that jumps at will: no fall of the clock within a dwell of the last change."""
    key, dwell_s = DWELL_S[name]
    made = make_controller(f"{name}:{key}={dwell_s}", context_of(LineFormula(), RISING, "decode"))
    clock, changed_s, now_s = made.initial_clock_mhz(), -math.inf, 0.0
    for batch in batches:
        state = busy_state("decode", batch, 1000 * batch)
        now_s += 0.002 * batch
        state.now_s, state.clock_mhz, state.last_duration_s = now_s, clock, 0.002 * batch
        decided = made.decide(state)
        if decided < clock:
            assert now_s - changed_s >= dwell_s - 1e-9
        if decided != clock:
            changed_s = now_s
        clock = decided


MONOTONE_IN_LOAD = ("dualscale-mpc", "ecofreq", "ecomin", "kairos", "throttllm", "static", "boost")
MONOTONE_IN_DELAY = (
    "dualscale-mpc", "ecofreq", "ecomin", "greenllm", "oracle", "throttllm", "static", "boost",
)  # fmt: skip
"""With power that rises with the clock. Not `powercap` and `rapid`: a heavier batch draws more and
is slowed down; not the ones that look at measured latency only."""


@pytest.mark.parametrize("name", MONOTONE_IN_LOAD)
@pytest.mark.parametrize("batch", [1, 10, 30])
def test_more_context_never_lowers_the_clock(name: str, batch: int) -> None:
    clocks = []
    for tokens in range(batch, 99_000, 1500):
        made = make_controller(name, context_of(LineFormula(), RISING, "decode"))
        state = busy_state("decode", batch, tokens)
        state.now_s, state.clock_mhz = 100.0, CLOCKS[-1]
        clocks.append(made.decide(state))
    assert clocks == sorted(clocks)


@pytest.mark.parametrize("name", MONOTONE_IN_DELAY)
def test_a_longer_queueing_delay_never_lowers_the_clock(name: str) -> None:
    """0.14 s of prefill at 1000 MHz, promise 0.5 s; beyond it all is lost, and faster is right."""
    clocks = []
    for delay_ms in range(0, 700, 5):
        times = Formula(lambda p, f, b, t: 1e-3 * t * 1000 / f)
        made = make_controller(name, context_of(times, RISING, "prefill"))
        state = busy_state("prefill", 1, 140)
        state.now_s, state.clock_mhz, state.last_queue_delay_s = 100.0, 1400, delay_ms * 1e-3
        clocks.append(made.decide(state))
    assert clocks == sorted(clocks)


@pytest.mark.parametrize("name", [n for n in MONOTONE_IN_LOAD if n != "kairos"])
def test_a_tighter_promise_never_lowers_the_clock(name: str) -> None:
    """`kairos` looks at no promise."""
    clocks = []
    for slo_ms in range(200, 5, -5):
        context = context_of(LineFormula(), RISING, "decode")
        made = make_controller(name, dataclasses.replace(context, slo_itl_s=slo_ms * 1e-3))
        state = busy_state("decode", 10, 20_000)
        state.now_s, state.clock_mhz = 100.0, 1400
        clocks.append(made.decide(state))
    assert clocks == sorted(clocks)


def router_spec(name: str, directory: Path, profile_hash: str) -> str:
    """`mdp` needs a policy: here each of two instances costs more the fuller it is."""
    if name != "mdp":
        return name
    grid = StateGrid(
        batch_edges_requests=(0, 1, 4, 16), kv_nodes_tokens=(100.0,), levels_mhz=(700, 1400)
    )
    cost_j = np.arange(grid.num_states, dtype=float).reshape(1, -1, 1)
    made = PolicyFile(
        kind="table", solver="factored", profile="synthetic", profile_hash=profile_hash,
        num_instances=2, rates_rps=(10.0,), grid=grid, parameters={}, seeds=(), provenance={},
        result={}, arrays={"delta_0": cost_j, "delta_1": cost_j},
    )  # fmt: skip
    path = directory / "policy.npz"
    made.save(path)
    return f"mdp:policy={path}"


FLEET = st.lists(
    st.tuples(
        st.integers(0, 300), st.integers(0, 10**6), st.integers(0, 50), st.sampled_from(CLOCKS)
    ),
    min_size=1, max_size=5,
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(ROUTERS))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefill=FLEET, decode=FLEET, tokens=st.integers(1, 10**5), times=st.sampled_from(TIMES),
    power=st.sampled_from(POWERS),
)  # fmt: skip
def test_routers_choose_among_the_given_and_draw_by_seed(
    name: str, tmp_path: Path, prefill: list[Any], decode: list[Any], tokens: int, times: Formula,
    power: Power,
) -> None:  # fmt: skip
    """Also where instances have gone: an instance's number is not its position then."""
    spec = router_spec(name, tmp_path, "0")

    def choices() -> list[tuple[int, int]]:
        router = make_router(spec, context_of(times, power, "decode"))
        fleets = []
        for phase, rows in (("prefill", prefill), ("decode", decode)):
            states = []
            for k, (batch, kv_tokens, waiting, clock) in enumerate(rows):
                state = busy_state(phase, batch, kv_tokens, waiting)  # type: ignore[arg-type]
                state.clock_mhz, state.instance_id = clock, 2 * k
                states.append(state)
            fleets.append(states)
        before = [fields_of(s) for fleet in fleets for s in fleet]
        made = [router.route(RequestView(k, 0.1 * k, tokens, None), *fleets) for k in range(5)]
        assert [fields_of(s) for fleet in fleets for s in fleet] == before
        return made

    first = choices()
    for prefill_at, decode_at in first:
        assert 0 <= prefill_at < len(prefill)
        assert 0 <= decode_at < len(decode)
    assert choices() == first


def test_policies_are_pure() -> None:
    """No clock, no randomness of their own, no simulator: neither time nor random nor simpy."""
    banned = {"time", "datetime", "random", "simpy", "threading", "socket", "subprocess"}
    for path in sorted((ROOT / "sim" / "policies").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            assert not banned & {n.split(".")[0] for n in names}, path
