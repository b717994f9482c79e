"""Colocated instances that keep prefixes: by hand, what is conserved, and both drivers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import run
from tests.sim.engine.sessions import random_sessions, sharing
from tests.sim.engine.test_coalescing import crooked, run_both, same_iterations, same_requests
from tests.sim.engine.test_prefix_cache import Watched, check
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.records import RunRecord

ONE: dict[str, Any] = {"num_prefill": 0, "num_decode": 0, "num_colocated": 1}
CACHE: dict[str, Any] = ONE | {"colocated_cache": True}
ORDERS = ("sglang", "sglang-mixed")


def cached_of(record: RunRecord) -> list[int]:
    assert record.requests.cached_tokens is not None
    return [int(n) for n in record.requests.cached_tokens]


@pytest.mark.parametrize("order", ORDERS)
def test_the_next_turn_finds_what_the_last_one_wrote(linear: Profile, order: str) -> None:
    """First turn: 512 tokens to 0.625, its second token at 1.125. Of its 514 the last is nowhere
    computed. The second turn has them and 254 more: 255 are computed, 0.125 + 255/1024 s in place
    of 0.125 + 0.75 s. Where nobody says which segment the answer is, only the 512 are found."""
    rows = [(0.0, [(1, 512)], 2), (4.0, [(1, 512), (2, 2), (3, 254)], 2)]
    of = {"colocated_order": order}
    _, without = run(linear, sharing(rows), **ONE, **of)
    cached, summary = run(linear, sharing(rows, answers=[2, 4]), **CACHE, **of)
    blind, _ = run(linear, sharing(rows), **CACHE, **of)
    assert (cached_of(cached), cached_of(blind)) == ([0, 513], [0, 512])
    assert cached.requests.first_token_s.tolist() == [0.625, 4.125 + 255 / 1024]
    assert without["colocated_energy_j"] - summary["colocated_energy_j"] == 256.0 * 513 / 1024
    assert (summary["cached_tokens"], summary["cached_share"]) == (513, 513 / 1280)


@pytest.mark.parametrize(("outputs", "found"), [(150, 399), (201, 399), (202, 0)])
def test_decoding_takes_memory_from_what_nobody_uses(
    linear: Profile, outputs: int, found: int
) -> None:
    """400 of A stay when it has ended. B's 400 and what it writes, all its tokens but the last, fit
    beside them up to 1,000; one more, and A's go whole."""
    rows = [(0.0, [(1, 400)], 1), (4.0, [(2, 400)], outputs), (200.0, [(1, 400)], 1)]
    settings = {"kv_capacity_tokens": 1000, "kv_reserve_tokens": 0}
    for engine in ("coalesced", "reference"):
        record, summary = run(linear, sharing(rows), engine=engine, **CACHE, **settings)
        assert cached_of(record) == [0, 0, found]
        # A's second coming needs one token of a full memory, or 400 of which 399 are free: that is
        # the end of B's answer, which is a leaf by itself
        assert summary["evicted_tokens"] == {150: 0, 201: 200, 202: 400 + 201}[outputs]


def test_what_requests_share_is_in_memory_once(linear: Profile) -> None:
    """A and B of 600 tokens begin with the same 500, in 1,000: B runs beside A if they are there
    once (600 and 100 and what both write), and waits for A's end if not."""
    rows = [(0.0, [(1, 500), (2, 100)], 20), (2.0, [(1, 500), (3, 100)], 20)]
    settings = {"kv_capacity_tokens": 1000, "kv_reserve_tokens": 30}
    plain, _ = run(linear, sharing(rows), **ONE, **settings)
    shared, _ = run(linear, sharing(rows), **CACHE, **settings)
    assert plain.requests.first_token_s[1] > plain.requests.finish_s[0]
    assert shared.requests.first_token_s[1] < 3.0
    assert cached_of(shared) == [0, 500]


def test_a_retracted_request_finds_its_prompt_again(tmp_path: Path) -> None:
    """Two of 4 + 8 in 16 tokens: the second goes with 5 made, as without a cache, and leaves the 4
    of its prompt. When the first has ended (11 tokens) the second's other 5 are computed: 16 hold
    11, 4 and 1 of them, so that the first's answer of 7 goes."""
    profile = write_synthetic_profile(
        tmp_path, time_s=lambda phase, f, b, t: 0.5 if phase == "prefill" else 0.25
    )
    rows = [(0.0, [(1, 4)], 8), (0.0, [(2, 4)], 8)]
    record, summary = run(profile, sharing(rows), kv_capacity_tokens=16, **CACHE)
    assert record.requests.retractions.tolist() == [0, 1]
    assert record.requests.finish_s.tolist() == [2.25, 3.25]
    assert record.instances[0].computed_tokens == 8 + 5
    assert (summary["cached_tokens"], summary["evicted_tokens"]) == (4, 7)
    assert cached_of(record) == [0, 0]  # as of the first time


