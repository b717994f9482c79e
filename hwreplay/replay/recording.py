"""What is written down while a replay runs: iterations and energy, as they happen."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from voltana.hwreplay.agent.energy_meter import CardMeter
from voltana.hwreplay.clock import RunClock
from voltana.hwreplay.messages.metrics_feed import MetricsFeed
from voltana.hwreplay.router.config import WorkerConfig
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.device.gpu import DeviceError, Gpu
from voltana.profiles.engines.sglang_metrics import IterationMetrics, MetricsError, step_time_s
from voltana.sim.policies.base import COLOCATED, PREFILL, Phase

ITERATIONS: Final = "iterations.jsonl"
ENERGY: Final = "energy.jsonl"
PERIOD_S: Final = 0.1
"""Between two readings; counters of data-centre cards move every 20 to 100 ms."""


class IterationRow(msgspec.Struct, frozen=True, array_like=True):
    """One iteration of one engine."""

    phase: Phase
    instance_id: int
    start_s: float
    duration_s: float
    """From boundary to boundary where iterations follow one another; else the forward pass."""
    wall_time_s: float
    """The forward pass alone, as the engine times it."""
    batch_size: int
    tokens: int
    """Prefill: new tokens. Decode: context. Colocated: of what is decoded, as `batch_size` is."""
    chunk_requests: int = 0
    chunk_tokens: int = 0
    """Colocated: prompts beside that, and their new tokens."""
    prefix_tokens: int = 0
    """Of the prompts, in front of their new tokens: done before, or found in a cache."""


class EnergyRow(msgspec.Struct, frozen=True, array_like=True):
    """One reading of an instance's counter."""

    phase: Phase
    instance_id: int
    at_s: float
    energy_j: float


_encode: Final = msgspec.json.Encoder().encode


async def record_iterations(worker: WorkerConfig, clock: RunClock, out: BinaryIO) -> None:
    """Append each iteration of one engine to a file until cancelled; strange messages are left.

    Args:
        worker: Whose; it must publish its metrics.
        clock: The run's.
        out: Takes one line an iteration.
    """
    assert worker.metrics is not None
    previous: IterationMetrics | None = None
    async with MetricsFeed(worker.metrics, clock) as feed:
        while True:
            try:
                record = await feed.receive()
            except MetricsError:
                continue
            if not record.is_heartbeat:
                out.write(_encode(_row(worker, record, previous)) + b"\n")
            previous = record


def _row(
    worker: WorkerConfig, record: IterationMetrics, previous: IterationMetrics | None
) -> IterationRow:
    duration_s = step_time_s(record, previous)
    is_prefill = worker.phase == PREFILL
    return IterationRow(
        worker.phase,
        worker.instance_id,
        round(record.received_s - duration_s, 6),
        round(duration_s, 7),
        round(record.wall_time_s, 7),
        record.num_prefill_requests if is_prefill else record.num_decode_requests,
        record.sum_prefill_tokens if is_prefill else record.sum_decode_kv_tokens,
        *(
            (record.num_prefill_requests, record.sum_prefill_tokens)
            if worker.phase == COLOCATED
            else (0, 0)
        ),
        prefix_tokens=record.sum_prefill_kv_tokens,
    )


class EnergyRecorder:
    """Reads every instance's cards in turn, in a thread: a driver's call may take long.

    A card without a counter is integrated from its power, by the trapezoid rule.
    """

    def __init__(
        self, gpus: Mapping[tuple[Phase, int], Sequence[Gpu]], clock: RunClock, path: Path
    ) -> None:
        """Start reading. Raises DeviceError if a card can tell neither energy nor power.

        Args:
            gpus: Cards of each instance, by phase and number.
            clock: The run's.
            path: Takes one line a reading.
        """
        self._clock = clock
        self._is_measured = all(
            card.identity.is_power_measured for cards in gpus.values() for card in cards
        )
        self._meters = {key: [CardMeter(gpu) for gpu in cards] for key, cards in gpus.items()}
        self._out = path.open("ab", buffering=0)
        self._error: DeviceError | None = None
        self._is_ended = threading.Event()
        self._read_all()
        self._thread = threading.Thread(target=self._follow, name="energy", daemon=True)
        self._thread.start()

    @property
    def is_measured(self) -> bool:
        """Whether every card measures its power."""
        return self._is_measured

    def close(self) -> None:
        """Read once more and end.

        Raises:
            VoltanaError: A card stopped answering during the run.
        """
        self._is_ended.set()
        self._thread.join()
        if self._error is None:
            self._read_all()
        self._out.close()
        if self._error is not None:
            raise VoltanaError(f"energy is incomplete, a card stopped answering: {self._error}")

    def _follow(self) -> None:
        while not self._is_ended.wait(PERIOD_S):
            try:
                self._read_all()
            except DeviceError as error:
                self._error = error
                return

    def _read_all(self) -> None:
        for (phase, instance_id), meters in self._meters.items():
            before_s = self._clock.now_s()
            energy_j = sum(meter.energy_j() for meter in meters)
            at_s = (before_s + self._clock.now_s()) / 2
            self._out.write(_encode(EnergyRow(phase, instance_id, at_s, energy_j)) + b"\n")
