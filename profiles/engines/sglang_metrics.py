"""SGLang's forward-pass metrics: one record an iteration, over ZMQ, without a fork.

The server binds a PUB socket at `IPC.0` when it is started with `--enable-forward-pass-metrics
--forward-pass-metrics-ipc-name IPC`. Each message has three frames: an empty topic, an 8-byte
sequence number and a msgpack map. An idle server repeats an empty record every second.

Source: sglang/srt/observability/forward_pass_metrics.py, version 1 (SGLang 0.5.14 to 0.5.23).
Dynamo 1.6 sends the same bytes: dynamo/common/forward_pass_metrics.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

from voltana.profiles.common.errors import VoltanaError

SCHEMA_VERSION: Final = 1
KNOWN: Final = "SGLang 0.5.14 to 0.5.23, or Dynamo 1.6"
MAX_QUEUED_RECORDS: Final = 100_000
"""What a subscriber keeps before it reads."""
MAX_CACHED: Final = 0.02
BACK_TO_BACK_S: Final = 0.005
"""A pass that begins so soon after the last one ended followed it without a pause."""


class MetricsError(VoltanaError):
    """A message that is not a record of the version we know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationMetrics:
    """One iteration as its engine reports it when it has ended, or an idle heartbeat."""

    sequence: int
    """Counts up by one; a gap means lost records, a fall means that the engine was restarted."""
    received_s: float
    """When it reached us, on the run's clock."""
    wall_time_s: float
    """Duration of the forward pass: what the engine does between two passes is not in it."""
    num_prefill_requests: int = 0
    sum_prefill_tokens: int = 0
    """New tokens of the batch, without what the prefix cache had."""
    sum_prefill_kv_tokens: int = 0
    """Cached tokens in front of them."""
    num_decode_requests: int = 0
    sum_decode_kv_tokens: int = 0
    """Context of the batch."""
    queued_prefill_requests: int = 0
    queued_prefill_tokens: int = 0
    queued_decode_requests: int = 0
    """In a decode server: waiting for room or for their KV, those still in prefill included."""
    queued_decode_tokens: int = 0

    @property
    def is_heartbeat(self) -> bool:
        """Nothing ran: the engine is alive and idle."""
        return self.num_prefill_requests == 0 and self.num_decode_requests == 0

    @property
    def start_s(self) -> float:
        """When the pass began, as far as its own duration tells."""
        return self.received_s - self.wall_time_s


class _Scheduled(msgspec.Struct, frozen=True):
    num_prefill_requests: int = 0
    sum_prefill_tokens: int = 0
    var_prefill_length: float = 0.0
    sum_prefill_kv_tokens: int = 0
    num_decode_requests: int = 0
    sum_decode_kv_tokens: int = 0
    var_decode_kv_tokens: float = 0.0


class _Queued(msgspec.Struct, frozen=True):
    num_prefill_requests: int = 0
    sum_prefill_tokens: int = 0
    var_prefill_length: float = 0.0
    num_decode_requests: int = 0
    sum_decode_kv_tokens: int = 0
    var_decode_kv_tokens: float = 0.0


class _Message(msgspec.Struct, frozen=True):
    version: int
    counter_id: int
    wall_time: float
    scheduled_requests: _Scheduled
    queued_requests: _Queued


_decoder: Final = msgspec.msgpack.Decoder(_Message)


def parse_metrics(payload: bytes, *, received_s: float) -> IterationMetrics:
    """Read one message.

    Raises:
        MetricsError: It is no record, or of a version this program does not know.
    """
    try:
        message = _decoder.decode(payload)
    except msgspec.DecodeError as error:
        raise MetricsError(
            f"forward-pass metrics must be records of version {SCHEMA_VERSION}, got {error}: "
            f"use {KNOWN}"
        ) from None
    if message.version != SCHEMA_VERSION:
        raise MetricsError(
            f"forward-pass metrics must have version {SCHEMA_VERSION}, got {message.version}: "
            f"use {KNOWN}"
        )
    scheduled, queued = message.scheduled_requests, message.queued_requests
    return IterationMetrics(
        sequence=message.counter_id,
        received_s=received_s,
        wall_time_s=message.wall_time,
        num_prefill_requests=scheduled.num_prefill_requests,
        sum_prefill_tokens=scheduled.sum_prefill_tokens,
        sum_prefill_kv_tokens=scheduled.sum_prefill_kv_tokens,
        num_decode_requests=scheduled.num_decode_requests,
        sum_decode_kv_tokens=scheduled.sum_decode_kv_tokens,
        queued_prefill_requests=queued.num_prefill_requests,
        queued_prefill_tokens=queued.sum_prefill_tokens,
        queued_decode_requests=queued.num_decode_requests,
        queued_decode_tokens=queued.sum_decode_kv_tokens,
    )


def is_whole(record: IterationMetrics, batch_size: int, tokens: int) -> bool:
    """Whether a pass is one prefill of just these prompts, and of nothing else.

    A prefix cache may know the first token of a random prompt: one a prompt, or `MAX_CACHED` of all
    tokens, may be missing.

    Args:
        record: One iteration.
        batch_size: Requests that were sent.
        tokens: New tokens (prefill) or context tokens (decode) of all of them.
    """
    missing = tokens - record.sum_prefill_tokens
    return (
        (record.num_prefill_requests, record.num_decode_requests) == (batch_size, 0)
        and missing == record.sum_prefill_kv_tokens
        and 0 <= missing <= max(batch_size, MAX_CACHED * tokens)
    )


def step_time_s(record: IterationMetrics, previous: IterationMetrics | None) -> float:
    """Duration of an iteration from boundary to boundary, as profiles count it.

    The engine reports the forward pass alone. Where one pass follows another, the time between
    their ends is the whole iteration, scheduling included.
    """
    if previous is None or previous.is_heartbeat or record.sequence != previous.sequence + 1:
        return record.wall_time_s
    if record.start_s - previous.received_s > BACK_TO_BACK_S:
        return record.wall_time_s
    return max(record.received_s - previous.received_s, record.wall_time_s)
