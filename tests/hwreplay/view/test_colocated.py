"""The state of an instance that does both phases, after hand-worked notices and records."""

from __future__ import annotations

from voltana.hwreplay.messages.batch_feed import BatchNotice, NoticeKind
from voltana.hwreplay.view.colocated import ColocatedTracker
from voltana.profiles.engines.sglang_metrics import IterationMetrics


def tracker() -> ColocatedTracker:
    return ColocatedTracker(
        "colocated", 0, kv_capacity_tokens=1000, max_prefill_tokens=100, max_running_requests=16
    )


def record(
    sequence: int, ended_s: float, *, prompts: tuple[int, int] = (0, 0),
    decode: tuple[int, int] = (0, 0),
) -> IterationMetrics:  # fmt: skip
    return IterationMetrics(
        sequence=sequence, received_s=ended_s, wall_time_s=0.5, num_prefill_requests=prompts[0],
        sum_prefill_tokens=prompts[1], num_decode_requests=decode[0],
        sum_decode_kv_tokens=decode[1],
    )  # fmt: skip


def steps(decode: tuple[int, int], chunk: tuple[int, int] = (0, 0)) -> BatchNotice:
    return BatchNotice(
        kind=NoticeKind.MIXED if chunk[1] else NoticeKind.DECODE, num_requests=decode[0],
        tokens=decode[1], num_waiting=0, sent_ns=0, chunk_requests=chunk[0], chunk_tokens=chunk[1],
    )  # fmt: skip


def test_prompts_alone_then_a_chunk_beside_decoding() -> None:
    """A and B fill a batch of 80; C's prompt of 150 is cut: 98 beside their two tokens, then 52."""
    seen = tracker()
    state = seen.state
    seen.on_assigned(0, 0.0, 30)
    seen.on_assigned(1, 0.1, 50)
    assert (state.num_waiting, state.waiting_tokens, state.is_busy) == (2, 80, True)
    seen.on_batch(2, 80, 0.2)
    assert (state.chunk_requests, state.chunk_tokens, state.last_queue_delay_s) == (2, 80, 0.2)
    assert (state.num_waiting, state.last_batch_size, state.num_running) == (0, 0, 0)
    seen.on_iteration(record(0, 0.7, prompts=(2, 80)))
    assert (state.chunk_tokens, state.ended_batch_size, state.last_duration_s) == (0, 0, 0.5)
    assert seen.ended_chunk == (2, 80)
    assert (state.num_running, state.kv_tokens) == (2, 82)  # each has made its first token
    seen.on_assigned(2, 0.6, 150)
    seen.on_steps(steps((2, 82), (1, 98)), 0.8)
    assert (state.last_batch_size, state.last_tokens) == (2, 82)
    assert (state.chunk_requests, state.chunk_tokens) == (1, 98)
    assert (state.num_waiting, state.waiting_tokens) == (1, 52)
    assert [w.input_tokens for w in state.list_waiting()] == [52]
    seen.on_iteration(record(1, 1.3, prompts=(1, 98), decode=(2, 82)))
    assert (state.num_running, state.kv_tokens, state.ended_tokens) == (2, 84, 82)
    seen.on_steps(steps((2, 84), (1, 52)), 1.4)
    assert state.num_waiting == 0
    seen.on_iteration(record(2, 1.9, prompts=(1, 52), decode=(2, 84)))
    assert (state.num_running, state.kv_tokens) == (3, 86 + 151)
    running = {r.request_id: r.generated_tokens for r in state.list_running()}
    assert running == {0: 3, 1: 3, 2: 1}


def test_decoding_that_stands_keeps_its_requests_and_its_cache() -> None:
    seen = tracker()
    state = seen.state
    seen.on_assigned(0, 0.0, 30)
    seen.on_batch(1, 30, 0.0)
    seen.on_iteration(record(0, 0.5, prompts=(1, 30)))
    seen.on_assigned(1, 0.5, 20)
    seen.on_batch(1, 20, 0.5)
    assert (state.last_batch_size, state.num_running, state.kv_tokens) == (0, 1, 31)
    seen.on_iteration(record(1, 1.0, prompts=(1, 20)))
    assert (state.num_running, state.kv_tokens) == (2, 31 + 21)
    seen.on_finished(0)
    assert (state.num_running, state.kv_tokens, state.is_busy) == (1, 21, True)
    seen.on_finished(1)
    seen.on_iteration(IterationMetrics(sequence=2, received_s=2.0, wall_time_s=0.0))
    assert (state.num_running, state.kv_tokens, state.is_busy) == (0, 0, False)


def test_without_notices_the_record_takes_the_prompts_off_the_queue() -> None:
    seen = tracker()
    seen.on_assigned(0, 0.0, 30)
    seen.on_iteration(record(0, 0.5, prompts=(1, 30)))
    assert (seen.state.num_waiting, seen.state.num_running, seen.state.kv_tokens) == (0, 1, 31)
