"""Decode instances that keep prefixes: by hand, what is conserved, and both drivers."""

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
from voltana.sim.engine.reuse.decode import CachingDecodeInstance

PLAIN: dict[str, Any] = {"prefill_starts": "decode_boundary"}
CACHE: dict[str, Any] = PLAIN | {"decode_cache": True}


@pytest.mark.parametrize(("first_token", "found"), [("decode", 514), ("prefill", 513)])
def test_what_decode_has_is_not_sent(linear: Profile, first_token: str, found: int) -> None:
    """First turn: 512 tokens to 0.625, half a second on the link, two or one steps. The second has
    its prompt and its answer, as far as that is computed, and 254 more; all 768 are computed, to
    8.875, and what decode has not found moves. Where nobody says what the answer is, 512 are."""
    rows = [(0.0, [(1, 512)], 2), (8.0, [(1, 512), (2, 2), (3, 254)], 2)]
    told = {"first_token": first_token, "kv_transfer_bytes_per_s": 1024.0 * 1024.0}
    taken_s = 0.5 if first_token == "decode" else 0.0
    for transfers in ("at_once", "in_turn", "shared_by_decode"):
        link = told | {"kv_transfers": transfers}
        plain, without = run(linear, sharing(rows, answers=[2, 4]), **PLAIN, **link)
        cached, summary = run(linear, sharing(rows, answers=[2, 4]), **CACHE, **link)
        blind, _ = run(linear, sharing(rows), **CACHE, **link)
        for record, sent in ((plain, 768), (cached, 768 - found), (blind, 256)):
            first_s = [0.625 + 0.5 + taken_s, 8.875 + sent / 1024 + taken_s]
            assert record.requests.first_token_s.tolist() == first_s
        assert (summary["unsent_tokens"], summary["evicted_tokens"]) == (found, 0)
        assert "unsent_tokens" not in without
        assert "cached_tokens" not in summary  # prefill found nothing: no joule is saved
        assert summary["prefill_energy_j"] == without["prefill_energy_j"]


@pytest.mark.parametrize(
    ("outputs", "found", "evicted"), [(199, 400, 1), (200, 400, 1 + 200), (201, 0, 401 + 201)]
)
def test_decoding_takes_memory_from_what_nobody_uses(
    linear: Profile, outputs: int, found: int, evicted: int
) -> None:
    """A leaves 400 and an answer of 1. B's 400 and what it writes fit beside them up to 1,000; then
    A's answer goes, then its prompt. A's second coming has to write a token, or all of it."""
    rows = [(0.0, [(1, 400)], 1), (4.0, [(2, 400)], outputs), (200.0, [(1, 400)], 1)]
    for engine in ("coalesced", "reference"):
        _, summary = run(linear, sharing(rows), engine=engine, kv_capacity_tokens=1000, **CACHE)
        assert (summary["unsent_tokens"], summary["evicted_tokens"]) == (found, evicted)


def test_memory_is_taken_before_prefill_and_once_for_what_is_shared(linear: Profile) -> None:
    """A and B of 600 tokens in 1,250. B's prefill waits for A's end unless it begins with the same
    500: then 100 are left to find room for, and B runs beside A."""
    rows = [(0.0, [(1, 500), (2, 100)], 20), (2.0, [(1, 500), (3, 100)], 20)]
    apart = [rows[0], (2.0, [(4, 500), (3, 100)], 20)]
    told = {"kv_capacity_tokens": 1250, "kv_reserve_tokens": 30}
    plain, _ = run(linear, sharing(rows), **PLAIN, **told)
    shared, summary = run(linear, sharing(rows), **CACHE, **told)
    waits, _ = run(linear, sharing(apart), **CACHE, **told)
    end_s = plain.requests.finish_s[0]
    assert plain.requests.first_token_s[1] == end_s + 0.5
    assert shared.requests.first_token_s[1] < end_s
    assert summary["unsent_tokens"] == 500
    assert waits.requests.first_token_s[1] == end_s + (0.125 + 600 / 1024) + 0.5


