"""Cards that change their role: by hand, conservation, both drivers, and the policy's rule."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from tests.sim.engine.test_coalescing import assert_same, busy_rows, crooked
from tests.sim.engine.test_scaling import STATES
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError

TABLE = "tests.sim.engine.scaling_table"


@pytest.fixture
def halves(tmp_path: Path) -> Profile:
    """Every iteration takes 0.5 s at 256 W busy and 64 W idle: sums are exact in binary."""
    made = write_synthetic_profile(
        tmp_path, time_s=lambda phase, f, b, t: 0.5, power_w=lambda phase, f, b, t: 256.0,
        idle_w=lambda f: 64.0,
    )  # fmt: skip
    return dataclasses.replace(made, states=STATES)


@pytest.fixture
def uneven(tmp_path: Path) -> Profile:
    made = write_synthetic_profile(
        tmp_path, time_s=crooked(1.0),
        power_w=lambda p, f, b, t: 80.0 + 1.3e-4 * f * f + 0.05 * t + 0.9 * b,
        idle_w=lambda f: 40.0 + f / 50,
    )  # fmt: skip
    return dataclasses.replace(made, states=STATES)


@pytest.mark.parametrize("engine", ["reference", "coalesced"])
def test_a_card_that_switches_is_one_card(halves: Profile, engine: str) -> None:
    """Three cards, 2P2D with one that switches. It decodes until 1 s, switches for 2 s at idle
    power, and is the second prefill instance from 3 s on.

    Of two prompts at 4 s (round-robin) each prefill instance takes one; decode, alone, has both
    from 4.5 s on, for two tokens each. Busy: 2 · 0.5 s and 1 s. All else is one idle card each.
    """
    requests = make_requests((4.0, 4, 2), (4.0, 4, 2))
    record, summary = run(
        halves, requests, num_prefill=2, num_decode=2, engine=engine,
        scaler=f"{TABLE}:plans=aaal,switching=1,switch=2",
    )  # fmt: skip
    assert record.makespan_s == 5.5
    assert [dict(i.away_s) for i in record.instances] == [
        {}, {"lent": 1.0, "changing": 2.0}, {}, {"lent": 4.5},
    ]  # fmt: skip
    assert [i.busy_s for i in record.instances] == [0.5, 0.5, 1.0, 0.0]
    assert summary["energy_j"] == 256.0 * 2.0 + 64.0 * (3 * 5.5 - 2.0)
    assert summary["wake_ups"] == 1
    assert summary["in_service_share"] == 1.0 - 2.0 / (3 * 5.5)


def test_work_ends_in_one_role_before_the_other_begins(halves: Profile) -> None:
    """The second of two requests at 0 s decodes on the card from 0.5 to 3 s, though it is wanted in
    prefill from 1 s on: it switches from 3 to 5 s."""
    requests = make_requests((0.0, 4, 5), (0.0, 4, 5), (9.0, 4, 1))
    record, _ = run(
        halves, requests, num_prefill=2, num_decode=2,
        scaler=f"{TABLE}:plans=aaal,switching=1,switch=2",
    )  # fmt: skip
    assert dict(record.instances[1].away_s) == {"lent": 3.0, "changing": 2.0}
    assert record.requests.finish_s[:2].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("scaler", ["table", "rapid-roles"])
@pytest.mark.parametrize("controller", ["static", "ecofreq"])
def test_drivers_agree_and_each_moment_has_one_role(
    uneven: Profile, scaler: str, controller: str
) -> None:
    told = (
        {
            "table": f"{TABLE}:plans=aallaa+aaaall+aalaal,period=0.2,switching=2,switch=0.03",
            "rapid-roles": "rapid-roles:switching=2,period=0.05,switch=0.03,cooldown=0.05,queue=2",
        }[scaler]
        .replace("aallaa", "allaaa")
        .replace("aalaal", "aalala")
    )
    settings: dict[str, Any] = {
        "num_prefill": 3, "num_decode": 3, "controller": controller, "router": "least-requests",
        "scaler": told, "kv_transfer_latency_s": 0.01, "slo_ttft_s": 0.2, "slo_itl_s": 0.02,
    }  # fmt: skip
    assert_same(uneven, busy_rows(), settings)
    arrivals = [(0.02 * k, 400, 30) for k in range(60)]
    record, summary = run(uneven, make_requests(*arrivals), **settings)
    assert summary["wake_ups"] >= 1
    for first, second in ((1, 4), (2, 5)):
        lent_s = [record.instances[i].away_s.get("lent", 0.0) for i in (first, second)]
        assert sum(lent_s) == pytest.approx(record.makespan_s, rel=1e-9)
    assert (record.requests.output_tokens == 30).all()
    assert summary["requests_completed"] == 60


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scaler": f"{TABLE}:plans=aaaa,switching=1"}, "awake in one role and lent"),
        ({"scaler": f"{TABLE}:plans=aall,switching=1"}, "must have one of"),
        ({"scaler": f"{TABLE}:plans=lala,switching=1"}, "must have one of"),
        ({"scaler": "rapid-roles:switching=2"}, "must be fewer than"),
        ({"scaler": "rapid-roles", "host_power_w": 9.0}, "must be fewer than"),
    ],
)
def test_what_cannot_be(halves: Profile, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(VoltanaError, match=words):
        run(halves, make_requests((0.0, 4, 9)), num_prefill=2, num_decode=2, **settings)
