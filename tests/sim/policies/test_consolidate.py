"""Consolidation: how many instances are used, worked by hand; and what it saves in a real run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.sim.policies.doubles import Formula, LineFormula, make_context
from tests.sim.policies.test_ecomin import CubicPower
from voltana.experiments.runs import run
from voltana.sim.config import make_config
from voltana.sim.metrics import summarise
from voltana.sim.policies.base import InstanceState, Phase, RequestView
from voltana.sim.policies.registry import make_router


def time_s(phase: str, clock: int, batch: int, tokens: int) -> float:
    """Decode (10 ms + 0.1 ms·b), prefill 0.1 ms a token; both at 1000 MHz, in proportion to 1/f."""
    return (0.01 + 1e-4 * batch if phase == "decode" else 1e-4 * tokens) * 1000 / clock


def router(spec: str = "consolidate:memory=0,dwell=5", slo_ttft_s: float = 0.6) -> Any:  # noqa: ANN401
    return make_router(
        spec, replace(make_context(Formula(time_s), slo_ttft_s=slo_ttft_s), power=CubicPower())
    )


def decode(*running: int, clock: int) -> list[InstanceState]:
    return [
        InstanceState(
            instance_id=i, phase="decode", num_running=n, open_requests=n, kv_tokens=100 * n,
            clock_mhz=clock,
        )
        for i, n in enumerate(running)
    ]  # fmt: skip


def idle_prefill(count: int = 1) -> list[InstanceState]:
    return [InstanceState(instance_id=i, phase="prefill", clock_mhz=1000) for i in range(count)]


def send(made: Any, at_s: float, states: list[InstanceState]) -> int:  # noqa: ANN401
    view = RequestView(request_id=0, arrival_s=at_s, input_tokens=10, output_tokens=None)
    return int(made.route(view, idle_prefill(), states)[1])


def test_the_number_of_instances_is_the_one_of_least_power() -> None:
    """Above idle (50 W): 1000 MHz 72.9 W, 1200 MHz 125.9 W, 1400 MHz 200 W; T <= 45 ms.

    One instance sustains 350 requests / 45 ms = 7,778 tokens/s at 1000 MHz, 440 / 45 ms = 9,778
    at 1200, 530 / 45 ms = 11,778 at 1400.
    300 at 1200 MHz: 33.3 ms, 9,000 tokens/s. One at 1200: 125.9 W; two at 1000: 145.8 W. One.
    300 at 1400 MHz: 28.6 ms, 10,500 tokens/s. One at 1400: 200 W; two at 1000: 145.8 W. Two.
    """
    assert send(router(), 1.0, decode(300, 0, 0, clock=1200)) == 0
    assert send(router(), 1.0, decode(300, 0, 0, clock=1400)) == 1
    assert send(router(), 1.0, decode(300, 0, 0, clock=0)) == 1  # unlocked, busy: at 1400


def test_a_settled_batch_is_a_graph_size_of_the_engine() -> None:
    """3,400 tokens/s at 1000 MHz: b >= 34 + 0.34·b holds from 51.5 on, so 56 of eights. At 8,000
    tokens/s b = 400 settles, but 50 ms are more than 45; at 7,700 b = 336 takes 43.6 ms."""
    made = router()
    assert made.settled_batch(3400.0, 100.0, 1000) == 56
    assert made.settled_batch(8000.0, 100.0, 1000) is None
    assert made.settled_batch(7700.0, 100.0, 1000) == 336


def test_a_batch_at_its_limit_opens_the_next_instance() -> None:
    """531 requests take 63.1/1.4 = 45.1 ms even at the top clock, against 50 ms less a tenth."""
    made = router()
    assert send(made, 0.1, decode(529, 0, clock=1000)) == 0  # too early for a plan
    assert send(made, 0.1, decode(530, 0, clock=1000)) == 1
    made = router()
    assert send(made, 0.1, decode(530, 0, 0, clock=1000)) == 1
    assert send(made, 0.2, decode(530, 7, 0, clock=1000)) == 1  # one more, not two


def test_room_is_counted_with_the_context_of_the_new_one() -> None:
    """(1 ms + 1 µs a token)·b/1.4 of 45 ms: b = 63 / (1 + context in thousands). Nine of 9,000
    tokens and a prompt of 11,000 share 20,000 by ten: 2,000 each, searched as 2,016: 20.9, so 20.
    Of the nine four may still wait. With 19 on their way there is room, with 20 not."""
    for waiting in (0, 4):
        for opened, chosen in ((19, 0), (20, 1)):
            made = make_router("consolidate", make_context(LineFormula()))
            states = decode(0, 0, clock=1000)
            first = states[0]
            first.num_running, first.num_waiting, first.open_requests = 9 - waiting, waiting, opened
            first.kv_tokens, first.waiting_tokens = 9000 - 1000 * waiting, 1000 * waiting
            view = RequestView(request_id=0, arrival_s=0.0, input_tokens=11_000, output_tokens=None)
            assert made.route(view, idle_prefill(), states) == (0, chosen)


def test_the_token_rate_is_a_mean_over_its_memory() -> None:
    """300 at 1400 MHz: 10,500 tokens/s, looked at each second with a memory of 3 s: a quarter of
    what is missing is added each time. One instance at 1200 MHz is cheapest up to 9,778 tokens/s:
    after nine looks the mean is 10,500·(1 - 0.75^9) = 9,712, after ten 9,909."""
    made = router("consolidate:memory=3,dwell=5")
    busy = decode(300, 0, clock=1400)
    assert [send(made, float(second), busy) for second in range(1, 11)] == [0] * 9 + [1]


def test_the_number_is_looked_at_once_a_period() -> None:
    """A quarter of a second: the rate that asks for two is not looked at before."""
    for at_s, chosen in ((0.24, 0), (0.25, 1)):
        assert send(router(), at_s, decode(300, 0, clock=1400)) == chosen


def test_all_are_used_where_no_number_keeps_the_promise() -> None:
    """600 at 1400 MHz: 70 ms/1.4 = 50 ms, 12,000 tokens/s each, and 11,778 are the most that one
    sustains: four of four, so that the fourth, which has the fewest, is taken."""
    assert send(router(), 1.0, decode(600, 600, 600, 590, clock=1400)) == 3


def test_nobody_running_changes_nothing() -> None:
    """Two are in use; a moment without requests is no reason for fewer, whatever the dwell."""
    made = router("consolidate:memory=0,dwell=0")
    assert send(made, 1.0, decode(300, 0, clock=1400)) == 1
    waiting = decode(0, 0, clock=1400)
    waiting[0].open_requests = 5
    assert send(made, 2.0, waiting) == 1


class TokenPower(CubicPower):
    """A watt for so many tokens beside."""

    def __init__(self, tokens_per_w: float) -> None:
        self._tokens_per_w = tokens_per_w

    def power_w(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        return super().power_w(phase, clock_mhz, batch_size, tokens) + tokens / self._tokens_per_w


@pytest.mark.parametrize(
    ("running", "clock", "tokens_per_w", "chosen"),
    [
        (150, 1200, 1e9, 0),
        (150, 1400, 1e9, 1),
        (150, 1200, 1e3, 1),  # a watt a request: 125.9 + 152 against 2·(72.9 + 48)
    ],
)
def test_the_context_is_part_of_the_price(
    running: int, clock: int, tokens_per_w: float, chosen: int
) -> None:
    """Contexts of 1,000 tokens: 10 ms + 0.2 ms a request at 1000 MHz.

    One instance sustains 220/45 ms = 4,889 tokens/s at 1200 MHz. 150 there: 33.3 ms, 4,500/s, at
    which 152 settle; two at 1000 MHz, 48 each. 150 at 1400 MHz: 28.6 ms, 5,250/s: two."""
    formula = Formula(
        lambda p, f, b, t: (0.01 + 1e-4 * b + 1e-7 * t if p == "decode" else 1e-4 * t) * 1000 / f
    )
    context = replace(make_context(formula), power=TokenPower(tokens_per_w))
    made = make_router("consolidate:memory=0", context)
    states = decode(running, 0, clock=clock)
    states[0].kv_tokens = 1000 * running
    assert send(made, 1.0, states) == chosen


def test_a_driver_that_shows_no_context_asks_of_a_token() -> None:
    def asked_of_one(phase: str, clock: int, batch: int, tokens: int) -> float:
        assert tokens >= 1
        return time_s(phase, clock, batch, tokens)

    context = replace(make_context(Formula(asked_of_one)), power=CubicPower())
    states, prefill = decode(300, 0, clock=1400), idle_prefill()
    states[0].kv_tokens, prefill[0].num_running = 0, 1
    view = RequestView(request_id=0, arrival_s=1.0, input_tokens=1, output_tokens=None)
    made = make_router("consolidate:memory=0", context)
    assert made.route(view, prefill, states) == (0, 1)


def test_one_fewer_is_used_only_after_the_dwell() -> None:
    made = router()
    assert send(made, 1.0, decode(300, 0, clock=1400)) == 1
    low = decode(21, 20, clock=1000)
    # 41/12 ms = 3,400 tokens/s: one at 1000 MHz is enough and costs half
    assert send(made, 5.9, low) == 1
    assert send(made, 6.15, low) == 0
    made = router()
    assert send(made, 1.0, decode(300, 0, clock=1400)) == 1
    assert send(made, 6.0, low) == 0  # five seconds to the last bit


def test_one_fewer_at_a_time() -> None:
    """Three at 1400 MHz, 10,500 tokens/s each, then hardly any load: two are left at first."""
    made = router("consolidate:memory=0,dwell=0")
    assert send(made, 1.0, decode(300, 300, 300, clock=1400)) == 0
    low = decode(9, 9, 1, clock=1000)
    assert send(made, 2.0, low) == 0
    low = decode(9, 9, 9, clock=1000)
    low[1].open_requests = 1
    assert send(made, 2.1, low) == 1


def test_a_small_gain_is_not_worth_a_change() -> None:
    """Two at 1000 MHz cost 145.8 W, one at 1200 MHz 125.9 W: 15.8 % more, 13.6 % less."""
    for gain, expected in ((0.10, 0), (0.20, 1)):
        made = router(f"consolidate:memory=0,dwell=0,gain={gain}")
        assert send(made, 1.0, decode(300, 0, clock=1400)) == 1
        # 4,500 tokens/s each at 1000 MHz: b = 81.8, T = 18.18 ms
        assert send(made, 2.0, decode(82, 81, clock=1000)) == expected


def test_prefill_is_packed_up_to_its_share_of_the_promise() -> None:
    """0.5 s are left for prefill, half of it for queues: 2,410 tokens take 0.241 s, 2,510 0.251."""
    made = router("consolidate:prefill=0.5")
    view = RequestView(request_id=0, arrival_s=0.0, input_tokens=10, output_tokens=None)
    prefill = idle_prefill(2)
    for waiting, expected in ((2400, 1), (2500, 0)):
        prefill[1].num_waiting, prefill[1].waiting_tokens = 3, waiting
        assert made.route(view, prefill, decode(0, clock=1000))[0] == expected
    # the fuller of two that keep their share, whichever comes first
    prefill[0].num_waiting, prefill[0].waiting_tokens = 3, 2400
    prefill[1].waiting_tokens = 100
    assert made.route(view, prefill, decode(0, clock=1000))[0] == 0
    prefill[0].num_waiting, prefill[0].waiting_tokens = 0, 0
    # the running batch counts as well: 0.2 s of it and 0.051 s
    prefill[1].num_running, prefill[1].kv_tokens, prefill[1].waiting_tokens = 1, 2000, 500
    assert made.route(view, prefill, decode(0, clock=1000))[0] == 0


def test_a_prompt_waits_for_the_batch_and_then_runs_with_the_queue() -> None:
    """(50 ms a prompt + 0.1 ms a token)·1000/f, 0.4 s of 0.5. 1: two run with 1,000 tokens (0.2 s),
    one of 90 waits and takes this one of 10 along (0.11 s): 0.31 s. 2: one waits, of the tokens
    named: 0.1 s and theirs. The fuller is taken, up to 0.4 s."""
    formula = Formula(lambda p, f, b, t: (0.05 * b + 1e-4 * t) * 1000 / f)
    made = make_router("consolidate", make_context(formula, slo_ttft_s=0.6))
    view = RequestView(request_id=0, arrival_s=0.0, input_tokens=10, output_tokens=None)
    first, second = prefill = idle_prefill(2)
    first.num_running, first.kv_tokens, first.num_waiting, first.waiting_tokens = 2, 1000, 1, 90
    second.num_waiting = 1
    for tokens, clock, chosen in (
        (2080, 1000, 0), (2100, 1000, 1), (2980, 1000, 1), (3000, 1000, 0),
        (3320, 1400, 0), (3340, 1400, 1),  # 0.433 s at 1000 MHz are 0.31 at 1400
        (3320, 0, 0), (3340, 0, 1),  # without a lock a busy card is at its top clock
    ):  # fmt: skip
        second.waiting_tokens, second.clock_mhz = tokens, clock
        assert made.route(view, prefill, decode(0, clock=1000))[0] == chosen, (tokens, clock)
    second.waiting_tokens, second.clock_mhz = 4000, 1000  # 0.501 s
    first.kv_tokens = 3000  # 0.51 s: neither is in time, so the one that has less before it
    assert made.route(view, prefill, decode(0, clock=1000))[0] == 1


def test_a_promise_of_many_seconds_is_no_reason_for_a_long_queue() -> None:
    """Under 30 s, of which 24 are left for queues: 19,900 tokens take 1.99 s, 20,100 take 2.01."""
    made = router("consolidate", slo_ttft_s=30.0)
    view = RequestView(request_id=0, arrival_s=0.0, input_tokens=10, output_tokens=None)
    prefill = idle_prefill(2)
    for waiting, expected in ((19_890, 1), (20_090, 0)):
        prefill[1].num_waiting, prefill[1].waiting_tokens = 3, waiting
        assert made.route(view, prefill, decode(0, clock=1000))[0] == expected


@pytest.mark.slow
def test_half_of_the_decode_fleet_rests_at_low_load() -> None:
    """At 10 requests/s one of two decode instances is enough: it saves a fifth, promises kept."""
    values = {"rate_rps": 10, "duration_s": 60, "slo_itl_s": 0.045, "controller": "ecomin"}
    packed = run(make_config(values | {"router": "consolidate"}))
    spread = summarise(run(make_config(values | {"router": "least-requests"})))
    ours = summarise(packed)
    assert min(i.busy_s for i in packed.instances if i.phase == "decode") == 0.0
    assert ours["attainment"] == 1.0
    assert ours["energy_j"] < 0.8 * spread["energy_j"]
