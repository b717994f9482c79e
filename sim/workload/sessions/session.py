"""One session, and what drawing any kind of it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What is said, in tokens, and how long passes between. One entry a turn in each list."""

    opening: Sequence[int] = ()
    """Names of the segments that sessions of its kind begin with, below `num_shared`."""
    opening_tokens: Sequence[int] = ()
    asked_tokens: Sequence[int]
    """New in the prompt of each turn."""
    answer_tokens: Sequence[int]
    think_s: Sequence[float]
    """From the answer before to each turn; 0 for the first."""


def cut_to_context(session: Session, longest_tokens: int) -> Session:
    """The session up to the last turn whose prompt and answer a context holds; one at least."""
    said = np.add(session.asked_tokens, session.answer_tokens)
    used = np.cumsum(said) + sum(session.opening_tokens)
    count = max(1, int(np.searchsorted(used, longest_tokens, side="right")))
    return replace(
        session,
        asked_tokens=session.asked_tokens[:count],
        answer_tokens=session.answer_tokens[:count],
        think_s=session.think_s[:count],
    )


def thinks_s(count: int, mean_s: float, rng: np.random.Generator) -> list[float]:
    """Exponential times before each turn but the first, in s."""
    return [0.0, *(mean_s * rng.standard_exponential(count - 1)).tolist()]
