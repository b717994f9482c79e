"""What the profiler asks of an engine: hold one operating point and run it for a while."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Protocol, Self

from profiles.errors import VoltanaError

Phase = Literal["prefill", "decode"]
PHASES: Final[tuple[Phase, ...]] = ("prefill", "decode")


class OutOfMemoryError(VoltanaError):
    """A point needs more memory than there is; it is recorded and the rest goes on."""


class EngineCrashError(VoltanaError):
    """The engine died at a point; it is recorded, and the engine is started again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """An operating point. `tokens` as in the profile's tables, of the whole batch."""

    phase: Phase
    batch_size: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Iterations that ran back to back."""

    iteration_s: tuple[float, ...]
    """Duration of each, boundary to boundary, host work included."""
    elapsed_s: float
    """From the first boundary to the last; longer than the sum if the engine had to wait."""
    tokens: float
    """Mean over the iterations of what the point calls tokens."""
    start_ns: int
    """Monotonic clock at the first boundary."""
    end_ns: int


class Workload(Protocol):
    """One point, prepared."""

    def run(self, *, min_duration_s: float, min_iterations: int) -> Window:
        """Iterate until both minima are reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What the profile says of engine and model."""

    engine_name: str
    engine_version: str
    model_name: str
    tensor_parallel: int
    kv_bytes_per_token: int
    max_context_tokens: int
    max_prefill_tokens: int
    max_running_requests: int
    kv_capacity_tokens: int
    graph_batch_sizes: tuple[int, ...]
    """Batch sizes with a captured CUDA graph; a batch in between is padded to the next."""
    notes: Mapping[str, str]
    """Anything that qualifies the numbers: dtype, attention kernel, random weights."""


class Engine(Protocol):
    """An engine with a loaded model, between `__enter__` and `__exit__`."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    @property
    def facts(self) -> EngineFacts: ...

    @property
    def process_ids(self) -> frozenset[int]:
        """Processes of the engine other than this one's descendants (an attached server)."""

    def open(self, point: Point) -> AbstractContextManager[Workload]:
        """Prepare a point.

        Raises:
            OutOfMemoryError: It does not fit.
            EngineCrashError: The engine died.
        """
