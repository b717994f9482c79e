"""What the instances report while a run goes on, kept exactly.

Token gaps come in runs: `count` iterations in a row, each `step_s` longer than the one before,
every one of them the gap of `weight` requests. With noise each has a multiplier beside.
"""

from __future__ import annotations

from array import array
from typing import Any, Protocol

import numpy as np

from voltana.sim.engine.request import NEVER, SimRequest
from voltana.sim.records import COMPLETED, IN_FLIGHT, REJECTED, FloatArray, IntArray, RequestTable
from voltana.sim.workload.workload import Workload


class RunLog(Protocol):
    """Where every instance of a run reports to."""

    @property
    def unresolved(self) -> int:
        """Requests that have arrived and not ended."""

    def arrive(self, request: SimRequest) -> None:
        """It has arrived."""

    def assign(self, request: SimRequest) -> None:
        """The router has chosen its instances."""

    def reuse(self, request: SimRequest, tokens: int) -> None:
        """Its prompt begins to be computed, and so many tokens of it need not be."""

    def first_token(self, request: SimRequest, now_s: float) -> None:
        """Its first token was made."""

    def finish(self, request: SimRequest, now_s: float) -> None:
        """Its last token was made."""

    def reject(self, request: SimRequest) -> None:
        """No instance of this fleet can ever hold it."""

    def retract(self, request: SimRequest) -> None:
        """It was put back in the queue for want of KV cache."""

    def gaps(self, first_s: float, step_s: float, count: int, weight: int) -> None:
        """A run of token gaps.

        Args:
            first_s: Length of the first gap.
            step_s: How much longer each gap is than the one before.
            count: Gaps in the run.
            weight: Requests that have this gap at each iteration.
        """

    def noisy_gaps(
        self, first_s: float, step_s: float, weight: int, multipliers: array[float]
    ) -> None:
        """A run of token gaps, gap k of which is (first_s + k·step_s)·multipliers[k].

        Args:
            first_s: Length of the first gap, noise aside; see `gaps` for the others.
            step_s: As there.
            weight: As there.
            multipliers: One for each gap of the run.
        """

    def results(self, end_s: float) -> dict[str, Any]:
        """The fields of a `RunRecord` that this log answers for, of a run that ended then."""


class GapRuns:
    """Runs of token gaps, kept in four numbers each; with noise, a multiplier a gap beside.

    Example:
        >>> runs = GapRuns()
        >>> runs.add(2.0, 0.5, 3, 7)
        >>> runs.add_noisy(1.0, 0.0, 2, array("d", (0.5, 1.5)))
        >>> [column.tolist() for column in runs.expand()]
        [[2.0, 2.5, 3.0, 0.5, 1.5], [7, 7, 7, 2, 2]]
    """

    __slots__ = ("_multipliers", "_noisy", "_plain", "num_gaps")

    def __init__(self) -> None:
        self._plain: array[float] = array("d")
        self._noisy: array[float] = array("d")
        self._multipliers: array[float] = array("d")
        self.num_gaps = 0
        """Gaps in all runs, whatever their weight."""

    def add(self, first_s: float, step_s: float, count: int, weight: int) -> None:
        """As `RunLog.gaps`."""
        self._plain.extend((first_s, step_s, count, weight))
        self.num_gaps += count

    def add_noisy(
        self, first_s: float, step_s: float, weight: int, multipliers: array[float]
    ) -> None:
        """As `RunLog.noisy_gaps`."""
        count = len(multipliers)
        self._noisy.extend((first_s, step_s, count, weight))
        self._multipliers.extend(multipliers)
        self.num_gaps += count

    def expand(self) -> tuple[FloatArray, IntArray]:
        """Length and weight of each gap, shape (n,): those without multipliers first."""
        gap_s, weight = _expand(self._plain)
        noisy_s, noisy_weight = _expand(self._noisy)
        noisy_s *= np.frombuffer(self._multipliers, dtype=np.float64)
        return np.concatenate((gap_s, noisy_s)), np.concatenate((weight, noisy_weight))


def _expand(runs: array[float]) -> tuple[FloatArray, IntArray]:
    columns = np.frombuffer(runs, dtype=np.float64).reshape(-1, 4).T
    first_s, step_s = columns[:2]
    count, weight = columns[2:].astype(np.int64)
    k = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(first_s, count) + np.repeat(step_s, count) * k, np.repeat(weight, count)


class ExactLog:
    """Keeps every request and every run of gaps; memory grows with the workload."""

    __slots__ = (
        "_arrived", "_cached_tokens", "_decode_id", "_finish_s", "_first_token_s", "_gaps",
        "_prefill_id", "_retractions", "_status", "_workload", "unresolved",
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
        self._cached_tokens: list[int] = []
        """Empty where nobody has a cache of prefixes."""
        self._arrived = 0
        self._gaps = GapRuns()
        self.unresolved = 0

    def arrive(self, request: SimRequest) -> None:
        self.unresolved += 1
        self._arrived += 1

    def assign(self, request: SimRequest) -> None:
        self._prefill_id[request.request_id] = request.prefill_id
        self._decode_id[request.request_id] = request.decode_id

    def reuse(self, request: SimRequest, tokens: int) -> None:
        if not self._cached_tokens:
            self._cached_tokens = [0] * len(self._status)
        self._cached_tokens[request.request_id] = tokens

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
        self._gaps.add(first_s, step_s, count, weight)

    def noisy_gaps(
        self, first_s: float, step_s: float, weight: int, multipliers: array[float]
    ) -> None:
        self._gaps.add_noisy(first_s, step_s, weight, multipliers)

    def results(self, end_s: float) -> dict[str, Any]:
        itl_s, itl_weight = self._gaps.expand()
        return {"requests": self._table(), "itl_s": itl_s, "itl_weight": itl_weight}

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
            cached_tokens=np.array(self._cached_tokens[came], dtype=np.int64)
            if self._cached_tokens
            else None,
        )
