"""throttLL'eM: the scoreboard and the clock it allows, worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sim.policies.doubles import Formula, LineFormula, decode_state, make_context
from voltana.sim.policies.base import InstanceState, RunningRequest, WaitingRequest
from voltana.sim.policies.controllers.throttllm import Segment, Throttllm, ThrottllmParameters
from voltana.sim.policies.registry import make_controller

ALL = "frequencies=1000+1200+1400"


def request(
    inputs: int, generated: int, length: int | None = None, *, arrival_s: float = 0.0
) -> RunningRequest:
    return RunningRequest(
        request_id=0, arrival_s=arrival_s, input_tokens=inputs, generated_tokens=generated,
        output_tokens=length, first_token_s=arrival_s,
    )  # fmt: skip


def state_of(*running: RunningRequest, now_s: float = 0.0, waiting: int = 0) -> InstanceState:
    state = decode_state(waiting=waiting)
    state.now_s = now_s
    state.num_running = len(running)
    state.kv_tokens = sum(r.input_tokens + r.generated_tokens for r in running)
    state.list_running = lambda: list(running)
    return state


def segment(count: int, batch: int, first: int, last: int, deadline_s: Any) -> Segment:  # noqa: ANN401
    return Segment(
        num_iterations=count, batch_size=batch, first_tokens=first, last_tokens=last,
        deadline_s=deadline_s,
    )  # fmt: skip


def test_scoreboard_with_known_lengths() -> None:
    """100 + 4 of 10 tokens and 50 + 1 of 3: batch 2 for two iterations (155, 157 tokens), then the
    second leaves with 53 and the first runs four more, from 106 to 109 tokens.

    Deadlines: arrival + 0.5 s + (L - 1)·50 ms = 0.95 s and 1 + 0.6 s.
    """
    made = Throttllm(ThrottllmParameters(), make_context())
    board = made.project([request(100, 4, 10), request(50, 1, 3, arrival_s=1.0)], 155)
    assert board == [
        segment(2, 2, 155, 157, pytest.approx(1.6)),
        segment(4, 1, 106, 109, pytest.approx(0.95)),
    ]


def test_scoreboard_with_predicted_and_outrun_lengths() -> None:
    """Predicted 8·1.25 = 10 tokens: 4 done, 6 to go. 10 done: outrun, 20 are expected now, 10 to
    go. 25 done, beyond those too: one more at least."""
    parameters = ThrottllmParameters(predicted_tokens=8, max_tokens=20, safety_ratio=1.25)
    made = Throttllm(parameters, make_context())
    board = made.project([request(1, 4), request(1, 10), request(1, 25)], 42)
    assert [(s.num_iterations, s.batch_size) for s in board] == [(1, 3), (5, 2), (4, 1)]
    # the third leaves with 27 of 45; the first with 11 of 28 after five more of two
    assert [(s.first_tokens, s.last_tokens) for s in board] == [(42, 42), (18, 26), (17, 20)]


def test_those_who_leave_together_leave_by_the_earlier_deadline() -> None:
    """104 and 54 tokens, six to go each; 10 with 20 to go. 168 tokens grow by three an iteration to
    183; 110 + 60 leave, 16 are left and grow to 29. Deadlines 1 + .5 + .45, .5 + .5 + .45 and
    .5 + .95."""
    made = Throttllm(ThrottllmParameters(), make_context())
    running = [
        request(100, 4, 10, arrival_s=1.0), request(50, 4, 10, arrival_s=0.5), request(10, 0, 20),
    ]  # fmt: skip
    assert made.project(running, 168) == [
        segment(6, 3, 168, 183, pytest.approx(1.45)),
        segment(14, 1, 16, 29, pytest.approx(1.45)),
    ]


def test_a_projection_never_has_fewer_than_no_tokens() -> None:
    """A driver that shows an empty cache: two of 100 tokens, one leaves with 102."""
    made = Throttllm(ThrottllmParameters(), make_context())
    board = made.project([request(100, 0, 2), request(100, 0, 3)], 0)
    assert [(s.first_tokens, s.last_tokens) for s in board] == [(0, 2), (0, 0)]


@pytest.mark.parametrize(
    ("inputs", "length", "clock"),
    [
        # T = (1 ms·b + 1 µs·t)·1000/f, promise 50 ms: the last iteration of one request has
        # inputs + length - 1 tokens
        (48_000, 1001, 1000),  # 1 + 49 = 50 ms
        (48_000, 1002, 1200),
        (58_000, 1001, 1200),  # 1 + 59 = 60 ms at 1000
        (58_000, 1002, 1400),
        (90_000, 10, 1400),  # fits nowhere
    ],
)
def test_the_last_iteration_of_the_projection_counts(inputs: int, length: int, clock: int) -> None:
    made = make_controller(f"throttllm:{ALL}", make_context(LineFormula()))
    assert made.decide(state_of(request(inputs, 0, length))) == clock


def test_a_batch_that_grows_after_others_have_left_is_looked_at_to_its_end() -> None:
    """Two iterations of 42 ms, and then 12,000 of one request, up to 1 + 52 ms: too long at 1000
    MHz, although no deadline is near."""
    made = make_controller(f"throttllm:{ALL}", make_context(LineFormula()))
    assert made.decide(state_of(request(10, 0, 2), request(40_000, 0, 12_002))) == 1200


def test_requests_that_wait_ask_for_the_top_clock() -> None:
    made = make_controller(f"throttllm:{ALL}", make_context(LineFormula()))
    assert made.decide(state_of(request(10, 0, 10), waiting=1)) == 1400


@pytest.mark.parametrize(
    ("now_s", "clock"),
    [
        # 11 iterations of 40 ms at 1000 MHz: 0.44 s; deadline 0.5 + 10·0.05 = 1.0 s
        (0.55, 1000),
        (0.57, 1200),  # 0.57 + 0.44 is late, 0.57 + 0.367 is not
        (0.65, 1400),  # 0.65 + 0.367 is late, 0.65 + 0.314 is not
        (0.70, 1400),  # lost: late at any clock
    ],
)
def test_deadlines(now_s: float, clock: int) -> None:
    flat = Formula(lambda p, f, b, t: 0.040 * 1000 / f)
    made = make_controller(f"throttllm:{ALL}", make_context(flat))
    assert made.decide(state_of(request(10, 0, 11), now_s=now_s)) == clock


@pytest.mark.parametrize(
    ("e2e_s", "clock"), [(11.52, 1000), (11.50, 1200), (9.60, 1200), (9.58, 1400)]
)
def test_times_on_the_way_to_a_deadline_are_summed(e2e_s: float, clock: int) -> None:
    """1,001 iterations with 10,000 to 11,000 tokens: 11 to 12 ms, 11.5115 s in all at 1000 MHz and
    9.593 s at 1200."""
    made = make_controller(f"throttllm:e2e={e2e_s},{ALL}", make_context(LineFormula()))
    assert made.decide(state_of(request(10_000, 0, 1001))) == clock


@pytest.mark.parametrize(
    ("late_s", "now_s", "clock"),
    [
        # 40 ms at 1000 MHz. The first has ten iterations and 0.95 s, the second 20 and 1.45 s
        (0.0, 0.54, 1000),  # 0.54 + 0.4
        (0.0, 0.56, 1200),  # 0.56 + 0.333
        (0.0, 0.62, 1400),  # 0.62 + 0.286
        # the second came earlier: 0.8 s of 0.81 and of 0.79; 0.667 s of 0.66
        (0.64, 0.0, 1000), (0.66, 0.0, 1200), (0.79, 0.0, 1400),
    ],
)  # fmt: skip
def test_each_deadline_counts(late_s: float, now_s: float, clock: int) -> None:
    flat = Formula(lambda p, f, b, t: 0.040 * 1000 / f)
    made = make_controller(f"throttllm:{ALL}", make_context(flat))
    running = request(10, 0, 10), request(10, 0, 20, arrival_s=-late_s)
    assert made.decide(state_of(*running, now_s=now_s)) == clock


def test_the_end_to_end_promise_can_be_given() -> None:
    flat = Formula(lambda p, f, b, t: 0.040 * 1000 / f)
    for e2e_s, clock in ((0.45, 1000), (0.43, 1200), (0.35, 1400)):
        made = make_controller(f"throttllm:e2e={e2e_s},{ALL}", make_context(flat))
        assert made.decide(state_of(request(10, 0, 11))) == clock


def test_it_projects_anew_only_when_the_batch_changed_or_a_length_was_outrun() -> None:
    """Predicted 3 tokens: the fourth iteration finds the request still there."""
    calls = []
    made = make_controller(f"throttllm:predicted=3,max=50,{ALL}", make_context(LineFormula()))
    for iteration in range(6):
        state = state_of(request(10, iteration))

        def listed(iteration: int = iteration) -> list[RunningRequest]:
            calls.append(iteration)
            return [request(10, iteration)]

        state.list_running = listed
        made.decide(state)
    assert calls == [0, 3]
    grown = state_of(request(10, 6), request(60_000, 0))
    assert made.decide(grown) == 1400  # 2 + 60 ms and more at 1000, 51.7 at 1200


def test_a_changed_queue_or_cache_asks_for_a_new_projection() -> None:
    """Two run and nothing changes but their tokens: one projection. Somebody waits, or one has left
    and another has come with a different context: another."""
    calls: list[float] = []
    made = make_controller(f"throttllm:{ALL}", make_context(LineFormula()))

    def decide(now_s: float, kv_tokens: int, waiting: int) -> None:
        state = state_of(now_s=now_s, waiting=waiting)
        state.num_running, state.kv_tokens = 2, kv_tokens

        def listed() -> list[RunningRequest]:
            calls.append(now_s)
            return [request(10, 0, 99)] * 2

        state.list_running = listed
        made.decide(state)

    for now_s, kv_tokens, waiting in (
        (0, 20, 0), (1, 22, 0), (2, 24, 0), (3, 26, 1), (4, 28, 1), (5, 31, 1), (6, 33, 1),
    ):  # fmt: skip
        decide(float(now_s), kv_tokens, waiting)
    assert calls == [0.0, 3.0, 5.0]


@pytest.mark.parametrize(
    ("queued", "waiting_tokens", "clock"),
    [
        # 10 ms a prompt and 1 ms a token. A batch of 90 tokens, 0.1 s; the older of two in the
        # queue has waited 0.1 s of 0.4: 0.2 s are left for the queue at 1000 MHz, 0.26 at 1200
        (2, 179, 1000), (2, 181, 1200), (5, 149, 1000), (5, 151, 1200), (2, 238, 1200),
        (2, 241, 1400),
    ],
)  # fmt: skip
def test_prefill_leaves_the_queue_its_time(queued: int, waiting_tokens: int, clock: int) -> None:
    times = Formula(lambda p, f, b, t: (1e-2 * b + 1e-3 * t) * 1000 / f)
    made = make_controller(f"throttllm:{ALL}", make_context(times, phase="prefill"))
    waiting = [
        WaitingRequest(request_id=k, arrival_s=1.0 - age_s, input_tokens=9)
        for k, age_s in enumerate((0.02, 0.1))
    ]
    state = InstanceState(
        instance_id=0, phase="prefill", now_s=1.0, last_batch_size=1, last_tokens=90,
        num_waiting=queued, waiting_tokens=waiting_tokens, list_waiting=lambda: waiting,
    )  # fmt: skip
    assert made.decide(state) == clock


@pytest.mark.parametrize(
    ("delay_s", "age_s", "clock"),
    [(0.29, None, 1000), (0.31, None, 1200), (0.33, None, 1400), (0.5, None, 1400),
     (0.0, 0.19, 1000), (0.0, 0.21, 1200), (0.0, 0.25, 1400)],
)  # fmt: skip
def test_prefill(delay_s: float, age_s: float | None, clock: int) -> None:
    """0.1 s a batch at 1000 MHz; 0.5 - 2·0.05 = 0.4 s for it, and for a queue of one batch."""
    made = make_controller(
        f"throttllm:{ALL}", make_context(Formula(lambda p, f, b, t: 100.0 / f), phase="prefill")
    )
    state = InstanceState(
        instance_id=0, phase="prefill", now_s=1.0, last_batch_size=1, last_tokens=9,
        last_queue_delay_s=delay_s,
    )  # fmt: skip
    if age_s is not None:
        waiting = [WaitingRequest(request_id=0, arrival_s=1.0 - age_s, input_tokens=9)]
        state.num_waiting, state.waiting_tokens = 1, 9
        state.list_waiting = lambda: waiting
    assert made.decide(state) == clock


def test_prefill_stays_at_the_top_clock_before_its_first_record() -> None:
    context = make_context(Formula(lambda p, f, b, t: 0.0), phase="prefill")
    made = make_controller(f"throttllm:{ALL}", context)
    state = InstanceState(instance_id=0, phase="prefill")
    assert made.decide(state) == 1400
    state.last_batch_size = 1
    assert made.decide(state) == 1000
