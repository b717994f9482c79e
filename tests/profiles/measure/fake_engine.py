"""An engine that computes nothing and can be told to crash, and campaigns with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.profiles.measure.quiet import Quiet
from voltana.profiles.device.constant import ConstantPowerGpu
from voltana.profiles.device.lock import ClockSession
from voltana.profiles.engines.base import (
    EngineCrashError,
    EngineFacts,
    OutOfMemoryError,
    Phase,
    Point,
    PreparedPoint,
    Window,
)
from voltana.profiles.measure.campaign import Campaign, Plan
from voltana.profiles.measure.journal import Journal
from voltana.profiles.measure.trial import Protocol

FAST = Protocol(window_s=0.001, warm_up_s=0, settle_s=0, min_iterations=1, num_trials=2)
BIG = Point(phase="decode", batch_size=2, tokens=2)


@dataclass(slots=True)
class Fake:
    """An engine whose iterations take no time; it dies where it is told to."""

    deadly: Sequence[Point] = ()
    too_big: Sequence[Point] = ()
    stops_at: Point | None = None
    """Where the user presses Ctrl-C."""
    has_attached: bool = False
    can_restart: bool = True
    num_starts: int = 0
    opened: list[Point] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.num_starts += 1
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def facts(self) -> EngineFacts:
        return EngineFacts(
            engine_name="fake", engine_version="1", model_name="m", tensor_parallel=1,
            kv_bytes_per_token=8, max_context_tokens=16, max_prefill_tokens=16,
            max_running_requests=2, kv_capacity_tokens=32, graph_batch_sizes=(), notes={},
            is_on_gpu=True,
        )  # fmt: skip

    @property
    def is_attached(self) -> bool:
        return self.has_attached

    def measure_serving(self) -> None:
        return None

    def restart(self) -> None:
        if not self.can_restart:
            raise EngineCrashError("run the same command again")
        self.num_starts += 1

    @contextmanager
    def open(self, point: Point) -> Iterator[PreparedPoint]:
        self.opened.append(point)
        if point in self.deadly:
            raise EngineCrashError(f"died of {point.tokens} tokens")
        if point in self.too_big:
            raise OutOfMemoryError("does not fit")
        if point == self.stops_at:
            raise KeyboardInterrupt
        yield self

    def run(self, *, min_duration_s: float, min_iterations: int) -> Window:
        tokens = float(self.opened[-1].tokens)
        return Window(iteration_s=(0.01,), elapsed_s=0.01, tokens=tokens, spans_ns=((0, 1),))


def plan(phases: tuple[Phase, ...] = ("prefill", "decode"), budget_s: float = 60.0) -> Plan:
    return Plan(
        clocks_mhz=None, phases=phases, budget_s=budget_s, max_batch_size=2, max_tokens=32,
        protocol=FAST,
    )  # fmt: skip


def run(engine: Fake, path: Path, wanted: Plan | None = None) -> Journal:
    log = Journal.open(path)
    card = ConstantPowerGpu(100.0)
    with ClockSession([card]) as session, engine:
        Campaign(engine, [card], wanted or plan(), session, log, Quiet()).run()
    return log
