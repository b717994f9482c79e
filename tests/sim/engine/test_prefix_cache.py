"""The cache of prefixes: closed forms, conservation, a cache of single tokens, both drivers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.independent.cache import Token, TokenCache
from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from tests.sim.engine.sessions import random_sessions, sharing
from tests.sim.engine.test_coalescing import crooked, run_both
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.engine.fleet import Fleet
from voltana.sim.engine.logs.exact import ExactLog
from voltana.sim.engine.reuse.colocated import CachingColocatedInstance
from voltana.sim.engine.reuse.decode import CachingDecodeInstance
from voltana.sim.engine.reuse.prefill import CachingPrefillInstance
from voltana.sim.engine.reuse.sessions import Sessions
from voltana.sim.policies.parts.radix import Node, RadixCache
from voltana.sim.policies.requests import Prompt
from voltana.sim.records import RunRecord
from voltana.sim.workload.workload import Workload


def prefill_starts_and_tokens(record: RunRecord) -> list[tuple[float, int]]:
    table = record.iterations
    assert table is not None
    rows = table.phase == "prefill"
    return list(zip(table.start_s[rows].tolist(), table.tokens[rows].tolist(), strict=True))


def test_two_turns_by_hand(linear: Profile) -> None:
    """First turn: 512 tokens, 0.125 + 0.5 s. Second: the 512, an answer of 2 that prefill has never
    seen, and 254 more: 256 computed in 0.125 + 0.25 s, in place of 0.125 + 0.75 s."""
    rows = [(0.0, [(1, 512)], 2), (4.0, [(1, 512), (2, 2), (3, 254)], 2)]
    plain, without = run(linear, sharing(rows), record_iterations=True)
    cached, summary = run(linear, sharing(rows), record_iterations=True, prefix_cache_tokens=2048)
    assert prefill_starts_and_tokens(plain) == [(0.0, 512), (4.0, 768)]
    assert prefill_starts_and_tokens(cached) == [(0.0, 512), (4.0, 256)]
    assert plain.requests.cached_tokens is None
    assert cached.requests.cached_tokens is not None
    assert cached.requests.cached_tokens.tolist() == [0, 512]
    ttft_s = cached.requests.first_token_s - cached.requests.arrival_s
    assert ttft_s.tolist() == [0.625 + 0.5, 0.375 + 0.5]
    assert without["prefill_energy_j"] - summary["prefill_energy_j"] == 256.0 * 0.5
    assert (summary["cached_tokens"], summary["cached_share"]) == (512, 512 / 1280)
    assert "cached_tokens" not in without


def test_the_prefix_is_context_of_what_is_computed(tmp_path: Path) -> None:
    """256 new tokens behind 512: looked up at 256² / 256·(256 + 2·512) = 0.2 equal prompts. With
    time 1/b at any number of tokens the line through b = 1 and 2 goes through 1/0.2."""
    profile = write_synthetic_profile(
        tmp_path,
        time_s=lambda phase, f, b, t: 0.25 / b if phase == "prefill" else 0.5,
        power_w=lambda phase, f, b, t: 256.0,
        idle_w=lambda f: 64.0,
    )
    rows = [(0.0, [(1, 512)], 1), (4.0, [(1, 512), (2, 256)], 1)]
    record, _ = run(profile, sharing(rows), prefix_cache_tokens=2048)
    waited_s = record.requests.first_token_s - record.requests.arrival_s
    assert waited_s[1] - 0.5 == pytest.approx(0.25 / 0.2, rel=1e-12)


def test_of_a_prompt_that_is_all_there_one_token_is_computed(linear: Profile) -> None:
    rows = [(0.0, [(1, 100)], 1), (2.0, [(1, 100)], 1), (4.0, [(1, 100), (2, 1)], 1)]
    record, _ = run(linear, sharing(rows), record_iterations=True, prefix_cache_tokens=2048)
    assert [n for _, n in prefill_starts_and_tokens(record)] == [100, 1, 1]


def test_the_least_recently_used_goes_and_its_length_is_computed_again(linear: Profile) -> None:
    """Room for 1,000: 400 of A and 400 of B; A again; C's 400 push B out, whole."""
    asked = [1, 2, 1, 3, 1, 2]
    rows = [(4.0 * k, [(name, 400)], 1) for k, name in enumerate(asked)]
    record, summary = run(linear, sharing(rows), record_iterations=True, prefix_cache_tokens=1000)
    assert [n for _, n in prefill_starts_and_tokens(record)] == [400, 400, 1, 400, 1, 400]
    # B's whole prompt, and C's for B's second
    assert summary["evicted_tokens"] == 800


