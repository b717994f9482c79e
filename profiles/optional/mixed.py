"""Iterations that compute a chunk of prompts beside a step of decode: what they take and draw.

A part is what the tables have, the chunk alone and the step alone. Together they take the sum of
both times less a share of the shorter one, the overlap, at the mean power of both times a ratio.
Without measurements the share is what is asked for (0: the sum of parts) and the ratio 1; with
`mixed.csv` both are from there: a measured point is met exactly, between points they are linear in
the clock and in the logarithms of chunk, batch and context, and beyond them they are held.

Why shares and not seconds: what both parts save is one pass over the weights, and no part is
shorter than that; so a share moves little where times move by factors.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd

from voltana.profiles.step_model import StepModel
from voltana.profiles.tables import MIXED_POINT

MIXED: Final = "mixed.csv"
Shares = tuple[float, float, float]
"""Overlap, what time is beyond that, and power over the mean of both parts."""
Line = tuple[list[float], list[Shares]]
"""Of one clock, chunk and batch: logarithms of contexts, ascending, and the shares there."""
Axis = tuple[list[float], list[Any]]
"""Keys, ascending, and at each of them the axis behind it, on the last the shares."""
Surface = Mapping[float, Mapping[float, Line]]
"""Of one clock: log chunk -> log batch -> line; ascending."""


class MixedGrid:
    """Overlap and power ratio as measured, by clock, chunk, batch and context."""

    def __init__(self, surfaces: Mapping[int, Surface]) -> None:
        """See `of_table`."""
        self._clocks: Axis = (
            [float(clock) for clock in surfaces],
            [
                (list(rows), [(list(lines), list(lines.values())) for lines in rows.values()])
                for rows in surfaces.values()
            ],
        )

    @classmethod
    def of_table(cls, table: pd.DataFrame, model: StepModel) -> MixedGrid:
        """What the rows of `mixed.csv` have beyond their parts, medians of trials.

        Args:
            table: Columns frequency_mhz, chunk_tokens, batch_size, tokens, time_s and power_w.
            model: Of the same profile, for the parts.
        """
        key = list(MIXED_POINT)
        found: dict[int, dict[float, dict[float, Line]]] = {}
        medians = table.groupby(key, sort=True)[["time_s", "power_w"]].median().reset_index()
        columns = [*key, "time_s", "power_w"]
        for clock, chunk, batch, tokens, time_s, power_w in medians[columns].itertuples(
            index=False
        ):
            parts = _Parts(model, int(clock), (1.0, int(chunk)), (int(batch), int(tokens)))
            rows = found.setdefault(int(clock), {}).setdefault(math.log(chunk), {})
            line = rows.setdefault(math.log(batch), ([], []))
            line[0].append(math.log(tokens / batch))
            line[1].append(parts.shares(float(time_s), float(power_w)))
        return cls(found)

    @property
    def most_power_ratio(self) -> float:
        """The largest power over the mean of both parts that was measured."""
        chunks = (axis for _, rows in self._clocks[1] for axis in rows)
        ratios: list[float] = [at[2] for _, lines in chunks for _, line in lines for at in line]
        return max(ratios)

    def shares(
        self, clock_mhz: int, chunk_tokens: float, batch_size: float, tokens: float
    ) -> Shares:
        """What both parts have in common at a point.

        Args:
            clock_mhz: SM clock; above all that are known it is the highest, as 0 is.
            chunk_tokens: New tokens of prompts.
            batch_size: Requests that decode.
            tokens: Their context, in all.
        """
        chunk, batch = math.log(chunk_tokens), math.log(batch_size)
        context = math.log(tokens / batch_size)

        clock = float(clock_mhz or self._clocks[0][-1])
        return _between(self._clocks, (clock, chunk, batch, context), 0)


class MixedStep:
    """Time and power of one iteration of prompts, decode or both."""

    __slots__ = ("_grid", "_model", "_overlap_frac")

    def __init__(
        self, model: StepModel, *, grid: MixedGrid | None = None, overlap_frac: float = 0.0
    ) -> None:
        """See the module.

        Args:
            model: The parts.
            grid: As measured; None: nobody has.
            overlap_frac: Without a grid, the share of the shorter part that the longer one hides.
        """
        self._model = model
        self._grid = grid
        self._overlap_frac = overlap_frac

    @property
    def most_power_ratio(self) -> float:
        """No iteration of both parts draws more than so many times the larger of the two."""
        return 1.0 if self._grid is None else max(self._grid.most_power_ratio, 1.0)

    def time_and_power(
        self, clock_mhz: int, chunk: tuple[float, int], decode: tuple[float, int]
    ) -> tuple[float, float]:
        """Duration (s) and power (W).

        Args:
            clock_mhz: SM clock; 0 is unlocked.
            chunk: Effective number of equal prompts, and their new tokens; 0 tokens: none.
            decode: Requests that decode, and their context in all; 0 requests: none.

        Raises:
            VoltanaError: As `StepModel.time_and_power`.
        """
        if not decode[0]:
            return self._model.time_and_power("prefill", clock_mhz, *chunk)
        if not chunk[1]:
            return self._model.time_and_power("decode", clock_mhz, *decode)
        parts = _Parts(self._model, clock_mhz, chunk, decode)
        if self._grid is None:
            return parts.total_s - self._overlap_frac * parts.shorter_s, parts.mean_w
        overlap, time_ratio, power_ratio = self._grid.shares(clock_mhz, chunk[1], *decode)
        time_s = (parts.total_s - overlap * parts.shorter_s) * time_ratio
        return time_s, parts.mean_w * power_ratio


class _Parts:
    """Both parts of an iteration, each by itself."""

    __slots__ = ("mean_w", "shorter_s", "total_s")

    def __init__(
        self, model: StepModel, clock_mhz: int, chunk: tuple[float, int], decode: tuple[float, int]
    ) -> None:
        time_s, power_w = model.time_and_power("prefill", clock_mhz, *chunk)
        beside_s, beside_w = model.time_and_power("decode", clock_mhz, *decode)
        self.total_s = time_s + beside_s
        self.mean_w = (power_w * time_s + beside_w * beside_s) / self.total_s
        self.shorter_s = min(time_s, beside_s)

    def shares(self, time_s: float, power_w: float) -> Shares:
        """Of an iteration of both.

        What is longer than the sum or shorter than the longer part, by noise or where the tables
        miss a bend, is no overlap: as a share of a small part it would be huge and misleading.
        """
        overlap = min(max((self.total_s - time_s) / self.shorter_s, 0.0), 1.0)
        explained_s = self.total_s - overlap * self.shorter_s
        return overlap, time_s / explained_s, power_w / self.mean_w


def held_out_errors(table: pd.DataFrame, model: StepModel) -> list[tuple[float, float]]:
    """How far the table is off where a chunk or a batch was left out of it.

    Each chunk and each batch between the ends is taken away in turn and told by the rest.

    Args:
        table: As of `MixedGrid.of_table`.
        model: As there.

    Returns:
        Relative errors of time and power, one pair a point; empty where there is no inner value.
    """
    found = []
    for column in ("chunk_tokens", "batch_size"):
        for value in sorted(set(table[column]))[1:-1]:
            left_out = table[column] == value
            step = MixedStep(model, grid=MixedGrid.of_table(table[~left_out], model))
            for row in table[left_out].to_dict("records"):
                time_s, power_w = step.time_and_power(
                    int(row["frequency_mhz"]),
                    (1.0, int(row["chunk_tokens"])),
                    (int(row["batch_size"]), int(row["tokens"])),
                )
                found.append((time_s / row["time_s"] - 1.0, power_w / row["power_w"] - 1.0))
    return found


def error_text(table: pd.DataFrame, model: StepModel) -> tuple[str, str]:
    """Those errors as the uncertainty of time and of power."""
    errors = np.abs(np.array(held_out_errors(table, model)).reshape(-1, 2))
    if not len(errors):
        return "between points unknown: too few to leave one out", "as of the time"
    middle, worst = np.median(errors, axis=0), errors.max(axis=0)
    told = [
        f"between points {m:.1%} (median) to {w:.1%} (worst), leaving out a chunk or batch in turn"
        for m, w in zip(middle, worst, strict=True)
    ]
    return told[0], told[1]


def _between(axis: Axis, point: Sequence[float], depth: int) -> Shares:
    """Linear between the keys next to the point, axis by axis, held beyond their ends.

    Args:
        axis: Keys and what is there: shares on the last axis, else the next axis.
        point: A number an axis.
        depth: Which of them is this axis's.
    """
    keys, values = axis
    at = point[depth]
    i = bisect_right(keys, at) - 1
    if i < 0 or i + 1 >= len(keys) or keys[i] == at:
        return _there(values[max(i, 0)], point, depth)
    low, high = keys[i], keys[i + 1]
    weight = (at - low) / (high - low)
    o0, t0, p0 = _there(values[i], point, depth)
    o1, t1, p1 = _there(values[i + 1], point, depth)
    return o0 + weight * (o1 - o0), t0 + weight * (t1 - t0), p0 + weight * (p1 - p0)


def _there(value: Any, point: Sequence[float], depth: int) -> Shares:  # noqa: ANN401 (see Axis)
    found: Shares = value if depth + 1 == len(point) else _between(value, point, depth + 1)
    return found