@pytest.fixture
def quick(tmp_path: Path) -> Profile:
    """Half a second of prefill, a quarter a step."""
    return write_synthetic_profile(
        tmp_path, time_s=lambda phase, f, b, t: 0.5 if phase == "prefill" else 0.25
    )


def test_a_retracted_request_comes_back_whole(quick: Profile) -> None:
    """Two of 4 + 8 in 16 tokens: the second goes with 4 made and leaves the 4 of its prompt. When
    the first has ended (12 tokens) the second takes memory for all its 8: its own prompt goes, as
    the oldest, and then the first's answer of 8."""
    rows = [(0.0, [(1, 4)], 8), (0.0, [(2, 4)], 8)]
    record, summary = run(quick, sharing(rows), kv_capacity_tokens=16, **CACHE)
    assert record.requests.retractions.tolist() == [0, 1]
    assert record.requests.finish_s.tolist() == [2.5, 3.5]
    assert summary["evicted_tokens"] == 4 + 8


def test_whoever_runs_can_run_to_its_end(quick: Profile) -> None:
    """A of 4 + 12 needs all 16 tokens. With B's 4 set aside it could not end: B waits for it."""
    rows = [(0.0, [(1, 4)], 12), (0.6, [(2, 4)], 1)]
    record, _ = run(quick, sharing(rows), kv_capacity_tokens=16, **CACHE)
    assert record.requests.finish_s.tolist() == [3.5, 3.5 + 0.5 + 0.25]
    assert record.requests.retractions.tolist() == [0, 0]


def test_what_decode_never_runs_is_kept_too(linear: Profile) -> None:
    rows = [(0.0, [(1, 512)], 1), (4.0, [(1, 512), (2, 256)], 1)]
    record, summary = run(linear, sharing(rows), first_token="prefill", **CACHE)
    assert summary["unsent_tokens"] == 512
    assert record.requests.finish_s.tolist() == [0.625, 4.875]


def test_without_anything_to_share_it_is_the_same_run(rough: Profile) -> None:
    """Prompts that are all different find nothing, and what is left behind costs nobody."""
    rng = np.random.default_rng(2)
    times_s, sizes = np.cumsum(rng.exponential(0.01, 80)), rng.integers(1, 60, (80, 2)).tolist()
    rows = [(times_s[k], [(k, prompt)], output) for k, (prompt, output) in enumerate(sizes)]
    told: dict[str, Any] = {"kv_capacity_tokens": 1000, "num_decode": 2, "record_iterations": True}
    plain, before = run(rough, sharing(rows), **PLAIN | told)
    cached, after = run(rough, sharing(rows), **CACHE | told)
    assert (before["retractions"], after["unsent_tokens"]) == (0, 0)
    assert after["evicted_tokens"] > 100
    same_requests(plain, cached)
    same_iterations(plain, cached)
    assert after["energy_j"] == pytest.approx(before["energy_j"], rel=1e-12)


@pytest.mark.parametrize("engine", ["coalesced", "reference"])
def test_what_is_counted_is_there_in_the_midst_of_a_run(linear: Profile, engine: str) -> None:
    """As above: B begins at 4 + 0.125 + 400/1024 and its 201st step takes A's prompt."""
    workload = sharing([(0.0, [(1, 400)], 1), (4.0, [(2, 400)], 300), (250.0, [(3, 9)], 1)])
    told = {"num_prefill": 1, "num_decode": 1, "engine": engine, "kv_capacity_tokens": 1000}
    fleet = Watched(linear, workload, **told, **CACHE).fleet
    arrivals = fleet.start()
    for _ in range(2):
        request = next(arrivals)
        fleet.advance(request.arrival_s)
        fleet.accept(request)
    assert workload.prompts is not None
    found = []
    for at_s in (104.5, 104.53):
        fleet.agenda.call_at(
            at_s, lambda _: found.append(fleet.decode[0].state.count_cached(prompt))
        )
    prompt = workload.prompts.prompt(0)
    fleet.finish()
    assert found == [400, 0]


