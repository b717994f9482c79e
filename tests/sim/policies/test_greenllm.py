"""GreenLLM: decisions worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.sim.policies.doubles import Formula, decode_state, make_context, require_point
from voltana.sim.policies.base import Controller, InstanceState, Phase, PolicyContext
from voltana.sim.policies.registry import make_controller

ALL = "frequencies=1000+1200+1400"


class CubicPower:
    """50 W idle; busy 100, 150 and 300 W at 1000, 1200 and 1400 MHz."""

    def power_w(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        require_point(phase, clock_mhz, batch_size, tokens)
        return {1000: 100.0, 1200: 150.0, 1400: 300.0}[clock_mhz]

    def idle_power_w(self, clock_mhz: int) -> float:
        assert clock_mhz >= 0, clock_mhz
        return 50.0


def prefill_context(times_s: dict[int, float]) -> PolicyContext:
    """TTFT 0.6 s less two iterations of 0.05 s: 0.5 s for prefill."""
    formula = Formula(lambda p, f, b, t: times_s[f])
    return replace(make_context(formula, phase="prefill", slo_ttft_s=0.6), power=CubicPower())


def prefill_state(*, tokens: int = 100, delay_s: float = 0.0, queued: int = 0) -> InstanceState:
    return InstanceState(
        instance_id=0, phase="prefill", now_s=1.0, last_batch_size=1, last_tokens=tokens,
        last_queue_delay_s=delay_s, waiting_tokens=queued,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("delay_s", "queued", "clock"),
    [
        # (P - 50)·T = 50·.30, 100·.18, 250·.15 = 15, 18, 37.5 J: the slowest that fits
        (0.0, 0, 1000),
        (0.19, 0, 1000),  # .19 + .30 = .49 <= .5
        (0.21, 0, 1200),
        (0.33, 0, 1400),
        (0.36, 0, 1400),  # none fits
        # window 1 s: 100 + 200 tokens/s of 100-token batches are 3 batches/s. rho = .9 at 1000:
        # W = .9·.3 / .2 = 1.35 s. At 1200 rho = .54, W = .54·.18 / .92 = .106, + .18 fits
        (0.0, 200, 1200),
        # 190 tokens/s: rho = .57, W = .57·.3 / .86 = .1988, + .3 just fits; 191: .573, .2013
        (0.0, 90, 1000),
        (0.0, 91, 1200),
        (0.19, 90, 1000),  # who has waited .19 s by now is not to wait W again
        # 6 batches/s: rho >= 1 at 1000 and 1200; at 1400 .9, W = .675: nothing fits
        (0.0, 500, 1400),
    ],
)
def test_prefill(delay_s: float, queued: int, clock: int) -> None:
    made = make_controller(
        f"greenllm:window=1.0,{ALL}", prefill_context({1000: 0.30, 1200: 0.18, 1400: 0.15})
    )
    assert made.decide(prefill_state(delay_s=delay_s, queued=queued)) == clock


def test_a_load_of_one_fits_no_clock() -> None:
    """400 tokens/s in batches of 100 that take .25 s: rho = 1, the queue never ends. At 1200 MHz
    rho = .72, W = .72·.18 / .56 = .231, and .18 more is within .5."""
    context = prefill_context({1000: 0.25, 1200: 0.18, 1400: 0.15})
    made = make_controller(f"greenllm:window=1.0,{ALL}", context)
    assert made.decide(prefill_state(queued=300)) == 1200


def test_prefill_respects_the_u() -> None:
    """50·.40 = 20, 100·.18 = 18, 250·.15 = 37.5 J: the middle clock although the slowest fits."""
    context = prefill_context({1000: 0.40, 1200: 0.18, 1400: 0.15})
    assert make_controller(f"greenllm:{ALL}", context).decide(prefill_state()) == 1200


def test_prefill_rate_of_a_young_run() -> None:
    """Half a second into a window of five, 100 tokens are 200 a second: rho = .6 at 1000, W =
    .6·.3 / .8 = .225, + .3 misses .5; at 1200 rho = .36. At time 0 nothing is known: the top."""
    context = prefill_context({1000: 0.30, 1200: 0.18, 1400: 0.15})
    state = prefill_state()
    for now_s, clock in ((0.0, 1400), (0.5, 1200)):
        state.now_s = now_s
        assert make_controller(f"greenllm:window=5.0,{ALL}", context).decide(state) == clock


def decode_at(now_s: float, duration_s: float, batch: int = 10) -> InstanceState:
    state = decode_state(batch=batch, tokens=batch * 100)
    state.now_s, state.last_duration_s = now_s, duration_s
    return state


def test_decode_steps_down_while_there_is_slack() -> None:
    """Slack at every look, 25 ms apart: 1400 - 15·13 = 1205, snapped up to 1400; one more, 1190,
    to 1200. No band yet, as coarse=10 s keeps it away."""
    made = make_controller(f"greenllm:coarse=10.0,{ALL}", make_context())
    clocks = [made.decide(decode_at(0.025 * k, 0.020)) for k in range(1, 15)]
    assert clocks[12] == 1400
    assert clocks[13] == 1200


def test_decode_rises_when_the_p95_misses_the_promise() -> None:
    made = make_controller(
        f"greenllm:coarse=0.1,bin_tokens=1000000.0,band=1000.0,{ALL}", make_context()
    )
    for k in range(1, 40):
        made.decide(decode_at(0.03 * k, 0.020))
    low = made.decide(decode_at(1.2, 0.020))
    for k in range(60):
        made.decide(decode_at(1.5 + 0.03 * k, 0.060))
    assert low == 1000
    assert made.decide(decode_at(4.0, 0.060)) == 1400


def test_the_band_waits_for_three_equal_bins() -> None:
    """100 requests a step every 50 ms are 2000 tokens/s: bin 10 of 200, batch = 11·200·.05 = 110,
    11,000 tokens. T = 121, 100.8, 86.4 ms > 50: the top clock, band 1340...1400, whatever slack
    the p95 shows. Before the third look (every 200 ms) the clock sinks freely."""
    made = make_controller(f"greenllm:{ALL}", make_context())
    clocks = [made.decide(decode_at(0.05 * k, 0.020, batch=100)) for k in range(1, 60)]
    assert clocks[-1] == 1400
    free = make_controller(f"greenllm:num_confirm=1000,{ALL}", make_context())
    sinking = [free.decide(decode_at(0.05 * k, 0.020, batch=100)) for k in range(1, 60)]
    assert sinking[-1] == 1000


def test_the_arrival_rate_is_of_the_last_window() -> None:
    """100 tokens at 1 s and 100 at 2 s: within a window of 1 s both are 200 a second, rho = .6 at
    1000 MHz, W = .6·.3 / .8 = .225, + .3 is too long. At 2.1 s the first is older: rho = .3."""
    for now_s, clock in ((2.0, 1200), (2.1, 1000)):
        context = prefill_context({1000: 0.30, 1200: 0.18, 1400: 0.15})
        made = make_controller(f"greenllm:window=1.0,{ALL}", context)
        assert made.decide(prefill_state()) == 1000
        state = prefill_state()
        state.now_s = now_s
        assert made.decide(state) == clock


EVERY = "frequencies=" + "+".join(str(clock) for clock in range(1000, 1401))
"""A clock a MHz: the wanted clock can be read off the decision."""


def fine_context(kv_capacity_tokens: int = 100_000) -> PolicyContext:
    """(1 ms a request + 1 µs a token)·1000/f, and a clock a MHz."""
    made = make_context(clocks_mhz=tuple(range(1000, 1401)))
    return replace(made, kv_capacity_tokens=kv_capacity_tokens)


def looks(made: Controller, batches: list[int], context_tokens: int = 800) -> list[int]:
    """Four decisions a look of a quarter of a second, of so many requests each, with slack."""
    clocks, now_s = [], 0.0
    for batch in batches:
        for _ in range(4):
            now_s += 0.0625
            state = decode_at(now_s, 0.020, batch=batch)
            state.last_tokens = batch * context_tokens
            clocks.append(made.decide(state))
    return clocks


SPEC = f"greenllm:coarse=0.25,{EVERY}"


def test_the_band_lies_around_the_clock_of_the_bin() -> None:
    """25 requests sixteen times a second are 400 tokens/s: bin 2, up to 600; by Little's law
    600·.05 = 30 requests, of 800 tokens each: 54 ms at 1000 MHz, so 1080 MHz and a band of 1020 to
    1140.

    Steps of 15 MHz down from 1400 at each decision; the third look, at the twelfth, sets the band.
    Then the promise is missed: steps of 15 up, to the band's top."""
    made = make_controller(SPEC, fine_context())
    falling = [1400 - 15 * k for k in range(1, 12)] + [1140 - 15 * k for k in range(8)] + [1020]
    assert looks(made, [25] * 5) == falling
    rising = [made.decide(decode_at(1.25 + 0.0625 * k, 0.051, batch=25)) for k in range(1, 12)]
    assert rising == [1020 + 15 * k for k in range(1, 9)] + [1140] * 3


