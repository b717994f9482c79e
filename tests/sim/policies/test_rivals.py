"""Window, powercap, KAIROS and the splitting routers: decisions worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.sim.policies.doubles import Formula, decode_state, make_context, require_point
from voltana.sim.policies.base import (
    InstanceState,
    Phase,
    PolicyContext,
    RequestView,
)
from voltana.sim.policies.registry import CONTROLLERS, ROUTERS, make_controller, make_router
from voltana.sim.policies.spec import describe_parameters


class CubicPower:
    """50 W idle; busy 100, 150 and 300 W at 1000, 1200 and 1400 MHz."""

    def power_w(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        require_point(phase, clock_mhz, batch_size, tokens)
        return {1000: 100.0, 1200: 150.0, 1400: 300.0}[clock_mhz]

    def idle_power_w(self, clock_mhz: int) -> float:
        assert clock_mhz >= 0, clock_mhz
        return 50.0


def cubic(phase: Phase = "decode", predictor: Formula | None = None) -> PolicyContext:
    """TTFT 0.6 s less two iterations of 50 ms: 0.5 s for prefill."""
    return replace(make_context(predictor, phase=phase, slo_ttft_s=0.6), power=CubicPower())


def at(now_s: float, batch: int, *, waiting: int = 0, duration_s: float = 0.0) -> InstanceState:
    state = decode_state(batch=batch, waiting=waiting)
    state.now_s, state.last_duration_s = now_s, duration_s
    return state


def test_window_decides_once_a_window_for_its_mean_load() -> None:
    """Batches 20 and 40: mean 30. T = 30, 25, 21.4 ms, all within 50 ms; P·T = 3, 3.75, 6.4 J:
    1000 MHz, but only when the 5 s are over."""
    made = make_controller("window:frequencies=1000+1200+1400", cubic())
    assert made.decide(at(0.0, 20)) == 1400
    assert made.decide(at(4.9, 20)) == 1400
    assert made.decide(at(5.0, 50)) == 1000
    assert made.decide(at(9.9, 500)) == 1000


@pytest.mark.parametrize(("batch", "clock"), [(50, 1000), (55, 1200), (65, 1400), (80, 1400)])
def test_window_candidates_keep_the_promise(batch: int, clock: int) -> None:
    """50 ms at 1 ms a request: up to 50 requests at 1000, 60 at 1200, 70 at 1400; then none."""
    made = make_controller("window:frequencies=1000+1200+1400", cubic())
    assert made.decide(at(5.0, batch)) == clock


def test_window_takes_the_top_clock_when_the_queue_grew() -> None:
    made = make_controller("window:frequencies=1000+1200+1400", cubic())
    assert made.decide(at(5.0, 20, waiting=2)) == 1400
    assert made.decide(at(10.0, 20, waiting=2)) == 1000
    assert made.decide(at(15.0, 20, waiting=3)) == 1400


def test_window_sees_the_u() -> None:
    """T = 40, 20, 18 ms: P·T = 4, 3, 5.4 J: the middle, although the slowest would fit."""
    times = {1000: 0.040, 1200: 0.020, 1400: 0.018}
    made = make_controller(
        "window:frequencies=1000+1200+1400", cubic(predictor=Formula(lambda p, f, b, t: times[f]))
    )
    assert made.decide(at(5.0, 10)) == 1200


def test_window_takes_off_the_mean_delay_of_its_batches() -> None:
    """0.5 s for prefill. Batches waited 0.4 and 0.2 s, 0.3 on average: 0.25 and 0.208 s at 1000 and
    1200 MHz are too long, 0.179 at 1400 is not. Waits of 0.2 and 0.1 s leave 0.35: 1000 MHz."""
    spec, times = "window:frequencies=1000+1200+1400", Formula(lambda p, f, b, t: 250.0 / f)
    for waits_s, clock in (((0.4, 0.2), 1400), ((0.2, 0.1), 1000)):
        made = make_controller(spec, cubic("prefill", times))
        decided = [
            made.decide(
                InstanceState(
                    instance_id=0, phase="prefill", now_s=now_s, last_batch_size=1, last_tokens=9,
                    last_queue_delay_s=wait_s,
                )
            )
            for now_s, wait_s in zip((1.0, 5.0), waits_s, strict=True)
        ]  # fmt: skip
        assert decided == [1400, clock]


def test_window_s_load_is_the_mean_of_batches_and_tokens() -> None:
    """10 ms a request and 1 µs a token at 1000 MHz, of 50 ms. Batches of one and three: two, so
    that 30,000 tokens fit: the mean of 20,000 and 40,000 does, that of 20,000 and 40,001, rounded
    up, does not. Records without a batch count for nothing, and do not end a window."""
    times = Formula(lambda p, f, b, t: (1e-2 * b + 1e-6 * t) * 1000 / f)
    for tokens, clock in ((40_000, 1000), (40_001, 1200)):
        made = make_controller("window:frequencies=1000+1200+1400", cubic(predictor=times))
        decided = []
        for now_s, batch, of_batch in (
            (1.0, 1, 20_000), (2.0, 0, 9**9), (4.9, 3, tokens), (5.0, 0, 9**9), (5.1, 0, 0),
        ):  # fmt: skip
            state = at(now_s, batch)
            state.last_tokens = of_batch
            decided.append(made.decide(state))
        assert decided == [1400, 1400, 1400, clock, clock]
    untouched = make_controller("window:frequencies=1000+1200+1400", cubic(predictor=times))
    assert untouched.decide(at(7.0, 0)) == 1400


def test_window_decides_again_a_window_later() -> None:
    """20 ms, then 55 requests: 55 ms at 1000 MHz. Decided at 5.5 s, so anew at 10.5 s."""
    made = make_controller("window:frequencies=1000+1200+1400", cubic())
    assert [made.decide(at(s, b)) for s, b in ((5.5, 20), (10.4, 55), (10.5, 55))] == [
        1000, 1000, 1200,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "clock"),
    [
        ("powercap:cap=400", 1400),
        ("powercap:cap=300", 1400),
        ("powercap:cap=299", 1200),
        ("powercap:cap=150", 1200),
        ("powercap:cap=120", 1000),
        ("powercap:cap=40", 1000),
        ("powercap:draw=0.5", 1200),
        ("powercap:draw=0.4", 1000),
        ("powercap:draw=1.0", 1400),
    ],
)
def test_powercap_is_the_fastest_clock_under_the_cap(spec: str, clock: int) -> None:
    """Draw 100, 150, 300 W; the natural draw is 300 W, so draw=0.5 is a cap of 150 W."""
    assert make_controller(spec, cubic()).decide(at(0.0, 10)) == clock


def test_powercap_knows_a_batch_of_one_and_no_batch() -> None:
    """Before the first record there is nothing to cap."""
    assert make_controller("powercap:cap=120", cubic()).decide(at(0.0, 1)) == 1000
    assert make_controller("powercap:cap=120", cubic()).decide(at(0.0, 0)) == 1400


def test_powercap_is_released_while_the_promise_is_missed() -> None:
    made = make_controller("powercap:cap=120", cubic())
    assert made.decide(at(1.0, 10, duration_s=0.060)) == 1400
    assert made.decide(at(1.5, 10, duration_s=0.010)) == 1400  # p99 of the window: still 60 ms
    assert made.decide(at(2.6, 10, duration_s=0.010)) == 1000


def test_powercap_is_released_for_its_window_after_a_miss() -> None:
    """Missed at 1 s; from then on 1,000 fast requests are the p99: capped again from 2 s on. An
    iteration of just the promise misses nothing."""
    made = make_controller("powercap:cap=120", cubic())
    clocks = []
    for now_s, batch, duration_s in (
        (0.5, 1, 0.050), (1.0, 1, 0.051), (1.5, 1000, 0.010), (1.9, 1000, 0.010),
        (2.0, 1000, 0.010),
    ):  # fmt: skip
        state = at(now_s, 10, duration_s=duration_s)
        state.ended_batch_size = batch
        clocks.append(made.decide(state))
    assert clocks == [1000, 1400, 1400, 1400, 1000]


def test_powercap_that_nothing_releases_is_a_cards_own_limit() -> None:
    made = make_controller("powercap:cap=120,release=0", cubic())
    assert [made.decide(at(s, 10, duration_s=9.0)) for s in (1.0, 1.5)] == [1000, 1000]


class PerRequest(CubicPower):
    """A tenth of a watt a MHz, and one a request and one per 1,000 tokens."""

    def power_w(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        require_point(phase, clock_mhz, batch_size, tokens)
        return clock_mhz / 10 + batch_size + tokens / 1000


def test_powercap_keeps_the_most_natural_draw_so_far() -> None:
    """100 requests of 10,000 tokens would draw 250 W at the top: a cap of 0.85·250 = 212.5 W, which
    they meet at 1000 MHz (210). A batch of 10 (160 W at the top) is below it. After ten alone the
    cap is 136 W: 1200 MHz would be 140."""
    context = replace(make_context(), power=PerRequest())
    made = make_controller("powercap", context)
    large, small = at(1.0, 100), at(2.0, 10)
    large.last_tokens, small.last_tokens = 10_000, 10_000
    assert [made.decide(large), made.decide(small)] == [1000, 1400]
    assert make_controller("powercap", context).decide(small) == 1000


@pytest.mark.parametrize(
    ("kv", "duration_s", "clock"),
    [
        (0, 0.01, 1000),
        # 1000 + 400 · (0.3 / 0.75) = 1160 -> 1200; 37,501 tokens -> 1200.005 -> 1400
        (30_000, 0.01, 1200),
        (37_400, 0.01, 1200),
        (37_600, 0.01, 1400),
        (80_000, 0.01, 1400),
        (0, 0.050, 1000),  # 20 tokens/s
        (0, 0.051, 1400),  # 19.6 tokens/s < 20
    ],
)
def test_kairos_clock_follows_the_cache(kv: int, duration_s: float, clock: int) -> None:
    state = decode_state(batch=1, tokens=kv, kv=kv)
    state.last_duration_s = duration_s
    assert (
        make_controller("kairos:frequencies=1000+1200+1400", make_context()).decide(state) == clock
    )


def test_kairos_holds_the_top_clock_after_a_stream_has_starved() -> None:
    """60 ms are 16.7 tokens/s: held from 1 s until 2 s."""
    made = make_controller("kairos:frequencies=1000+1200+1400", make_context())
    clocks = []
    for now_s, duration_s in ((1.0, 0.06), (1.1, 0.01), (1.99, 0.01), (2.0, 0.01)):
        state = decode_state(batch=1)
        state.now_s, state.last_duration_s = now_s, duration_s
        clocks.append(made.decide(state))
    assert clocks == [1400, 1400, 1400, 1000]


@pytest.mark.parametrize(
    ("tokens", "waiting_tokens", "clock"),
    [(0, 0, 1000), (20_000, 17_500, 1200), (20_000, 17_600, 1400), (37_600, 0, 1400)],
)
def test_kairos_counts_batch_and_queue_in_prefill(
    tokens: int, waiting_tokens: int, clock: int
) -> None:
    """37,500 of 100,000 tokens: 1000 + 400·(0.375 / 0.75) = 1200 MHz. A batch of 60 ms starves
    nobody, and what the cache holds does not count."""
    state = InstanceState(
        instance_id=0, phase="prefill", last_tokens=tokens, waiting_tokens=waiting_tokens,
        last_duration_s=0.06, kv_tokens=99_999,
    )  # fmt: skip
    context = make_context(phase="prefill")
    assert make_controller("kairos:frequencies=1000+1200+1400", context).decide(state) == clock


def test_kairos_clock_is_monotone_in_the_cache() -> None:
    made = make_controller("kairos:frequencies=1000+1200+1400", make_context())
    clocks = [made.decide(decode_state(batch=1, kv=kv)) for kv in range(0, 100_001, 500)]
    assert clocks == sorted(clocks)
    assert set(clocks) == {1000, 1200, 1400}


def prompt(tokens: int) -> RequestView:
    return RequestView(request_id=0, arrival_s=0.0, input_tokens=tokens, output_tokens=None)


@pytest.mark.parametrize(
    ("kv", "chosen"),
    [
        ([0, 0, 0], 0),
        ([49_899, 0, 0], 0),
        ([49_900, 0, 0], 1),  # with the prompt of 100 half of 100,000 would be reached
        ([60_000, 10, 0], 1),
        ([70_000, 60_000, 90_000], 1),  # all above half: the least used
    ],
)
def test_kairos_router_consolidates_then_spreads(kv: list[int], chosen: int) -> None:
    router = make_router("kairos", make_context())
    decode = [decode_state(kv=tokens, index=i) for i, tokens in enumerate(kv)]
    assert router.route(prompt(100), [decode_state()], decode) == (0, chosen)


@pytest.mark.parametrize(
    ("tokens", "queued", "spec", "chosen"),
    [
        (1023, [900, 800, 0, 0], "length-split", 1),
        (1024, [0, 0, 900, 800], "length-split", 3),
        (5000, [0, 0, 0, 900], "length-split:share=0.25", 3),
        (100, [9, 8, 7, 0], "length-split:share=0.25", 2),
        (100, [9, 0], "length-split:share=1.0", 0),  # never all for the long ones
        (5000, [0, 9], "length-split:share=0.0", 1),  # and never none
        (100, [9], "length-split", 0),
        (5000, [9], "length-split", 0),
    ],
)
def test_length_split(tokens: int, queued: list[int], spec: str, chosen: int) -> None:
    prefill = [
        InstanceState(instance_id=i, phase="prefill", waiting_tokens=n)
        for i, n in enumerate(queued)
    ]
    decode = [decode_state(opened=3), decode_state(opened=2)]
    assert make_router(spec, make_context()).route(prompt(tokens), prefill, decode) == (chosen, 1)


def test_no_two_parameters_of_a_policy_share_a_short_name() -> None:
    declared = [entry.parameters for entry in CONTROLLERS.values()]
    declared += [entry.parameters for entry in ROUTERS.values()]
    for parameters in declared:
        keys = [info.key for info in describe_parameters(parameters)]
        assert len(keys) == len(set(keys)), parameters
