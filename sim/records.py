"""What one run leaves behind, simulated or real: requests, token gaps, instances, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from voltana.sim.policies.base import Phase
from voltana.sim.sketches import RunSketch

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

IN_FLIGHT: Final = 0
COMPLETED: Final = 1
REJECTED: Final = 2
FAILED: Final = 3
CANCELLED: Final = 4
STATUS_NAMES: Final = ("in_flight", "completed", "rejected", "failed", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTable:
    """One row a request, all arrays of shape (n,). NaN or -1 for what did not happen."""

    arrival_s: FloatArray
    input_tokens: IntArray
    output_tokens: IntArray
    prefill_id: IntArray
    decode_id: IntArray
    first_token_s: FloatArray
    """Instant of the first token on the run's clock."""
    finish_s: FloatArray
    status: IntArray
    retractions: IntArray
    cached_tokens: IntArray | None = None
    """Of the prompt, found in a cache of prefixes; None in a run without one."""
    workload_row: IntArray | None = None
    """Which request of the workload it was, where turns make the order of arrival another one."""

    def __len__(self) -> int:
        return len(self.arrival_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceRecord:
    """Time and energy of one instance over the run."""

    phase: Phase
    instance_id: int
    busy_s: float
    idle_s: float
    busy_energy_j: float
    idle_energy_j: float
    busy_window_energy_j: float
    """From the start of its first iteration to the end of its last, with the idle time between."""
    num_iterations: int
    clock_busy_s: Mapping[int, float]
    """Busy seconds by clock in MHz; 0 is unlocked."""
    clock_idle_s: Mapping[int, float]
    num_clock_changes: int
    num_retractions: int
    away_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds out of service by state (parked, asleep, stopped, changing), beside busy and idle."""
    away_energy_j: Mapping[str, float] = field(default_factory=dict)
    """Energy out of service by state, beside busy and idle energy."""
    num_wake_ups: int = 0
    cached_tokens: int | None = None
    """Of prompts, found in this instance's cache of prefixes; None if it has none."""
    computed_tokens: int | None = None
    """Of the same prompts, computed; both count a prompt from when it begins."""
    evicted_tokens: int | None = None
    unsent_tokens: int | None = None
    """Of prompts, found in this decode instance's cache and so not sent; None if it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationTable:
    """One row an iteration, shape (n,); kept on request only."""

    phase: npt.NDArray[np.str_]
    instance_id: IntArray
    start_s: FloatArray
    duration_s: FloatArray
    batch_size: IntArray
    tokens: IntArray
    clock_mhz: IntArray
    """Lock in force when the iteration began; 0 is unlocked."""
    energy_j: FloatArray
    chunk_requests: IntArray | None = None
    """Of a replay with colocated servers: prompts beside what is decoded; None of any other run."""
    chunk_tokens: IntArray | None = None
    prefix_tokens: IntArray | None = None
    """Of a replay: of the prompts, in front of their new tokens; None of any other run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """Everything measured in one run. `voltana.sim.metrics.summarise` turns it into numbers."""

    requests: RequestTable
    itl_s: FloatArray
    """Gaps between consecutive tokens of a request."""
    itl_weight: IntArray
    """How many token gaps had that length; all ones for a list of single gaps."""
    instances: Sequence[InstanceRecord]
    makespan_s: float
    """From time 0 to the end of the last request (or to the limit that stopped the run)."""
    slo_ttft_s: float
    slo_itl_s: float
    wall_s: float
    """Real time that the run took."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration."""
    sketch: RunSketch | None = None
    """Set in a run with metrics=sketch, whose tables of requests and gaps are empty."""
    iterations: IterationTable | None = None
    timeline: Mapping[str, npt.NDArray[Any]] | None = None
    """Columns of equal length: time_s, phase, instance_id, clock_mhz, batch_size, num_waiting,
    kv_tokens, power_w."""
