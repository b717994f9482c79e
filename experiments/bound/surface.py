"""A profile's interpolant laid out in arrays: every clock, batch size and linear piece in tokens.

`StepModel` answers one point at a time, a minimum over all of them needs them all. Strictly between
two neighbouring batch sizes of the decode table, time and power at fixed clock and tokens are
linear in the batch size, on the same knots: the rows of the first and the last batch size between
them give all the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from voltana.profiles.catalog import Profile
from voltana.profiles.step_model import Row
from voltana.profiles.tables import Grid, grid_of

FloatArray = npt.NDArray[np.float64]
Knots = tuple[FloatArray, FloatArray, FloatArray]
"""tokens, time_s, power_w"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeSurface:
    """Linear pieces of decode: one row a clock, batch size and piece, arrays of shape (m,)."""

    batch_size: FloatArray
    start_tokens: FloatArray
    end_tokens: FloatArray
    start_s: FloatArray
    end_s: FloatArray
    start_w: FloatArray
    end_w: FloatArray

    def up_to(self, most_requests: int) -> DecodeSurface:
        """The pieces of batch sizes up to that one."""
        kept = self.batch_size <= most_requests
        return DecodeSurface(**{f.name: getattr(self, f.name)[kept] for f in fields(self)})

    @property
    def shortest_s(self) -> float:
        """The shortest iteration there is."""
        return float(min(self.start_s.min(), self.end_s.min()))

    def above(self, floor_w: float) -> DecodeSurface:
        """The same with powers counted from a floor."""
        return replace(self, start_w=self.start_w - floor_w, end_w=self.end_w - floor_w)

    def most_j(self, lam: float) -> float:
        """The largest P·T + λ·b·T that any piece may come to."""
        above_w = np.maximum(self.start_w, self.end_w) + lam * self.batch_size
        return float((above_w * np.maximum(self.start_s, self.end_s)).max())

    def least_per_request(self, beta: float, lam: float) -> float:
        """Least of all pieces of (P·T + λ·b·T - β·t)/b, in J. Exact.

        On a piece P and T are linear in t, so that this is a quadratic: least at an end, or at
        its vertex if it is convex and that lies inside.

        Args:
            beta: Price of a context token, in J.
            lam: Price of a second of each request, in W.
        """
        b = self.batch_size
        first_w, last_w = self.start_w + lam * b, self.end_w + lam * b
        start = first_w * self.start_s - beta * self.start_tokens
        end = last_w * self.end_s - beta * self.end_tokens
        least = np.minimum(start, end)
        bend = (last_w - first_w) * (self.end_s - self.start_s)
        with np.errstate(divide="ignore", invalid="ignore"):
            # start + (end - start - bend)·x + bend·x² for x in [0, 1]
            at = -(end - start - bend) / (2.0 * bend)
        inside = (bend > 0.0) & (at > 0.0) & (at < 1.0)
        x = at[inside]
        vertex = start[inside] - bend[inside] * x * x
        least[inside] = np.minimum(least[inside], vertex)
        return float((least / b).min())

    def mean_slope_j(self) -> float:
        """A typical growth of energy with context, J/token: where a search starts."""
        width = np.maximum(self.end_tokens - self.start_tokens, 1.0)
        slope = self.end_w * self.end_s - self.start_w * self.start_s
        return float(max(np.median(slope / width), 0.0))

    def mean_power_w(self) -> float:
        """A typical power: where a search starts."""
        return float(np.median(self.start_w))


def joined(surfaces: Sequence[DecodeSurface]) -> DecodeSurface:
    """The pieces of all of them."""
    columns = {f.name: [getattr(s, f.name) for s in surfaces] for f in fields(DecodeSurface)}
    return DecodeSurface(**{name: np.concatenate(parts) for name, parts in columns.items()})


@lru_cache(maxsize=8)
def decode_surface(
    profile: Profile, most_requests: int, extrapolate: bool, capacity_tokens: int
) -> DecodeSurface:
    """All pieces of all supported clocks.

    Args:
        profile: The truth.
        most_requests: Largest batch size.
        extrapolate: Whether iterations outside the grid are allowed. Time beyond the knots is then
            taken as its row's least where it would fall, so that values there are lower bounds.
        capacity_tokens: Largest context sum; only counts with `extrapolate`.
    """
    truth, grid = profile.truth(extrapolate=extrapolate), grid_of(profile.decode)
    parts: list[tuple[FloatArray, ...]] = []
    for clock in profile.clocks_mhz:
        for first, last in _spans(grid, clock, most_requests, extrapolate):
            batches = np.arange(first, last + 1, dtype=np.float64)
            rows = truth.decode_row(clock, first), truth.decode_row(clock, last)
            parts.append(_pieces(batches, rows, capacity_tokens if extrapolate else None))
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    names = [f.name for f in fields(DecodeSurface)]
    return DecodeSurface(**dict(zip(names, columns, strict=True)))


