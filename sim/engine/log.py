"""What the instances report while a run goes on, kept exactly.

Token gaps come in runs: `count` iterations in a row, each `step_s` longer than the one before,
every one of them the gap of `weight` requests. With noise each has a multiplier beside.
"""

from __future__ import annotations

from array import array
from typing import Any, Protocol

import numpy as np

from sim.engine.request import NEVER, SimRequest
from sim.records import COMPLETED, IN_FLIGHT, REJECTED, FloatArray, IntArray, RequestTable
from sim.workload.workload import Workload


class RunLog(Protocol):
    """Where every instance of a run reports to."""

    unresolved: int
    """Requests that have arrived and not ended."""

    def arrive(self, request: SimRequest) -> None:
        """It has arrived."""

    def assign(self, request: SimRequest) -> None:
        """The router has chosen its instances."""

    def first_token(self, request: SimRequest, now_s: float) -> None:
        """Its first token is out."""

    def finish(self, request: SimRequest, now_s: float) -> None:
        """Its last token is out."""

    def reject(self, request: SimRequest) -> None:
        """It can never be served by this fleet."""

    def retract(self, request: SimRequest) -> None:
        """It was put back in the queue for want of KV cache."""

    def gaps(self, first_s: float, step_s: float, count: int, weight: int) -> None:
        """A run of token gaps; see the module."""

    def noisy_gaps(
        self, first_s: float, step_s: float, weight: int, multipliers: array[float]
    ) -> None:
        """A run of token gaps, gap k of which is (first_s + k·step_s)·multipliers[k]."""

    def results(self, end_s: float) -> dict[str, Any]:
        """The fields of a `RunRecord` that this log answers for, of a run that ended then."""


def expand_gaps(
    first_s: FloatArray, step_s: FloatArray, count: IntArray, weight: IntArray
) -> tuple[FloatArray, IntArray]:
    """Single iterations of runs: gap k of a run is first_s + k·step_s. All shapes (n,).

    Example:
        >>> runs = np.array([2.0]), np.array([0.5]), np.array([3]), np.array([7])
        >>> [column.tolist() for column in expand_gaps(*runs)]
        [[2.0, 2.5, 3.0], [7, 7, 7]]
    """
    starts = np.cumsum(count) - count
    k = np.arange(int(count.sum())) - np.repeat(starts, count)
    return np.repeat(first_s, count) + np.repeat(step_s, count) * k, np.repeat(weight, count)


class NoisyGaps:
    """Runs of token gaps with a multiplier for each iteration."""

    __slots__ = ("_count", "_first_s", "_multipliers", "_step_s", "_weight")

    def __init__(self) -> None:
        self._first_s: list[float] = []
        self._step_s: list[float] = []
        self._count: list[int] = []
        self._weight: list[int] = []
        self._multipliers: array[float] = array("d")

    def __len__(self) -> int:
        return len(self._multipliers)

    def add(self, first_s: float, step_s: float, weight: int, multipliers: array[float]) -> None:
        """Append a run; see `RunLog.noisy_gaps`."""
        self._first_s.append(first_s)
        self._step_s.append(step_s)
        self._count.append(len(multipliers))
        self._weight.append(weight)
        self._multipliers.extend(multipliers)

    def expand(self) -> tuple[FloatArray, IntArray]:
        """Length and weight of each gap, shape (n,)."""
        gap_s, weight = expand_gaps(
            np.array(self._first_s),
            np.array(self._step_s),
            np.array(self._count, dtype=np.int64),
            np.array(self._weight, dtype=np.int64),
        )
        return gap_s * np.frombuffer(self._multipliers, dtype=np.float64), weight


class ExactLog:
    """Keeps every request and every run of gaps; memory grows with the workload."""

    __slots__ = (
        "_arrived", "_count", "_decode_id", "_finish_s", "_first_s", "_first_token_s", "_noisy",
        "_prefill_id", "_retractions", "_status", "_step_s", "_weight", "_workload", "unresolved",
    )  # fmt: skip

    def __init__(self, workload: Workload) -> None:
        count = len(workload)
        self._workload = workload
        self._prefill_id = [-1] * count
        self._decode_id = [-1] * count
        self._first_token_s = [NEVER] * count
        self._finish_s = [NEVER] * count
        self._status = [IN_FLIGHT] * count
        self._retractions = [0] * count
        self._arrived = 0
        self._first_s: list[float] = []
        self._step_s: list[float] = []
        self._count: list[int] = []
        self._weight: list[int] = []
        self._noisy = NoisyGaps()
        self.unresolved = 0

    def arrive(self, request: SimRequest) -> None:
        self.unresolved += 1
        self._arrived += 1

    def assign(self, request: SimRequest) -> None:
        self._prefill_id[request.request_id] = request.prefill_id
        self._decode_id[request.request_id] = request.decode_id

    def first_token(self, request: SimRequest, now_s: float) -> None:
        request.first_token_s = now_s
        self._first_token_s[request.request_id] = now_s

    def finish(self, request: SimRequest, now_s: float) -> None:
        index = request.request_id
        self._finish_s[index] = now_s
        self._status[index] = COMPLETED
        self.unresolved -= 1

    def reject(self, request: SimRequest) -> None:
        self._status[request.request_id] = REJECTED
        self.unresolved -= 1

    def retract(self, request: SimRequest) -> None:
        self._retractions[request.request_id] = request.retractions

    def gaps(self, first_s: float, step_s: float, count: int, weight: int) -> None:
        self._first_s.append(first_s)
        self._step_s.append(step_s)
        self._count.append(count)
        self._weight.append(weight)

    def noisy_gaps(
        self, first_s: float, step_s: float, weight: int, multipliers: array[float]
    ) -> None:
        self._noisy.add(first_s, step_s, weight, multipliers)

    def results(self, end_s: float) -> dict[str, Any]:
        itl_s, itl_weight = expand_gaps(
            np.array(self._first_s),
            np.array(self._step_s),
            np.array(self._count, dtype=np.int64),
            np.array(self._weight, dtype=np.int64),
        )
        noisy_s, noisy_weight = self._noisy.expand()
        return {
            "requests": self._table(),
            "itl_s": np.concatenate((itl_s, noisy_s)),
            "itl_weight": np.concatenate((itl_weight, noisy_weight)),
        }

    def _table(self) -> RequestTable:
        """Those that arrived before the run ended; they arrive in the order of the workload."""
        came = slice(self._arrived)
        return RequestTable(
            arrival_s=self._workload.arrival_s[came],
            input_tokens=self._workload.input_tokens[came],
            output_tokens=self._workload.output_tokens[came],
            prefill_id=np.array(self._prefill_id[came], dtype=np.int64),
            decode_id=np.array(self._decode_id[came], dtype=np.int64),
            first_token_s=np.array(self._first_token_s[came]),
            finish_s=np.array(self._finish_s[came]),
            status=np.array(self._status[came], dtype=np.int64),
            retractions=np.array(self._retractions[came], dtype=np.int64),
        )
