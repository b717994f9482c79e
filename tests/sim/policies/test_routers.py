"""Decision tables of the routers, worked out by hand from the reference's rule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sim.policies.doubles import Formula, decode_state, make_context
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import InstanceState, RequestView, Router
from voltana.sim.policies.registry import ROUTERS, make_router
from voltana.sim.policies.routers.ecoroute import reference_levels

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


def test_the_what_if_levels_are_the_reference_s_or_five_of_the_profile() -> None:
    """From 900 MHz, the lowest default level, to 1400 in steps of 125, snapped to hundreds: 1025 to
    1000, 1150 to the faster of 1100 and 1200, 1275 to 1300."""
    extra = (700, *FIVE, 1500)
    assert reference_levels(make_context(clocks_mhz=extra, levels_mhz=(700, 1500))) == FIVE
    hundreds = tuple(range(700, 1500, 100))
    context = make_context(clocks_mhz=hundreds, levels_mhz=(900, 1400))
    assert reference_levels(context) == (900, 1000, 1200, 1300, 1400)


@pytest.mark.parametrize(
    ("load", "chosen"),
    [
        # 128 requests: 12.8 ms, and load + 2·128 of 50 ms at 1005 MHz: 36,944 tokens. With a prompt
        # of 100 and 50·128 ahead: 12.9 ms, 30,600 tokens
        (30_600, 0),  # unraised at 1005 as the other, which has two tiles
        (30_601, 1),  # raised to 1095, one level apart: the smallest tag is the other's
    ],
)
def test_the_what_if_looks_fifty_steps_ahead(load: int, chosen: int) -> None:
    first, other = decode_state(opened=128, kv=load), decode_state(opened=129, kv=1000)
    assert pick(ecoroute(), first, other) == chosen
    # beside an instance that would be raised: the one that is not, or the first of equals
    raised = decode_state(opened=128, kv=30_700)
    assert pick(ecoroute(), raised, first) == (1 if load == 30_600 else 0)


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


def test_least_kv_counts_the_queue_and_then_requests() -> None:
    """Tokens in use and queued: 900 + 0 against 100 + 900; then 500 + 500 each, by requests."""
    router = make_router("least-kv", make_context())
    for tokens, chosen in ((((900, 0), (100, 900)), 0), (((900, 200), (100, 900)), 1),
                           (((500, 500), (1000, 0)), 1)):  # fmt: skip
        states = [decode_state(opened=n, kv=kv) for n, (kv, _) in zip((5, 4), tokens, strict=True)]
        for state, (_, waiting) in zip(states, tokens, strict=True):
            state.waiting_tokens = waiting
        assert router.route(request(), states, states) == (chosen, chosen)


def test_two_choices_take_the_emptier_and_the_first_of_equals() -> None:
    """Of 0 and 9 open requests the 9 is taken only if it is drawn twice: a quarter of the time,
    4,000 draws with a standard error of 0.7 %. Of equals each is taken half of the time."""
    router = make_router("two-choices", make_context())
    for opened, share in (((0, 9), 0.25), ((9, 0), 0.75), ((3, 3), 0.5)):
        states = [decode_state(opened=n) for n in opened]
        chosen = [router.route(request(), states, states) for _ in range(4000)]
        for phase in (0, 1):
            seen = [pair[phase] for pair in chosen]
            assert seen.count(1) / 4000 == pytest.approx(share, abs=0.03)


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


@pytest.mark.parametrize(
    "name", [n for n, e in ROUTERS.items() if "frequencies" in [i.key for i in e.parameter_infos]]
)
def test_an_unsupported_clock_is_refused_by_the_router_s_own_name(name: str) -> None:
    with pytest.raises(VoltanaError) as caught:
        make_router(f"{name}:frequencies=1000+1007", make_context())
    assert str(caught.value).startswith(
        f"{name}: frequencies must be a clock the profile supports, got 1007 MHz: nearest 1000"
    )


@pytest.mark.parametrize("name", ["ecoroute", "ecoroute-tile", "min-delta-energy"])
def test_prefill_at_random_is_the_router_s_own_draw(name: str) -> None:
    """A number of the seeded generator a request, whatever decode does."""
    router = make_router(name, make_context(clocks_mhz=FIVE, levels_mhz=(1005, 1410)))
    rng = np.random.default_rng(0)
    for opened in (0, 200, 3, 500) * 5:
        decode = [decode_state(opened=opened, clock=1005), decode_state(opened=9, clock=1005)]
        chosen, _ = router.route(request(), prefill_states(3), decode)
        assert chosen == int(rng.integers(3))


@pytest.mark.parametrize(
    "name", ["slo-pack", "least-added-power", "kairos", "length-split", "least-requests"]
)
def test_prefill_goes_to_the_fewest_open_requests(name: str) -> None:
    router = make_router(name, make_context())
    prefill = prefill_states(4)
    for state, opened in zip(prefill, (5, 3, 2, 4), strict=True):
        state.open_requests = opened
    # length-split keeps the last two of four for prompts of 1,024 tokens and more
    expected = 1 if name == "length-split" else 2
    assert router.route(request(), prefill, [decode_state()]) == (expected, 0)


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
