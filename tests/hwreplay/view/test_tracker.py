"""The tracker's state after hand-worked sequences of router events and engine records."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import zmq

from voltana.hwreplay.clock import RunClock
from voltana.hwreplay.messages.events import Event, EventFeed, EventPublisher
from voltana.hwreplay.messages.metrics_feed import MetricsFeed
from voltana.hwreplay.view.tracker import InstanceTracker
from voltana.profiles.engines.sglang_metrics import (
    IterationMetrics,
    MetricsError,
    parse_metrics,
    step_time_s,
)
from voltana.sim.policies.base import Phase

# Made by SGLang 0.5.23: worker decode-0, counter 7, 3.1 ms, 3 requests of 120 context tokens in
# the batch, 2 of 33 tokens queued.
UPSTREAM = bytes.fromhex(
    "87a776657273696f6e01a9776f726b65725f6964a86465636f64652d30a764705f72616e6b00aa636f756e7465725f"
    "696407a977616c6c5f74696d65cb3f69652bd3c36113b27363686564756c65645f726571756573747387b46e756d5f"
    "70726566696c6c5f726571756573747300b273756d5f70726566696c6c5f746f6b656e7300b27661725f7072656669"
    "6c6c5f6c656e677468cb0000000000000000b573756d5f70726566696c6c5f6b765f746f6b656e7300b36e756d5f64"
    "65636f64655f726571756573747303b473756d5f6465636f64655f6b765f746f6b656e7378b47661725f6465636f64"
    "655f6b765f746f6b656e73cb0000000000000000af7175657565645f726571756573747386b46e756d5f7072656669"
    "6c6c5f726571756573747300b273756d5f70726566696c6c5f746f6b656e7300b27661725f70726566696c6c5f6c65"
    "6e677468cb0000000000000000b36e756d5f6465636f64655f726571756573747302b473756d5f6465636f64655f6b"
    "765f746f6b656e7321b47661725f6465636f64655f6b765f746f6b656e73cb0000000000000000"
)


def tracker(phase: Phase, *, max_running: int = 16) -> InstanceTracker:
    return InstanceTracker(
        phase,
        0,
        kv_capacity_tokens=1000,
        max_prefill_tokens=100,
        max_running_requests=max_running,
        kv_reserve_tokens=10,
    )


def prefilled(sequence: int, requests: int, tokens: int, *, ended_s: float) -> IterationMetrics:
    return IterationMetrics(
        sequence=sequence,
        received_s=ended_s,
        wall_time_s=0.5,
        num_prefill_requests=requests,
        sum_prefill_tokens=tokens,
    )


def decoded(sequence: int, requests: int, context: int, *, ended_s: float) -> IterationMetrics:
    return IterationMetrics(
        sequence=sequence,
        received_s=ended_s,
        wall_time_s=0.002,
        num_decode_requests=requests,
        sum_decode_kv_tokens=context,
    )


def test_a_message_of_the_engine_is_read() -> None:
    record = parse_metrics(UPSTREAM, received_s=4.0)
    assert (record.sequence, record.wall_time_s, record.received_s) == (7, 0.0031, 4.0)
    assert (record.num_decode_requests, record.sum_decode_kv_tokens) == (3, 120)
    assert (record.queued_decode_requests, record.queued_decode_tokens) == (2, 33)
    assert not record.is_heartbeat


@pytest.mark.parametrize(
    "payload", [b"", b"\xff" * 20, b"\x80", UPSTREAM[:-5], b"\x93\x01\x02\x03"]
)
def test_anything_else_is_one_clear_error(payload: bytes) -> None:
    with pytest.raises(MetricsError, match="forward-pass metrics must"):
        parse_metrics(payload, received_s=0.0)


def test_prefill_queue_batch_and_chunk() -> None:
    seen = tracker("prefill")
    for request_id, tokens in enumerate((30, 40, 120)):
        seen.on_assigned(request_id, arrival_s=0.1 * request_id, input_tokens=tokens)
    state = seen.state
    assert (state.num_waiting, state.waiting_tokens, state.open_requests) == (3, 190, 3)
    # budget 100: prompts 0 and 1 whole, 30 tokens of prompt 2
    seen.on_iteration(prefilled(0, 3, 100, ended_s=1.0))
    assert (state.last_batch_size, state.last_tokens) == (3, 100)
    assert state.last_queue_delay_s == 0.5
    assert (state.num_waiting, state.waiting_tokens) == (1, 90)
    seen.on_prefilled(0)
    seen.on_prefilled(1)
    assert (state.open_requests, state.is_busy) == (1, True)
    seen.on_iteration(prefilled(1, 1, 90, ended_s=1.5))
    assert (state.num_waiting, state.waiting_tokens, state.is_busy) == (0, 0, False)
    seen.on_prefilled(2)
    assert state.open_requests == 0


def test_a_cached_prefix_does_not_leave_a_prompt_in_the_queue() -> None:
    seen = tracker("prefill")
    seen.on_assigned(0, 0.0, 50)
    seen.on_iteration(prefilled(0, 1, 2, ended_s=1.0))
    assert (seen.state.num_waiting, seen.state.waiting_tokens) == (0, 0)


def test_an_announced_batch_is_not_taken_twice() -> None:
    seen = tracker("prefill")
    for request_id in range(2):
        seen.on_assigned(request_id, 0.0, 20)
    seen.on_batch(1, 20, start_s=0.4)
    assert (seen.state.num_running, seen.state.num_waiting) == (1, 1)
    assert seen.state.last_queue_delay_s == 0.4
    seen.on_iteration(prefilled(0, 1, 20, ended_s=0.9))
    assert (seen.state.num_running, seen.state.num_waiting) == (0, 1)


def test_the_delay_of_the_batch_that_ended_is_kept_beside_that_of_the_next() -> None:
    """The next batch is announced before the record of the one before it comes."""
    seen = tracker("prefill")
    for request_id in range(3):
        seen.on_assigned(request_id, 0.0, 20)
    seen.on_batch(1, 20, start_s=0.25)
    seen.on_batch(1, 20, start_s=0.75)
    seen.on_iteration(prefilled(0, 1, 20, ended_s=0.75))
    assert (seen.state.last_queue_delay_s, seen.state.ended_queue_delay_s) == (0.75, 0.25)
    seen.on_iteration(prefilled(1, 1, 20, ended_s=1.25))
    assert seen.state.ended_queue_delay_s == 0.75
    seen.on_iteration(prefilled(2, 1, 20, ended_s=2.0))  # not announced
    assert seen.state.ended_queue_delay_s == seen.state.last_queue_delay_s == 1.5


def test_decode_from_arrival_to_end() -> None:
    seen = tracker("decode")
    state = seen.state
    for request_id in range(2):
        seen.on_assigned(request_id, 0.0, 100)
    assert (state.open_requests, state.num_waiting, state.is_busy) == (2, 0, False)
    seen.on_prefilled(0)
    seen.on_prefilled(1)
    assert state.num_waiting == 0  # there is room: the transfer is under way
    seen.on_iteration(decoded(0, 1, 101, ended_s=1.0))
    seen.on_iteration(decoded(1, 2, 203, ended_s=1.003))
    assert (state.num_running, state.last_batch_size, state.last_tokens) == (2, 2, 203)
    assert state.kv_tokens == 205
    assert state.last_duration_s == pytest.approx(0.003)  # boundary to boundary
    running = state.list_running()
    assert [(r.request_id, r.generated_tokens) for r in running] == [(0, 3), (1, 2)]
    seen.on_finished(0)
    assert (state.num_running, state.open_requests, state.kv_tokens) == (1, 1, 102)
    seen.on_finished(1)
    assert (state.num_running, state.kv_tokens, state.is_busy) == (0, 0, False)


def test_decode_queues_what_has_no_slot_or_no_room() -> None:
    full = tracker("decode", max_running=1)
    for request_id, tokens in enumerate((100, 200)):
        full.on_assigned(request_id, 0.0, tokens)
        full.on_prefilled(request_id)
    full.on_iteration(decoded(0, 1, 101, ended_s=1.0))
    assert (full.state.num_waiting, full.state.waiting_tokens) == (1, 200)
    assert [r.request_id for r in full.state.list_waiting()] == [1]
    tight = tracker("decode")
    for request_id, tokens in enumerate((600, 500)):
        tight.on_assigned(request_id, 0.0, tokens)
        tight.on_prefilled(request_id)
    tight.on_iteration(decoded(0, 1, 601, ended_s=1.0))
    assert tight.state.kv_load_tokens == 602 + 500
    tight.on_finished(0)
    assert tight.state.num_waiting == 0


def test_without_records_the_routers_counts_hold() -> None:
    seen = tracker("decode")
    seen.on_assigned(0, 0.0, 100)
    seen.on_prefilled(0)
    seen.on_first_token(0, 0.2)
    seen.on_tokens(0, 3)
    assert (seen.state.num_running, seen.state.kv_tokens, seen.state.last_tokens) == (1, 103, 103)
    assert seen.state.list_running()[0].first_token_s == 0.2
    seen.on_finished(0)
    assert (seen.state.kv_tokens, seen.state.is_busy) == (0, False)


def test_an_idle_engine_says_so() -> None:
    seen = tracker("decode")
    seen.on_assigned(0, 0.0, 100)
    seen.on_iteration(decoded(0, 1, 101, ended_s=1.0))
    seen.on_iteration(IterationMetrics(sequence=1, received_s=2.0, wall_time_s=0.0))
    assert (seen.state.num_running, seen.state.kv_tokens, seen.state.is_busy) == (0, 0, False)


def test_a_pause_is_not_part_of_an_iteration() -> None:
    first = decoded(0, 1, 100, ended_s=1.0)
    assert step_time_s(decoded(1, 1, 101, ended_s=1.0035), first) == pytest.approx(0.0035)
    assert step_time_s(decoded(1, 1, 101, ended_s=1.5), first) == 0.002
    assert step_time_s(decoded(2, 1, 101, ended_s=1.0035), first) == 0.002  # a record is missing


def test_feeds_over_sockets(tmp_path: Path) -> None:
    """Real sockets: an agent that missed an end learns it from the next snapshot."""
    metrics_at, events_at = (f"ipc://{tmp_path}/{name}" for name in ("metrics", "events"))

    async def run() -> None:
        publisher = EventPublisher(events_at)
        events = EventFeed(events_at, ("decode", 1))
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        engine = context.socket(zmq.PUB)
        engine.bind(metrics_at)
        seen = tracker("decode")
        async with MetricsFeed(metrics_at, RunClock()) as feed:
            await asyncio.sleep(0.2)
            engine.send_multipart((b"", (7).to_bytes(8, "big"), UPSTREAM))
            assert (await feed.receive()).num_decode_requests == 3
        for instance_id in (10, 1):
            publisher.publish(Event("assigned", "decode", instance_id, 0.5, instance_id, 40))
        publisher.publish(Event("open", "decode", 1, 1.0, open_ids=()))
        seen.on_event(await events.receive())
        assert seen.open_ids() == [1]
        seen.on_event(await events.receive())
        assert seen.open_ids() == []
        for part in (publisher, events):
            part.close()
        engine.close(linger=0)
        context.term()

    asyncio.run(run())
