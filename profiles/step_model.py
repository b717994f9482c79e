"""The tables as a function of one point: lean enough to be called for every iteration.

Within the grid the value is exact at its points and, between them, linear in tokens; linear in
batch size (decode) or in its reciprocal (prefill: attention over a batch of T tokens in B equal
prompts grows with T²/B); time is linear in 1/f (time = A + B/f) and power in f. A combination of
functions that are linear between the same knots is one as well, so that every (clock, batch size)
has one row of knots, built once and kept.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from itertools import pairwise

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.tables import Grid, GridRow

Row = tuple[list[float], list[float], list[float], list[float], list[float]]
"""knots (tokens), time_s, time slope, power_w, power slope; slopes belong to the piece after."""

Line = tuple[float, float, float, float, float]
"""A linear piece of decode; see `StepModel.decode_line`."""


class StepModel:
    """Time and power of one iteration, scalar, without numpy.

    Args:
        prefill: Medians of the prefill table.
        decode: Medians of the decode table.
        idle_w: Power between two iterations by clock; needs clock 0, the unlocked card.
        rest_w: Power of an instance that has not worked yet, by clock; by default the same.
        clocks_mhz: Supported clocks, ascending; the last one is what an unlocked card runs at.
        extrapolate: Beyond the grid go on instead of refusing. In tokens: time along the last
            piece, never below the row's least, power held. In batch sizes of decode: time and
            power along the chord over the upper half of them, never below the largest's; steps
            between padded batches make the last piece alone a poor guess. In batch sizes of
            prefill: as the largest, whose attention work is small already.
        power_limit_w: Of the instance; power that is gone on with stays below it.
    """

    __slots__ = (
        "_decode", "_decode_rows", "_extrapolate", "_idle_w", "_power_limit_w", "_prefill",
        "_prefill_batches", "_prefill_rows", "_rest_w", "_top_mhz",
    )  # fmt: skip

    def __init__(
        self,
        prefill: Grid,
        decode: Grid,
        idle_w: dict[int, float],
        clocks_mhz: tuple[int, ...],
        *,
        rest_w: dict[int, float] | None = None,
        extrapolate: bool = False,
        power_limit_w: float = math.inf,
    ) -> None:
        self._prefill = prefill
        self._decode = decode
        self._idle_w = dict(idle_w)
        self._rest_w = dict(rest_w or idle_w)
        self._top_mhz = clocks_mhz[-1]
        self._extrapolate = extrapolate
        self._power_limit_w = power_limit_w
        self._decode_rows: dict[int, Row] = {}
        self._prefill_rows: dict[int, Row] = {}
        common = set.intersection(*(set(rows) for rows in prefill.values()))
        self._prefill_batches: list[float] = sorted(common)

    def predict_s(self, phase: str, clock_mhz: int, batch_size: float, tokens: float) -> float:
        """Duration of one iteration in seconds; arguments as of `time_and_power`."""
        return self.time_and_power(phase, clock_mhz, batch_size, tokens)[0]

    def power_w(self, phase: str, clock_mhz: int, batch_size: float, tokens: float) -> float:
        """Power of the instance in watts in one iteration; arguments as of `time_and_power`."""
        return self.time_and_power(phase, clock_mhz, batch_size, tokens)[1]

    def time_and_power(
        self, phase: str, clock_mhz: int, batch_size: float, tokens: float
    ) -> tuple[float, float]:
        """Duration (s) and power (W) of one iteration.

        Args:
            phase: "prefill" or "decode".
            clock_mhz: A clock within the profiled range; 0 is unlocked, at the top clock.
            batch_size: Requests. In prefill any number > 0: the effective number of equal prompts.
            tokens: New tokens (prefill) or context tokens (decode) of the batch, in all.

        Raises:
            VoltanaError: The point lies outside the profiled grid and `extrapolate` is off.
        """
        if phase == "prefill":
            return self._prefill_point(clock_mhz, batch_size, tokens)
        row = self._decode_rows.get((clock_mhz << 16) | int(batch_size))
        if row is None or batch_size != int(batch_size):
            row = self._make_decode_row(clock_mhz, batch_size)
        knots = row[0]
        if tokens < knots[0] or tokens > knots[-1]:
            self._refuse_outside(phase, clock_mhz, batch_size, tokens, knots)
            return _beyond(row, tokens)
        i = bisect_right(knots, tokens) - 1
        ahead = tokens - knots[i]
        return row[1][i] + row[2][i] * ahead, row[3][i] + row[4][i] * ahead

    def idle_power_w(self, clock_mhz: int) -> float:
        """Power between two iterations in watts at a locked clock, or unlocked (0)."""
        power = self._idle_w.get(clock_mhz)
        return _at_clock(self._idle_w, clock_mhz) if power is None else power

    def rest_power_w(self, clock_mhz: int) -> float:
        """Power before the first iteration, which a parked instance never leaves."""
        return _at_clock(self._rest_w, clock_mhz)

    def decode_line(self, clock_mhz: int, batch_size: int, tokens: int) -> Line:
        """The linear piece of decode that holds `tokens`.

        Args:
            clock_mhz: A clock within the profiled range; 0 is unlocked.
            batch_size: Requests.
            tokens: Context tokens of the whole batch.

        Returns:
            Tokens up to which it holds (`tokens` itself outside the grid), time at `tokens` (s),
            its slope (s/token), power (W) and its slope (W/token).

        Raises:
            VoltanaError: As `time_and_power`.
        """
        row = self._decode_rows.get((clock_mhz << 16) | batch_size)
        if row is None:
            row = self._make_decode_row(clock_mhz, batch_size)
        knots = row[0]
        if tokens < knots[0] or tokens >= knots[-1]:
            time_s, power_w = self.time_and_power("decode", clock_mhz, batch_size, tokens)
            return tokens, time_s, 0.0, power_w, 0.0
        i = bisect_right(knots, tokens) - 1
        ahead, time_slope, power_slope = tokens - knots[i], row[2][i], row[4][i]
        return (
            knots[i + 1],
            row[1][i] + time_slope * ahead,
            time_slope,
            row[3][i] + power_slope * ahead,
            power_slope,
        )

    def decode_row(self, clock_mhz: int, batch_size: int) -> Row:
        """Knots, times, time slopes, powers and power slopes at a clock and batch size."""
        return self._make_decode_row(clock_mhz, batch_size)

    def prefill_rows(self, clock_mhz: int) -> dict[int, Row]:
        """`decode_row` for prefill, by the batch sizes between which 1/batch is interpolated."""
        return {
            int(b): self._across_clocks(self._prefill, clock_mhz, b, "prefill")
            for b in self._prefill_batches
        }

    def _prefill_point(
        self, clock_mhz: int, batch_size: float, tokens: float
    ) -> tuple[float, float]:
        batches = self._prefill_batches
        if batch_size > batches[-1]:
            self._refuse_batch("prefill", batch_size, batches[-1])
            batch_size = batches[-1]
        at = bisect_right(batches, batch_size) - 1
        if at >= 0 and batches[at] == batch_size:
            return self._at_prefill_row(clock_mhz, int(batches[at]), tokens)
        low = max(at, 0)
        if low + 1 >= len(batches):
            return self._at_prefill_row(clock_mhz, int(batches[low]), tokens)
        first, second = batches[low], batches[low + 1]
        weight = (1.0 / batch_size - 1.0 / first) / (1.0 / second - 1.0 / first)
        time_0, power_0 = self._at_prefill_row(clock_mhz, int(first), tokens)
        time_1, power_1 = self._at_prefill_row(clock_mhz, int(second), tokens)
        clamped = min(max(weight, 0.0), 1.0)
        time_s = time_0 + weight * (time_1 - time_0)
        if weight < 0.0 and time_s < time_0:  # a longer prefix never saves time, noise may say so
            time_s = time_0
        return time_s, power_0 + clamped * (power_1 - power_0)

    def _at_prefill_row(
        self, clock_mhz: int, batch_size: int, tokens: float
    ) -> tuple[float, float]:
        row = self._prefill_rows.get((clock_mhz << 16) | batch_size)
        if row is None:
            row = self._across_clocks(self._prefill, clock_mhz, batch_size, "prefill")
            self._prefill_rows[(clock_mhz << 16) | batch_size] = row
        knots = row[0]
        if tokens < knots[0] or tokens > knots[-1]:
            self._refuse_outside("prefill", clock_mhz, batch_size, tokens, knots)
            return _beyond(row, tokens)
        i = bisect_right(knots, tokens) - 1
        ahead = tokens - knots[i]
        return row[1][i] + row[2][i] * ahead, row[3][i] + row[4][i] * ahead

    def _make_decode_row(self, clock_mhz: int, batch_size: float) -> Row:
        row = self._across_clocks(self._decode, clock_mhz, batch_size, "decode")
        if batch_size == int(batch_size):
            self._decode_rows[(clock_mhz << 16) | int(batch_size)] = row
        return row

    def _across_clocks(self, grid: Grid, clock_mhz: int, batch_size: float, phase: str) -> Row:
        clock = clock_mhz or self._top_mhz
        clocks = list(grid)
        if not clocks[0] <= clock <= clocks[-1]:
            raise VoltanaError(
                f"{phase} was profiled from {clocks[0]} to {clocks[-1]} MHz, asked for {clock} MHz"
            )
        at = bisect_right(clocks, clock) - 1
        below = self._across_batches(grid[clocks[at]], batch_size, phase)
        if clocks[at] == clock:
            return _with_slopes(below)
        above = self._across_batches(grid[clocks[at + 1]], batch_size, phase)
        low, high = clocks[at], clocks[at + 1]
        time_weight = (1.0 / clock - 1.0 / low) / (1.0 / high - 1.0 / low)
        return _with_slopes(_mix(below, above, time_weight, (clock - low) / (high - low)))

    def _across_batches(
        self, rows: Mapping[int, GridRow], batch_size: float, phase: str
    ) -> GridRow:
        batches = list(rows)
        if not batches[0] <= batch_size <= batches[-1]:
            limit = batches[-1] if batch_size > batches[-1] else batches[0]
            self._refuse_batch(phase, batch_size, limit)
            if batch_size > limit and len(batches) > 1:
                return self._beyond_batches(rows, batch_size)
            batch_size = float(limit)
        at = bisect_right(batches, batch_size) - 1
        low = rows[batches[at]]
        if batches[at] == batch_size:
            return low
        weight = (batch_size - batches[at]) / (batches[at + 1] - batches[at])
        return _mix(low, rows[batches[at + 1]], weight, weight)

    def _beyond_batches(self, rows: Mapping[int, GridRow], batch_size: float) -> GridRow:
        """A row past the largest batch size; see `extrapolate`."""
        batches = list(rows)
        last = batches[-1]
        half = batches[min(bisect_right(batches, last // 2), len(batches) - 1) - 1]
        weight = (batch_size - half) / (last - half)
        beyond, largest = (_mix(rows[half], rows[last], w, w) for w in (weight, 1.0))
        limit_w = self._power_limit_w
        return GridRow(
            tokens=beyond.tokens,
            time_s=tuple(map(max, beyond.time_s, largest.time_s)),
            power_w=tuple(
                max(w, min(p, limit_w))
                for p, w in zip(beyond.power_w, largest.power_w, strict=True)
            ),
        )

    def _refuse_outside(
        self, phase: str, clock: int, batch_size: float, tokens: float, knots: list[float]
    ) -> None:
        if not self._extrapolate:
            raise VoltanaError(
                f"{phase} at {clock or self._top_mhz} MHz and batch size {batch_size:g} was "
                f"profiled from {knots[0]:g} to {knots[-1]:g} tokens, asked for {tokens:g}: "
                "profile further or set extrapolate=true"
            )

    def _refuse_batch(self, phase: str, batch_size: float, limit: float) -> None:
        if not self._extrapolate:
            raise VoltanaError(
                f"{phase} batch size {batch_size:g} is outside the profiled grid, which ends at "
                f"{limit:g}: profile further or set extrapolate=true"
            )


def _at_clock(power_w: dict[int, float], clock_mhz: int) -> float:
    """Linear between the given clocks; what was interpolated is kept in `power_w`."""
    if clock_mhz not in power_w:
        clocks = sorted(c for c in power_w if c > 0)
        if not clocks or not clocks[0] <= clock_mhz <= clocks[-1]:
            raise VoltanaError(f"idle power was not profiled at {clock_mhz} MHz")
        at = bisect_right(clocks, clock_mhz) - 1
        low, high = clocks[at], clocks[at + 1]
        weight = (clock_mhz - low) / (high - low)
        power_w[clock_mhz] = power_w[low] + weight * (power_w[high] - power_w[low])
    return power_w[clock_mhz]


def _mix(first: GridRow, second: GridRow, time_weight: float, power_weight: float) -> GridRow:
    """Combine two rows on the union of their knots, within the range that both cover."""
    start = max(first.tokens[0], second.tokens[0])
    end = min(first.tokens[-1], second.tokens[-1])
    if start > end:
        raise VoltanaError(
            f"neighbouring grid rows share no range of tokens: {first.tokens[0]:g}-"
            f"{first.tokens[-1]:g} and {second.tokens[0]:g}-{second.tokens[-1]:g}"
        )
    inner = {t for t in (*first.tokens, *second.tokens) if start <= t <= end}
    knots = tuple(sorted(inner | {start, end}))
    a, b = _with_slopes(first), _with_slopes(second)
    points = [(_inside(a, t), _inside(b, t)) for t in knots]
    return GridRow(
        tokens=knots,
        time_s=tuple(p[0] + time_weight * (q[0] - p[0]) for p, q in points),
        power_w=tuple(p[1] + power_weight * (q[1] - p[1]) for p, q in points),
    )


def _inside(row: Row, tokens: float) -> tuple[float, float]:
    i = bisect_right(row[0], tokens) - 1
    ahead = tokens - row[0][i]
    return row[1][i] + row[2][i] * ahead, row[3][i] + row[4][i] * ahead


def _beyond(row: Row, tokens: float) -> tuple[float, float]:
    knots, times, slopes, powers, _ = row
    if tokens < knots[0]:
        slope = slopes[0]
        return max(times[0] + slope * (tokens - knots[0]), min(times)), powers[0]
    slope = slopes[-2] if len(knots) > 1 else 0.0
    return max(times[-1] + slope * (tokens - knots[-1]), min(times)), powers[-1]


def _with_slopes(row: GridRow) -> Row:
    knots, times, powers = list(row.tokens), list(row.time_s), list(row.power_w)
    widths = [b - a for a, b in pairwise(knots)]
    time_slopes = [(b - a) / w for a, b, w in zip(times, times[1:], widths, strict=False)]
    power_slopes = [(b - a) / w for a, b, w in zip(powers, powers[1:], widths, strict=False)]
    return knots, times, [*time_slopes, 0.0], powers, [*power_slopes, 0.0]
