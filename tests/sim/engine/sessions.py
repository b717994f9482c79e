"""Small workloads whose prompts share what they begin with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from voltana.sim.workload.prompts import Prompts, Turns
from voltana.sim.workload.workload import Workload

Segment = tuple[int, int]
"""Name and tokens."""


def sharing(
    rows: Sequence[tuple[float, Sequence[Segment], int]],
    *,
    previous: Sequence[int] | None = None,
    think_s: Sequence[float] | None = None,
    answers: Sequence[int] | None = None,
) -> Workload:
    """Requests from (arrival_s, segments of the prompt, output_tokens).

    Args:
        rows: They, in order of arrival.
        previous: Whom each waits for.
        think_s: How long after that.
        answers: The segment that each output is.
    """
    names = [[name for name, _ in segments] for _, segments, _ in rows]
    tokens = [[length for _, length in segments] for _, segments, _ in rows]
    turns = None
    if previous is not None and think_s is not None:
        turns = Turns(previous=np.array(previous), think_s=np.array(think_s, dtype=np.float64))
    return Workload(
        arrival_s=np.array([row[0] for row in rows], dtype=np.float64),
        input_tokens=np.array([sum(row) for row in tokens], dtype=np.int64),
        output_tokens=np.array([row[2] for row in rows], dtype=np.int64),
        prompts=Prompts.of_rows(names, tokens, answers),
        turns=turns,
    )


def random_sessions(
    seed: int,
    *,
    count: int,
    mean_gap_s: float,
    longest: int = 40,
    is_closed: bool = False,
    has_answers: bool = False,
) -> Workload:
    """Sessions that begin alike: each turn repeats a session so far, with an answer and more.

    Some turns come twice, as if asked again, and some sessions go back a few turns.

    Args:
        seed: Of everything.
        count: Requests.
        mean_gap_s: Between arrivals.
        longest: A segment's bound.
        is_closed: Turns wait for the ones before them.
        has_answers: What a turn repeats is what was put out before; else nobody knows.
    """
    rng = np.random.default_rng(seed)
    lengths: dict[int, int] = {}

    def segment(name: int) -> Segment:
        return name, lengths.setdefault(name, int(rng.integers(1, longest)))

    openings = [[segment(name) for name in range(k + 1)] for k in range(3)]
    sessions: list[tuple[int, list[Segment]]] = []
    rows: list[tuple[float, list[Segment], int]] = []
    previous: list[int] = []
    answers: list[int] = []
    fresh, now_s = 100, 0.0
    for row in range(count):
        now_s += float(rng.exponential(mean_gap_s))
        if not sessions or rng.random() < 0.3:
            sessions.append((-1, list(openings[rng.integers(3)])))
        at = int(rng.integers(len(sessions)))
        before, said = sessions[at]
        kept = len(said) - int(rng.integers(0, 2) * rng.integers(0, len(said)))
        said = said[: max(kept, 1)]
        for _ in range(int(rng.integers(0, 3))):
            said.append(segment(fresh))
            fresh += 1
        rows.append((now_s, list(said), int(rng.integers(1, 30))))
        previous.append(before)
        if has_answers:
            answers.append(fresh)
            lengths[fresh] = rows[-1][2]
            said = [*said, (fresh, rows[-1][2])]
            fresh += 1
        sessions[at] = (row, said)
    if not is_closed:
        return sharing(rows, answers=answers or None)
    think_s = [0.0 if p < 0 else float(rng.exponential(5 * mean_gap_s)) for p in previous]
    arrival_s = [row[0] for row in rows]
    for row, before in enumerate(previous):  # the earliest that it could come
        arrival_s[row] = max(arrival_s[row], arrival_s[before] + think_s[row] if row else 0.0)
    order = np.argsort(arrival_s, kind="stable")
    place = {int(row): k for k, row in enumerate(order)}
    return sharing(
        [(arrival_s[k], rows[k][1], rows[k][2]) for k in order],
        previous=[place[previous[k]] if previous[k] >= 0 else -1 for k in order],
        think_s=[think_s[k] for k in order],
        answers=[answers[k] for k in order] if has_answers else None,
    )
