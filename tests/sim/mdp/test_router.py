"""The MDP router: grid, policy files (good, foreign, broken), and decisions worked by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.sim.policies.doubles import decode_state, make_context
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.mdp.grid import StateGrid, batch_edges, kv_nodes
from voltana.sim.mdp.observation import RateMeter, observe
from voltana.sim.mdp.policy_file import PolicyFile, PolicyKind, load_policy
from voltana.sim.mdp.router import nearest_rate
from voltana.sim.policies.base import InstanceState, RequestView, Router
from voltana.sim.policies.registry import make_router

GRID = StateGrid(
    batch_edges_requests=(0, 1, 5, 9), kv_nodes_tokens=(100.0, 200.0), levels_mhz=(1000, 1400)
)


def policy(kind: PolicyKind, arrays: dict[str, Any], **changes: object) -> PolicyFile:
    made = PolicyFile(
        kind=kind, solver="vi", profile="gpu/model", profile_hash="0", num_instances=2,
        rates_rps=(10.0,), grid=GRID, parameters={"penalty_j": 1.0}, seeds=(), provenance={},
        result={}, arrays=arrays,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def router_of(made: PolicyFile, path: Path) -> Router:
    made.save(path)
    return make_router(f"mdp:policy={path}", make_context().__class__(**_two_decode()))


def _two_decode() -> dict[str, Any]:
    context = make_context()
    values = {f.name: getattr(context, f.name) for f in dataclasses.fields(context)}
    return values | {"num_decode": 2, "num_prefill": 2}


def pick(router: Router, *decode: InstanceState, arrival_s: float = 0.0) -> int:
    prefill = [InstanceState(instance_id=0, phase="prefill")]
    return router.route(RequestView(0, arrival_s, 100, None), prefill, decode)[1]


def test_states_are_numbered_batch_then_kv_then_level() -> None:
    """7 is in bucket 2, past its node; 140 tokens are nearer to 100 than 200; 1250 MHz: level 1."""
    assert GRID.shape == (3, 2, 2)
    assert GRID.blend(7, 7 * 140, 1250)[0] == (2 * 2 + 0) * 2 + 1
    assert GRID.blend(7, 7 * 160, 1100)[0] == (2 * 2 + 1) * 2 + 0
    assert GRID.blend(0, 0, 0)[0] == 1  # an unlocked card is at the top level
    assert GRID.blend(99, 10**6, 1400)[0] == GRID.num_states - 1
    assert GRID.batch_nodes_requests.tolist() == [0.0, 2.5, 6.5]


def test_states_are_blended_between_nodes() -> None:
    """4 requests lie 1.5 of 4 above the node 2.5; below it, and at empty, a bucket stands alone."""
    assert GRID.blend(4, 400, 1000) == (4, 8, 0.375)
    assert GRID.blend(4, 800, 1400) == (7, 11, 0.375)
    assert GRID.blend(0, 0, 1000) == (0, 0, 0.0)
    assert GRID.blend(1, 100, 1000) == (4, 4, 0.0)
    assert GRID.blend(1, 200, 1400) == (7, 7, 0.0)
    assert GRID.blend(500, 500, 1000) == (8, 8, 0.0)


BAD_GRIDS: list[tuple[dict[str, tuple[float, ...]], str]] = [
    ({"batch_edges_requests": (0, 1)}, "batch bucket edges must ascend as 0, 1, …, got (0, 1)"),
    ({"batch_edges_requests": (0, 2, 3)},
     "batch bucket edges must ascend as 0, 1, …, got (0, 2, 3)"),
    ({"batch_edges_requests": (0, 1, 1)},
     "batch bucket edges must ascend as 0, 1, …, got (0, 1, 1)"),
    ({"kv_nodes_tokens": ()}, "kv_nodes_tokens must be positive and ascending, got ()"),
    ({"kv_nodes_tokens": (0.0, 1.0)},
     "kv_nodes_tokens must be positive and ascending, got (0.0, 1.0)"),
    ({"levels_mhz": (1400, 1000)}, "levels_mhz must be positive and ascending, got (1400, 1000)"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD_GRIDS)))
def test_a_bad_grid_is_refused_in_one_line(number: int) -> None:
    changes, line = BAD_GRIDS[number]
    with pytest.raises(VoltanaError) as caught:
        dataclasses.replace(GRID, **changes)  # type: ignore[arg-type]
    assert str(caught.value) == line


def test_what_lies_between_counts_to_the_nearest_and_to_the_lower_of_a_tie() -> None:
    """150 tokens a request are as near to 100 as to 200, 1200 MHz as near to 1000 as to 1400."""
    assert [GRID.level_of(f) for f in (1, 1200, 1201, 9999, 0)] == [0, 0, 1, 1, 1]
    assert [GRID.blend(2, 2 * t, 1000)[0] for t in (150, 151)] == [4, 6]
    # on a node its state alone counts, and between the last two both
    assert GRID.blend(6, 600, 1000) == (4, 8, 0.875)
    assert GRID.blend(7, 700, 1000) == (8, 8, 0.0)
    live = decode_state(opened=6, kv=500, clock=1000)
    live.waiting_tokens = 100
    assert GRID.blend_instance(live) == (4, 8, 0.875)


def test_buckets_end_at_the_steps_of_decode_time() -> None:
    for width in (1, 2, 4, 8, 16):
        edges = batch_edges(256, width)
        assert {128 + 1, 256 + 1} <= set(edges)
        assert edges[:3] == (0, 1, 2)
    # narrow near empty (doubling from 3 on), then as wide as asked, and the last one whole
    assert batch_edges(40, 16) == (0, 1, 2, 3, 5, 9, 17, 33, 49)
    assert batch_edges(48, 16) == (0, 1, 2, 3, 5, 9, 17, 33, 49)
    assert batch_edges(49, 16) == (0, 1, 2, 3, 5, 9, 17, 33, 49, 65)


def test_nodes_of_context_lie_around_its_mean_and_above_the_prompt() -> None:
    """300 tokens of answers: of three nodes the outer ones lie 0.75·(1 - 1/3)·300 = 150 apart from
    the middle, of two 0.75·(1 - 1/2)·300 = 112.5."""
    assert kv_nodes(200, 500, 1) == (500.0,)
    assert kv_nodes(200, 500, 2) == (387.5, 612.5)
    assert kv_nodes(200, 500, 3) == (350.0, 500.0, 650.0)


def test_a_pair_is_looked_up_and_interpolated(tmp_path: Path) -> None:
    """Sending to 0 costs 10, 30, 50 J at 0, 2.5, 6.5 requests, to 1 always 35 J: with 3 requests
    32.5 J, with 4 37.5 J. Equal costs: the fewest requests."""
    delta_j = np.empty((1, 12, 12, 2))
    delta_j[..., 0] = np.repeat([10.0, 30.0, 50.0], 4)[:, None]
    delta_j[..., 1] = 35.0
    router = router_of(policy("table", {"delta_0": delta_j}), tmp_path / "p.npz")
    assert pick(router, decode_state(opened=3), decode_state()) == 0
    assert pick(router, decode_state(opened=4), decode_state()) == 1
    assert pick(router, decode_state(opened=7)) == 0  # one instance left: it cannot be read
    delta_j[..., 0] = 35.0
    router = router_of(policy("table", {"delta_0": delta_j}), tmp_path / "q.npz")
    assert pick(router, decode_state(opened=4), decode_state(opened=3)) == 1
    assert pick(router, decode_state(opened=3), decode_state(opened=4)) == 0


def test_groups_compete(tmp_path: Path) -> None:
    """Instances 0 and 1 are a pair, 2 stands alone at 20 J; what a member of the pair costs
    depends on the other: 10 J beside an empty one, else 30 J."""
    pair = np.full((1, 12, 12, 2), 30.0)
    pair[0, :, :4, 0] = pair[0, :4, :, 1] = 10.0
    single = np.full((1, 12, 1), 20.0)
    made = policy("table", {"delta_0": pair, "delta_1": single}, num_instances=3)
    made.save(tmp_path / "p.npz")
    context = make_context().__class__(**_two_decode() | {"num_decode": 3})
    router = make_router(f"mdp:policy={tmp_path / 'p.npz'}", context)
    busy, empty = decode_state(opened=6, kv=600), decode_state()
    assert pick(router, busy, empty, empty) == 0
    assert pick(router, empty, busy, empty) == 1
    assert pick(router, busy, busy, busy) == 2


def test_the_nearest_rate_is_used(tmp_path: Path) -> None:
    """Arrivals 0.1 s apart are 10/s: nearer to 10 than to 100. At 10/s instance 0 is the choice."""
    delta_j = np.zeros((2, 12, 12, 2))
    delta_j[0, ..., 1] = delta_j[1, ..., 0] = 1.0
    made = policy("table", {"delta_0": delta_j}, rates_rps=(10.0, 100.0))
    slow, fast = (router_of(made, tmp_path / "p.npz") for _ in range(2))
    a, b = decode_state(), decode_state()
    assert [pick(slow, a, b, arrival_s=0.1 * k) for k in range(20)][-1] == 0
    assert [pick(fast, a, b, arrival_s=0.01 * k) for k in range(20)][-1] == 1
    assert nearest_rate((10.0, 40.0), 19.0) == 0
    assert nearest_rate((10.0, 40.0), 21.0) == 1


def test_rate_meter_forgets() -> None:
    """The count of the arrivals after the first, each weighed by exp(-age/window), over the time
    since the first, weighed alike: window·(1 - exp(-age of the first/window))."""
    meter = RateMeter(2.0)
    times_s = [1.0, 1.1, 1.3, 2.0, 2.05, 9.0, 9.5]
    for k, now_s in enumerate(times_s):
        count = sum(math.exp(-(now_s - t) / 2.0) for t in times_s[1 : k + 1])
        time_s = 2.0 * (1.0 - math.exp(-(now_s - times_s[0]) / 2.0))
        expected = count / time_s if k else 0.0
        assert meter.arrive(now_s) == pytest.approx(expected, rel=1e-12)
    assert RateMeter(1.0).arrive(5.0) == 0.0
    twice = RateMeter(1.0)
    assert [twice.arrive(0.0), twice.arrive(0.0)] == [0.0, 0.0]  # no time has passed


def test_a_network_takes_the_greatest_value(tmp_path: Path) -> None:
    """Values: 1 - relu(open_0/256) and relu(open_1/256): the second when both have 256."""
    first = np.zeros((2, 10), dtype=np.float32)
    first[0, 0] = first[1, 4] = 1.0
    arrays = {
        "weight_0": first, "bias_0": np.zeros(2, dtype=np.float32),
        "weight_1": np.array([[-1.0, 0.0], [0.0, 1.0]], dtype=np.float32),
        "bias_1": np.array([1.0, 0.0], dtype=np.float32),
    }  # fmt: skip
    router = router_of(policy("network", arrays), tmp_path / "p.npz")
    full = [decode_state(opened=256), decode_state(opened=256)]
    for state in full:
        state.kv_capacity_tokens = 1000
    assert pick(router, *full) == 1
    full[0].open_requests = full[1].open_requests = 10
    assert pick(router, *full) == 0


def test_observation_by_hand() -> None:
    state = decode_state(opened=128, kv=300, waiting=0, clock=700)
    state.kv_capacity_tokens, state.waiting_tokens, state.is_busy = 1000, 200, True
    seen = observe(RequestView(0, 0.0, 512, None), [state], 25.0, 1400)
    assert seen.tolist() == [0.5, 0.5, 0.5, 1.0, 0.5, 0.5]
    state.clock_mhz, state.is_busy = 0, False  # unlocked counts as the top clock
    seen = observe(RequestView(0, 0.0, 20 * 1024, None), [state, state], 25.0, 1400)
    assert seen.tolist() == [0.5, 0.5, 1.0, 0.0, 0.5, 0.5, 1.0, 0.0, 10.0, 0.5]  # 20 is cut to 10


def test_a_policy_file_comes_back_as_it_was(tmp_path: Path) -> None:
    made = policy("table", {"delta_0": np.arange(288.0).reshape(1, 12, 12, 2)}, seeds=(1, 2))
    made.save(tmp_path / "p.npz")
    read = load_policy(tmp_path / "p.npz", profile_hash="0")
    assert dataclasses.replace(read, arrays={}) == dataclasses.replace(made, arrays={})
    np.testing.assert_array_equal(read.arrays["delta_0"], made.arrays["delta_0"])
    assert [p.name for p in tmp_path.iterdir()] == ["p.npz"]


def rewrite(path: Path, **changes: object) -> None:
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    meta = json.loads(str(arrays.pop("meta"))) | changes
    np.savez(path, meta=np.array(json.dumps(meta)), **arrays)


def test_a_foreign_or_broken_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    made = policy("table", {"delta_0": np.zeros((1, 12, 12, 2))})

    def refused(words: str, decode: int = 2) -> None:
        with pytest.raises(VoltanaError, match=words) as caught:
            make_router(
                f"mdp:policy={path}",
                make_context().__class__(**_two_decode() | {"num_decode": decode}),
            )
        assert "\n" not in str(caught.value)

    refused("no such policy file")
    path.write_bytes(b"PK\x03\x04 nonsense")
    refused("is not a policy file")
    path.write_text("text")
    refused("is not a policy file")
    np.save(path.with_suffix(".npy"), np.zeros(3))
    path.with_suffix(".npy").replace(path)
    refused("is not a policy file")
    np.savez(path, meta=np.array([{"a": 1}], dtype=object))
    refused("is not a policy file")
    np.savez(path, meta=np.array("{}"))
    refused("is no routing policy of version 1")
    dataclasses.replace(made, profile_hash="1234567890abcdef").save(path)
    refused("was trained for profile gpu/model .hash 1234567890ab., this run's profile has hash 0")
    made.save(path)
    refused("was trained for 2 decode instances, this fleet has 3", decode=3)
    rewrite(path, kind="spell")
    refused("lacks kind")
    rewrite(path, kind="network")
    refused("arrays that do not fit")
    dataclasses.replace(made, arrays={"delta_0": np.zeros((1, 12, 1))}).save(path)
    refused("arrays that do not fit")
    layer = {"weight_0": np.zeros((3, 10)), "bias_0": np.zeros(3)}  # a third action
    policy("network", layer).save(path)
    refused("arrays that do not fit")


def test_what_is_wrong_with_a_policy_is_said_to_the_letter(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    made = policy("table", {"delta_0": np.zeros((1, 12, 12, 2))})

    def line() -> str:
        with pytest.raises(VoltanaError) as caught:
            make_router(f"mdp:policy={path}", make_context().__class__(**_two_decode()))
        return str(caught.value)

    assert line() == f"no such policy file: {path}: make one with voltana train mdp"
    path.write_text("text")
    assert line() == f"{path} is not a policy file (no NumPy archive)"
    np.savez(path, other=np.zeros(1))
    assert line() == f"{path} is not a policy file (KeyError)"
    np.savez(path, meta=np.array("[]"))
    assert line() == f"{path} is not a policy file (its meta is no table)"
    make = "make one with voltana train mdp"
    for wrong in ({"format": "else"}, {"version": 2}):
        made.save(path)
        rewrite(path, **wrong)
        assert line() == f"{path} is no routing policy of version 1: {make}"
    dataclasses.replace(made, profile_hash="1234567890abcdef").save(path)
    assert line() == (
        f"{path} was trained for profile gpu/model (hash 1234567890ab), this run's profile has "
        "hash 0: train it again for this one"
    )
    dataclasses.replace(made, num_instances=3, arrays={
        "delta_0": np.zeros((1, 12, 12, 2)), "delta_1": np.zeros((1, 12, 1)),
    }).save(path)  # fmt: skip
    assert line() == (
        f"{path} was trained for 3 decode instances, this fleet has 2: train it again with that "
        "number"
    )
    misfit = f"{path} has arrays that do not fit its grid: train the policy again"
    for arrays in (
        {"delta_0": np.zeros((2, 12, 12, 2))}, {"delta_0": np.zeros((1, 11, 12, 2))},
        {"delta_0": np.zeros(())}, {"gamma_0": np.zeros((1, 12, 12, 2))}, {},
    ):  # fmt: skip
        dataclasses.replace(made, arrays=arrays).save(path)
        assert line() == misfit, list(arrays)
    dataclasses.replace(made, rates_rps=(), arrays={"delta_0": np.zeros((0, 12, 12, 2))}).save(path)
    assert line() == misfit
    layers = {"weight_0": np.zeros((3, 10)), "bias_0": np.zeros(3),
              "weight_1": np.zeros((2, 3)), "bias_1": np.zeros(2)}  # fmt: skip
    for change in (
        {"weight_1": np.zeros((2, 4))}, {"bias_1": np.zeros(3)}, {"bias_1": np.zeros(())},
        {"extra": np.zeros(1)},
    ):  # fmt: skip
        policy("network", layers | change).save(path)
        assert line() == misfit, list(change)
    policy("network", layers).save(path)
    make_router(f"mdp:policy={path}", make_context().__class__(**_two_decode()))


def test_mdp_without_a_file_says_how_to_get_one() -> None:
    with pytest.raises(VoltanaError) as caught:
        make_router("mdp", make_context())
    assert str(caught.value) == (
        "mdp needs a trained policy, mdp:policy=FILE: make one with voltana train mdp"
    )
