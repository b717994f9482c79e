"""From what a replay wrote down to the record that a simulation leaves too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from voltana.hwreplay.replay.load import Row, read_rows
from voltana.hwreplay.replay.recording import ENERGY, ITERATIONS, EnergyRow, IterationRow
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.policies.base import COLOCATED, DECODE, PREFILL, UNLOCKED_MHZ, Phase
from voltana.sim.records import (
    COMPLETED,
    IN_FLIGHT,
    FloatArray,
    InstanceRecord,
    IntArray,
    IterationTable,
    RequestTable,
    RunRecord,
)
from voltana.sim.workload.workload import Workload

REQUESTS: Final = "requests.jsonl"
NEVER: Final = float("nan")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The measured part of a run, on the clock of its processes."""

    start_s: float
    """The workload's time 0: everything before was warming up."""
    is_complete: bool
    wall_s: float


def assemble(
    directory: Path, workload: Workload, config: SimConfig, window: Window, extra: Mapping[str, Any]
) -> RunRecord:
    """Build the record of a replay from its files; requests without a row are in flight.

    Args:
        directory: Where the replay wrote.
        workload: What was sent.
        config: The configuration that was replayed.
        window: When it ran.
        extra: More settings to keep beside the configuration's.

    Raises:
        VoltanaError: A file is missing or holds something else.
    """
    rows = read_rows(directory / REQUESTS)
    iterations = _read_iterations(directory, window)
    makespan_s = _makespan_s(rows, iterations, is_complete=window.is_complete)
    keys = [(phase, index) for phase, count in config.counts.items() for index in range(count)]
    counters = _read_counters(directory, window)
    views = [
        _view(key, iterations, counters.get(key), _read_clocks(directory, key, window))
        for key in keys
    ]
    requests = _requests(workload, rows, has_cache=bool(config.caches))
    return RunRecord(
        requests=replace(requests, cached_tokens=None) if config.decode_cache else requests,
        itl_s=np.array([gap for row in rows for gap in row.gaps_s]),
        itl_weight=np.ones(sum(len(row.gaps_s) for row in rows), dtype=np.int64),
        instances=[_with_reuse(view.record(makespan_s), view, requests, config) for view in views],
        makespan_s=makespan_s,
        slo_ttft_s=config.slo_ttft_s,
        slo_itl_s=config.slo_itl_s,
        wall_s=window.wall_s,
        settings=config.as_dict() | dict(extra),
        iterations=_table(views),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """One instance: its iterations, its energy counter and its clock, from the start of the run."""

    phase: Phase
    instance_id: int
    start_s: FloatArray
    duration_s: FloatArray
    batch_size: IntArray
    tokens: IntArray
    chunk_requests: IntArray
    chunk_tokens: IntArray
    prefix_tokens: IntArray
    counted_s: FloatArray
    counted_j: FloatArray
    changed_s: FloatArray
    changed_mhz: IntArray

    def energy_at(self, at_s: FloatArray | float) -> FloatArray:
        """The counter, linear between two readings: blurred by their period unless constant."""
        return np.asarray(np.interp(at_s, self.counted_s, self.counted_j))

    @property
    def energy_j(self) -> FloatArray:
        """Of each iteration."""
        return self.energy_at(self.start_s + self.duration_s) - self.energy_at(self.start_s)

    def _at_clock_s(self) -> dict[int, FloatArray]:
        """How long each iteration ran at each clock."""
        end_s = self.start_s + self.duration_s
        if not len(end_s):
            return {}
        first_s, last_s = self.start_s.min(), end_s.max()
        edges = np.clip([first_s, *self.changed_s[1:], last_s], first_s, last_s)
        lasts_s = np.diff(edges)
        found = {}
        for clock in np.unique(self.changed_mhz):
            passed_s = np.append(0.0, np.cumsum(np.where(self.changed_mhz == clock, lasts_s, 0.0)))
            spent_s = np.interp(end_s, edges, passed_s) - np.interp(self.start_s, edges, passed_s)
            found[int(clock)] = spent_s
        return found

    @property
    def clock_mhz(self) -> IntArray:
        """Of each iteration, the clock that most of it ran at."""
        spent_s = self._at_clock_s()
        if not spent_s:
            return np.empty(0, dtype=np.int64)
        clocks: IntArray = np.array([*spent_s], dtype=np.int64)
        longest = np.argmax(np.stack([*spent_s.values()]), axis=0)
        return np.asarray(clocks[longest], dtype=np.int64)

    def _clock_at(self, at_s: FloatArray) -> IntArray:
        return self.changed_mhz[np.searchsorted(self.changed_s, at_s, side="right") - 1]

    def record(self, makespan_s: float) -> InstanceRecord:
        busy_s, busy_j = float(self.duration_s.sum()), float(self.energy_j.sum())
        total_j = float(self.energy_at(makespan_s) - self.energy_at(0.0))
        spent_s = {clock: float(s.sum()) for clock, s in self._at_clock_s().items()}
        clock_busy_s = {clock: seconds for clock, seconds in spent_s.items() if seconds > 0}
        edges = np.unique(np.clip(np.append(self.changed_s, [0.0, makespan_s]), 0.0, makespan_s))
        clock_s = _sum_by(self._clock_at(edges[:-1]), np.diff(edges))
        window_j = 0.0
        if len(self.start_s):
            ends_s = self.start_s + self.duration_s
            window_j = float(self.energy_at(ends_s.max()) - self.energy_at(self.start_s.min()))
        in_run = (self.changed_s > 0) & (self.changed_s <= makespan_s)
        return InstanceRecord(
            phase=self.phase,
            instance_id=self.instance_id,
            busy_s=busy_s,
            idle_s=max(makespan_s - busy_s, 0.0),
            busy_energy_j=busy_j,
            idle_energy_j=total_j - busy_j,
            busy_window_energy_j=window_j,
            num_iterations=len(self.start_s),
            clock_busy_s=clock_busy_s,
            clock_idle_s={
                clock: max(seconds - clock_busy_s.get(clock, 0.0), 0.0)
                for clock, seconds in clock_s.items()
            },
            num_clock_changes=int(in_run.sum()),
            num_retractions=0,
        )


def _view(
    key: tuple[Phase, int],
    iterations: Sequence[IterationRow],
    counter: Sequence[EnergyRow] | None,
    clocks: Sequence[tuple[float, int]],
) -> _View:
    if not counter:
        raise VoltanaError(f"no energy was recorded of {key[0]} {key[1]}")
    mine = [row for row in iterations if (row.phase, row.instance_id) == key]
    return _View(
        phase=key[0],
        instance_id=key[1],
        start_s=np.array([row.start_s for row in mine]),
        duration_s=np.array([row.duration_s for row in mine]),
        batch_size=np.array([row.batch_size for row in mine], dtype=np.int64),
        tokens=np.array([row.tokens for row in mine], dtype=np.int64),
        chunk_requests=np.array([row.chunk_requests for row in mine], dtype=np.int64),
        chunk_tokens=np.array([row.chunk_tokens for row in mine], dtype=np.int64),
        prefix_tokens=np.array([row.prefix_tokens for row in mine], dtype=np.int64),
        counted_s=np.array([row.at_s for row in counter]),
        counted_j=np.array([row.energy_j for row in counter]),
        changed_s=np.array([-np.inf, *(at_s for at_s, _ in clocks)]),
        changed_mhz=np.array([UNLOCKED_MHZ, *(mhz for _, mhz in clocks)], dtype=np.int64),
    )


def _requests(workload: Workload, rows: Sequence[Row], *, has_cache: bool) -> RequestTable:
    """In order of arrival; a turn that was never sent, as its session had ended, is left out."""
    count = len(workload)
    status, prefill_id, decode_id = (np.full(count, value) for value in (IN_FLIGHT, -1, -1))
    first_s, finish_s = np.full(count, NEVER), np.full(count, NEVER)
    cached, arrival_s = np.zeros(count, dtype=np.int64), workload.arrival_s.copy()
    came = np.ones(count, dtype=bool) if workload.turns is None else workload.turns.previous < 0
    for row in rows:
        index = row.request_id
        if not 0 <= index < count:
            raise VoltanaError(f"request {index} is not in the workload of {count} requests")
        status[index] = row.status
        prefill_id[index], decode_id[index] = row.prefill_id, row.decode_id
        first_s[index] = NEVER if row.first_token_s is None else row.first_token_s
        if row.status == COMPLETED and row.finish_s is not None:
            finish_s[index] = row.finish_s
        cached[index], came[index] = row.cached_tokens, True
        arrival_s[index] = arrival_s[index] if row.arrival_s is None else row.arrival_s
    order = np.flatnonzero(came)
    order = order[np.argsort(arrival_s[order], kind="stable")]
    return RequestTable(
        arrival_s=arrival_s[order],
        input_tokens=workload.input_tokens[order],
        output_tokens=workload.output_tokens[order],
        prefill_id=prefill_id[order],
        decode_id=decode_id[order],
        first_token_s=first_s[order],
        finish_s=finish_s[order],
        status=status[order],
        retractions=np.zeros(len(order), dtype=np.int64),
        cached_tokens=cached[order] if has_cache else None,
        workload_row=None if workload.turns is None else order,
    )


def _with_reuse(
    record: InstanceRecord, view: _View, requests: RequestTable, config: SimConfig
) -> InstanceRecord:
    """What was found of its prompts by the answers' word, and computed by the engine's records.

    A decode server with a cache answers the larger of what it found itself and what prefill did:
    where both have one, prefill's is what it did not compute of its prompts (what its engine's
    records have in front of a later chunk is its earlier ones too), and decode's nobody tells.
    """
    if requests.cached_tokens is None:
        return record
    if view.phase == DECODE:
        if not config.decode_cache or config.prefix_cache_tokens:
            return record
        mine = requests.decode_id == view.instance_id
        return replace(record, unsent_tokens=int(requests.cached_tokens[mine].sum()))
    if view.phase == PREFILL and not config.prefix_cache_tokens:
        return record
    mine = requests.prefill_id == view.instance_id
    computed = int((view.chunk_tokens if view.phase == COLOCATED else view.tokens).sum())
    found = int(requests.cached_tokens[mine].sum())
    if config.decode_cache:
        ended = mine & (requests.status == COMPLETED)
        found = max(int(requests.input_tokens[ended].sum()) - computed, 0)
    return replace(record, cached_tokens=found, computed_tokens=computed)


def _makespan_s(
    rows: Sequence[Row], iterations: Sequence[IterationRow], *, is_complete: bool
) -> float:
    """End of the last request; of an interrupted run, the last thing that was seen."""
    ends = [row.finish_s for row in rows if row.finish_s is not None]
    if not is_complete or not ends:
        ends += [row.start_s + row.duration_s for row in iterations]
    return max(ends, default=0.0)


def _table(views: Sequence[_View]) -> IterationTable:
    order = np.argsort(np.concatenate([v.start_s for v in views]), kind="stable")

    def column(parts: Iterable[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return np.concatenate(list(parts))[order]

    return IterationTable(
        phase=column(np.full(len(v.start_s), v.phase) for v in views),
        instance_id=column(np.full(len(v.start_s), v.instance_id) for v in views),
        start_s=column(v.start_s for v in views),
        duration_s=column(v.duration_s for v in views),
        batch_size=column(v.batch_size for v in views),
        tokens=column(v.tokens for v in views),
        clock_mhz=column(v.clock_mhz for v in views),
        energy_j=column(v.energy_j for v in views),
        prefix_tokens=column(v.prefix_tokens for v in views),
        **(
            {
                "chunk_requests": column(v.chunk_requests for v in views),
                "chunk_tokens": column(v.chunk_tokens for v in views),
            }
            if any(v.phase == COLOCATED for v in views)
            else {}
        ),
    )


def _sum_by(keys: IntArray, values: FloatArray) -> dict[int, float]:
    return {int(key): float(values[keys == key].sum()) for key in np.unique(keys)}


def read_iterations(directory: Path) -> list[IterationRow]:
    """Every iteration that a replay wrote down, its warm-up included."""
    return _read_lines(directory / ITERATIONS, IterationRow)


def _read_iterations(directory: Path, window: Window) -> list[IterationRow]:
    rows = read_iterations(directory)
    moved = [msgspec.structs.replace(r, start_s=r.start_s - window.start_s) for r in rows]
    return [row for row in moved if row.start_s >= 0]


def _read_counters(directory: Path, window: Window) -> dict[tuple[Phase, int], list[EnergyRow]]:
    found: dict[tuple[Phase, int], list[EnergyRow]] = {}
    for row in _read_lines(directory / ENERGY, EnergyRow):
        moved = msgspec.structs.replace(row, at_s=row.at_s - window.start_s)
        found.setdefault((row.phase, row.instance_id), []).append(moved)
    return found


class _ClockLine(msgspec.Struct):
    at_s: float
    clock_mhz: int


def _read_clocks(
    directory: Path, key: tuple[Phase, int], window: Window
) -> list[tuple[float, int]]:
    path = directory / f"agent-{key[0]}-{key[1]}.clocks.jsonl"
    if not path.exists():
        return []
    return [(c.at_s - window.start_s, c.clock_mhz) for c in _read_lines(path, _ClockLine)]


def _read_lines(path: Path, kind: type[T]) -> list[T]:
    """All whole lines of a JSONL file."""
    decoder = msgspec.json.Decoder(kind)
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
        return [decoder.decode(line) for line in lines]
    except FileNotFoundError:
        raise VoltanaError(f"no {path.name} in {path.parent}: is it a replay's folder?") from None
    except msgspec.DecodeError as error:
        raise VoltanaError(f"cannot read {path}: {error}") from None
