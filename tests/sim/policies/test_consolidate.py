"""Consolidation: how many instances are used, worked by hand; and what it saves in a real run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.sim.policies.doubles import Formula, make_context
from tests.sim.policies.test_ecomin import CubicPower
from voltana.experiments.runs import run
from voltana.sim.config import make_config
from voltana.sim.metrics import summarise
from voltana.sim.policies.base import InstanceState, RequestView
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
    assert made._settled_batch(3400.0, 100.0, 1000) == 56
    assert made._settled_batch(8000.0, 100.0, 1000) is None
    assert made._settled_batch(7700.0, 100.0, 1000) == 336


def test_a_batch_at_its_limit_opens_the_next_instance() -> None:
    """531 requests take 63.1/1.4 = 45.1 ms even at the top clock, against 50 ms less a tenth."""
    made = router()
    assert send(made, 0.1, decode(529, 0, clock=1000)) == 0  # too early for a plan
    assert send(made, 0.1, decode(530, 0, clock=1000)) == 1
    made = router()
    assert send(made, 0.1, decode(530, 0, 0, clock=1000)) == 1
    assert send(made, 0.2, decode(530, 7, 0, clock=1000)) == 1  # one more, not two


def test_one_fewer_is_used_only_after_the_dwell() -> None:
    made = router()
    assert send(made, 1.0, decode(300, 0, clock=1400)) == 1
    low = decode(21, 20, clock=1000)
    # 41/12 ms = 3,400 tokens/s: one at 1000 MHz is enough and costs half
    assert send(made, 5.9, low) == 1
    assert send(made, 6.2, low) == 0


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
