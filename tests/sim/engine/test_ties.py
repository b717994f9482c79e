"""Events of one instant: arrivals first, decode steps last, in both drivers.

All times are multiples of 1/512 s, which doubles hold and add exactly, so that an arrival, the end
of a prompt and the end of an iteration often fall on one instant.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import run
from tests.sim.engine.test_coalescing import assert_same
from tests.sim.engine.test_properties import workload_of
from voltana.profiles.catalog import Profile

TICK_S = 1 / 512
ROUTERS = ("least-kv", "kairos:fill=0.1", "ecoroute:tile=2", "slo-pack", "round-robin")
CONTROLLERS = ("static", "kairos", "ecofreq")


def exact_time_s(phase: str, clock: int, batch: int, tokens: float) -> float:
    """Prefill 8 ticks, decode 4, at half speed below the top clock."""
    return (8 if phase == "prefill" else 4) * TICK_S * (1 if clock == 1400 else 2)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile"), time_s=exact_time_s)


ROW = st.tuples(
    st.integers(0, 24).map(lambda ticks: ticks * TICK_S), st.integers(1, 300), st.integers(1, 40)
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(ROW, min_size=2, max_size=40),
    router=st.sampled_from(ROUTERS),
    controller=st.sampled_from(CONTROLLERS),
    latency_s=st.sampled_from([0.0, TICK_S, 6 * TICK_S]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    transfer_s=st.sampled_from([0.0, 3 * TICK_S]),
    limit_s=st.sampled_from([None, 100 * TICK_S, 131 * TICK_S]),
)
def test_same_run_where_events_tie(
    profile: Profile,
    rows: list[tuple[float, int, int]],
    router: str,
    controller: str,
    latency_s: float,
    shape: tuple[int, int],
    transfer_s: float,
    limit_s: float | None,
) -> None:
    policy: dict[str, Any] = {
        "router": router, "controller": controller, "actuation_latency_s": latency_s,
        "num_prefill": shape[0], "num_decode": shape[1], "kv_transfer_latency_s": transfer_s,
        "run_limit_s": limit_s,
    }  # fmt: skip
    assert_same(profile, rows, policy)


@pytest.mark.parametrize("engine", ["reference", "coalesced"])
@pytest.mark.parametrize(("tokens", "expected"), [(102, 0), (101, 1)])
def test_a_router_sees_an_iteration_that_ends_at_the_arrival_as_running(
    profile: Profile, engine: str, tokens: int, expected: int
) -> None:
    """Request 0 prefills over ticks 0-8 and decodes alone at instance 0 in iterations that end at
    12, 16, …, 28, 32; request 1 prefills over 10-18 and does so at instance 1: 22, 26, 30. When
    request 2 arrives at tick 32, five and three have ended: 100 + 5 tokens against `tokens` + 3.
    102 + 3 is a tie, which goes to the first; 101 + 3 is fewer."""
    rows = [(0.0, 100, 60), (10 * TICK_S, tokens, 60), (22 * TICK_S, 1, 1)]
    record, _ = run(profile, workload_of(rows), engine=engine, router="least-kv", num_decode=2)
    assert record.requests.decode_id.tolist() == [0, 1, expected]