def test_an_answer_may_go_without_its_prompt(tmp_path: Path) -> None:
    """As above, but the first makes 12: its 13th token takes the second's prompt. So all 9 of the
    second are computed at once, in place of the first's answer of 11, and are two nodes all the
    same: 4 of prompt, 5 of answer, and 2 more when it ends. The third's 8 push out the first's
    prompt of 4, these 2 and these 5, and the second's prompt is there for the fourth."""
    profile = write_synthetic_profile(
        tmp_path, time_s=lambda phase, f, b, t: 0.5 if phase == "prefill" else 0.25
    )
    rows = [
        (0.0, [(1, 4)], 12), (0.0, [(2, 4)], 8), (20.0, [(3, 8)], 1), (25.0, [(2, 4)], 1),
    ]  # fmt: skip
    record, summary = run(profile, sharing(rows), kv_capacity_tokens=16, **CACHE)
    assert record.requests.retractions.tolist() == [0, 1, 0, 0]
    assert cached_of(record) == [0, 0, 0, 3]
    assert summary["evicted_tokens"] == 4 + 11 + 4 + 2 + 5


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(
        tmp_path_factory.mktemp("profile"),
        time_s=crooked(1.0),
        power_w=lambda p, f, b, t: 80.0 + 1.3e-4 * f * f + 0.017 * t + 0.9 * b,
        idle_w=lambda f: 40.0 + f / 50,
    )


@pytest.mark.parametrize("order", ORDERS)
def test_without_anything_to_share_it_is_the_same_run(rough: Profile, order: str) -> None:
    """Prompts that are all different find nothing, and what is left behind costs nobody."""
    rng = np.random.default_rng(2)
    times_s, sizes = np.cumsum(rng.exponential(0.01, 80)), rng.integers(1, 60, (80, 2)).tolist()
    rows = [(times_s[k], [(k, prompt)], output) for k, (prompt, output) in enumerate(sizes)]
    settings: dict[str, Any] = {
        "kv_capacity_tokens": 400, "kv_reserve_tokens": 60, "max_prefill_tokens": 50,
        "colocated_order": order, "num_colocated": 2, "record_iterations": True,
    }  # fmt: skip
    plain, before = run(rough, sharing(rows), **ONE | settings)
    cached, after = run(rough, sharing(rows), **CACHE | settings)
    assert (before["retractions"], after["cached_tokens"]) == (0, 0)
    assert after["evicted_tokens"] > 1000
    same_requests(plain, cached)
    same_iterations(plain, cached)
    assert after["energy_j"] == pytest.approx(before["energy_j"], rel=1e-12)


POLICY = st.fixed_dictionaries(
    {
        "num_colocated": st.integers(1, 3),
        "colocated_order": st.sampled_from(ORDERS),
        "controller": st.sampled_from(("static", "ecofreq", "ecomin", "pid")),
        "router": st.sampled_from(
            ("round-robin", "ecoroute", "prefix-affinity", "prefix-energy", "cache-aware")
        ),
        "kv_capacity_tokens": st.sampled_from((500, 900, 3000)),
        "kv_reserve_tokens": st.sampled_from((0, 20)),
        "kv_retract_tokens": st.sampled_from((1, 7)),
        "max_prefill_tokens": st.sampled_from((40, 1024)),
        "max_running_requests": st.sampled_from((3, 64)),
        "serving_latency_s": st.sampled_from((0.0, 0.01)),
        "slo_itl_s": st.sampled_from((0.006, 0.05)),
    }
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(seed=st.integers(0, 99), is_closed=st.booleans(), gap_s=st.sampled_from((0.005, 0.03)),
       policy=POLICY, limit_s=st.sampled_from((None, 0.7)))  # fmt: skip
def test_both_drivers_give_one_run(
    rough: Profile,
    seed: int,
    is_closed: bool,
    gap_s: float,
    policy: dict[str, Any],
    limit_s: float | None,
) -> None:
    workload = random_sessions(
        seed, count=60, mean_gap_s=gap_s, is_closed=is_closed, has_answers=True
    )
    told = CACHE | policy | {"extrapolate": True, "run_limit_s": limit_s}
    (plain, before), (quick, after) = run_both(rough, workload, **told)
    for key in ("cached_tokens", "evicted_tokens", "retractions"):
        assert before[key] == after[key]
    np.testing.assert_array_equal(plain.requests.cached_tokens, quick.requests.cached_tokens)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_found_or_computed_and_memory_is_given_back(
    rough: Profile, seed: int, order: str
) -> None:
    workload = random_sessions(seed, count=150, mean_gap_s=0.01, has_answers=True)
    watched = Watched(
        rough, workload, kv_capacity_tokens=700, kv_reserve_tokens=4, max_prefill_tokens=90,
        colocated_order=order, **CACHE | {"num_colocated": 2},
    )  # fmt: skip
    record = watched.play()
    cached = sum(i.cached_tokens or 0 for i in record.instances)
    computed = sum(i.computed_tokens or 0 for i in record.instances)
    again = cached + computed - workload.input_tokens.sum()
    assert (again > 0) == (record.requests.retractions.sum() > 0)
    assert cached >= sum(cached_of(record)) > 1000
    for instance in watched.fleet.decode:
        assert instance._held_tokens == 0
    for cache in watched.caches():
        check(cache)
        assert (cache.locked_tokens, cache.held_tokens) == (0, 0)
        assert cache.evicted_tokens > 100


def test_vllm_has_other_rules() -> None:
    with pytest.raises(VoltanaError, match="colocated_cache must go with SGLang's orders"):
        make_config({"num_colocated": 1, "colocated_cache": True, "colocated_order": "vllm"})
    with pytest.raises(VoltanaError, match="colocated_cache is of colocated instances"):
        make_config({"colocated_cache": True})
