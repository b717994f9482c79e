"""What the host adds to a first token, measured beside running streams before the loop's cells.

    arrival ── serving ──> decode's boundary ── handshake ──> prefill ── transfer ──> next boundary

The first two are waited for by everybody; the third decides whether the next boundary is caught.
The requests are the probe's own: nothing of a cell is looked at but how long its prompts are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from voltana.experiments.runs import cached_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.engine.simulate import simulate
from voltana.sim.policies.base import DECODE, PREFILL
from voltana.sim.records import RunRecord
from voltana.sim.workload.workload import Workload

SINGLE: Final = 44
"""Single requests whose prefill meets decode's iterations anywhere."""
STREAM_STEP_S: Final = 0.0112
"""A decode step of one or two requests, a little short: the streams outlive the single ones."""
CANDIDATES_S: Final = np.arange(0.0, 0.008, 0.00025)
LEAST: Final = 12
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTimes:
    """Keys of the simulated configuration, in dilated seconds."""

    serving_latency_s: float = 0.0
    handshake_latency_s: float = 0.0
    kv_transfer_latency_s: float = 0.0

    def on(self, config: SimConfig) -> SimConfig:
        """The configuration with them."""
        return replace(config, **{k: round(v, 5) for k, v in asdict(self).items()})


def plan(num_streams: int, prompt_tokens: tuple[int, int]) -> Workload:
    """One stream an instance, and single requests beside them.

    Args:
        num_streams: Decode instances.
        prompt_tokens: Shortest and longest prompt of the single requests.
    """
    rng = np.random.default_rng(7)
    at_s = 0.7 + np.cumsum(rng.uniform(0.10, 0.16, SINGLE))
    low, high = np.log(prompt_tokens)
    prompts = np.exp(rng.uniform(low, high, SINGLE)).astype(np.int64)
    steps = int(at_s[-1] / STREAM_STEP_S)
    return Workload(
        arrival_s=np.concatenate([np.zeros(num_streams), at_s]),
        input_tokens=np.concatenate([np.full(num_streams, 64), prompts]),
        output_tokens=np.concatenate([np.full(num_streams, steps), np.full(SINGLE, 2)]),
        name="single requests beside streams",
    )


def measure(config: SimConfig, play: Callable[[Workload], RunRecord], work: Workload) -> HostTimes:
    """Play the probe and take its times apart.

    Args:
        config: Of the fleet, without host times.
        play: Replays a workload.
        work: Of `plan`.

    Raises:
        VoltanaError: Too few single requests were served alone.
    """
    observed = play(work)
    handshake_s, gap_s, missed = _passages(observed)
    if len(gap_s) < LEAST:
        raise VoltanaError(f"a probe needs {LEAST} single requests of their own, got {len(gap_s)}")
    wrong = [int(((gap_s < limit_s) != missed).sum()) for limit_s in CANDIDATES_S]
    best = np.flatnonzero(np.array(wrong) == min(wrong))
    found = HostTimes(
        handshake_latency_s=float(np.median(handshake_s)),
        kv_transfer_latency_s=float(CANDIDATES_S[best].mean()),
    )
    expected = simulate(found.on(config), cached_profile(config.profile), work).requests
    left_s = np.sort((observed.requests.first_token_s - expected.first_token_s)[-SINGLE:])
    middle_s = float(left_s[SINGLE // 4 : -SINGLE // 4].mean())
    return replace(found, serving_latency_s=max(middle_s, 0.0))


def _passages(run: RunRecord) -> tuple[FloatArray, FloatArray, npt.NDArray[np.bool_]]:
    """Of each single request that was prefilled alone: its handshake, and how it met decode.

    That is the gap from its prefill's end to the next boundary, and whether it missed that one.
    """
    table, requests = run.iterations, run.requests
    assert table is not None
    end_s = table.start_s + table.duration_s
    rows = []
    for i in range(len(requests.arrival_s) - SINGLE, len(requests.arrival_s)):
        prefilled = np.flatnonzero(
            (table.phase == PREFILL) & (table.batch_size == 1)
            & (table.tokens == requests.input_tokens[i])
            & (table.start_s > requests.arrival_s[i]) & (end_s < requests.first_token_s[i])
        )  # fmt: skip
        if len(prefilled) != 1:
            continue
        at = prefilled[0]
        boundary_s = end_s[
            (table.phase == DECODE) & (table.instance_id == requests.decode_id[i])
        ]  # fmt: skip
        before_s = boundary_s[boundary_s < table.start_s[at]]
        after_s = boundary_s[boundary_s > end_s[at]]
        if not len(before_s) or len(after_s) < 2:
            continue
        half_s = (after_s[1] - after_s[0]) / 2
        rows.append((
            table.start_s[at] - before_s[-1],
            after_s[0] - end_s[at],
            requests.first_token_s[i] > after_s[0] + half_s,
        ))  # fmt: skip
    columns = np.array(rows, dtype=np.float64).reshape(-1, 3).T
    return columns[0], columns[1], columns[2].astype(bool)
