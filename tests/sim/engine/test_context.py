"""What a run tells its policies: every field of the context, and a stream of dice for each."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from voltana.profiles.catalog import Profile
from voltana.sim.policies.base import (
    Controller,
    InstanceState,
    Phase,
    PolicyContext,
    RequestView,
    Router,
    States,
)
from voltana.sim.policies.controllers.fixed import NoParameters
from voltana.sim.policies.registry import CONTROLLERS, ROUTERS, Entry


class Listener(Controller):
    """Keeps its context."""

    heard: ClassVar[list[PolicyContext]] = []

    def __init__(self, parameters: NoParameters, context: PolicyContext) -> None:
        self.heard.append(context)

    def decide(self, state: InstanceState) -> int:
        return 0


class Ear(Router):
    """Keeps its context, and the requests with what it sees of the fleet."""

    heard: ClassVar[list[PolicyContext]] = []
    seen: ClassVar[list[tuple[RequestView, int, int]]] = []

    def __init__(self, parameters: NoParameters, context: PolicyContext) -> None:
        self.heard.append(context)

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        self.seen.append((request, len(prefill), len(decode)))
        return 0, 0


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Profile:
    monkeypatch.setitem(CONTROLLERS, "listener", Entry(make=Listener, parameters=NoParameters))
    monkeypatch.setitem(ROUTERS, "ear", Entry(make=Ear, parameters=NoParameters))
    Listener.heard.clear()
    Ear.heard.clear()
    Ear.seen.clear()
    return write_synthetic_profile(tmp_path)


def test_every_policy_knows_the_fleet_and_has_its_own_dice(profile: Profile) -> None:
    """Streams: router 1, prefill 2, decode 3, and the instance's number, beside the run's seed."""
    run(
        profile, make_requests((0.0, 4, 2)), num_prefill=2, num_decode=3, controller="listener",
        router="ear", seed=11, slo_ttft_s=0.75, slo_itl_s=0.0625, kv_capacity_tokens=3000,
        actuation_latency_s=0.125, first_token="prefill", predictor="table",
    )  # fmt: skip
    phases: list[tuple[Phase, int]] = [
        ("prefill", 0),
        ("prefill", 1),
        *[("decode", i) for i in range(3)],
    ]
    assert [(c.phase, c.instance_id) for c in Listener.heard] == phases
    streams = [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    for context, stream in zip((*Ear.heard, *Listener.heard), streams, strict=True):
        assert (context.num_prefill, context.num_decode) == (2, 3)
        assert (context.slo_ttft_s, context.slo_itl_s) == (0.75, 0.0625)
        assert (context.kv_capacity_tokens, context.actuation_s) == (3000, 0.125)
        assert (context.clocks_mhz, context.default_levels_mhz) == ((700, 1000, 1400), (700, 1400))
        assert (context.first_token, context.profile_hash) == ("prefill", profile.content_hash)
        assert context.cluster is Ear.heard[0].cluster
        seeds = np.random.SeedSequence(11, spawn_key=stream)
        assert context.rng.random() == np.random.default_rng(seeds).random()
    context = Listener.heard[0]
    point: tuple[Phase, int, int, int] = ("decode", 1000, 3, 90)
    true_s, true_w = profile.truth().time_and_power(*point)
    assert context.predictor.predict_s(*point) == true_s
    assert context.power.power_w(*point) == true_w
    assert context.truth is not None
    assert context.truth.time_and_power(*point) == (true_s, true_w)
    # what lies beyond the tables is no error where a policy only wonders
    assert context.truth.time_and_power("decode", 1000, 9999, 9)[0] > 0.0
    assert context.predictor.predict_s("decode", 1000, 9999, 9) > 0.0
    cluster = context.cluster
    assert cluster is not None
    assert [s.instance_id for s in (*cluster.prefill, *cluster.decode)] == [0, 1, 0, 1, 2]
    assert {s.kv_capacity_tokens for s in (*cluster.prefill, *cluster.decode)} == {3000}


def test_a_router_is_shown_the_active_instances_and_the_length_only_by_an_oracle(
    profile: Profile,
) -> None:
    work = make_requests((0.0, 4, 2), (0.5, 7, 3))
    for oracle, lengths in ((False, (None, None)), (True, (2, 3))):
        Ear.seen.clear()
        run(
            profile, work, num_prefill=3, num_decode=4, active_prefill=2, active_decode=3,
            router="ear", length_oracle=oracle,
        )  # fmt: skip
        assert Ear.seen == [
            (RequestView(0, 0.0, 4, lengths[0]), 2, 3), (RequestView(1, 0.5, 7, lengths[1]), 2, 3),
        ]  # fmt: skip


def test_beliefs_are_wrong_by_what_is_asked_for(profile: Profile) -> None:
    """Times by a factor; power above idle by a factor and by (f/1400)^error: (1000/1400)^-1."""
    run(
        profile, make_requests((0.0, 4, 2)), controller="listener", predictor="table",
        predictor_scale=1.5, predictor_power_scale=2.0,
        predictor_power_clock_error=-1.0,
    )  # fmt: skip
    context = Listener.heard[0]
    point: tuple[Phase, int, int, int] = ("prefill", 1000, 1, 64)
    true_s, true_w = profile.truth().time_and_power(*point)
    idle_w = profile.truth().idle_power_w(1000)
    assert context.predictor.predict_s(*point) == 1.5 * true_s
    believed_w = context.power.power_w(*point)
    assert believed_w == pytest.approx(idle_w + (true_w - idle_w) * 2.0 * 1.4)
    assert context.power.idle_power_w(1000) == idle_w
