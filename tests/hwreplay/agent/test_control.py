"""The loop by itself: when it asks, what it writes, and when it gives the clock back."""

from __future__ import annotations

import pytest

from tests.hwreplay.agent.scripted import (
    FAILED,
    OWN,
    Clock,
    decode,
    is_safe,
    make,
    notice,
    prefill,
    record,
    with_requests,
)
from voltana.hwreplay.messages.batch_feed import BatchNotice, NoticeKind
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import IdlePlan, Phase


def test_decode_decides_on_each_record_and_sees_the_clock_in_force() -> None:
    loop, controller, clock, tracker = make("decode")
    with_requests(tracker, 3)
    assert loop.on_record(decode(0, 1.0))
    assert loop.on_record(decode(1, 1.01, batch_size=3))
    assert controller.seen == [(1.0, 2, 100, 0.0, 705), (1.01, 3, 100, 0.0, 1002)]
    assert clock.wishes == [705, 1002, 1003]
    assert list(loop.clock_changes) == [(0.0, 705), (1.0, 1002), (1.01, 1003)]


def test_prefill_decides_before_its_batch_with_the_plug_in() -> None:
    loop, controller, _, tracker = make("prefill", decides_before=True)
    tracker.on_assigned(1, 0.9, 50)
    assert loop.on_notice(notice(1.0), 1.0)
    assert not loop.on_record(prefill(0, 1.02))
    (seen,) = controller.seen
    assert seen[:3] == (1.0, 1, 50)
    assert seen[3] == pytest.approx(0.1)


def test_a_plug_in_that_is_silent_is_counted() -> None:
    """The engine only logs an error when it cannot load the plug-in: the decision comes late."""
    loop, controller, _, tracker = make("prefill", decides_before=True)
    tracker.on_assigned(1, 0.9, 50)
    assert loop.on_record(prefill(0, 1.02))
    assert controller.seen[0][:3] == (1.02, 1, 50)
    assert loop.report.counts["decided_late"] == 1


def test_prefill_after_decides_on_the_batch_that_has_ended() -> None:
    """Though the plug-in has announced the next one, of 80 tokens, before the record came."""
    loop, controller, _, tracker = make("prefill")
    for request_id, tokens in ((1, 50), (2, 80)):
        tracker.on_assigned(request_id, 0.9, tokens)
    assert not loop.on_notice(notice(1.0), 1.0)
    assert not loop.on_notice(notice(1.01, tokens=80), 1.01)
    assert loop.on_record(prefill(0, 1.02))
    assert [seen[:3] for seen in controller.seen] == [(1.02, 1, 50)]
    assert "decided_late" not in loop.report.counts


def test_decode_before_needs_the_notice() -> None:
    loop, controller, _, tracker = make("decode", decides_before=True)
    with_requests(tracker, 4)
    told = BatchNotice(kind=NoticeKind.DECODE, num_requests=4, tokens=90, num_waiting=0, sent_ns=0)
    assert loop.on_notice(told, 2.0)
    assert not loop.on_record(decode(0, 2.01))
    assert controller.seen == [(2.0, 4, 90, 0.0, 705)]


def test_stale_metrics_under_load_unlock_until_a_fresh_record() -> None:
    """Expected 10 ms, five more are 50: 60 ms of silence pass, 61 do not."""
    loop, controller, clock, tracker = make("decode")
    with_requests(tracker, 2)
    loop.on_record(decode(0, 1.0))
    loop.tick(1.059)
    assert not is_safe(loop)
    loop.tick(1.061)
    assert is_safe(loop)
    assert clock.clock_mhz == 0
    loop.tick(1.5)
    assert clock.wishes == [705, 1002, 0]
    assert loop.on_record(decode(1, 2.0))
    assert clock.clock_mhz == 1002
    (safe,) = loop.report.as_dict()["safe_states"]
    assert (safe["at_s"], safe["until_s"]) == (1.061, 2.0)
    assert "no metrics for 0.06 s" in safe["reason"]
    assert len(controller.seen) == 2


def test_an_idle_engine_is_not_stale_and_a_silent_one_is_dead() -> None:
    loop, _, clock, _ = make("decode")
    for second in range(10):
        loop.on_record(record(second, float(second)))
        loop.tick(second + 0.99)
    assert not is_safe(loop)
    assert clock.wishes == [705]
    loop.tick(12.1)
    assert is_safe(loop)
    loop.on_record(record(10, 15.0))
    assert not is_safe(loop)


