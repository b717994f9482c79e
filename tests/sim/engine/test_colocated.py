"""Instances that do both phases: schedules by hand, what is conserved, and both drivers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from tests.sim.engine.test_coalescing import assert_same, crooked, uneven_spread
from tests.sim.engine.test_properties import REQUEST, workload_of
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.records import RunRecord

ORDERS = ("sglang", "sglang-mixed", "vllm")
COLOCATED: dict[str, Any] = {"num_prefill": 0, "num_decode": 0, "num_colocated": 1}


@pytest.fixture
def halves(tmp_path: Path) -> Profile:
    """A chunk takes 0.5 s at 256 W, a decode step 0.25 s at 128 W, rest 64 W: exact in binary."""
    return write_synthetic_profile(
        tmp_path,
        time_s=lambda phase, f, b, t: 0.5 if phase == "prefill" else 0.25,
        power_w=lambda phase, f, b, t: 256.0 if phase == "prefill" else 128.0,
        idle_w=lambda f: 64.0,
    )


def gaps_of(record: RunRecord) -> list[float]:
    return sorted(np.repeat(record.itl_s, record.itl_weight).tolist())


@pytest.mark.parametrize("order", ORDERS)
def test_one_request_alone(halves: Profile, order: str) -> None:
    """Two chunks of a prompt of 1,500 (1,024 and 476) end at 2.0: its first token. Two decode
    steps make the others, at 2.25 and 2.5. A second of rest before, two chunks, two steps."""
    record, summary = run(
        halves, make_requests((1.0, 1500, 3)), colocated_order=order, max_prefill_tokens=1024,
        **COLOCATED,
    )  # fmt: skip
    assert record.requests.first_token_s.tolist() == [2.0]
    assert record.requests.finish_s.tolist() == [2.5]
    assert gaps_of(record) == [0.25, 0.25]
    assert summary["colocated_energy_j"] == 2 * 0.5 * 256.0 + 2 * 0.25 * 128.0
    assert summary["idle_energy_j"] == 64.0
    assert summary["energy_j"] == 256.0 + 64.0 + 64.0
    assert summary["prefill_energy_j"] == summary["decode_energy_j"] == 0.0
    assert summary["clock_residency"]["colocated"] == {"1400": 1.0}


def test_decoding_stands_while_prompts_run(halves: Profile) -> None:
    """A's prompt ends at 0.5, its second token is out at 0.75. B came at 0.625: its prompt runs
    alone to 1.25; then both decode to 1.5, A's third token after 0.75 s."""
    record, summary = run(halves, make_requests((0.0, 4, 3), (0.625, 4, 2)), **COLOCATED)
    assert record.requests.first_token_s.tolist() == [0.5, 1.25]
    assert record.requests.finish_s.tolist() == [1.5, 1.5]
    assert gaps_of(record) == [0.25, 0.25, 0.75]
    assert summary["colocated_energy_j"] == 2 * 128.0 + 2 * 32.0


@pytest.mark.parametrize("order", ["sglang-mixed", "vllm"])
@pytest.mark.parametrize(
    ("overlap", "third_s", "mixed_j"),
    [(0.0, 1.5, 160.0), (0.5, 1.375, 160.0 / 0.75 * 0.625), (1.0, 1.25, 160.0 / 0.75 * 0.5)],
)
def test_a_chunk_runs_beside_decoding(
    halves: Profile, order: str, overlap: float, third_s: float, mixed_j: float
) -> None:
    """As above, but A decodes beside B's prompt: 0.75 s as the sum of parts, 0.5 s of 256 W and
    0.25 s of 128 W. Hidden to a half, the step takes 0.125 s less at the same mean power."""
    record, summary = run(
        halves, make_requests((0.0, 4, 3), (0.625, 4, 2)), colocated_order=order,
        mixed_overlap_frac=overlap, **COLOCATED,
    )  # fmt: skip
    assert record.requests.first_token_s.tolist() == [0.5, third_s]
    assert record.requests.finish_s.tolist() == [third_s, third_s + 0.25]
    assert summary["colocated_energy_j"] == pytest.approx(128.0 + 32.0 + mixed_j + 32.0)


@pytest.mark.parametrize("order", ["sglang-mixed", "vllm"])
def test_running_requests_are_tokens_of_the_budget(halves: Profile, order: str) -> None:
    """Three decode when a prompt of 8 comes; of a budget of 6 they leave it 3, 3 and 2."""
    requests = make_requests(*[(0.0, 2, 20)] * 3, (0.625, 8, 1))
    record, _ = run(
        halves, requests, colocated_order=order, max_prefill_tokens=6, **COLOCATED
    )  # fmt: skip
    assert record.requests.first_token_s.tolist() == [0.5, 0.5, 0.5, 0.75 + 3 * 0.75]


@pytest.mark.parametrize("order", ORDERS)
def test_a_retracted_request_is_computed_again(halves: Profile, order: str) -> None:
    """Two of 4 + 8 in 16 tokens. Prompts to 0.5, tokens 2 to 5 at 0.75 … 1.5 (8, 10, 12, 14 and
    16 tokens): the fifth step fits no longer. The second goes with 5 tokens made, 9 in all. The
    first ends at 2.25 (three more steps); the 9 are a prompt that ends at 2.75 with its sixth
    token, after 1.25 s; the last two at 3.0 and 3.25."""
    record, summary = run(
        halves, make_requests((0.0, 4, 8), (0.0, 4, 8)), kv_capacity_tokens=16,
        colocated_order=order, **COLOCATED,
    )  # fmt: skip
    assert record.requests.retractions.tolist() == [0, 1]
    assert record.requests.finish_s.tolist() == [2.25, 3.25]
    assert summary["itl_s"]["p99"] == 1.25
    assert record.itl_weight.sum() == 14
    assert record.instances[0].computed_tokens == 8 + 9