def test_a_router_sees_what_decode_has(rough: Profile) -> None:
    workload = random_sessions(7, count=300, mean_gap_s=0.02, has_answers=True)
    told = {"num_decode": 3, "kv_capacity_tokens": 500, "extrapolate": True, **CACHE}

    def play(router: str, engine: str) -> tuple[list[int], int, int]:
        record, summary = run(rough, workload, router=router, engine=engine, **told)
        ids = record.requests.decode_id.tolist()
        return ids, summary["unsent_tokens"], summary["evicted_tokens"]

    found = play("prefix-affinity", "coalesced")
    assert found == play("prefix-affinity", "reference")
    assert found[1] > play("least-requests", "coalesced")[1]


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(VoltanaError, match="set prefill_starts=decode_boundary"):
        make_config({"decode_cache": True})
    with pytest.raises(VoltanaError, match="decode_cache is of a fleet with its phases apart"):
        make_config({"decode_cache": True, "num_colocated": 1})


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(
        tmp_path_factory.mktemp("profile"),
        time_s=crooked(1.0),
        power_w=lambda p, f, b, t: 80.0 + 1.3e-4 * f * f + 0.017 * t + 0.9 * b,
        idle_w=lambda f: 40.0 + f / 50,
    )


POLICY = st.fixed_dictionaries(
    {
        "num_prefill": st.integers(1, 2),
        "num_decode": st.integers(1, 3),
        "controller": st.sampled_from(("static", "ecofreq", "ecomin", "pid")),
        "router": st.sampled_from(("round-robin", "ecoroute", "prefix-affinity")),
        "prefix_cache_tokens": st.sampled_from((None, 700)),
        "kv_capacity_tokens": st.sampled_from((500, 900, 3000)),
        "kv_reserve_tokens": st.sampled_from((0, 20)),
        "kv_retract_tokens": st.sampled_from((1, 7)),
        "max_prefill_tokens": st.sampled_from((40, 1024)),
        "max_running_requests": st.sampled_from((3, 64)),
        "serving_latency_s": st.sampled_from((0.0, 0.01)),
        "handshake_latency_s": st.sampled_from((0.0, 0.002)),
        "first_token": st.sampled_from(("decode", "prefill")),
        "kv_transfer_latency_s": st.sampled_from((0.0, 0.01)),
        "kv_transfer_bytes_per_s": st.sampled_from((None, 2e6)),
        "kv_transfers": st.sampled_from(("at_once", "in_turn", "shared_by_decode")),
        "slo_itl_s": st.sampled_from((0.006, 0.05)),
    }
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(seed=st.integers(0, 99), is_closed=st.booleans(), gap_s=st.sampled_from((0.002, 0.03)),
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
    (_, before), (_, after) = run_both(rough, workload, **told)
    for key in ("unsent_tokens", "evicted_tokens", "retractions"):
        assert before[key] == after[key]
    if limit_s is None:
        assert after["requests_completed"] + after["requests_rejected"] == 60


@pytest.mark.parametrize("seed", range(3))
def test_memory_is_never_more_than_there_is_and_is_given_back(rough: Profile, seed: int) -> None:
    workload = random_sessions(seed, count=150, mean_gap_s=0.002, has_answers=True)
    watched = Watched(
        rough, workload, kv_capacity_tokens=600, kv_reserve_tokens=4, num_decode=2,
        first_token="prefill", kv_transfer_latency_s=0.01, **CACHE,
    )  # fmt: skip
    record = watched.play()
    assert record.requests.retractions.sum() > 0
    unsent = 0
    for instance in watched.fleet.decode:
        assert isinstance(instance, CachingDecodeInstance)
        check(instance.cache)
        assert (instance.cache.locked_tokens, instance.cache.held_tokens) == (0, 0)
        assert instance._held_tokens == 0
        assert instance._due_tokens == 0
        assert instance.cache.evicted_tokens > 100
        unsent += instance.record().unsent_tokens or 0
    assert 1000 < unsent < workload.input_tokens.sum()