def test_a_prompt_waits_for_memory_that_a_transfer_locks(linear: Profile) -> None:
    """600 tokens go to decode for a second after 0.7 s: 500 more have no room in 1,000 before."""
    rows = [(0.0, [(1, 600)], 1), (0.25, [(2, 500)], 1)]
    record, _ = run(
        linear, sharing(rows), record_iterations=True, prefix_cache_tokens=1000,
        kv_transfer_latency_s=1.0,
    )  # fmt: skip
    assert prefill_starts_and_tokens(record) == [(0.0, 600), (0.125 + 600 / 1024 + 1.0, 500)]


def test_a_prompt_beyond_the_memory_is_rejected(linear: Profile) -> None:
    rows = [(0.0, [(1, 98)], 1), (1.0, [(2, 97)], 1)]
    _, summary = run(linear, sharing(rows), prefix_cache_tokens=100)
    assert (summary["requests_rejected"], summary["requests_completed"]) == (1, 1)


def test_a_cache_needs_to_know_what_prompts_share(linear: Profile) -> None:
    with pytest.raises(VoltanaError, match="what prompts share"):
        run(linear, make_requests((0.0, 4, 1)), prefix_cache_tokens=100)
    waiting = sharing([(0.0, [(1, 5)], 1), (1.0, [(1, 5)], 1)], previous=[-1, 0], think_s=[0, 1])
    with pytest.raises(VoltanaError, match="what prompts share"):
        run(linear, dataclasses.replace(waiting, prompts=None), prefix_cache_tokens=100)
    _, summary = run(linear, dataclasses.replace(waiting, prompts=None))
    assert summary["requests_completed"] == 2


def test_a_turn_comes_when_its_answer_has_been_read(linear: Profile) -> None:
    """512 tokens: prefill to 0.625, two tokens at 1.125 and 1.625; the next turn 2.5 s later,
    though the workload could have it at 2.5. Another session's request comes in between."""
    workload = sharing(
        [(0.0, [(1, 512)], 2), (2.5, [(1, 512), (2, 32)], 1), (3.0, [(3, 64)], 1)],
        previous=[-1, 0, -1],
        think_s=[0.0, 2.5, 0.0],
    )
    for engine in ("coalesced", "reference"):
        record, summary = run(linear, workload, prefix_cache_tokens=2048, engine=engine)
        assert record.requests.arrival_s.tolist() == [0.0, 3.0, 4.125]
        assert record.requests.workload_row is not None
        assert record.requests.workload_row.tolist() == [0, 2, 1]
        assert record.requests.input_tokens.tolist() == [512, 64, 544]
        assert record.requests.cached_tokens is not None
        assert record.requests.cached_tokens.tolist() == [0, 0, 512]
        # the table's digits: 1e-7 s
        assert record.makespan_s == pytest.approx(4.125 + 0.125 + 32 / 1024 + 0.5, rel=1e-6)
        assert summary["requests_completed"] == 3
        # cut while somebody thinks: the turn to come does not exist
        cut, _ = run(linear, workload, run_limit_s=4.0, engine=engine)
        assert len(cut.requests) == 2
        _, sketched = run(linear, workload, metrics="sketch", engine=engine)
        assert sketched["requests_completed"] == 3


def test_a_rejected_turn_ends_its_session(linear: Profile) -> None:
    workload = sharing(
        [(0.0, [(1, 512)], 1), (1.0, [(1, 512), (2, 9)], 1)], previous=[-1, 0], think_s=[0.0, 1.0]
    )
    record, summary = run(linear, workload, kv_capacity_tokens=500)
    assert (len(record.requests), summary["requests_rejected"]) == (1, 1)


def test_a_fleet_without_sessions_does_not_play_turns(linear: Profile) -> None:
    workload = sharing([(0.0, [(1, 5)], 1), (1.0, [(1, 5)], 1)], previous=[-1, 0], think_s=[0, 1])
    fleet = Fleet(make_config({}), linear, (workload,), ExactLog(workload))
    with pytest.raises(VoltanaError, match="simulate"):
        fleet.run()


class Watched:
    """A run that is stopped at each arrival to look at its caches."""

    def __init__(self, profile: Profile, workload: Workload, **settings: Any) -> None:  # noqa: ANN401
        config = make_config(
            {"profile": "synthetic", "controller": "static", "router": "round-robin", **settings}
        )
        log = Sessions(workload, ExactLog(workload))
        self.fleet = Fleet(config, profile, (workload,), log)

    def caches(self) -> list[RadixCache]:
        kinds = CachingPrefillInstance, CachingDecodeInstance, CachingColocatedInstance
        return [i.cache for i in self.fleet.instances if isinstance(i, kinds)]

    def play(self) -> RunRecord:
        for request in self.fleet.start():
            self.fleet.advance(request.arrival_s)
            for cache in self.caches():
                check(cache)
            self.fleet.accept(request)
        return self.fleet.finish()


def nodes_of(cache: RadixCache) -> list[Node]:
    found: list[Node] = []
    seen = [cache.root]
    while seen:
        node = seen.pop()
        found += node.children.values()
        seen += node.children.values()
    return found


