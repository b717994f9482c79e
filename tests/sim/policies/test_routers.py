"""Decision tables of the routers, worked out by hand from the reference's rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sim.policies.doubles import Formula, decode_state, make_context
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import InstanceState, RequestView, Router
from voltana.sim.policies.registry import ROUTERS, make_router

FIVE = (1005, 1095, 1200, 1305, 1410)


def request(input_tokens: int = 100) -> RequestView:
    return RequestView(0, 0.0, input_tokens, None)


def prefill_states(count: int = 2) -> list[InstanceState]:
    return [InstanceState(instance_id=i, phase="prefill") for i in range(count)]


def ecoroute(spec: str = "ecoroute", slo_itl_s: float = 0.05) -> Router:
    """T(f, b, t) = (0.1 ms·b + 1 µs·t)·1005/f."""
    predictor = Formula(lambda p, f, b, t: (1e-4 * b + 1e-6 * t) * 1005 / f)
    context = make_context(predictor, clocks_mhz=FIVE, levels_mhz=(1005, 1410), slo_itl_s=slo_itl_s)
    return make_router(spec, context)


def pick(router: Router, *decode: InstanceState, input_tokens: int = 100) -> int:
    return router.route(request(input_tokens), prefill_states(), list(decode))[1]


def test_below_a_tile_the_lowest_clock_then_the_fewest_requests() -> None:
    router = ecoroute()
    a = decode_state(opened=100, kv=20_000, clock=1410)
    b = decode_state(opened=127, kv=30_000, clock=1005)
    assert pick(router, a, b) == 1
    assert pick(router, a, decode_state(opened=99, clock=1410)) == 1
    assert pick(router, decode_state(opened=5, clock=0), a) == 0  # unlocked counts as the top


def test_what_if_prefers_the_instance_that_need_not_speed_up() -> None:
    """Promise 50 ms. load + 2n: A 130·0.1 + 30,260 µs = 43.3 ms fits 1005; with the request
    13.1 + (30,000 + 100 + 50·130 = 36,600) = 49.7 ms fits 1005 still: tag -1005.
    B: 13 + 36,260 = 49.3 ms fits 1005; 13.1 + 42,600 = 55.7 ms needs 1200 (46.6): tag +1200.
    |tags| 1005 and 1200 are two levels apart: the slow one, A."""
    a = decode_state(opened=130, kv=30_000)
    b = decode_state(opened=130, kv=36_000)
    assert pick(ecoroute(), b, a) == 1
    assert pick(ecoroute(), a, b) == 0


def test_within_one_level_the_negative_tag_with_the_higher_clock_wins() -> None:
    """A stays at 1005 (-1005). B: 13 + 37,260 = 50.26 ms needs 1095 (46.1) and with the request
    13.1 + 41,000… at look-ahead 10: 13.1 + 38,400 = 51.5 -> 47.3 ms at 1095: -1095.
    One level apart: the smaller tag, -1095, so B: fill what already runs faster."""
    a = decode_state(opened=130, kv=30_000)
    b = decode_state(opened=130, kv=37_000)
    assert pick(ecoroute("ecoroute:look_ahead=10"), a, b) == 1


def test_equal_tags_fill_the_partly_filled_tile() -> None:
    """Both need no speed-up at 1005; 129 and 200 requests are both two tiles: more requests win.
    With 257 (three tiles) the fewer tiles win."""
    a = decode_state(opened=129, kv=1_000)
    b = decode_state(opened=200, kv=1_000)
    assert pick(ecoroute(), a, b) == 1
    assert pick(ecoroute(), decode_state(opened=257, kv=1_000), b) == 1


def test_at_the_top_clock_the_tag_is_positive() -> None:
    """Both saturated (+1410): tie on tag, then fewer tiles."""
    a = decode_state(opened=300, kv=90_000)
    b = decode_state(opened=200, kv=90_000)
    assert pick(ecoroute(), a, b) == 1


def test_router_and_controller_margin_differ_by_default() -> None:
    """A margin of 1 (100 ms) keeps B at 1005 as well: the tie goes to more requests."""
    a = decode_state(opened=130, kv=30_000)
    b = decode_state(opened=131, kv=36_000)
    assert pick(ecoroute(), a, b) == 0
    assert pick(ecoroute("ecoroute:margin=1.0"), a, b) == 1


TILE_CASES = [
    ((100, 120), 0),  # below a tile: equal clocks, fewest requests
    ((128, 130), 1),  # one and two tiles, but 128 is full; 130 leaves room in its second tile
    ((130, 200), 1),  # both two tiles, most requests first
    ((128, 128), 0),  # all full: the first
    ((128, 0), 1),  # empty counts as room; ceil(0) = 0 tiles comes first anyway
    ((250, 129), 0),  # both two tiles: 250 is fuller
]


@pytest.mark.parametrize(("opened", "expected"), TILE_CASES)
def test_ecoroute_tile(opened: tuple[int, int], expected: int) -> None:
    router = make_router("ecoroute-tile", make_context())
    assert pick(router, *(decode_state(opened=n) for n in opened)) == expected


def test_simple_routers() -> None:
    context = make_context()
    few, many = decode_state(opened=2, kv=900), decode_state(opened=7, kv=100)
    assert pick(make_router("least-requests", context), many, few) == 1
    assert pick(make_router("least-kv", context), many, few) == 0
    turn = make_router("round-robin", context)
    assert [turn.route(request(), prefill_states(2), [few, many, few]) for _ in range(4)] == [
        (0, 0), (1, 1), (0, 2), (1, 0),
    ]  # fmt: skip


def test_random_is_uniform_and_seeded() -> None:
    """3,000 draws over three: each within 4 standard errors (sqrt(p·q·n) = 25.8) of 1,000."""
    states = [decode_state() for _ in range(3)]
    routers = [make_router("random", make_context()) for _ in range(2)]
    draws = [[r.route(request(), prefill_states(), states)[1] for _ in range(3000)]
             for r in routers]  # fmt: skip
    assert draws[0] == draws[1]
    for i in range(3):
        assert abs(draws[0].count(i) - 1000) < 104


@pytest.mark.parametrize("name", sorted(set(ROUTERS) - {"mdp"}))  # which needs a file
@given(opened=st.lists(st.integers(0, 400), min_size=1, max_size=6), kv=st.integers(0, 10**6))
def test_every_router_stays_within_its_fleet(name: str, opened: list[int], kv: int) -> None:
    router = make_router(name, make_context(clocks_mhz=FIVE, levels_mhz=(1005, 1410)))
    decode = [decode_state(opened=n, kv=kv, clock=1005) for n in opened]
    prefill_id, decode_id = router.route(request(), prefill_states(), decode)
    assert 0 <= prefill_id < 2
    assert 0 <= decode_id < len(opened)


def test_unknown_router_suggests_the_nearest() -> None:
    with pytest.raises(VoltanaError, match="did you mean 'ecoroute'"):
        make_router("ecorout", make_context())


@pytest.mark.parametrize("mode", ["spread", "pack"])
def test_latency_headroom_explores_as_often_as_it_is_told(mode: str) -> None:
    """45 ms are the limit at 1 ms a request: 20 and 30 open requests keep it, 60 and 50 do not.
    A quarter of 4,000 requests goes to the least bad, the others to the best; the standard error
    of the share is 0.7 %."""
    formula = Formula(lambda p, f, b, t: 1e-3 * b * 1400 / f)
    router = make_router(f"latency-headroom:explore=0.25,mode={mode}", make_context(formula))
    prefill = [InstanceState(instance_id=0, phase="prefill")]
    decode = [decode_state(opened=n) for n in (20, 60, 50, 30)]
    chosen = [router.route(RequestView(0, 0.0, 10, None), prefill, decode)[1] for _ in range(4000)]
    best = 0 if mode == "spread" else 3
    assert set(chosen) == {best, 2}
    assert chosen.count(2) / 4000 == pytest.approx(0.25, abs=0.02)


def test_latency_headroom_has_nothing_to_explore_where_all_keep_the_promise() -> None:
    formula = Formula(lambda p, f, b, t: 1e-3 * b * 1400 / f)
    router = make_router("latency-headroom:explore=1.0", make_context(formula))
    prefill = [InstanceState(instance_id=0, phase="prefill")]
    decode = [decode_state(opened=n) for n in (20, 10, 30)]
    assert router.route(RequestView(0, 0.0, 10, None), prefill, decode)[1] == 1


def test_latency_headroom_counts_what_prefill_runs_and_what_waits_there() -> None:
    """1 ms a token: 400 running and 100 waiting are 500 tokens, more than 450 waiting alone."""
    formula = Formula(lambda p, f, b, t: 1e-3 * t)
    router = make_router("latency-headroom", make_context(formula))
    prefill = prefill_states()
    prefill[0].kv_tokens, prefill[0].num_running = 400, 1
    prefill[0].waiting_tokens, prefill[1].waiting_tokens = 100, 450
    prefill[0].num_waiting = prefill[1].num_waiting = 1
    assert router.route(RequestView(0, 0.0, 10, None), prefill, [decode_state()])[0] == 1
    prefill[1].waiting_tokens = 550
    assert router.route(RequestView(0, 0.0, 10, None), prefill, [decode_state()])[0] == 0
