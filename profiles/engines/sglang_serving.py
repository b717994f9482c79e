"""What a request spends outside the iterations: on its way in, between the phases, and back.

    client ──in──► prefill pass ──handover──► client sees the first token
                                 (KV transfer, decode takes it up, its token travels back)

One request at a time on idle servers, prompts of several lengths. What grows with the prompt is the
KV transfer's bandwidth; the rest is fixed. A profile's tables hold the iterations alone, so the
simulator takes these as `kv_transfer_latency_s` and `kv_transfer_bytes_per_s`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from voltana.profiles.engines.base import EngineFacts, NotHeldError
from voltana.profiles.engines.sglang_client import SETTLE_S, Client, Records
from voltana.profiles.engines.sglang_metrics import is_whole

PROMPT_TOKENS: Final = (16, 64, 256, 512, 1024, 2048, 4096)
OUTPUT_TOKENS: Final = 4
NUM_REPEATS: Final = 7
MIN_LENGTHS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """One request on idle servers."""

    prompt_tokens: int
    in_s: float
    """From sending it to the start of its prefill pass."""
    handover_s: float
    """From the end of its prefill pass to the first token at the client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingDelays:
    """Of a request, beyond its iterations."""

    in_s: float
    """Median: HTTP, scheduling, the pair's handshake."""
    handover_s: float
    """Part of the hand-over that does not depend on the prompt."""
    bytes_per_s: float | None
    """Bandwidth that the prompt-dependent part amounts to; None where none can be told."""
    handover_spread_s: float
    """Median absolute deviation of the hand-over from this line."""

    @property
    def fixed_s(self) -> float:
        """What a first token waits in all, queues and passes not counted."""
        return self.in_s + self.handover_s


def measure_passages(
    client: Client, records: Records, facts: EngineFacts, *, num_repeats: int = NUM_REPEATS
) -> list[Passage]:
    """Send single requests through idle servers; the first of each length warms up.

    Args:
        client: Sends them.
        records: Of the server that prefills.
        facts: Limits of the servers.
        num_repeats: Requests of each prompt length.
    """
    cap = min(facts.max_prefill_tokens, facts.max_context_tokens - OUTPUT_TOKENS - 1)
    found = []
    for length in (n for n in PROMPT_TOKENS if n <= cap):
        rounds = [_passage(client, records, length) for _ in range(num_repeats + 1)]
        found += [passage for passage in rounds[1:] if passage is not None]
    return found


def fit_delays(passages: Sequence[Passage], kv_bytes_per_token: int) -> ServingDelays:
    """A line through the medians of the hand-over by prompt length; a falling one has no slope.

    Raises:
        NotHeldError: Fewer than `MIN_LENGTHS` lengths were seen.

    Example:
        >>> passages = [
        ...     Passage(prompt_tokens=n, in_s=0.01, handover_s=0.02 + n * 1e-6)
        ...     for n in (100, 1000, 2000)
        ... ]
        >>> found = fit_delays(passages, kv_bytes_per_token=1000)
        >>> round(found.fixed_s, 6), round(found.bytes_per_s)
        (0.03, 1000000000)
    """
    lengths = sorted({passage.prompt_tokens for passage in passages})
    if len(lengths) < MIN_LENGTHS:
        raise NotHeldError(
            f"delays need requests of >= {MIN_LENGTHS} prompt lengths, {len(lengths)} ran alone "
            "in one pass: leave the servers to the profiler"
        )
    medians = [
        statistics.median(p.handover_s for p in passages if p.prompt_tokens == length)
        for length in lengths
    ]
    slope, fixed_s = (float(value) for value in np.polyfit(lengths, medians, 1))
    if slope <= 0.0:
        slope, fixed_s = 0.0, statistics.median(medians)
    off_s = [abs(p.handover_s - fixed_s - slope * p.prompt_tokens) for p in passages]
    return ServingDelays(
        in_s=statistics.median(passage.in_s for passage in passages),
        handover_s=max(fixed_s, 0.0),
        bytes_per_s=kv_bytes_per_token / slope if slope else None,
        handover_spread_s=statistics.median(off_s),
    )


def serving_table(
    delays: ServingDelays, facts: EngineFacts, kv_reserve_tokens: int | None
) -> Mapping[str, Any]:
    """What `serving.toml` holds: the measurement, and the `voltana simulate` keys it amounts to.

    Args:
        delays: What was measured.
        facts: Of the engine.
        kv_reserve_tokens: KV tokens that a request reserves ahead.
    """
    simulate: dict[str, Any] = {
        "first_token": "prefill",
        "kv_transfer_latency_s": round(delays.fixed_s, 6),
        "max_prefill_tokens": facts.max_prefill_tokens,
        "max_running_requests": facts.max_running_requests,
        "kv_capacity_tokens": facts.kv_capacity_tokens,
    }
    if delays.bytes_per_s is not None:
        simulate["kv_transfer_bytes_per_s"] = float(f"{delays.bytes_per_s:.4g}")
    if kv_reserve_tokens is not None:
        simulate["kv_reserve_tokens"] = kv_reserve_tokens
    measured = {
        "status": "measured",
        "source": f"single requests on idle servers, {facts.engine_name} {facts.engine_version}",
        "in_s": round(delays.in_s, 6),
        "handover_s": round(delays.handover_s, 6),
        "handover_spread_s": round(delays.handover_spread_s, 6),
        "limits": "those of the servers profiled; a fleet with other arguments has its own",
    }
    return {"schema_version": 1, "measured": measured, "simulate": simulate}


def _passage(client: Client, records: Records, length: int) -> Passage | None:
    """One request; None if it did not prefill alone in one pass."""
    records.take()
    answer = client.start([length], OUTPUT_TOKENS).result()
    time.sleep(SETTLE_S)
    passes = [r for r in records.take() if r.num_prefill_requests]
    if len(passes) != 1 or not is_whole(passes[0], 1, length):
        return None
    return Passage(
        prompt_tokens=length,
        in_s=max(passes[0].start_s - answer.sent_s, 0.0),
        handover_s=max(answer.chunks_s[0] - passes[0].received_s, 0.0),
    )
