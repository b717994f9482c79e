"""Which points to measure: at and just past every suspected step, then where the line is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, TypeVar

from profiles.engines.base import EngineFacts, Phase, Point

T = TypeVar("T")

PROMPT_TOKENS: Final = (1, 4, *(2**power for power in range(4, 15)))
CONTEXT_TOKENS: Final = (1, 16, 128, 512, 1024, 2048, 4096, 8192)
SMALL_STEP: Final = 8
LARGE_STEP: Final = 128
SMALL_STEP_END: Final = 128
REFINE_ERROR: Final = 0.03
"""Interpolation error (a fraction) below which a gap needs no further point."""


def batch_sizes(facts: EngineFacts, *, limit: int) -> tuple[int, ...]:
    """1, 2, 4, then 8k and 8k+1 to 128, 128k and 128k+1 above, and the CUDA-graph buckets."""
    steps = [*range(SMALL_STEP, SMALL_STEP_END, SMALL_STEP), *range(LARGE_STEP, limit, LARGE_STEP)]
    wanted = {1, 2, 4, *steps, *(step + 1 for step in steps), limit}
    wanted |= {size + past for size in facts.graph_batch_sizes for past in (0, 1)}
    return tuple(sorted(size for size in wanted if 1 <= size <= limit))


def design(
    facts: EngineFacts, phase: Phase, *, max_batch_size: int, max_tokens: int
) -> list[Point]:
    """The first grid of a phase, coarse points first, so that a short budget still spans it.

    Args:
        facts: Limits of the engine.
        phase: Which phase.
        max_batch_size: Largest batch of decode.
        max_tokens: Largest total of tokens of a point.
    """
    if phase == "prefill":
        cap = min(facts.max_prefill_tokens, facts.max_context_tokens, max_tokens)
        tokens = sorted({t for t in PROMPT_TOKENS if t <= cap})
        points = [Point(phase=phase, batch_size=b, tokens=t) for t in tokens for b in (1, 2, 4)]
        return _spread([p for p in points if p.tokens % p.batch_size == 0])
    limit = min(facts.max_running_requests, max_batch_size)
    contexts = sorted({max(context, facts.min_context_tokens) for context in CONTEXT_TOKENS})
    cap = min(facts.kv_capacity_tokens, max_tokens)
    points = [
        Point(phase=phase, batch_size=batch, tokens=batch * context)
        for batch in batch_sizes(facts, limit=limit)
        for context in contexts
        if batch * context <= cap and context <= facts.max_context_tokens
    ]
    return _spread(points)


def next_refinement(
    time_s: Mapping[Point, float], tried: frozenset[Point] = frozenset()
) -> Point | None:
    """Midpoint of the gap whose straight line is most in doubt, or None if all are good.

    The doubt of a gap next to a known knot is how far that knot lies off the line through its
    neighbours, relative to its value: where the curve bends there, it bends in the gap too.
    """
    best: tuple[float, Point] | None = None
    for (phase, batch), row in _rows(time_s).items():
        for (t0, y0), (t1, y1), (t2, y2) in zip(row, row[1:], row[2:], strict=False):
            doubt = abs(y0 + (y2 - y0) * (t1 - t0) / (t2 - t0) - y1) / y1
            low, high = (t0, t1) if t1 - t0 > t2 - t1 else (t1, t2)
            middle = (low + high) // 2 // batch * batch
            point = Point(phase=phase, batch_size=batch, tokens=middle)
            is_new = low < middle < high and point not in time_s and point not in tried
            if is_new and doubt > REFINE_ERROR and (best is None or doubt > best[0]):
                best = (doubt, point)
    return None if best is None else best[1]


def _rows(
    time_s: Mapping[Point, float],
) -> dict[tuple[Phase, int], list[tuple[int, float]]]:
    rows: dict[tuple[Phase, int], list[tuple[int, float]]] = {}
    for point in sorted(time_s, key=lambda p: (p.phase, p.batch_size, p.tokens)):
        row = rows.setdefault((point.phase, point.batch_size), [])
        row.append((point.tokens, time_s[point]))
    return rows


def _spread(points: Sequence[Point]) -> list[Point]:
    """Coarse first: the corners, both ends of ever more batch sizes, then what lies between.

    Whenever the budget ends, every batch size but the last one begun spans its range of tokens, so
    that neighbouring ones can be interpolated.
    """
    rows: dict[int, list[Point]] = {}
    for point in sorted(points, key=lambda p: (p.batch_size, p.tokens)):
        rows.setdefault(point.batch_size, []).append(point)
    ordered = [rows[batch_size] for batch_size in _subdivided(sorted(rows))]
    ends = [point for row in ordered for point in (row[0], row[-1])]
    corners = [ordered[0][0], ordered[min(1, len(ordered) - 1)][-1]] if ordered else []
    inner = [_subdivided(row) for row in ordered]
    longest = max(map(len, inner), default=0)
    between = [row[i] for i in range(longest) for row in inner if i < len(row)]
    return list(dict.fromkeys([*corners, *ends, *between]))


def _subdivided(ordered: Sequence[T]) -> list[T]:
    """Ends first, then ever finer subdivisions of a sorted list."""
    stride = 1
    while stride < len(ordered):
        stride *= 2
    chosen: dict[T, None] = dict.fromkeys([*ordered[:1], *ordered[-1:]])
    while stride >= 1:
        chosen.update(dict.fromkeys(ordered[::stride]))
        stride //= 2
    return list(chosen)
