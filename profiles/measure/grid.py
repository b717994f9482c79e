"""Which points to measure: at and just past every suspected step, then where the line is wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, TypeVar

import numpy as np

from voltana.profiles.engines.base import MIXED, EngineFacts, Phase, Point

T = TypeVar("T")
Row = list[tuple[int, float]]
"""(tokens, time in s) of a batch size, tokens ascending."""
Rows = dict[tuple[Phase, int], Row]

PROMPT_TOKENS: Final = (1, 4, *(2**power for power in range(4, 15)))
CONTEXT_TOKENS: Final = (1, 16, 128, 512, 1024, 2048, 4096, 8192)
SMALL_STEP: Final = 8
LARGE_STEP: Final = 128
SMALL_STEP_END: Final = 128
NEAR_END: Final = 0.9
"""A usual context closer to the last one than this says nothing new."""
NARROW: Final = 0.1
"""A gap of this fraction is left alone: what a straight line misses there is noise."""
MIXED_CONTEXTS: Final = (16, 1024)
"""Beside the longest that fits. Few: what is looked for is how much both parts have in common."""
MIXED_PARTS: Final = 8
"""The middle chunk is that part of the largest one, the smallest that part of the middle one."""
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
    if phase == MIXED:
        return _mixed(facts, max_batch_size, max_tokens)
    limit = min(facts.max_running_requests, max_batch_size)
    cap = min(facts.kv_capacity_tokens, max_tokens)
    points = [
        Point(phase=phase, batch_size=batch, tokens=batch * context)
        for batch in batch_sizes(facts, limit=limit)
        for context in _contexts(facts, cap // batch)
    ]
    return _spread(points)


def _mixed(facts: EngineFacts, max_batch_size: int, max_tokens: int) -> list[Point]:
    """Three chunks, batches and contexts, the corners first.

    A prompt takes a place in the batch and room in the cache, who decodes a token of its budget.
    """
    limit = min(facts.max_running_requests - 1, max_batch_size)
    budget = min(facts.max_prefill_tokens, facts.max_context_tokens, max_tokens)
    if limit < 1 or budget < 2:
        return []
    batches = sorted({1, round(math.sqrt(limit)), limit})
    largest = max(budget - limit, budget // 2)
    chunks = sorted({max(largest // MIXED_PARTS**k, 1) for k in (0, 1, 2)})
    found: list[tuple[int, Point]] = []
    for chunk, batch in itertools.product(chunks, batches):
        if batch + chunk > budget:
            continue
        room = min(facts.kv_capacity_tokens - chunk, max_tokens)
        end = min(room // batch, facts.max_context_tokens - 1)
        usual = {max(context, facts.min_context_tokens) for context in MIXED_CONTEXTS}
        contexts = sorted(c for c in {*usual, end} if facts.min_context_tokens <= c <= end)
        for context in contexts:
            sizes = ((chunk, chunks), (batch, batches), (context, contexts))
            inner = sum(size not in (of[0], of[-1]) for size, of in sizes)
            tokens = batch * context
            point = Point(phase=MIXED, batch_size=batch, tokens=tokens, chunk_tokens=chunk)
            found.append((inner, point))
    return _corners_first(found)


def _corners_first(found: Sequence[tuple[int, Point]]) -> list[Point]:
    """Those with no size between two others, from both ends in turn; then by how many have one.

    A budget that holds few of them still has small and large ones.
    """
    corners = [point for inner, point in found if inner == 0]
    turns = (point for pair in zip(corners, reversed(corners), strict=True) for point in pair)
    rest = sorted((row for row in found if row[0]), key=lambda row: row[0])
    return list(dict.fromkeys([*turns, *(point for _, point in rest)]))


def _contexts(facts: EngineFacts, room: int) -> list[int]:
    """Contexts of a batch whose requests have `room` tokens each, up to the last that fits.

    A simulation refuses what lies beyond the grid, so it must reach the end of the KV cache.
    """
    end = min(room, facts.max_context_tokens)
    if end < facts.min_context_tokens:
        return []
    usual = {max(context, facts.min_context_tokens) for context in CONTEXT_TOKENS}
    return sorted({*(context for context in usual if context <= NEAR_END * end), end})


def next_refinement(
    time_s: Mapping[Point, float], tried: frozenset[Point] = frozenset()
) -> Point | None:
    """Midpoint of the gap whose straight line is most in doubt, or None if all are good.

    The doubt of a gap next to a known knot is how far that knot lies off the line through its
    neighbours, relative to its value: where the curve bends there, it bends in the gap too. Gaps
    between tokens of one batch size and, in decode, between batch sizes of one context count alike.
    A batch size begun this way is given both ends of its row before anything else.
    """
    rows = _rows(time_s)
    found = [*_token_doubts(rows), *_batch_doubts(rows)]
    unknown = [d for d in found if d[1] not in time_s and d[1] not in tried]
    best = max(unknown, key=lambda d: d[0], default=None)
    return best[1] if best is not None and best[0] > REFINE_ERROR else None


def _token_doubts(rows: Rows) -> Iterator[tuple[float, Point]]:
    """(doubt, midpoint) along the tokens of each row."""
    for (phase, batch), row in rows.items():
        for (t0, y0), (t1, y1), (t2, y2) in zip(row, row[1:], row[2:], strict=False):
            doubt = abs(y0 + (y2 - y0) * (t1 - t0) / (t2 - t0) - y1) / y1
            low, high = (t0, t1) if t1 - t0 > t2 - t1 else (t1, t2)
            middle = (low + high) // 2 // batch * batch
            if low < middle < high and high - low > NARROW * low:
                yield doubt, Point(phase=phase, batch_size=batch, tokens=middle)


def _batch_doubts(rows: Rows) -> Iterator[tuple[float, Point]]:
    """(doubt, an end of a new row) between the batch sizes of decode, at contexts of all three."""
    decode = {batch: row for (phase, batch), row in rows.items() if phase == "decode"}
    whole = {batch: row for batch, row in decode.items() if len(row) > 1}
    for batch in sorted(decode.keys() - whole.keys()) if whole else ():
        for tokens in _ends(whole, batch):
            yield math.inf, Point(phase="decode", batch_size=batch, tokens=tokens)
    sizes = sorted(whole)
    for b0, b1, b2 in zip(sizes, sizes[1:], sizes[2:], strict=False):
        low, high = (b0, b1) if b1 - b0 > b2 - b1 else (b1, b2)
        middle = (low + high) // 2
        if low < middle < high and high - low > NARROW * low:
            doubt = _doubt_between(whole, b0, b1, b2)
            end = _ends(whole, middle)[-1]
            yield doubt, Point(phase="decode", batch_size=middle, tokens=end)


def _doubt_between(whole: Mapping[int, Row], b0: int, b1: int, b2: int) -> float:
    """How far the middle one lies off the line through the others, at their shared contexts."""
    firsts, lasts = ([whole[b][i][0] / b for b in (b0, b1, b2)] for i in (0, -1))
    doubt = 0.0
    for context in (max(firsts), min(lasts)) if max(firsts) <= min(lasts) else ():
        y0, y1, y2 = (_at(whole[b], b * context) for b in (b0, b1, b2))
        doubt = max(doubt, abs(y0 + (y2 - y0) * (b1 - b0) / (b2 - b0) - y1) / y1)
    return doubt


def _ends(whole: Mapping[int, Row], batch: int) -> tuple[int, int]:
    """Tokens of the shortest and longest point of a row, by what the other rows were held at."""
    shortest = min(row[0][0] // size for size, row in whole.items())
    longest = max(row[-1][0] // size for size, row in whole.items())
    room = max(row[-1][0] for row in whole.values()) // batch
    return batch * shortest, batch * min(longest, room)


def _at(row: Row, tokens: float) -> float:
    """Time at some tokens by the straight line between points."""
    return float(np.interp(tokens, [t for t, _ in row], [y for _, y in row]))


def _rows(time_s: Mapping[Point, float]) -> Rows:
    rows: Rows = {}
    apart = [point for point in time_s if point.phase != MIXED]
    for point in sorted(apart, key=lambda p: (p.phase, p.batch_size, p.tokens)):
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
