"""How much iteration times vary around the tables: their relative standard deviation.

A measured table says it by itself (`spread_s`, half the interquartile range of a trial's
iterations); a profile without that column states one number a phase in `profile.toml`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Final

import pandas as pd

from voltana.profiles.tables import POINT

HALF_IQR_PER_SD: Final = 0.6745
"""Half the interquartile range of a normal distribution in standard deviations."""

RowSpreads = Mapping[int, Mapping[int, float]]
"""clock in MHz -> batch size -> relative standard deviation; both ascending."""


class IterationSpread:
    """Relative standard deviation of iteration times by phase, clock and batch size.

    Args:
        stated: One number a phase, for the phases without `rows`; a phase in neither has none.
        rows: The measured spreads. Between measured points the next lower clock and batch size
            are taken: a spread is too rough an estimate to be interpolated.
        top_mhz: The clock at which an unlocked card runs.
    """

    __slots__ = ("_kept", "_rows", "_stated", "_top_mhz")

    def __init__(
        self, stated: Mapping[str, float], rows: Mapping[str, RowSpreads], top_mhz: int
    ) -> None:
        self._stated = dict(stated)
        self._rows = dict(rows)
        self._top_mhz = top_mhz
        self._kept: dict[tuple[str, int, int], float] = {}

    def is_zero(self, phase: str) -> bool:
        """Whether iterations of this phase take exactly what the table says."""
        if phase in self._rows:
            return not any(s for row in self._rows[phase].values() for s in row.values())
        return not self._stated.get(phase, 0.0)

    def largest(self, phase: str) -> float:
        """The largest spread of a phase at any clock and batch."""
        if phase in self._rows:
            return max(s for row in self._rows[phase].values() for s in row.values())
        return self._stated.get(phase, 0.0)

    def constant(self, phase: str) -> float | None:
        """The one spread of a phase at every clock and batch; None if a table says more."""
        return None if phase in self._rows else self._stated.get(phase, 0.0)

    def relative(self, phase: str, clock_mhz: int, batch_size: float) -> float:
        """Standard deviation over mean of the times of one iteration.

        Args:
            phase: "prefill" or "decode".
            clock_mhz: Clock; 0 is unlocked, at the top clock.
            batch_size: Requests; of prefill the effective number of equal prompts.
        """
        rows = self._rows.get(phase)
        if rows is None:
            return self._stated.get(phase, 0.0)
        key = (phase, clock_mhz, int(batch_size))
        kept = self._kept.get(key)
        if kept is None:
            row = rows[_at_or_below(rows, clock_mhz or self._top_mhz)]
            kept = self._kept[key] = row[_at_or_below(row, int(batch_size))]
        return kept


def row_spreads(frame: pd.DataFrame) -> RowSpreads | None:
    """Median over tokens and trials of the relative spreads of a table; None if it has none."""
    if "spread_s" not in frame.columns:
        return None
    relative = frame["spread_s"] / frame["time_s"] / HALF_IQR_PER_SD
    keys = list(POINT[:2])
    medians = frame[keys].assign(relative=relative).groupby(keys, sort=True).median().reset_index()
    rows: dict[int, dict[int, float]] = {}
    for clock, batch, spread in medians.itertuples(index=False):
        rows.setdefault(int(clock), {})[int(batch)] = float(spread)
    return rows


def _at_or_below(keys: Mapping[int, object], wanted: int) -> int:
    known = list(keys)
    return known[max(bisect_right(known, wanted) - 1, 0)]
