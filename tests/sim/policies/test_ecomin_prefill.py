"""EcoMin in prefill: the bottom of the U, the queue's time, holding, a wrong model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.sim.policies.doubles import Formula, make_context
from tests.sim.policies.test_ecomin import EXACT, CubicPower
from voltana.sim.policies.base import InstanceState, WaitingRequest
from voltana.sim.policies.registry import make_controller


def prefill_controller(spec: str = EXACT, predictor: Any = None, **context: Any) -> Any:  # noqa: ANN401
    """0.1 s·1000/f an iteration; TTFT 0.5 s - 2·0.05 s ITL leaves 0.4 s."""
    formula = predictor or Formula(lambda p, f, b, t: 100.0 / f)
    made = make_context(formula, phase="prefill", slo_ttft_s=0.5, slo_itl_s=0.05, **context)
    return make_controller(spec, replace(made, power=CubicPower()))


def prefill_state() -> InstanceState:
    return InstanceState(instance_id=0, phase="prefill", last_batch_size=1, last_tokens=9)


def test_prefill_sits_at_the_bottom_of_the_u() -> None:
    """Energy (P - idle)·T: 1000: (122.9 - 50)·.1 = 7.29 J; 1200: (175.9 - 60)/12 = 9.66 J; 1400:
    (250 - 70)/14 = 12.9 J: the bottom is 1000 MHz. 0.4 s: the oldest has waited 0.31, 0.1 s more
    is too late, 0.083 s is not. T = 10^8/f³ s: 72.9·.1 = 7.3 J, 115.9·.0579 = 6.7 J,
    180·.0364 = 6.6 J: running fast is the cheaper side of the U."""
    state = prefill_state()
    assert prefill_controller().decide(state) == 1000
    state.last_queue_delay_s = 0.31
    assert prefill_controller().decide(state) == 1200
    state.last_queue_delay_s = 0.0
    steep = Formula(lambda p, f, b, t: 1e8 / f**3)
    assert prefill_controller(predictor=steep).decide(state) == 1400


def test_prefill_holds_until_the_oldest_has_just_time_to_run() -> None:
    """hold = 0.5 of 0.4 s: 0.2 s, of which 0.1 s to run at 1000 MHz. The oldest came at 1.00 s."""
    made = prefill_controller(f"{EXACT},hold=0.5")
    state = prefill_state()
    state.num_waiting, state.waiting_tokens = 2, 20
    arrivals = [WaitingRequest(request_id=k, arrival_s=1.0 + 0.01 * k, input_tokens=10)
                for k in range(2)]  # fmt: skip
    state.list_waiting = lambda: arrivals
    state.now_s = 1.02
    assert made.hold_s(state) == pytest.approx(0.08, abs=1e-12)
    state.now_s = 1.10
    assert made.hold_s(state) == pytest.approx(0.0, abs=1e-12)
    state.now_s = 1.30
    assert made.hold_s(state) == 0.0
    assert prefill_controller(f"{EXACT},hold=0").hold_s(state) == 0.0
    slow = Formula(lambda p, f, b, t: 300.0 / f)  # 0.3 s: nothing to gather
    assert prefill_controller(f"{EXACT},hold=0.5", predictor=slow).hold_s(state) == 0.0


def times(phase: str, clock: int, batch: int, tokens: int) -> float:
    """10 ms a prompt and 1 ms a token at 1000 MHz, in proportion to 1/f."""
    return (1e-2 * batch + 1e-3 * tokens) * 1000 / clock


@pytest.mark.parametrize(
    ("tokens", "queued", "waiting_tokens", "delay_s", "clock"),
    [
        # of 0.4 s. Nobody waits: who arrives during the batch waits for it: 2·T
        (190, 0, 0, 0.0, 1000),  # 2·0.2, to the last millisecond
        (191, 0, 0, 0.0, 1200),
        (231, 0, 0, 0.0, 1400),  # 0.2008 at 1200 MHz
        # the queue in one batch, whether longer than this batch or not: 0.1 s and 0.3
        (90, 2, 280, 0.0, 1000),
        (90, 2, 281, 0.0, 1200),
        (90, 12, 181, 0.0, 1200),  # 0.12 s for 12 prompts
        (290, 1, 90, 0.0, 1000),  # 0.3 and 0.1: a short queue asks for less than 2·T
        (290, 1, 91, 0.0, 1200),
        # the longer of delay and queue
        (90, 1, 90, 0.3, 1000),
        (90, 1, 90, 0.301, 1200),
    ],
)
def test_prefill_leaves_the_queue_its_time(
    tokens: int, queued: int, waiting_tokens: int, delay_s: float, clock: int
) -> None:
    state = InstanceState(
        instance_id=0, phase="prefill", last_batch_size=1, last_tokens=tokens, num_waiting=queued,
        waiting_tokens=waiting_tokens, last_queue_delay_s=delay_s + 1e-12,
    )  # fmt: skip
    almost = prefill_controller(predictor=Formula(lambda *at: times(*at) - 1e-9))
    assert almost.decide(state) == clock


def test_a_held_queue_is_run_as_one_batch_at_the_bottom() -> None:
    """hold = 0.5 of 0.4 s. Three prompts of 70 tokens in all take 0.03 + 0.07 = 0.1 s at 1000 MHz,
    the bottom; the oldest, listed last, came at 1.0 s: until 1.1 s. Of 170 tokens: 0.2 s, now."""
    made = prefill_controller(f"{EXACT},hold=0.5", Formula(times))
    arrivals = [WaitingRequest(request_id=k, arrival_s=at_s, input_tokens=10)
                for k, at_s in enumerate((1.02, 1.01, 1.0))]  # fmt: skip
    state = InstanceState(
        instance_id=0, phase="prefill", now_s=1.02, num_waiting=3, waiting_tokens=70,
        list_waiting=lambda: arrivals,
    )  # fmt: skip
    assert made.hold_s(state) == pytest.approx(0.08, abs=1e-12)
    state.waiting_tokens = 170
    assert made.hold_s(state) == 0.0


def test_a_wrong_prefill_model_is_found_out() -> None:
    """0.1 s·1000/f predicted, 0.12 s taken: of 0.4 s the batch that has waited 0.29 s needs
    1200 MHz (0.39 s), where the uncorrected prediction (0.39 s) would let it run at 1000."""
    made = prefill_controller()
    state = prefill_state()
    state.clock_mhz = 1400
    state.last_queue_delay_s = 0.29
    assert made.decide(state) == 1000
    state.last_queue_delay_s = 0.0
    state.ended_batch_size, state.ended_tokens = 1, 9
    state.clock_mhz, state.last_duration_s = 1000, 0.12
    for step in range(200):
        state.now_s = 0.2 * (step + 1)
        made.decide(state)
    state.last_queue_delay_s = 0.29
    assert made.decide(state) == 1200
