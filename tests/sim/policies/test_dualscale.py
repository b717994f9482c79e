"""DualScale: the plan of the next batches, how the queue becomes batches, and decode."""

from __future__ import annotations

import pytest

from tests.sim.policies.doubles import Formula, decode_state, make_context
from tests.sim.policies.test_rivals import cubic
from voltana.sim.policies.base import InstanceState, WaitingRequest
from voltana.sim.policies.controllers.dualscale import (
    DualScale,
    DualScaleParameters,
    ProjectedBatch,
)
from voltana.sim.policies.registry import make_controller


def dualscale(levels: tuple[int, ...] = (1000, 1400)) -> DualScale:
    """One ms a token at 1000 MHz; 0.5 s for prefill; powers 100, 150, 300 W."""
    context = cubic("prefill", Formula(lambda p, f, b, t: 1e-3 * t * 1000 / f))
    return DualScale(DualScaleParameters(frequencies_mhz=levels), context)


def batch(tokens: int, waited_s: float) -> ProjectedBatch:
    return ProjectedBatch(num_requests=1, tokens=tokens, waited_s=waited_s)


@pytest.mark.parametrize(
    ("batches", "plan"),
    [
        # 140 tokens take 140 ms slow, 100 ms fast
        ([batch(140, 0.00)], [1000]),
        ([batch(140, 0.35)], [1000]),
        ([batch(140, 0.37)], [1400]),
        ([batch(140, 0.90)], [1400]),  # lost anyway
        # the second has 290 ms left: both slow end at 280
        ([batch(140, 0.0), batch(140, 0.21)], [1000, 1000]),
        # 350 ms left: 140 slow + 280 fast = 340 fits, 100 + 280 slow = 380 does not
        ([batch(140, 0.0), batch(280, 0.15)], [1000, 1400]),
        # 350 ms left: 280 slow + 100 = 380 does not fit, 200 + 140 slow = 340 does
        ([batch(280, 0.0), batch(140, 0.15)], [1400, 1000]),
        # 190 ms left, 200 needed
        ([batch(140, 0.0), batch(140, 0.31)], [1400, 1400]),
    ],
)
def test_dualscale_plans(batches: list[ProjectedBatch], plan: list[int]) -> None:
    assert dualscale().plan_mhz(batches) == plan


def test_dualscale_plans_by_the_requests_of_a_batch_too() -> None:
    """100 ms a request at 1000 MHz: four take 400 ms slow, which fits 500; six take 600 slow
    and 429 fast."""
    context = cubic("prefill", Formula(lambda p, f, b, t: 0.1 * b * 1000 / f))
    made = DualScale(DualScaleParameters(frequencies_mhz=(1000, 1400)), context)
    for count, clock in ((4, 1000), (6, 1400)):
        assert made.plan_mhz([ProjectedBatch(num_requests=count, tokens=9, waited_s=0.0)]) == [
            clock
        ]


def test_dualscale_packs_the_queue_and_looks_no_further_than_k_batches() -> None:
    """Queue of 60+60+60 tokens, budget 120: batches of 120 and 60 behind 140 at hand. Fast they
    take 100, 86 and 43 ms, slow 140, 120 and 60. With 250 ms left the first may be slow if only two
    are seen (140 + 86 = 226), not if all three are (269)."""

    def state(age_s: float) -> InstanceState:
        waiting = [
            WaitingRequest(request_id=i, arrival_s=1.0 - age_s, input_tokens=60) for i in range(3)
        ]
        return InstanceState(
            instance_id=0, phase="prefill", now_s=1.0, last_batch_size=1, last_tokens=140,
            num_waiting=3, waiting_tokens=180, list_waiting=lambda: waiting,
        )  # fmt: skip

    context = cubic("prefill", Formula(lambda p, f, b, t: 1e-3 * t * 1000 / f))
    spec = "dualscale-mpc:frequencies=1000+1400,batch_tokens=120,num_batches="
    assert make_controller(spec + "8", context).decide(state(0.10)) == 1000  # 320 <= 400
    assert make_controller(spec + "8", context).decide(state(0.25)) == 1400
    assert make_controller(spec + "2", context).decide(state(0.25)) == 1000