@pytest.mark.parametrize(
    ("batches", "capacity", "clock"),
    [
        # after the last decision: 1400 - 15 a decision without a band
        ([25, 25, 50, 25], 100_000, 1160),  # never three in a row
        ([50, 25, 25, 25], 100_000, 1140),
        # another bin moves the band at its third look: 50 requests, 800 tokens/s, bin 4, 1000·.05 =
        # 50 of 800 tokens: 90 ms at 1000 MHz, above the top clock: 1340 to 1400
        ([25, 25, 25, 50, 50], 100_000, 1020),
        ([25, 25, 25, 50, 50, 50], 100_000, 1340),
        # no more context than the cache holds: 30 + 10 ms, 1000 MHz, and no lower: up to 1060
        ([25, 25, 25], 10_000, 1060),
    ],
)
def test_a_bin_has_to_be_seen_three_times_in_a_row(
    batches: list[int], capacity: int, clock: int
) -> None:
    """The band is set in the last of a look's four decisions, and clamps that one already."""
    made = make_controller(SPEC, fine_context(capacity))
    seen = looks(made, batches)
    assert seen[-1] == clock


def test_between_slack_and_promise_the_clock_stays() -> None:
    """Four steps down; then a p95 of 43 ms, above 0.85 of 50, and of 50, which is kept; then 51.
    After a fine step 20 ms have to pass."""
    made = make_controller(f"{SPEC},num_confirm=1000", fine_context())
    clocks = [made.decide(decode_at(0.0625 * k, 0.020)) for k in range(1, 5)]
    for now_s, duration_s in ((0.31, 0.043), (0.37, 0.050), (0.43, 0.051), (0.44, 0.051),
                              (0.451, 0.051)):  # fmt: skip
        clocks.append(made.decide(decode_at(now_s, duration_s)))
    assert clocks == [1385, 1370, 1355, 1340, 1340, 1340, 1355, 1355, 1370]
