"""Conversations: several turns, each of which repeats all that was said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from voltana.sim.policies.spec import parameter
from voltana.sim.workload.lengths import draw_lengths, list_lengths
from voltana.sim.workload.sessions.session import Session, cut_to_context, thinks_s

LINE: Final = (
    "conversations of several turns, ShareGPT messages and answers; a turn waits for the answer"
    " before it and for its reader (chat:turns=3.7,think=60)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatParameters:
    """How people talk. Sources beside each number."""

    turns: float = parameter(3.7, "mean turns of a conversation (geometric)", low=1.0)
    """73 % of ShareGPT's conversations have more than one turn (Gao et al., CachedAttention,
    arXiv:2403.19708); a geometric number, ours, with that share has mean 1 / (1 - 0.73)."""
    think_s: float = parameter(60.0, "mean time from an answer to the next turn", low=0.0)
    """Ours: what reading the mean answer takes, 325 tokens of 0.75 words at some 240 a minute.
    Exponential, ours."""
    lengths: str = parameter(
        "sharegpt", "lengths of a turn's message and its answer", choices=tuple(list_lengths())
    )
    system_tokens: int = parameter(0, "prompt of the service that all conversations share", low=0)
    longest_tokens: int = parameter(8_192, "context at which a conversation ends", low=2)
    """The filter of the `sharegpt-8k` lengths."""
    waits: bool = parameter(True, "a turn waits for the answer; false: as if that took no time")
    num_shared: ClassVar[int] = 1
    """Names of segments that belong to no single session."""


def draw_chat(parameters: ChatParameters, rng: np.random.Generator) -> Session:
    """One conversation.

    A turn's message and answer are a pair of the length distribution; `sharegpt` has the first
    turn's pairs, which stand for those of later turns too (ours).
    """
    count = int(rng.geometric(1.0 / parameters.turns))
    asked, answers = draw_lengths(parameters.lengths, count, rng)
    has_system = parameters.system_tokens > 0
    session = Session(
        opening=(0,) if has_system else (),
        opening_tokens=(parameters.system_tokens,) if has_system else (),
        asked_tokens=asked.tolist(),
        answer_tokens=answers.tolist(),
        think_s=thinks_s(count, parameters.think_s, rng),
    )
    return cut_to_context(session, parameters.longest_tokens)
