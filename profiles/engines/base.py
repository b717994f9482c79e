"""What the profiler asks of an engine: hold one operating point and run it for a while."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, Self

from voltana.profiles.common.errors import VoltanaError

Phase = Literal["prefill", "decode", "mixed"]
PHASES: Final[tuple[Phase, ...]] = ("prefill", "decode")
"""What every profile has."""
MIXED: Final = "mixed"
"""A chunk of one prompt beside a step of decode, in one pass."""


class OutOfMemoryError(VoltanaError):
    """A point needs more memory than there is; it is recorded and the rest goes on."""


class NotHeldError(VoltanaError):
    """The engine does not run a point as asked for; it is recorded and the rest goes on."""


class EngineCrashError(VoltanaError):
    """The engine died at a point; it is recorded, and the engine is started again.

    A later run tries the point again: who died of what is not always known.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """An operating point. `tokens` as in the profile's tables, of the whole batch."""

    phase: Phase
    batch_size: int
    tokens: int
    chunk_tokens: int = 0
    """New tokens of the prompt beside it; `batch_size` and `tokens` are decode's then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Iterations at one point, in one stretch back to back or in several."""

    iteration_s: tuple[float, ...]
    """Duration of each, boundary to boundary, host work included."""
    elapsed_s: float
    """From the first boundary to the last; longer than the sum if the engine had to wait."""
    tokens: float
    """Mean over the iterations of what the point calls tokens."""
    spans_ns: tuple[tuple[int, int], ...]
    """Start and end (monotonic clock) of each stretch that held the point: energy counts there."""


class PreparedPoint(Protocol):
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
    min_context_tokens: int = 1
    """Shortest context, per request, that decode can be held at."""
    is_on_gpu: bool = False
    """Whether it computes on the cards: else their power is not that of its work."""
    model_shape: Mapping[str, Any] = field(default_factory=dict)
    """The model's sizes: two models of one name are not one."""
    notes: Mapping[str, str]
    """Anything that qualifies the numbers: dtype, attention kernel, random weights."""


class Engine(Protocol):
    """An engine with a loaded model, between `__enter__` and `__exit__`."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    @property
    def facts(self) -> EngineFacts: ...

    @property
    def is_attached(self) -> bool:
        """Whether its model is loaded before `__enter__`: bare idle power cannot be measured."""

    def restart(self) -> None:
        """Start again after a crash, inside the same `__enter__`.

        Raises:
            EngineCrashError: That cannot be done from here; the message has the remedy.
        """

    def measure_serving(self) -> Mapping[str, Any] | None:
        """What a request spends outside the iterations, as `serving.toml` holds it; or nothing."""

    def open(self, point: Point) -> AbstractContextManager[PreparedPoint]:
        """Prepare a point.

        Raises:
            OutOfMemoryError: It does not fit.
            NotHeldError: The engine runs it otherwise than asked for.
            EngineCrashError: The engine died.
        """
