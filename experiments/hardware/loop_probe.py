"""What the host adds to a first token, measured on a load like the cells' before these.

    arrival ── serving ──> decode's boundary ── handshake ──> prefill ── transfer ──> next boundary

The first two are waited for by everybody; the third decides whether the next boundary is caught.
The requests are the probe's own, of the cells' kind: how many streams and prompts are under way
decides what the host takes for one.
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

CANDIDATES_S: Final = np.arange(0.0, 0.008, 0.00025)
SERVING_S: Final = np.arange(0.0, 0.012, 0.00025)
SMOOTH: Final = 5
"""Neighbours whose mean counts: first tokens wait for boundaries, their middle moves in steps."""
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


def plan(cell: Workload) -> Workload:
    """Requests of a cell's kind, not the cell's: its gaps and its lengths, drawn with replacement.

    Args:
        cell: Whose number of requests, rate and lengths the probe has.
    """
    rng = np.random.default_rng(7)
    drawn = rng.integers(0, len(cell), len(cell))
    gaps_s = rng.choice(np.diff(cell.arrival_s, prepend=0.0), len(cell))
    return Workload(
        arrival_s=np.cumsum(gaps_s),
        input_tokens=cell.input_tokens[drawn],
        output_tokens=cell.output_tokens[drawn],
        name="a probe of the host",
    )


def measure(config: SimConfig, play: Callable[[Workload], RunRecord], work: Workload) -> HostTimes:
    """Play the probe and take its times apart.

    Args:
        config: Of the fleet, without host times.
        play: Replays a workload.
        work: Of `plan`.

    Raises:
        VoltanaError: Too few requests were prefilled alone.
    """
    observed = play(work)
    handshake_s, gap_s, missed = _passages(observed)
    if len(gap_s) < LEAST:
        raise VoltanaError(f"a probe needs {LEAST} requests prefilled alone, got {len(gap_s)}")
    wrong = [int(((gap_s < limit_s) != missed).sum()) for limit_s in CANDIDATES_S]
    best = np.flatnonzero(np.array(wrong) == min(wrong))
    found = HostTimes(
        handshake_latency_s=float(np.median(handshake_s)),
        kv_transfer_latency_s=float(CANDIDATES_S[best].mean()),
    )
    profile = cached_profile(config.profile)

    def middle_with(serving_s: float) -> float:
        host = replace(found, serving_latency_s=float(serving_s))
        return _middle_s(simulate(host.on(config), profile, work))

    left_s = _middle_s(observed) - np.array([middle_with(s) for s in SERVING_S])
    smooth_s = np.convolve(left_s, np.full(SMOOTH, 1.0 / SMOOTH), mode="valid")
    at = SMOOTH // 2 + int(np.abs(smooth_s).argmin())
    return replace(found, serving_latency_s=float(SERVING_S[at]))


def _middle_s(run: RunRecord) -> float:
    """Mean TTFT of the middle half."""
    ttft_s = np.sort(run.requests.first_token_s - run.requests.arrival_s)
    return float(ttft_s[len(ttft_s) // 4 : -len(ttft_s) // 4].mean())


def _passages(run: RunRecord) -> tuple[FloatArray, FloatArray, npt.NDArray[np.bool_]]:
    """Of each request that was prefilled alone: its handshake, and how it met decode.

    That is the gap from its prefill's end to the next boundary, and whether it missed that one.
    """
    table, requests = run.iterations, run.requests
    assert table is not None
    end_s = table.start_s + table.duration_s
    rows = []
    for i in range(len(requests.arrival_s)):
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