def prefill_knots(
    profile: Profile, most_tokens: int, most_requests: int, extrapolate: bool
) -> Iterator[Knots]:
    """Rows of prefill at every supported clock, cut at `most_tokens`.

    Batch sizes between which a batch of at most `most_requests` prompts can lie. With
    `extrapolate` the ranges before and after a row follow as rows of their own, lower bounds of
    the time there.

    Args:
        profile: Whose tables.
        most_tokens: Largest batch, in new tokens.
        most_requests: Largest batch, in prompts.
        extrapolate: Whether batches may lie outside the tables.
    """
    truth = profile.truth(extrapolate=extrapolate)
    for clock in profile.clocks_mhz:
        rows = truth.prefill_rows(clock)
        sizes = list(rows)
        above = [b for b in sizes if b >= most_requests]
        for batch in sizes[: sizes.index(above[0]) + 1] if above else sizes:
            knots, times, slopes, powers, _ = (np.asarray(c) for c in rows[batch])
            if extrapolate:
                yield knots[:1], times.min(keepdims=True), powers[:1]
                if most_tokens > knots[-1]:
                    ends = np.array([knots[-1], float(most_tokens)])
                    slope = slopes[-2] if len(knots) > 1 else 0.0
                    first_s = times[-1] if slope >= 0.0 else times.min()
                    last_s = first_s + max(slope, 0.0) * (ends[1] - ends[0])
                    yield ends, np.array([first_s, last_s]), np.full(2, powers[-1])
            yield _cut(knots, times, powers, float(most_tokens))


def _cut(knots: FloatArray, times: FloatArray, powers: FloatArray, end: float) -> Knots:
    if end >= knots[-1] or end <= knots[0]:
        return knots, times, powers
    kept = knots < end
    return (
        np.append(knots[kept], end),
        np.append(times[kept], np.interp(end, knots, times)),
        np.append(powers[kept], np.interp(end, knots, powers)),
    )


def _spans(
    grid: Grid, clock: int, most_requests: int, extrapolate: bool
) -> Iterator[tuple[int, int]]:
    """Runs of batch sizes within which the decode row of that clock is linear in the batch."""
    around = [
        max((c for c in grid if c <= clock), default=clock),
        min((c for c in grid if c >= clock), default=clock),
    ]
    rows = [grid[c] for c in around if c in grid]
    low, high = max(min(r) for r in rows), min(max(r) for r in rows)
    if extrapolate:
        low, high = 1, most_requests
    high = min(high, most_requests)
    knots = sorted({b for r in rows for b in r if low <= b <= high} | {low, high})
    for b in knots:
        if low <= b <= high:
            yield b, b
    for first, second in pairwise(knots):
        if second - first > 1:
            yield first + 1, second - 1


def _pieces(
    batches: FloatArray, rows: tuple[Row, Row], capacity_tokens: int | None
) -> tuple[FloatArray, ...]:
    """Columns of `DecodeSurface` for batch sizes whose rows lie evenly between two rows."""
    knots = np.asarray(rows[0][0])
    weight = np.linspace(0.0, 1.0, len(batches))[:, np.newaxis]
    times = (1.0 - weight) * np.asarray(rows[0][1]) + weight * np.asarray(rows[1][1])
    powers = (1.0 - weight) * np.asarray(rows[0][3]) + weight * np.asarray(rows[1][3])
    tokens = np.broadcast_to(knots, times.shape)
    if capacity_tokens is not None:
        tokens, times, powers = _extended(tokens, times, powers, float(capacity_tokens))
    elif len(knots) == 1:
        tokens, times, powers = (np.repeat(m, 2, axis=1) for m in (tokens, times, powers))
    columns = [side for m in (tokens, times, powers) for side in (m[:, :-1], m[:, 1:])]
    sizes = np.broadcast_to(batches[:, np.newaxis], columns[0].shape)
    return tuple(c.ravel() for c in (sizes, *columns))


def _extended(
    tokens: FloatArray, times: FloatArray, powers: FloatArray, capacity: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Below the first knot the row's least time; above the last one, the last slope if it rises."""
    least = times.min(axis=1, keepdims=True)
    start, end = tokens[:, :1], tokens[:, -1:]
    low = np.minimum(start, 1.0)
    slope = np.zeros_like(least)
    if tokens.shape[1] > 1:
        width = end - tokens[:, -2:-1]
        slope = np.maximum((times[:, -1:] - times[:, -2:-1]) / width, 0.0)
    falls = (
        np.zeros_like(least, dtype=bool)
        if tokens.shape[1] == 1
        else times[:, -1:] < times[:, -2:-1]
    )
    far = np.maximum(end, capacity)
    first_s = np.where(falls, least, times[:, -1:])
    above = first_s + slope * (far - end)
    return (
        np.hstack([low, start, tokens, end, far]),
        np.hstack([least, least, times, first_s, above]),
        np.hstack([powers[:, :1], powers[:, :1], powers, powers[:, -1:], powers[:, -1:]]),
    )