@pytest.mark.parametrize(
    ("queue", "clock"),
    [
        # (tokens, age) of those behind 140 tokens, which take 140 ms slow and 100 fast; 0.5 s each.
        # Two of 35 make one batch (70 ms slow, 50 fast), which ends within what its oldest has:
        # 140 + 50 of 230 ms, or of 180
        (((35, 0.05), (35, 0.27)), 1000),
        (((35, 0.05), (35, 0.32)), 1400),
        # more than a batch of 120 runs in chunks: 120 now, 86 ms fast, 226 in all of 230 ms
        (((500, 0.27),), 1000),
        (((500, 0.28),), 1400),
        # 60 + 60 and then 10: 140 + 86 + 7 = 233 ms to the end of the third, whose own age counts
        (((60, 0.27), (60, 0.27), (10, 0.0)), 1000),
        (((60, 0.0), (60, 0.0), (10, 0.27)), 1400),
        # 60 + 60 fill the batch behind one of 120, to end after 140 + 86 + 86 = 311 ms of 275; if
        # they made two, the older one would end after 269
        (((120, 0.0), (60, 0.225), (60, 0.0)), 1400),
    ],
)
def test_dualscale_projects_the_queue_as_batches(
    queue: tuple[tuple[int, float], ...], clock: int
) -> None:
    waiting = [
        WaitingRequest(request_id=k, arrival_s=1.0 - age_s, input_tokens=tokens)
        for k, (tokens, age_s) in enumerate(queue)
    ]
    state = InstanceState(
        instance_id=0, phase="prefill", now_s=1.0, last_batch_size=1, last_tokens=140,
        num_waiting=len(queue), list_waiting=lambda: waiting,
    )  # fmt: skip
    context = cubic("prefill", Formula(lambda p, f, b, t: 1e-3 * t * 1000 / f))
    spec = "dualscale-mpc:frequencies=1000+1400,batch_tokens=120"
    assert make_controller(spec, context).decide(state) == clock


def test_dualscale_counts_the_delay_of_the_batch_at_hand() -> None:
    """140 ms slow of 500: after 359 ms of delay still, after 361 no more."""
    context = cubic("prefill", Formula(lambda p, f, b, t: 1e-3 * t * 1000 / f))
    for delay_s, clock in ((0.359, 1000), (0.361, 1400)):
        state = InstanceState(
            instance_id=0, phase="prefill", now_s=1.0, last_batch_size=1, last_tokens=140,
            last_queue_delay_s=delay_s,
        )  # fmt: skip
        made = make_controller("dualscale-mpc:frequencies=1000+1400", context)
        assert made.decide(state) == clock


def test_dualscale_slows_down_step_by_step() -> None:
    """Levels of 1000, 1200 and 1400 MHz, 140 tokens: 140, 117 and 100 ms; P·T 14, 17.5, 30 J.

    Two batches, 240 ms for the second: a step of both saves 25 J and ends at 233 ms; a step more of
    either would end at 257. With 290 ms both go on to the lowest, 280 ms."""
    made = dualscale((1000, 1200, 1400))
    assert made.plan_mhz([batch(140, 0.0), batch(140, 0.26)]) == [1200, 1200]
    assert made.plan_mhz([batch(140, 0.0), batch(140, 0.21)]) == [1000, 1000]
    assert made.plan_mhz([batch(140, 0.37)]) == [1200]


def test_dualscale_does_not_slow_down_where_that_costs_energy() -> None:
    """P·T of 100 W·0.4 s and 300·0.1: 40 J against 30."""
    times = {1000: 0.4, 1200: 0.4, 1400: 0.1}
    context = cubic("prefill", Formula(lambda p, f, b, t: times[f]))
    made = DualScale(DualScaleParameters(frequencies_mhz=(1000, 1400)), context)
    assert made.plan_mhz([batch(1, 0.0)]) == [1400]


@pytest.mark.parametrize(
    ("tokens", "kv", "waiting", "clock"),
    [(40_000, 40_000, 0, 1000), (55_000, 55_000, 0, 1400), (40_000, 90_001, 0, 1400),
     (40_000, 90_000, 0, 1000), (40_000, 40_000, 1, 1400)],
)  # fmt: skip
def test_dualscale_decode(tokens: int, kv: int, waiting: int, clock: int) -> None:
    """10 ms + 1 µs a token at 1000 MHz: 50 ms hold at 40,000 tokens, 65 do not; KV limit 90,000."""
    predictor = Formula(lambda p, f, b, t: (0.0099 + 1e-6 * t) * 1000 / f)
    made = make_controller("dualscale-mpc:frequencies=1000+1400", make_context(predictor))
    state = decode_state(batch=10, tokens=tokens, kv=kv, waiting=waiting)
    assert made.decide(state) == clock