def test_lost_records_are_counted_and_many_are_stale() -> None:
    loop, _, clock, tracker = make("decode")
    with_requests(tracker, 2)
    loop.on_record(decode(0, 1.0))
    assert loop.on_record(decode(6, 1.06))  # five lost
    assert not loop.on_record(decode(13, 1.13))  # six lost
    assert clock.clock_mhz == 0
    assert loop.on_record(decode(14, 1.14))
    assert loop.on_record(decode(0, 9.0))  # a restarted engine
    assert loop.report.counts["lost_records"] == 11


@pytest.mark.parametrize("error", [VoltanaError("no such point"), ZeroDivisionError("by zero")])
def test_a_failing_controller_unlocks(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    loop, controller, clock, tracker = make("decode")
    with_requests(tracker, 2)
    loop.on_record(decode(0, 1.0))
    controller.fails = error
    assert not loop.on_record(decode(1, 1.01))
    assert not loop.on_record(decode(2, 1.02))
    assert clock.clock_mhz == 0
    assert str(error) in loop.report.safe[0].reason
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.strip() == f"voltana: {loop.report.safe[0].reason.removeprefix(FAILED)}"
    if not isinstance(error, VoltanaError):
        assert "scripted.Script (decode 0): decide raised ZeroDivisionError" in said
        assert "scripted.py:" in said
    assert loop.report.counts["controller_errors"] == 2
    controller.fails = None
    assert loop.on_record(decode(3, 1.03))
    assert clock.clock_mhz == 1002


@pytest.mark.parametrize("answer", [999, -1, 1002.0, None, "1002", True])
def test_a_decision_that_is_no_supported_clock_unlocks(answer: object) -> None:
    loop, controller, clock, tracker = make("decode")
    with_requests(tracker, 2)
    loop.on_record(decode(0, 1.0))
    assert clock.clock_mhz == 1002
    controller.answer = answer
    assert not loop.on_record(decode(1, 1.01))
    assert clock.wishes[-1] == 0
    assert is_safe(loop)
    assert "decide must return a clock" in loop.report.safe[0].reason
    assert repr(answer) in loop.report.safe[0].reason
    controller.answer = OWN
    assert loop.on_record(decode(2, 1.02))
    assert clock.clock_mhz == 1002


def test_an_idle_plan_of_an_unsupported_clock_unlocks() -> None:
    loop, _, clock, tracker = make("decode", IdlePlan(after_s=0.1, clock_mhz=999))
    with_requests(tracker, 1)
    loop.on_record(decode(0, 1.0))
    tracker.on_finished(0)
    loop.settle(1.2)
    assert clock.wishes[-1] == 0
    assert "on_idle's plan must return a clock" in loop.report.safe[0].reason


def test_a_refused_clock_unlocks_and_the_next_decision_is_tried() -> None:
    """Whatever lock is in force then may be too low for what the controller wanted."""
    loop, _, clock, tracker = make("decode")
    with_requests(tracker, 3)
    clock.refuses = {1003}
    loop.on_record(decode(0, 1.0))
    loop.on_record(decode(1, 1.01, batch_size=3))
    assert clock.clock_mhz == 0
    assert loop.report.safe[0].reason == "the actuator refused a clock: 1003 MHz: no"
    loop.on_record(decode(2, 1.02))
    assert clock.wishes == [705, 1002, 0, 1002]
    assert not is_safe(loop)


def test_of_waiting_records_the_controller_sees_each_and_the_clock_follows_the_newest() -> None:
    loop, controller, clock, tracker = make("decode")
    with_requests(tracker, 4)
    for sequence in range(3):
        loop.on_record(decode(sequence, 1.0, batch_size=sequence + 1), is_newest=sequence == 2)
    assert [seen[1] for seen in controller.seen] == [1, 2, 3]
    assert clock.wishes == [705, 1003]


def test_silence_under_load_counts_from_the_load() -> None:
    """A prefill server has a request that waits for its pair: its silence says nothing, for 8 s.
    When its batch is announced it has the predictor's 10 ms and 50 more."""
    loop, _, _, tracker = make("prefill")
    hello = BatchNotice(kind=NoticeKind.HELLO, num_requests=0, tokens=0, num_waiting=0, sent_ns=0)
    loop.on_notice(hello, 0.5)
    loop.on_record(record(0, 1.0))
    tracker.on_assigned(1, 1.9, 50)
    for tenth in range(19, 100):
        loop.hear_router(0.1 * tenth)
        loop.tick(0.1 * tenth)
    assert not is_safe(loop)
    loop.on_notice(notice(10.0), 10.0)
    loop.tick(10.0)
    loop.tick(10.05)
    assert not is_safe(loop)
    loop.tick(10.07)
    assert is_safe(loop)
    loop.on_record(prefill(1, 10.1))
    assert not is_safe(loop)


def test_without_the_plug_in_a_waiting_prefill_server_may_be_silent_as_one_at_rest() -> None:
    loop, _, _, tracker = make("prefill")
    loop.on_record(record(0, 1.0))
    tracker.on_assigned(1, 1.9, 50)
    loop.tick(1.9)
    loop.tick(3.9)
    assert not is_safe(loop)
    loop.tick(5.0)
    assert is_safe(loop)


def test_a_decode_server_that_waits_for_a_long_prefill_is_not_dead() -> None:
    """It has a request and no heartbeat for 8 s, as SGLang's queue of KV to come is no rest."""
    loop, _, clock, tracker = make("decode")
    loop.on_record(record(0, 1.0))
    tracker.on_assigned(1, 1.5, 5000)
    for tenth in range(15, 100):
        loop.hear_router(0.1 * tenth)
        loop.tick(0.1 * tenth)
    assert not is_safe(loop)
    assert clock.wishes == [705]
    tracker.on_finished(1)
    loop.tick(12.8)
    assert not is_safe(loop)
    loop.tick(13.0)
    assert is_safe(loop)  # nothing is here any more since 9.9 s, and no heartbeat has come


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_requests_of_a_router_that_was_killed_are_no_reason_to_wait(phase: Phase) -> None:
    """It was last heard at 2 s, with a request here that nobody will end: its word holds to 5 s,
    and at 8 s the engine has been silent for as long as one at rest may be."""
    loop, _, clock, tracker = make(phase)
    hello = BatchNotice(kind=NoticeKind.HELLO, num_requests=0, tokens=0, num_waiting=0, sent_ns=0)
    loop.on_notice(hello, 0.5)
    loop.on_record(record(0, 1.0))
    tracker.on_assigned(1, 1.5, 5000)
    loop.hear_router(2.0)
    for tenth in range(20, 79):
        loop.tick(0.1 * tenth)
    assert not is_safe(loop)
    loop.tick(8.2)
    assert is_safe(loop)
    assert clock.clock_mhz == 0


def test_records_that_were_lost_leave_no_batch_under_way() -> None:
    loop, _, _, _ = make("prefill")
    loop.on_notice(notice(1.0), 1.0)
    loop.on_record(record(0, 1.05))  # at rest: the batch's record never came
    loop.tick(2.0)
    assert not is_safe(loop)


def test_idle_plan_comes_due_and_work_cancels_it() -> None:
    loop, _, clock, tracker = make("decode", IdlePlan(after_s=0.5, clock_mhz=210))
    with_requests(tracker, 2)
    loop.on_record(decode(0, 1.0))
    for request_id in range(2):
        tracker.on_finished(request_id)
    loop.settle(1.1)
    loop.tick(1.59)
    assert clock.clock_mhz == 1002
    loop.tick(1.61)
    assert clock.clock_mhz == 210
    with_requests(tracker, 2)
    loop.on_record(decode(1, 2.0))
    for request_id in range(2):
        tracker.on_finished(request_id)
    loop.settle(2.1)
    with_requests(tracker, 1)
    loop.on_record(decode(2, 2.2, batch_size=1))
    loop.tick(2.25)
    assert clock.wishes[-1] == 1001


def test_a_lost_actuator_is_safe_and_can_come_back() -> None:
    loop, _, clock, tracker = make("decode")
    with_requests(tracker, 2)
    loop.on_record(decode(0, 1.0))
    clock.is_lost = True
    loop.tick(1.01)
    assert clock.is_closed
    assert is_safe(loop)
    assert loop.report.counts["actuator_lost"] == 1
    assert tracker.state.clock_mhz == 0
    assert loop.on_record(decode(1, 1.02))  # decisions go on, into nothing
    again = Clock()
    loop.attach(again)
    loop.on_record(decode(2, 1.03, batch_size=3))
    assert again.wishes == [1003]
    assert not is_safe(loop)
    loop.close(1.5)
    assert again.is_closed
    assert loop.clock_changes[-1] == (1.5, 0)