@pytest.mark.parametrize(("order", "expected"), [("sglang", [1, 0]), ("vllm", [0, 1])])
def test_who_is_retracted(halves: Profile, order: str, expected: list[int]) -> None:
    """6 + 8 and 4 + 8 fill 18 tokens when each has made five: the longest prompt, or the latest."""
    record, _ = run(
        halves, make_requests((0.0, 6, 8), (0.0, 4, 8)), kv_capacity_tokens=18,
        colocated_order=order, **COLOCATED,
    )  # fmt: skip
    assert record.requests.retractions.tolist() == expected


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(
        tmp_path_factory.mktemp("profile"),
        time_s=crooked(1.0),
        power_w=lambda p, f, b, t: 80.0 + 1.3e-4 * f * f + 0.017 * t + 0.9 * b,
        idle_w=lambda f: 40.0 + f / 50,
        spread_s=uneven_spread(crooked(1.0)),
    )


CONTROLLERS = ("static", "boost", "ecofreq", "ecomin", "pid")
POLICY = st.fixed_dictionaries(
    {
        "num_colocated": st.integers(1, 3),
        "colocated_order": st.sampled_from(ORDERS),
        "controller": st.sampled_from(CONTROLLERS),
        "router": st.sampled_from(("round-robin", "least-requests", "consolidate", "ecoroute")),
        "kv_capacity_tokens": st.sampled_from((900, 1500, 6000)),
        "kv_reserve_tokens": st.sampled_from((0, 20)),
        "kv_retract_tokens": st.sampled_from((1, 7)),
        "max_prefill_tokens": st.sampled_from((7, 64, 1024)),
        "max_running_requests": st.sampled_from((2, 64)),
        "max_prefill_requests": st.sampled_from((2, 512)),
        "mixed_overlap_frac": st.sampled_from((0.0, 0.4)),
        "noise_scale": st.sampled_from((0.0, 1.0)),
        "sag_depth": st.sampled_from((0.0, 0.5)),
        "serving_latency_s": st.sampled_from((0.0, 0.01)),
        "clock_stall_s": st.sampled_from((0.0, 0.002)),
        "slo_itl_s": st.sampled_from((0.006, 0.05)),
        "extrapolate": st.just(True),
    }
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(rows=st.lists(REQUEST, min_size=1, max_size=40), policy=POLICY, data=st.data())
def test_both_drivers_agree(
    profile: Profile,
    rows: list[tuple[float, int, int]],
    policy: dict[str, Any],
    data: st.DataObject,
) -> None:
    if data.draw(st.booleans(), label="cut"):
        policy = policy | {"run_limit_s": data.draw(st.floats(0.01, 3.0), label="limit")}
    assert_same(profile, rows, {**COLOCATED, **policy})


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(rows=st.lists(REQUEST, min_size=1, max_size=40), policy=POLICY)
def test_tokens_time_and_energy_are_conserved(
    profile: Profile, rows: list[tuple[float, int, int]], policy: dict[str, Any]
) -> None:
    record, summary = run(profile, workload_of(rows), **{**COLOCATED, **policy})
    requests = record.requests
    done = requests.finish_s == requests.finish_s
    assert (done | (requests.status == 2)).all()
    outputs = requests.output_tokens[done]
    assert record.itl_weight.sum() == (outputs - 1).sum()
    # gaps of a request add up to its last token less its first, and so do those of all
    lived_s = (requests.finish_s - requests.first_token_s)[done].sum()
    assert np.dot(record.itl_s, record.itl_weight) == pytest.approx(lived_s, abs=1e-7)
    again = computed(record) - requests.input_tokens[done].sum()
    assert (again > 0) == (summary["retractions"] > 0)
    for instance in record.instances:
        assert instance.busy_s + instance.idle_s == pytest.approx(record.makespan_s)
    parts = summary["colocated_energy_j"] + summary["idle_energy_j"]
    assert summary["energy_j"] == pytest.approx(parts)


def computed(record: RunRecord) -> int:
    return sum(i.computed_tokens or 0 for i in record.instances)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_colocated": 2, "num_decode": 1}, "num_decode is of a fleet with its phases apart"),
        ({"num_colocated": 2, "prefix_cache_tokens": 9}, "prefix_cache_tokens is of a fleet"),
        ({"num_colocated": 2, "decode_controller": "static"}, "decode_controller is of a fleet"),
        ({"colocated_order": "vllm"}, "colocated_order is of colocated instances"),
        ({"num_colocated": 2, "active_colocated": 3}, "active_colocated must be <= num_colocated"),
        ({"num_colocated": 2, "mixed_overlap_frac": 1.5}, "mixed_overlap_frac must be <= 1"),
        ({"num_prefill": 0}, "num_prefill must be > 0"),
        ({"num_colocated": 0}, "num_colocated must be > 0"),
    ],
)
def test_a_fleet_is_of_one_kind(values: dict[str, Any], message: str) -> None:
    with pytest.raises(VoltanaError, match=message):
        make_config(values)
