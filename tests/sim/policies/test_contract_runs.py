"""What every policy keeps in whole runs: models that are wrong, seeds, the other driver, rest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from tests.sim.engine.test_coalescing import assert_same, busy_rows
from tests.sim.policies.doubles import (
    make_context,
)
from tests.sim.policies.test_contracts import router_spec
from voltana.profiles.catalog import Profile
from voltana.sim.policies.base import (
    InstanceState,
)
from voltana.sim.policies.registry import CONTROLLERS, ROUTERS, make_controller
from voltana.sim.records import COMPLETED, RunRecord

POWER_TABLES: dict[str, Callable[[str, int, int, float], float]] = {
    "plausible": lambda p, f, b, t: 80.0 + 220.0 * (f / 1400) ** 2,
    "megawatts": lambda p, f, b, t: 1e6 * b + f,
    "microwatts": lambda p, f, b, t: 1e-6,
    "falling": lambda p, f, b, t: 4e5 / f,
}


@pytest.fixture(scope="module", params=sorted(POWER_TABLES))
def profile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(
        tmp_path_factory.mktemp("profile"), power_w=POWER_TABLES[request.param]
    )


def check_run(record: RunRecord, summary: dict[str, Any]) -> None:
    assert (record.requests.status == COMPLETED).all()
    for key in ("energy_j", "ttft_attainment", "itl_attainment", "makespan_s"):
        assert math.isfinite(summary[key]), key
    assert record.iterations is not None
    assert set(record.iterations.clock_mhz.tolist()) <= {0, 700, 1000, 1400}


def play(profile: Profile, **policy: Any) -> tuple[RunRecord, dict[str, Any]]:  # noqa: ANN401
    rows = busy_rows()[:80]
    at_s = np.cumsum([gap for gap, _, _ in rows])
    workload = make_requests(*((float(t), n, m) for t, (_, n, m) in zip(at_s, rows, strict=True)))
    values = {"num_prefill": 2, "num_decode": 2, "slo_itl_s": 0.008, "record_iterations": True}
    return run(profile, workload, **(values | policy))


WRONG = [
    {"predictor_scale": 0.5},
    {"predictor_scale": 1.5, "predictor": "table", "actuation_latency_s": 0.2},
]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", sorted(CONTROLLERS))
def test_a_wrong_model_never_ends_a_run(profile: Profile, name: str, wrong: dict[str, Any]) -> None:
    """Times 50 % wrong either way, powers absurd: every request is served all the same."""
    check_run(*play(profile, controller=name, router="ecoroute", **wrong))


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_a_wrong_model_never_stops_routing(
    profile: Profile, name: str, wrong: dict[str, Any], tmp_path: Path
) -> None:
    spec = router_spec(name, tmp_path, profile.content_hash)
    check_run(*play(profile, controller="ecofreq", router=spec, **wrong))


@pytest.mark.parametrize("name", sorted(CONTROLLERS))
def test_a_run_repeats_by_its_seed(name: str, tmp_path: Path) -> None:
    """Twice the same clocks, iteration by iteration; `random` routing makes the seed matter."""
    profile = write_synthetic_profile(tmp_path)
    clocks = []
    for _ in range(2):
        record, _ = play(profile, controller=name, router="random", seed=3)
        assert record.iterations is not None
        clocks.append(record.iterations.clock_mhz.tolist())
    assert clocks[0] == clocks[1]


@pytest.mark.parametrize("kind", ["controller", "router"])
def test_the_reference_driver_agrees_where_a_policy_needs_more(kind: str, tmp_path: Path) -> None:
    """Of the routers, `mdp` with a policy file; of the controllers, those with a length oracle.
    All others: tests/sim/engine/test_coalescing.py."""
    profile = write_synthetic_profile(tmp_path)
    spec = router_spec("mdp", tmp_path, profile.content_hash)
    policies: dict[str, dict[str, Any]] = {
        "controller": {"controller": "throttllm", "length_oracle": True, "router": "ecoroute"},
        "router": {"controller": "ecofreq", "router": spec},
    }
    assert_same(profile, busy_rows(), policies[kind])


@pytest.mark.parametrize("name", sorted(CONTROLLERS))
def test_idle_clock_is_what_the_controller_planned(name: str, tmp_path: Path) -> None:
    """One request, a minute of silence, another: in between the clock that `on_idle` named, after
    the time that it named, and the second request is served."""
    profile = write_synthetic_profile(tmp_path)
    record, _ = run(
        profile, make_requests((0.0, 100, 20), (60.0, 100, 20)), controller=name,
        record_iterations=True,
    )  # fmt: skip
    assert (record.requests.status == COMPLETED).all()
    context = dataclasses.replace(
        make_context(clocks_mhz=(700, 1000, 1400), levels_mhz=(700, 1400)),
        power=profile.truth(extrapolate=True), truth=profile.truth(extrapolate=True),
    )  # fmt: skip
    for instance in record.instances:
        controller = make_controller(name, dataclasses.replace(context, phase=instance.phase))
        plan = controller.on_idle(InstanceState(instance_id=0, phase=instance.phase))
        longest_mhz = max(instance.clock_idle_s, key=lambda f: instance.clock_idle_s[f])
        if plan is not None:
            assert longest_mhz == plan.clock_mhz
            assert instance.clock_idle_s[longest_mhz] >= 59.0 - plan.after_s
        assert instance.idle_s == pytest.approx(60.0, abs=1.0)
