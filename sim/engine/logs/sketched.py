"""A run log in bounded memory: rows go to sketches, and to a parquet file if one is named."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from voltana.sim.engine.logs.exact import GapRuns
from voltana.sim.engine.request import NEVER, SimRequest
from voltana.sim.records import COMPLETED, IN_FLIGHT, REJECTED, IntArray, RequestTable
from voltana.sim.sketches import RunSketch

_ROWS: Final = 65_536
"""Rows kept before they are folded into the sketches."""


class SketchLog:
    """The `RunLog` of runs too long to keep."""

    def __init__(self, *, slo_ttft_s: float, slo_itl_s: float, spill: RowSpill | None) -> None:
        """See the class.

        Args:
            slo_ttft_s: Promise of first tokens, for attainment.
            slo_itl_s: Promise of token gaps.
            spill: Takes one row a request.
        """
        self._sketch = RunSketch(slo_ttft_s=slo_ttft_s, slo_itl_s=slo_itl_s)
        self._spill = spill
        self._ttft_s: list[float] = []
        self._finished: list[SimRequest] = []
        self._finish_s: list[float] = []
        self._gaps = GapRuns()
        self._open: dict[int, SimRequest] = {}
        """Requests that have arrived and not ended."""
        self.unresolved = 0

    def arrive(self, request: SimRequest) -> None:
        self.unresolved += 1
        self._sketch.counts["arrived"] += 1
        self._open[request.request_id] = request

    def assign(self, request: SimRequest) -> None:
        pass

    def retract(self, request: SimRequest) -> None:
        pass

    def reuse(self, request: SimRequest, tokens: int) -> None:
        pass

    def first_token(self, request: SimRequest, now_s: float) -> None:
        request.first_token_s = now_s
        self._ttft_s.append(now_s - request.arrival_s)

    def finish(self, request: SimRequest, now_s: float) -> None:
        self.unresolved -= 1
        self._finished.append(request)
        self._finish_s.append(now_s)
        self._end_row(request, now_s, COMPLETED)
        if len(self._finished) >= _ROWS:
            self._fold_requests()

    def reject(self, request: SimRequest) -> None:
        self.unresolved -= 1
        self._sketch.reject()
        self._end_row(request, NEVER, REJECTED)

    def gaps(self, first_s: float, step_s: float, count: int, weight: int) -> None:
        self._gaps.add(first_s, step_s, count, weight)
        if self._gaps.num_gaps >= 8 * _ROWS:
            self._fold_gaps()

    def noisy_gaps(
        self, first_s: float, step_s: float, weight: int, multipliers: array[float]
    ) -> None:
        self._gaps.add_noisy(first_s, step_s, weight, multipliers)
        if self._gaps.num_gaps >= 8 * _ROWS:
            self._fold_gaps()

    def results(self, end_s: float) -> dict[str, Any]:
        self._fold_requests()
        self._fold_gaps()
        in_flight = list(self._open.values())
        self._sketch.add_in_flight(
            np.array([r.first_token_s - r.arrival_s for r in in_flight], dtype=np.float64),
            end_s - np.array([r.arrival_s for r in in_flight], dtype=np.float64),
        )
        for request in in_flight:
            self._end_row(request, NEVER, IN_FLIGHT)
        empty = np.array([], dtype=np.int64)
        return {
            "requests": _no_requests(),
            "itl_s": empty.astype(np.float64),
            "itl_weight": empty,
            "sketch": self._sketch,
        }

    def _end_row(self, request: SimRequest, finish_s: float, status: int) -> None:
        del self._open[request.request_id]
        if self._spill is not None:
            self._spill.add(request, finish_s, status)

    def _fold_requests(self) -> None:
        self._sketch.add_first_tokens(np.array(self._ttft_s))
        finished, finish_s = self._finished, np.array(self._finish_s)
        arrival_s = np.array([r.arrival_s for r in finished])
        first_s = np.array([r.first_token_s for r in finished])
        outputs = np.array([r.output_tokens for r in finished], dtype=np.int64)
        self._sketch.add_finished(first_s - arrival_s, finish_s - arrival_s, outputs)
        self._ttft_s, self._finished, self._finish_s = [], [], []

    def _fold_gaps(self) -> None:
        self._sketch.add_gaps(*self._gaps.expand())
        self._gaps = GapRuns()


class RowSpill:
    """One parquet row a request: in the order in which they end, then those still in flight.

    The columns are those of `requests.parquet` in a run directory, after `request_id`. Rows are
    written in groups, the last one when the spill is closed. A run that fails leaves no whole file.
    """

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, _SCHEMA)
        self._rows: list[SimRequest] = []
        self._finish_s: list[float] = []
        self._status: list[int] = []

    def __enter__(self) -> RowSpill:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._write()
        self._writer.close()

    def add(self, request: SimRequest, finish_s: float, status: int) -> None:
        """Append a row; the request does not change any more.

        Args:
            request: It has ended, or the run has.
            finish_s: When its last token was made; NaN without one.
            status: One of `voltana.sim.records`.
        """
        self._rows.append(request)
        self._finish_s.append(finish_s)
        self._status.append(status)
        if len(self._rows) >= _ROWS:
            self._write()

    def _write(self) -> None:
        if not self._rows:
            return
        columns = {name: [getattr(r, name) for r in self._rows] for name in _FIELDS}
        ended = {"finish_s": self._finish_s, "status": self._status}
        self._writer.write_table(pa.table({**columns, **ended}, schema=_SCHEMA))
        self._rows, self._finish_s, self._status = [], [], []


_FIELDS: Final = (
    "request_id", "arrival_s", "input_tokens", "output_tokens", "prefill_id", "decode_id",
    "first_token_s", "retractions",
)  # fmt: skip
_SCHEMA: Final = pa.schema(
    [(name, pa.float64() if name.endswith("_s") else pa.int64()) for name in _FIELDS]
    + [("finish_s", pa.float64()), ("status", pa.int64())]
)


def _no_requests() -> RequestTable:
    none: IntArray = np.array([], dtype=np.int64)
    never = none.astype(np.float64)
    return RequestTable(
        arrival_s=never,
        input_tokens=none,
        output_tokens=none,
        prefill_id=none,
        decode_id=none,
        first_token_s=never,
        finish_s=never,
        status=none,
        retractions=none,
    )
