"""Requests of sessions: a turn arrives when the answer before it has been read."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from voltana.sim.engine.logs.exact import RunLog
from voltana.sim.engine.request import SimRequest
from voltana.sim.workload.workload import Workload


class Sessions:
    """A workload with prompts or turns, and the log that hears when an answer has ended.

    It stands before the run's own log. A request's number is its place in order of arrival, which
    only the run knows; until it arrives it carries its row in the workload. A turn that is due
    counts as unresolved, so that a run goes on while somebody thinks. Where a request is rejected
    its session ends.
    """

    def __init__(self, workload: Workload, log: RunLog) -> None:
        """See the class.

        Args:
            workload: The requests.
            log: The run's own.
        """
        self._workload = workload
        self._log = log
        self._rows: list[int] = []
        """Row in the workload of each request, in order of arrival."""
        self._arrival_s: list[float] = []
        self._next = [-1] * len(workload)
        """Row of the turn that waits for this row's answer; -1 if none does."""
        self._think_s: list[float] = []
        if workload.turns is not None:
            self._think_s = workload.turns.think_s.tolist()
            for row, previous in enumerate(workload.turns.previous.tolist()):
                if previous >= 0:
                    self._next[previous] = row
        self._num_due = 0
        self._call_at: Callable[[float, Callable[[float], None]], None]
        self._accept: Callable[[SimRequest], None]

    def begin(
        self,
        call_at: Callable[[float, Callable[[float], None]], None],
        accept: Callable[[SimRequest], None],
    ) -> Iterator[SimRequest]:
        """The requests that wait for nobody, in order of arrival.

        Args:
            call_at: The agenda's.
            accept: Takes each other request when it arrives.
        """
        self._call_at, self._accept = call_at, accept
        turns = self._workload.turns
        waits = [False] * len(self._next) if turns is None else (turns.previous >= 0).tolist()
        for row, arrival_s in enumerate(self._workload.arrival_s.tolist()):
            if not waits[row]:
                yield self._request(row, arrival_s)

    @property
    def unresolved(self) -> int:
        """Requests that have arrived and not ended, and turns that are due."""
        return self._log.unresolved + self._num_due

    def arrive(self, request: SimRequest) -> None:
        self._rows.append(request.request_id)
        self._arrival_s.append(request.arrival_s)
        request.request_id = len(self._rows) - 1
        self._log.arrive(request)

    def finish(self, request: SimRequest, now_s: float) -> None:
        self._log.finish(request, now_s)
        following = self._next[self._rows[request.request_id]]
        if following >= 0:
            arrival_s = now_s + self._think_s[following]
            self._num_due += 1
            self._call_at(arrival_s, partial(self._send, following))

    def results(self, end_s: float) -> dict[str, Any]:
        found = self._log.results(end_s)
        table = found["requests"]
        if len(table) or not found.get("sketch"):
            rows = np.array(self._rows, dtype=np.int64)
            found["requests"] = dataclasses.replace(
                table,
                arrival_s=np.array(self._arrival_s, dtype=np.float64),
                input_tokens=self._workload.input_tokens[rows],
                output_tokens=self._workload.output_tokens[rows],
                workload_row=rows,
            )
        return found

    def assign(self, request: SimRequest) -> None:
        self._log.assign(request)

    def reuse(self, request: SimRequest, tokens: int) -> None:
        self._log.reuse(request, tokens)

    def first_token(self, request: SimRequest, now_s: float) -> None:
        self._log.first_token(request, now_s)

    def reject(self, request: SimRequest) -> None:
        self._log.reject(request)

    def retract(self, request: SimRequest) -> None:
        self._log.retract(request)

    def gaps(self, first_s: float, step_s: float, count: int, weight: int) -> None:
        self._log.gaps(first_s, step_s, count, weight)

    def noisy_gaps(
        self, first_s: float, step_s: float, weight: int, multipliers: array[float]
    ) -> None:
        self._log.noisy_gaps(first_s, step_s, weight, multipliers)

    def _send(self, row: int, now_s: float) -> None:
        self._num_due -= 1
        self._accept(self._request(row, now_s))

    def _request(self, row: int, arrival_s: float) -> SimRequest:
        workload = self._workload
        made = SimRequest(
            row, arrival_s, int(workload.input_tokens[row]), int(workload.output_tokens[row])
        )
        if workload.prompts is not None:
            made.prompt = workload.prompts.prompt(row)
            if workload.prompts.answers is not None:
                made.answer = int(workload.prompts.answers[row])
        return made
