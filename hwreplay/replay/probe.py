"""What serving adds to a request's first token, on the path and the machine of a replay.

A profile knows iterations. A request also spends time in HTTP, the router, the schedulers and the
pair's handshake, and every step of that handshake waits while decode computes. So single requests
are sent twice: to idle servers, and beside a running stream. What their time to first token has
beyond the iterations that the simulator plays for them is the overhead. Nothing here looks at the
workload that is to be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np

from voltana.hwreplay.replay.load import Row
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.policies.base import DECODE, PREFILL, UNLOCKED_MHZ
from voltana.sim.records import COMPLETED
from voltana.sim.workload.workload import Workload

NUM_SINGLE: Final = 24
"""Single requests to idle servers, and as many beside a stream."""
PROMPT_TOKENS: Final = (8, 400)
"""Shortest and longest prompt of a single request."""
OUTPUT_TOKENS: Final = 4
STREAM_TOKENS: Final = (64, 2400)
"""Prompt and answer of the stream beside which single requests run."""
ROUNDS: Final = 2
"""Streams, each with its share of the single requests beside it; and rounds of batches."""
BATCHES: Final = (2, 4, 8)
BATCH_PROMPTS: Final = (32, 250)
BATCH_OUTPUTS: Final = 200
LONG_PROMPTS: Final = (512, 1024, 2048, 512, 1024, 2048)
GAP_S: Final = 0.4
SEED: Final = 7
MIN_GAP_S: Final = 0.15
"""Single requests do not overlap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Time from arrival to first token that no iteration explains."""

    idle_s: float
    """Median, servers idle."""
    busy_s: float
    """Median beside a running stream."""
    busy_quartiles_s: tuple[float, float]
    step_s: float
    """The decode iteration that the busy requests met, by the profile."""

    def expected_s(self, decode_busy_frac: float) -> float:
        """The mean of both, weighted by how much of the time decode computes.

        Example:
            >>> found = Overhead(
            ...     idle_s=0.02, busy_s=0.04, busy_quartiles_s=(0.03, 0.05), step_s=0.004
            ... )
            >>> round(found.expected_s(0.25), 6)
            0.025
        """
        return self.idle_s + (self.busy_s - self.idle_s) * decode_busy_frac


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbePlan:
    """The requests of a probe, and which of them are single."""

    workload: Workload
    idle: tuple[int, ...]
    """Single requests to idle servers."""
    busy: tuple[int, ...]
    """Single requests beside a stream."""
    streams: tuple[int, ...]


def plan_probe() -> ProbePlan:
    """Some 65 s of requests: single ones, a stream with single ones beside it, then batches.

    Single requests come with random gaps and lengths, as those of a workload do. One every quarter
    of a second keeps the caches warm, and an engine that has met a length before has its kernels
    ready: on a CPU the first prompt of a length takes twice as long as the next.
    """
    rng = np.random.default_rng(SEED)
    shortest, longest = np.log(PROMPT_TOKENS)
    rows: list[tuple[float, int, int]] = []

    def add_single(begin_s: float, count: int) -> None:
        at_s = begin_s + np.cumsum(MIN_GAP_S + rng.exponential(GAP_S - MIN_GAP_S, count))
        tokens = np.exp(rng.uniform(shortest, longest, count)).round()
        rows.extend((float(t), int(n), OUTPUT_TOKENS) for t, n in zip(at_s, tokens, strict=True))

    add_single(0.0, NUM_SINGLE)
    streams = []
    for _ in range(ROUNDS):
        begin_s = rows[-1][0] + 2.0
        streams.append(len(rows))
        rows.append((begin_s, *STREAM_TOKENS))
        add_single(begin_s + 0.5, NUM_SINGLE // ROUNDS)
    busy = tuple(i for i in range(NUM_SINGLE, len(rows)) if i not in streams)
    begin_s = rows[-1][0] + 4.0
    for batch_size, prompt in product(BATCHES * ROUNDS, BATCH_PROMPTS):
        rows += [(begin_s, prompt, BATCH_OUTPUTS)] * batch_size
        begin_s += 1.5 + 0.06 * batch_size
    for prompt in LONG_PROMPTS:
        rows.append((begin_s, prompt, 2))
        begin_s += 0.4
    columns = list(zip(*rows, strict=True))
    workload = Workload(
        arrival_s=np.array(columns[0]),
        input_tokens=np.array(columns[1], dtype=np.int64),
        output_tokens=np.array(columns[2], dtype=np.int64),
        name="probe",
    )
    idle = tuple(range(NUM_SINGLE))
    return ProbePlan(workload=workload, idle=idle, busy=busy, streams=tuple(streams))


def fit_overhead(
    rows: Sequence[Row], plan: ProbePlan, config: SimConfig, profile: Profile
) -> Overhead:
    """Time to first token of the single requests, less what the simulator plays for them.

    That is the prompt's iteration and its KV transfer by bandwidth; beside a stream half a decode
    iteration, until the running one ends; and a whole one more where decode makes the first token.

    Args:
        rows: How the probe's requests ended.
        plan: What was sent.
        config: How the simulator counts (`first_token`, `kv_transfer_bytes_per_s`).
        profile: Its iterations.

    Raises:
        VoltanaError: Not half of the single requests were served, or beside a stream.
    """
    model = profile.truth(extrapolate=True)
    work = plan.workload
    by_id = {row.request_id: row for row in rows if row.status == COMPLETED}
    streams = [by_id[i] for i in plan.streams if i in by_id]
    own = 1.0 if config.first_token == DECODE else 0.0
    context = sum(STREAM_TOKENS) / 2

    def left_s(row: Row, batch_size: int, waits: float, beside: float) -> float:
        tokens = int(work.input_tokens[row.request_id])
        known_s = model.predict_s(PREFILL, UNLOCKED_MHZ, 1, tokens)
        step_s = model.predict_s(DECODE, UNLOCKED_MHZ, batch_size, tokens + beside)
        if config.kv_transfer_bytes_per_s is not None:
            kv_bytes = tokens * profile.meta.model.kv_bytes_per_token
            known_s += kv_bytes / config.kv_transfer_bytes_per_s
        return _ttft_s(row) - known_s - (own + waits) * step_s

    idle = [by_id[i] for i in plan.idle if i in by_id]
    busy = [by_id[i] for i in plan.busy if i in by_id and _is_beside(by_id[i], streams)]
    for ids, kept, what in ((plan.idle, idle, "served"), (plan.busy, busy, "beside a stream")):
        if 2 * len(kept) < len(ids):
            raise VoltanaError(
                f"a probe needs half of its single requests, {len(kept)} of {len(ids)} were {what}"
            )
    idle_s = [left_s(row, 1, 0.0, 1.0) for row in idle]
    busy_s = [left_s(row, 2, 0.5, context) for row in busy]
    low_s, high_s = np.quantile(busy_s, [0.25, 0.75])
    return Overhead(
        idle_s=max(float(np.median(idle_s)), 0.0),
        busy_s=max(float(np.median(busy_s)), 0.0),
        busy_quartiles_s=(float(low_s), float(high_s)),
        step_s=model.predict_s(DECODE, UNLOCKED_MHZ, 2, context),
    )


def _ttft_s(row: Row) -> float:
    assert row.first_token_s is not None  # it was served
    return row.first_token_s - row.sent_s


def _is_beside(row: Row, streams: Sequence[Row]) -> bool:
    """Whether a stream ran from the request's sending to its first token.

    A fast engine ends a stream before all that was to run beside it.
    """
    return any(
        s.first_token_s is not None
        and s.finish_s is not None
        and s.first_token_s <= row.sent_s
        and row.sent_s + _ttft_s(row) <= s.finish_s
        for s in streams
    )
