"""Which cache a server over an emulated card is started with, and in how much memory."""

from __future__ import annotations

from dataclasses import replace

from tests.conftest import ROOT
from voltana.hwreplay.emulated.fleet import emulated_arguments
from voltana.hwreplay.replay.config import read_replay_config
from voltana.sim.config import SimConfig
from voltana.sim.policies.base import Phase

OFF = "--disable-radix-cache"
AT_DECODE = "--disaggregation-decode-enable-radix-cache"


def started(sim: SimConfig, phase: Phase) -> tuple[int, set[str]]:
    """Memory in tokens, and which of the two words there are."""
    words = emulated_arguments(sim, sim.profile, phase)
    memory = int(words[words.index("--max-total-tokens") + 1])
    return memory, {OFF, AT_DECODE} & set(words)


def test_the_shipped_example_has_its_cache_in_prefill_alone() -> None:
    sim = read_replay_config(ROOT / "hwreplay/replay-cache.toml").sim
    assert sim.prefix_cache_tokens is not None
    assert started(sim, "prefill") == (sim.prefix_cache_tokens, set())
    assert started(sim, "decode") == (sim.kv_capacity_tokens, {OFF})
    both = replace(sim, decode_cache=True)
    assert started(both, "decode") == (sim.kv_capacity_tokens, {AT_DECODE})
    plain = replace(sim, prefix_cache_tokens=None)
    assert started(plain, "prefill") == (sim.kv_capacity_tokens, {OFF})


def test_a_colocated_server_keeps_prefixes_in_the_memory_that_it_has() -> None:
    sim = read_replay_config(ROOT / "hwreplay/replay-colocated.toml").sim
    assert started(sim, "colocated") == (sim.kv_capacity_tokens, {OFF})
    caching = replace(sim, colocated_cache=True)
    assert started(caching, "colocated") == (sim.kv_capacity_tokens, set())
