"""A request inside the simulator, and the log that all instances write to."""

from __future__ import annotations

import numpy as np
import simpy

from sim.records import COMPLETED, IN_FLIGHT, REJECTED, RequestTable
from sim.workload.workload import Workload

NEVER = float("nan")


class SimRequest:
    """Mutable state of one request on its way through the fleet."""

    __slots__ = (
        "arrival_s", "decode_id", "finish_iteration", "generated_tokens", "input_tokens",
        "is_running", "last_token_s", "output_tokens", "prefilled_tokens", "request_id",
    )  # fmt: skip

    def __init__(
        self, request_id: int, arrival_s: float, input_tokens: int, output_tokens: int
    ) -> None:
        self.request_id = request_id
        self.arrival_s = arrival_s
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        self.decode_id = -1
        self.prefilled_tokens = 0
        self.generated_tokens = 0
        """Tokens whose keys and values decode holds or held beyond the prompt."""
        self.finish_iteration = -1
        self.is_running = False
        self.last_token_s = NEVER
        """Instant of its newest token while it is out of the batch; NaN before the first."""


class RunLog:
    """Per-request outcomes and the weighted sample of token gaps; counts the run down."""

    def __init__(self, env: simpy.Environment, workload: Workload) -> None:
        count = len(workload)
        self._workload = workload
        self.prefill_id = [-1] * count
        self.decode_id = [-1] * count
        self.first_token_s = [NEVER] * count
        self.finish_s = [NEVER] * count
        self.status = [IN_FLIGHT] * count
        self.retractions = [0] * count
        self.gap_s: list[float] = []
        self.gap_weight: list[int] = []
        self.unresolved = count
        self.all_resolved = env.event()

    def finish(self, request_id: int, now_s: float) -> None:
        """The request's last token is out."""
        self.finish_s[request_id] = now_s
        self._resolve(request_id, COMPLETED)

    def reject(self, request_id: int) -> None:
        """The request can never be served by this fleet."""
        self._resolve(request_id, REJECTED)

    def _resolve(self, request_id: int, status: int) -> None:
        self.status[request_id] = status
        self.unresolved -= 1
        if self.unresolved == 0:
            self.all_resolved.succeed()

    def table(self) -> RequestTable:
        """Freeze into arrays."""
        return RequestTable(
            arrival_s=self._workload.arrival_s,
            input_tokens=self._workload.input_tokens,
            output_tokens=self._workload.output_tokens,
            prefill_id=np.array(self.prefill_id, dtype=np.int64),
            decode_id=np.array(self.decode_id, dtype=np.int64),
            first_token_s=np.array(self.first_token_s),
            finish_s=np.array(self.finish_s),
            status=np.array(self.status, dtype=np.int64),
            retractions=np.array(self.retractions, dtype=np.int64),
        )
