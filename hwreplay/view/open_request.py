"""A request that is at an instance and how far it has come there; a queue without names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from voltana.profiles.engines.sglang_metrics import IterationMetrics
from voltana.sim.policies.base import InstanceState, RunningRequest, WaitingRequest

QUEUED: Final = 0
"""Prefill: waits for its batch. Decode: still in prefill."""
ARRIVING: Final = 1
"""Decode: prefill is done, the KV is on its way or waits for room."""
RUNNING: Final = 2


@dataclass(slots=True)
class OpenRequest:
    """What is known of it."""

    request_id: int
    arrival_s: float
    input_tokens: int
    output_tokens: int | None
    left_tokens: int
    stage: int = QUEUED
    generated_tokens: int = 0
    """Counted up to iteration `counted_at`."""
    counted_at: int = 0
    first_token_s: float | None = None

    def as_waiting(self, tokens: int) -> WaitingRequest:
        """As policies see it in a queue, with so many tokens to compute or to hold."""
        return WaitingRequest(
            request_id=self.request_id, arrival_s=self.arrival_s, input_tokens=tokens
        )

    def as_running(self, generated_tokens: int, *, length_oracle: bool) -> RunningRequest:
        """As policies see it in a batch.

        Args:
            generated_tokens: Made so far.
            length_oracle: Show its true length.
        """
        return RunningRequest(
            request_id=self.request_id,
            arrival_s=self.arrival_s,
            input_tokens=self.input_tokens,
            generated_tokens=generated_tokens,
            output_tokens=self.output_tokens if length_oracle else None,
            first_token_s=self.first_token_s,
        )


def engine_queue(
    record: IterationMetrics, state: InstanceState, max_running: int, reserve_tokens: int
) -> tuple[int, int]:
    """Requests that wait at a decode server, and their tokens, by its own word.

    SGLang counts requests as queued that are still in prefill, or whose KV is on its way. They wait
    where the batch or the cache has no room for the mean one of them.

    Args:
        record: Of the iteration that has ended.
        state: Its running batch and cache.
        max_running: Most requests in a batch.
        reserve_tokens: KV tokens kept free for each request.
    """
    queued, tokens = record.queued_decode_requests, record.queued_decode_tokens
    if not queued:
        return 0, 0
    free = state.kv_capacity_tokens - state.kv_tokens
    need = tokens / queued + reserve_tokens * (state.num_running + 1)
    has_room = state.num_running < max_running and need <= free
    return (0, 0) if has_room else (queued, tokens)