def check(cache: RadixCache) -> None:
    """Sizes are those of the tree, a lock holds all before it, and nothing is beyond capacity."""
    nodes = nodes_of(cache)
    assert sum(n.end - n.start for n in nodes) == cache.size_tokens
    assert sum(n.end - n.start for n in nodes if n.locks) == cache.locked_tokens
    assert cache.size_tokens + cache.held_tokens <= cache.capacity_tokens
    for node in nodes:
        assert node.parent is not None
        assert node.parent.end == node.start
        assert node.parent is cache.root or node.parent.locks >= node.locks


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(
        tmp_path_factory.mktemp("profile"),
        time_s=crooked(1.0),
        power_w=lambda p, f, b, t: 80.0 + 1.3e-4 * f * f + 0.017 * t + 0.9 * b,
        idle_w=lambda f: 40.0 + f / 50,
    )


@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_found_or_computed_and_none_is_lost(rough: Profile, seed: int) -> None:
    settings = {
        "prefix_cache_tokens": 700, "kv_transfer_latency_s": 0.03, "max_prefill_tokens": 90,
        "num_prefill": 2, "num_decode": 1,
    }  # fmt: skip
    workload = random_sessions(seed, count=150, mean_gap_s=0.02)
    watched = Watched(rough, workload, **settings)
    record = watched.play()
    cached = record.requests.cached_tokens
    assert cached is not None
    assert (cached < workload.input_tokens).all()
    computed = [i.computed_tokens for i in record.instances if i.phase == "prefill"]
    assert cached.sum() + sum(c or 0 for c in computed) == workload.input_tokens.sum()
    for cache in watched.caches():
        check(cache)
        assert (cache.locked_tokens, cache.held_tokens) == (0, 0)
        assert cache.evicted_tokens > 100
    assert cached.sum() > 1000


Step = tuple[str, list[int], int]


@given(
    steps=st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(0, 3)),
        max_size=60,
    ),
    capacity=st.integers(12, 40),
)
def test_a_cache_of_single_tokens_finds_and_evicts_the_same(
    steps: list[tuple[list[int], int]], capacity: int
) -> None:
    """Requests that find, compute and keep, each locked until `lag` more have come.

    A segment's name is the path to it, its length follows from its last digit: 1, 3 or 4 tokens.
    """
    tree, tokens = RadixCache(capacity), TokenCache(capacity)
    names: dict[tuple[int, ...], int] = {}
    locked: list[tuple[int, Node, list[Token]]] = []
    for digits, lag in steps:
        locked = [(left - 1, node, path) for left, node, path in locked]
        for left, node, path in locked:
            if left < 0:
                tree.unlock(node)
                for token in path:
                    token.locks -= 1
        locked = [entry for entry in locked if entry[0] >= 0]
        paths = [tuple(digits[: k + 1]) for k in range(len(digits))]
        lengths = [(1, 3, 4)[digit] for digit in digits]
        prompt = Prompt([names.setdefault(p, len(names)) for p in paths], lengths)
        flat = [(p, k) for p, n in zip(paths, lengths, strict=True) for k in range(n)]
        total = len(flat)
        assert prompt.ends[-1] == total
        known = tree.count(prompt, total - 1)
        node, path = tree.match(prompt, total - 1), tokens.find(flat[: total - 1])
        assert node.end == known == len(path)
        tree.lock(node)
        for token in path:
            token.locks += 1
        assert tree.available_tokens == tokens.room()
        if total - known <= tree.available_tokens:
            tree.hold(total - known)
            tokens.take(total - known)
            assert (tree.size_tokens, tree.evicted_tokens) == (len(tokens.all()), tokens.evicted)
            tree.held_tokens -= total - known
            tokens.computing -= total - known
            whole, all_path = tree.insert(prompt, total), tokens.keep(flat)
            tree.lock(whole)
            for token in all_path:
                token.locks += 1
            locked.append((lag, whole, all_path))
        tree.unlock(node)
        for token in path:
            token.locks -= 1
        check(tree)
        assert tree.size_tokens == len(tokens.all())


@pytest.mark.parametrize("is_closed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_both_drivers_give_one_run(rough: Profile, seed: int, is_closed: bool) -> None:
    workload = random_sessions(seed, count=120, mean_gap_s=0.03, is_closed=is_closed)
    settings = {
        "prefix_cache_tokens": 500, "kv_transfer_latency_s": 0.02, "max_prefill_tokens": 100,
        "num_prefill": 2, "num_decode": 2, "controller": "ecofreq",
        "actuation_latency_s": 0.003, "kv_capacity_tokens": 900,
    }  # fmt: skip
    (plain, _), (quick, summary) = run_both(rough, workload, **settings)
    for name in ("cached_tokens", "workload_row"):
        np.testing.assert_array_equal(
            getattr(plain.requests, name), getattr(quick.requests, name), err_msg=name
        )
    assert summary["cached_share"] > 0.1
    assert summary["evicted_tokens"] > 0
