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
from typing import Final

import numpy as np
import numpy.typing as npt

from hwreplay.load import Row
from profiles.catalog import Profile
from profiles.errors import VoltanaError
from sim.config import SimConfig
from sim.policies.base import DECODE, PREFILL, UNLOCKED_MHZ
from sim.records import COMPLETED
from sim.workload.workload import Workload

PROMPT_TOKENS: Final = (16, 64, 128, 256)
REPEATS: Final = 6
OUTPUT_TOKENS: Final = 4
STREAM_TOKENS: Final = (64, 1200)
"""Prompt and answer of the stream beside which single requests run."""
BATCHES: Final = (2, 4, 8)
BATCH_PROMPTS: Final = (32, 250)
BATCH_OUTPUTS: Final = 64
LONG_PROMPTS: Final = (512, 1024, 2048, 512, 1024, 2048)
GAP_S: Final = 0.25
JITTER_S: Final = 0.0137
"""Moves the arrivals against the stream's iterations."""


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
    idle: range
    busy: range


def plan_probe() -> ProbePlan:
    """Some 35 s of requests: single ones, a stream with single ones beside it, then batches."""
    prompts = PROMPT_TOKENS * REPEATS
    rows = [(GAP_S * i, tokens, OUTPUT_TOKENS) for i, tokens in enumerate(prompts)]
    start_s = GAP_S * len(prompts) + 1.0
    rounds = 2
    for turn in range(rounds):
        begin_s = start_s + turn * (GAP_S * len(prompts) / rounds + 2.0)
        rows.append((begin_s, *STREAM_TOKENS))
        part = prompts[turn::rounds]
        rows += [
            (begin_s + 0.5 + GAP_S * i + JITTER_S * (i % 7), tokens, OUTPUT_TOKENS)
            for i, tokens in enumerate(part)
        ]
    num_single = len(rows)
    begin_s = rows[-1][0] + 2.0
    for batch_size in BATCHES:
        for prompt in BATCH_PROMPTS:
            rows += [(begin_s, prompt, BATCH_OUTPUTS)] * batch_size
            begin_s += 0.8 + 0.06 * batch_size
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
    return ProbePlan(
        workload=workload, idle=range(len(prompts)), busy=range(len(prompts), num_single)
    )


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
        VoltanaError: Not half of the single requests were served.
    """
    model = profile.truth(extrapolate=True)
    work = plan.workload
    by_id = {row.request_id: row for row in rows if row.status == COMPLETED}
    own = 1.0 if config.first_token == DECODE else 0.0
    context = sum(STREAM_TOKENS) / 2

    def left_s(ids: range, batch_size: int, waits: float, beside: float) -> npt.NDArray[np.float64]:
        values, num_single = [], 0
        for index in ids:
            tokens = int(work.input_tokens[index])
            if work.output_tokens[index] != OUTPUT_TOKENS:
                continue
            num_single += 1
            row = by_id.get(index)
            if row is None or row.first_token_s is None:
                continue
            known_s = model.predict_s(PREFILL, UNLOCKED_MHZ, 1, tokens)
            step_s = model.predict_s(DECODE, UNLOCKED_MHZ, batch_size, tokens + beside)
            if config.kv_transfer_bytes_per_s is not None:
                kv_bytes = tokens * profile.meta.model.kv_bytes_per_token
                known_s += kv_bytes / config.kv_transfer_bytes_per_s
            values.append(row.first_token_s - row.sent_s - known_s - (own + waits) * step_s)
        if 2 * len(values) < num_single:
            raise VoltanaError(
                f"a probe needs half of its single requests, {len(values)} of {num_single} were "
                "served"
            )
        return np.array(values)

    idle_s = left_s(plan.idle, 1, 0.0, 1.0)
    busy_s = left_s(plan.busy, 2, 0.5, context)
    low_s, high_s = np.quantile(busy_s, [0.25, 0.75])
    return Overhead(
        idle_s=max(float(np.median(idle_s)), 0.0),
        busy_s=max(float(np.median(busy_s)), 0.0),
        busy_quartiles_s=(float(low_s), float(high_s)),
        step_s=model.predict_s(DECODE, UNLOCKED_MHZ, 2, context),
    )
