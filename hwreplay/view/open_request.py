"""A request that is at an instance, and how far it has come there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

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
