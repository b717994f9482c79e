"""What the host adds to a first token, measured on a load like the cells' before these.

    arrival ── serving ──> decode's boundary ── handshake ──> prefill
    prefill's end ── transfer ──> decode's boundary ── delivery ──> client

All wait for serving, handshake and delivery; serving and transfer decide which boundary is caught.
The requests are the probe's own, of the cells' kind: how many streams and prompts are under way
decides what the host takes for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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

LIMITS_S: Final = np.arange(0.0, 0.008, 0.00025)
LEAST: Final = 12
STARTS: Final = 12
"""Simulated for one prediction: which boundary a request catches is chance."""
ITERATION_S: Final = 0.012
"""Of decode, about."""
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTimes:
    """In dilated seconds."""

    serving_s: float = 0.0
    handshake_s: float = 0.0
    transfer_s: float = 0.0
    delivery_s: float = 0.0

    def on(self, config: SimConfig) -> SimConfig:
        """The configuration with those that the simulator has keys for."""
        return replace(
            config,
            serving_latency_s=round(self.serving_s, 5),
            handshake_latency_s=round(self.handshake_s, 5),
            kv_transfer_latency_s=round(self.transfer_s, 5),
        )

    def delivered(self, run: RunRecord) -> RunRecord:
        """A simulated run as its clients see it: each token `delivery_s` after it was made."""
        table = run.requests
        late = replace(
            table,
            first_token_s=table.first_token_s + self.delivery_s,
            finish_s=table.finish_s + self.delivery_s,
        )
        return replace(run, requests=late)


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


def jittered(work: Workload) -> Iterator[Workload]:
    """The same requests in the same order, each up to an iteration later: `STARTS` times."""
    for seed in range(STARTS):
        late_s = np.random.default_rng(seed).uniform(0.0, ITERATION_S, len(work))
        yield replace(work, arrival_s=np.maximum.accumulate(work.arrival_s + late_s))


def measure(config: SimConfig, play: Callable[[Workload], RunRecord], work: Workload) -> HostTimes:
    """Play the probe and take its times apart.

    Args:
        config: Of the fleet, without host times.
        play: Replays a workload.
        work: Of `plan`.

    Raises:
        VoltanaError: Too few requests were prefilled alone.
    """
    return times_of(play(work), config, work)


def times_of(observed: RunRecord, config: SimConfig, work: Workload) -> HostTimes:
    """The host's times in a run of the probe, see `measure`."""
    passages = [p for i in range(len(work)) if (p := _passage(observed, i)) is not None]
    if len(passages) < LEAST:
        raise VoltanaError(f"a probe needs {LEAST} requests prefilled alone, got {len(passages)}")
    free = [p for p in passages if p.caught_s > 0 and not p.waited]
    found = HostTimes(
        serving_s=_limit_s([p.caught_s for p in free], [p.passed_s for p in free]),
        handshake_s=float(np.mean([p.handshake_s for p in free])),
        transfer_s=_limit_s(
            [p.gap_s for p in passages if not p.missed], [p.gap_s for p in passages if p.missed]
        ),
    )
    profile = cached_profile(config.profile)
    expected_s = [_middle_s(simulate(found.on(config), profile, each)) for each in jittered(work)]
    left_s = _middle_s(observed) - float(np.mean(expected_s))
    return replace(found, delivery_s=max(left_s, 0.0))


def _limit_s(caught_s: list[float], missed_s: list[float]) -> float:
    """The least time before a boundary that catches it: best split of those that did or did not."""
    caught, missed = np.array(caught_s), np.array(missed_s)
    wrong = np.array([np.sum(caught < s) + np.sum(missed > s) for s in LIMITS_S])
    return float(LIMITS_S[wrong == wrong.min()].mean())


def _middle_s(run: RunRecord) -> float:
    """Mean TTFT of the middle half."""
    ttft_s = np.sort(run.requests.first_token_s - run.requests.arrival_s)
    return float(ttft_s[len(ttft_s) // 4 : -len(ttft_s) // 4].mean())


@dataclass(frozen=True, slots=True)
class _Passage:
    """How a request that was prefilled alone met decode's boundaries, before and after prefill."""

    caught_s: float
    """From its arrival to the boundary that let it go to prefill; not above 0: decode rested, and
    no boundary did."""
    passed_s: float
    """The same of the boundary before that one."""
    handshake_s: float
    """From the one that it caught to its prefill."""
    waited: bool
    """Another prefill ran meanwhile: the three are no time of the host's."""
    gap_s: float
    """From its prefill's end to the next boundary."""
    missed: bool
    """Its first token came with a later one."""


def _passage(run: RunRecord, i: int) -> _Passage | None:
    table, requests = run.iterations, run.requests
    assert table is not None
    end_s = table.start_s + table.duration_s
    arrival_s, first_token_s = requests.arrival_s[i], requests.first_token_s[i]
    mine = (table.phase == PREFILL) & (table.instance_id == requests.prefill_id[i])
    alone = np.flatnonzero(
        mine & (table.batch_size == 1) & (table.tokens == requests.input_tokens[i])
        & (table.start_s > arrival_s) & (end_s < first_token_s)
    )  # fmt: skip
    boundary_s = np.sort(
        end_s[(table.phase == DECODE) & (table.instance_id == requests.decode_id[i])]
    )
    if len(alone) != 1:
        return None
    start_s, done_s = table.start_s[alone[0]], end_s[alone[0]]
    before_s = boundary_s[boundary_s < start_s]
    after_s = boundary_s[boundary_s > done_s]
    if len(before_s) < 2 or len(after_s) < 2:
        return None
    return _Passage(
        caught_s=before_s[-1] - arrival_s,
        passed_s=before_s[-2] - arrival_s,
        handshake_s=start_s - before_s[-1],
        waited=bool(np.any(mine & (end_s > before_s[-1]) & (table.start_s < start_s))),
        gap_s=after_s[0] - done_s,
        missed=bool(first_token_s > (after_s[0] + after_s[1]) / 2),
    )
