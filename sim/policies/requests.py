"""Requests as policies see them: waiting, running, or just arrived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


class Prompt:
    """What a prompt consists of: segments, which have the same tokens wherever they have one name.

    Two prompts share the segments that both begin with. A segment is a block of a trace, or what
    somebody said in a session; its length follows from its name.
    """

    __slots__ = ("ends", "names")

    def __init__(self, names: Sequence[int], tokens: Sequence[int]) -> None:
        """Put a prompt together.

        Args:
            names: Of its segments, in order.
            tokens: Of each segment, all >= 1.
        """
        self.names = list(names)
        self.ends = list(accumulate(tokens))
        """Tokens up to the end of each segment; the last is the prompt's length."""

    def followed_by(self, name: int, tokens: int) -> Prompt:
        """The prompt and one segment more, of so many tokens."""
        longer = Prompt(self.names, ())
        longer.names.append(name)
        longer.ends = [*self.ends, self.ends[-1] + tokens]
        return longer


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingRequest:
    """A request in an instance's queue."""

    request_id: int
    arrival_s: float
    input_tokens: int
    """Tokens still to be prefilled (prefill), or of context to be loaded (decode)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRequest:
    """A request in the running batch."""

    request_id: int
    arrival_s: float
    input_tokens: int
    generated_tokens: int
    output_tokens: int | None
    """The length it will reach; None unless the driver knows it (a length oracle)."""
    first_token_s: float | None


@dataclass(slots=True)
class RequestView:
    """A request as the router sees it on arrival."""

    request_id: int
    arrival_s: float
    input_tokens: int
    output_tokens: int | None
    """None unless the driver offers a length oracle."""
    prompt: Prompt | None = None
    """None unless the workload says what prompts share."""
