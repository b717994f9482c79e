"""Rules for instances of both phases, worked by hand.

Prefill takes 0.1 ms a token, decode 10 ms and 0.1 ms a request, at 1000 MHz; both in proportion to
1/f. ITL 50 ms, TTFT 500 ms.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.sim.policies.doubles import Formula, make_context
from tests.sim.policies.test_consolidate import router, time_s
from tests.sim.policies.test_ecomin import PLAIN, CubicPower
from voltana.experiments.runs import run
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.policies.base import InstanceState, PolicyContext
from voltana.sim.policies.parts.mixed import BothPhases, GapWatch
from voltana.sim.policies.registry import make_controller


def context() -> PolicyContext:
    made = make_context(Formula(time_s), phase="colocated", levels_mhz=(1000, 1200, 1400))
    return replace(made, power=CubicPower())


def about_to(
    *,
    chunk: int = 0,
    running: int = 0,
    decoding: int | None = None,
    **fields: Any,  # noqa: ANN401
) -> InstanceState:
    """What a controller sees of an iteration of `chunk` prompt tokens beside so many requests."""
    decoding = running if decoding is None else decoding
    return InstanceState(
        instance_id=0, phase="colocated", clock_mhz=1400, chunk_requests=int(chunk > 0),
        chunk_tokens=chunk, num_running=running, last_batch_size=decoding,
        kv_tokens=100 * running, last_tokens=100 * decoding, open_requests=running, **fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("state", "clock_mhz"),
    [
        (about_to(running=300), 1000),  # 40 ms
        (about_to(running=450), 1200),  # 55 ms, 45.8 ms
        (about_to(chunk=300, running=10), 1000),  # 30 + 11 ms
        (about_to(chunk=400, running=10), 1200),  # 40 + 11 ms, 42.5 ms
        (about_to(chunk=450, running=10, decoding=0), 1000),  # 45 ms: decoding stands
        (about_to(chunk=900, running=10, decoding=0), 1400),  # 90 ms, 75 ms, 64 ms: none fits
        (about_to(chunk=4000, last_queue_delay_s=0.05), 1000),  # 400 ms of 450
        (about_to(chunk=4000, last_queue_delay_s=0.15), 1200),  # 333 ms of 350
        (about_to(chunk=100, num_waiting=1), 1400),
    ],
)
def test_ecofreq_adds_the_parts_and_keeps_the_tighter_promise(
    state: InstanceState, clock_mhz: int
) -> None:
    assert make_controller("ecofreq", context()).decide(state) == clock_mhz


@pytest.mark.parametrize(
    ("state", "clock_mhz"),
    [
        (about_to(running=300), 1000),
        # of the 400 ms that TTFT leaves, who comes meanwhile waits for one batch: 2 · 150 ms
        (about_to(chunk=1500), 1000),
        (about_to(chunk=2500), 1400),  # 2 · 250, 2 · 208, 2 · 179 ms
        (about_to(chunk=1500, last_queue_delay_s=0.26), 1200),  # 150 and 125 ms of 140
        (about_to(chunk=100, num_waiting=3, waiting_tokens=4000), 1200),  # 400 + 10, 333 + 8 ms
        (about_to(chunk=300, running=10), 1000),  # a gap of 30 + 11 ms
        (about_to(chunk=400, running=10), 1200),
        (about_to(chunk=400, running=10, decoding=0), 1200),  # the step comes after: 40 + 11 ms
        (about_to(chunk=600, running=10), 1000),  # 50.7 ms at the top: lost, so not paid for
    ],
)
def test_ecomin_takes_the_lowest_clock_that_helps(state: InstanceState, clock_mhz: int) -> None:
    assert make_controller(PLAIN, context()).decide(state) == clock_mhz


def test_a_gap_is_all_iterations_since_the_last_token() -> None:
    """Prompts alone, a step of two, prompts while the two stand, a step of three."""
    watch = GapWatch()
    states = (
        about_to(chunk=50),
        about_to(running=2, last_duration_s=0.1),
        about_to(chunk=50, running=2, decoding=0, last_duration_s=0.02, ended_batch_size=2),
        about_to(running=3, last_duration_s=0.1),
        about_to(running=3, last_duration_s=0.03, ended_batch_size=3),
    )
    told = [(watch.look(state), watch.decoded) for state in states]
    assert told == [(0, None), (1, None), (0, (0.02, 2)), (1, None), (0, (0.13, 3))]
    assert watch.aside_s == pytest.approx(0.02 * 0.1)  # a fiftieth of the newest gap's


def test_pid_holds_the_phase_that_is_nearer_to_its_promise() -> None:
    """Setpoints at half: 200 ms for prompts, 25 ms for gaps. A prompt of 100 ms that waited 20 is
    at 0.6, a gap of 20 ms at 0.8."""
    both = BothPhases(context(), 1.0, 0.99, 0.5)
    assert both.ratio(about_to(chunk=50)) is None
    ended: dict[str, Any] = {"now_s": 0.1, "last_duration_s": 0.1, "ended_queue_delay_s": 0.02}
    assert both.ratio(about_to(running=2, **ended)) == pytest.approx(0.6)
    ended = {"now_s": 0.12, "last_duration_s": 0.02, "ended_batch_size": 2}
    assert both.ratio(about_to(running=2, **ended)) == pytest.approx(0.8)


def test_a_rule_for_one_phase_is_refused() -> None:
    with pytest.raises(VoltanaError, match=r"'agft' has no rule .* take one of static, boost"):
        make_controller("agft", context())


def test_prompts_stretch_gaps() -> None:
    """1,000 tokens/s with half of the time spent on prompts: b >= 20 + 0.2·b from 25 on, so 32.
    At 3,400 b = 216 would settle, at 63 ms."""
    made = router()
    assert made.settled_batch(1000.0, 100.0, 1000, stretch=2.0) == 32
    assert made.settled_batch(3400.0, 100.0, 1000, stretch=2.0) is None


def test_consolidate_leaves_colocated_instances_at_rest() -> None:
    """Of four instances one or two carry 6 requests/s of ShareGPT, and all promises of requests."""
    config = make_config(
        {"num_colocated": 4, "rate_rps": 6, "duration_s": 30, "controller": "ecomin",
         "router": "consolidate", "seed": 3}
    )  # fmt: skip
    record = run(config)
    assert set(record.requests.decode_id) <= {0, 1}
    assert (record.requests.prefill_id == record.requests.decode_id).all()
