"""What the harness tells a policy is what the simulator tells it: every field of its context."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from voltana.hwreplay.view import context
from voltana.profiles.catalog import load_profile
from voltana.sim.config import SimConfig, make_config
from voltana.sim.engine import fleet
from voltana.sim.engine.simulate import simulate
from voltana.sim.policies import registry
from voltana.sim.policies.base import InstanceState, PolicyContext
from voltana.sim.policies.parts.prediction import ModelsOf
from voltana.sim.workload.workload import Workload

SIMULATION_ONLY = {"truth"}
"""For oracles: nobody knows it on hardware."""
OBJECTS = {"predictor", "power", "rng", "cluster"}
"""Compared by what they answer."""
SETTINGS: list[dict[str, Any]] = [
    {},
    {"aim_ratio": 0.8},
    {"predictor_scale": 1.3, "aim_ratio": 1.2},
    {"predictor": "table", "kv_capacity_tokens": 5000, "actuation_latency_s": 0.02, "seed": 7},
    {"decode_profiles": "h100-sxm/llama-3.1-8b+a100-80g-sxm/llama-3.1-8b", "controller": "static"},
]


def contexts_of_both(
    config: SimConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, PolicyContext], dict[str, PolicyContext]]:
    """The contexts of router and controllers, by who gets them: simulator's and harness's."""
    found: tuple[dict[str, PolicyContext], dict[str, PolicyContext]] = ({}, {})
    for module, kept in zip((fleet, context), found, strict=True):

        def controller(
            spec: str, given: PolicyContext, kept: dict[str, PolicyContext] = kept
        ) -> Any:  # noqa: ANN401
            kept[f"{given.phase}-{given.instance_id}"] = given
            return registry.make_controller(spec, given)

        def router(spec: str, given: PolicyContext, kept: dict[str, PolicyContext] = kept) -> Any:  # noqa: ANN401
            kept["router"] = given
            return registry.make_router(spec, given)

        monkeypatch.setattr(module, "make_controller", controller)
        monkeypatch.setattr(module, "make_router", router)
    profile = load_profile(config.profile)
    one = np.array([1])
    simulate(config, profile, Workload(arrival_s=one * 0.0, input_tokens=one, output_tokens=one))
    source = context.PolicySource(config=config, profile=profile)
    source.make_router()
    for instance_id in range(config.num_prefill):
        source.make_controller("prefill", instance_id)
    for instance_id in range(config.num_decode):
        source.make_controller("decode", instance_id)
    return found


@pytest.mark.parametrize("settings", SETTINGS)
def test_simulator_and_harness_tell_policies_the_same(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"num_prefill": 1, "num_decode": 2} | settings)
    simulated, real = contexts_of_both(config, monkeypatch)
    assert simulated.keys() == real.keys() == {"router", "prefill-0", "decode-0", "decode-1"}
    for name, ours in simulated.items():
        theirs = real[name]
        for key in (f.name for f in dataclasses.fields(PolicyContext)):
            if key not in SIMULATION_ONLY | OBJECTS:
                assert getattr(ours, key) == getattr(theirs, key), f"{key} of {name}"
        assert ours.rng.bit_generator.state == theirs.rng.bit_generator.state
        assert theirs.cluster is not None
        card = InstanceState(instance_id=0, phase="decode")  # in the last case one of its own kind
        models = ModelsOf(ours)(card), ModelsOf(theirs)(card)
        assert models[0].clocks_mhz == models[1].clocks_mhz
        watts = [m.power.power_w("decode", 1005, 16, 9000) for m in models]
        assert watts[0] == watts[1]
        for batch_size, tokens in ((1, 100), (30, 20_000), (2000, 2_000_000)):
            point = (ours.phase, ours.clocks_mhz[0], batch_size, tokens)
            assert ours.predictor.predict_s(*point) == theirs.predictor.predict_s(*point)
            assert ours.power.power_w(*point) == theirs.power.power_w(*point)
    assert simulated["decode-0"].slo_itl_s == config.slo_itl_s * settings.get("aim_ratio", 1.0)
