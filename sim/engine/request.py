"""A request inside the simulator."""

from __future__ import annotations

from voltana.sim.policies.base import RunningRequest, WaitingRequest
from voltana.sim.policies.requests import Prompt

NEVER = float("nan")


class SimRequest:
    """Mutable state of one request on its way through the fleet."""

    __slots__ = (
        "answer", "arrival_s", "decode_id", "end_context_tokens", "finish_iteration",
        "first_token_s", "generated_tokens", "input_tokens", "is_running", "last_token_s",
        "output_tokens", "prefill_id", "prefilled_tokens", "prompt", "request_id", "retractions",
        "unsent_tokens",
    )  # fmt: skip

    def __init__(
        self, request_id: int, arrival_s: float, input_tokens: int, output_tokens: int
    ) -> None:
        """A request that is to come.

        Args:
            request_id: Its number in order of arrival, from 0.
            arrival_s: When it arrives.
            input_tokens: Of its prompt.
            output_tokens: That it will have made at its end.
        """
        self.request_id = request_id
        self.arrival_s = arrival_s
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        self.prefill_id = -1
        self.decode_id = -1
        self.prefilled_tokens = 0
        """Of the prompt: computed, or found in a cache of prefixes."""
        self.unsent_tokens = 0
        """Of the prompt: found in decode's cache, and so not sent to it."""
        self.prompt: Prompt | None = None
        """What it consists of; None where the workload does not say."""
        self.answer = -1 - request_id
        """Name of the segment that its output is, in the prompts that repeat it; below 0: none."""
        self.generated_tokens = 0
        """Tokens whose keys and values decode holds or held beyond the prompt."""
        self.end_context_tokens = 0
        """Tokens whose keys and values decode holds when it leaves; set when it joins."""
        self.finish_iteration = -1
        self.is_running = False
        self.first_token_s = NEVER
        self.last_token_s = NEVER
        """Instant of its newest token while it is out of the batch; NaN before the first."""
        self.retractions = 0

    def as_waiting(self, done_tokens: int = 0) -> WaitingRequest:
        """What policies see of it in a queue: its context, less what of that is done."""
        return WaitingRequest(
            request_id=self.request_id,
            arrival_s=self.arrival_s,
            input_tokens=self.input_tokens + self.generated_tokens - done_tokens,
        )

    def as_running(self, iteration: int, *, knows_length: bool) -> RunningRequest:
        """What policies see of it in the batch, after that iteration."""
        return RunningRequest(
            request_id=self.request_id,
            arrival_s=self.arrival_s,
            input_tokens=self.input_tokens,
            generated_tokens=self.output_tokens - max(self.finish_iteration - iteration, 0),
            output_tokens=self.output_tokens if knows_length else None,
            first_token_s=self.first_token_s if self.first_token_s == self.first_token_s else None,
        )

    def began(self) -> int:
        """The iteration after which it would have begun, had it never been retracted."""
        return self.finish_iteration - (self.end_context_tokens - self.input_tokens)
