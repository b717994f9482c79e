"""The measured tables of a profile: strict reading, and the grid of medians behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from voltana.profiles.common.errors import VoltanaError

FloatArray = npt.NDArray[np.float64]

POINT: Final = ("frequency_mhz", "batch_size", "tokens")
PHASE_COLUMNS: Final = (*POINT, "trial", "time_s", "power_w")
CHUNK: Final = "chunk_tokens"
MIXED_POINT: Final = (POINT[0], CHUNK, *POINT[1:])
MIXED_COLUMNS: Final = (*MIXED_POINT, "trial", "time_s", "power_w")
OPTIONAL_COLUMNS: Final = ("flags", "spread_s")
"""Only in measured tables: flags of a trial; half the interquartile range of its iterations."""
IDLE_COLUMNS: Final = ("frequency_mhz", "trial", "power_w")
AWAKE: Final = "awake_power_w"
"""Optional in `idle.csv`: what an instance draws, from its first iteration on, above the power at
rest and above the phase tables alike."""
_HEADER_LINES: Final = 2
"""Line number of the first data row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GridRow:
    """Medians at one clock and batch size, against tokens (ascending)."""

    tokens: tuple[float, ...]
    time_s: tuple[float, ...]
    power_w: tuple[float, ...]


Grid = Mapping[int, Mapping[int, GridRow]]
"""clock in MHz -> batch size -> row; both ascending."""


def read_phase_table(
    path: Path, clocks_mhz: tuple[int, ...], *, chunks: bool = False
) -> pd.DataFrame:
    """Read `prefill.csv` or `decode.csv`, or `mixed.csv`, whose rows have a chunk of prompts each.

    Args:
        path: The file.
        clocks_mhz: Supported clocks.
        chunks: It is `mixed.csv`.

    Raises:
        VoltanaError: A wrong or missing column, a value that is no number, not finite or not
            positive, an unsupported clock, or a repeated (point, trial); with file and line.
    """
    point = MIXED_POINT if chunks else POINT
    frame = _read_csv(path, MIXED_COLUMNS if chunks else PHASE_COLUMNS)
    for column in ("time_s", "power_w"):
        _require(frame, path, column, frame[column] > 0, "must be > 0")
    for column in point[1:]:
        _require(frame, path, column, frame[column] >= 1, "must be >= 1")
    _require_clocks(frame, path, clocks_mhz)
    _require_unique(frame, path, [*point, "trial"])
    return frame


def read_idle_table(path: Path, clocks_mhz: tuple[int, ...]) -> pd.DataFrame:
    """Read `idle.csv`; clock 0 is the unlocked card. Raises as `read_phase_table` does."""
    frame = _read_csv(path, IDLE_COLUMNS, (*OPTIONAL_COLUMNS, AWAKE))
    _require(frame, path, "power_w", frame["power_w"] > 0, "must be > 0")
    if AWAKE in frame:
        awake = pd.to_numeric(frame[AWAKE], errors="coerce")
        _require(frame, path, AWAKE, np.isfinite(awake) & (awake >= 0), "must be a number >= 0")
        frame[AWAKE] = awake
    _require_clocks(frame, path, (0, *clocks_mhz))
    _require_unique(frame, path, ["frequency_mhz", "trial"])
    if 0 not in set(frame["frequency_mhz"]):
        raise VoltanaError(f"{path}: needs a row with frequency_mhz 0, the unlocked card")
    return frame


def grid_of(frame: pd.DataFrame) -> dict[int, dict[int, GridRow]]:
    """Median over trials of every grid point."""
    medians = frame.groupby(list(POINT), sort=True)[["time_s", "power_w"]].median().reset_index()
    grid: dict[int, dict[int, GridRow]] = {}
    for clock, at_clock in medians.groupby("frequency_mhz", sort=True):
        rows = grid.setdefault(int(str(clock)), {})
        for batch, row in at_clock.groupby("batch_size", sort=True):
            rows[int(str(batch))] = GridRow(
                tokens=tuple(row["tokens"].astype(float)),
                time_s=tuple(row["time_s"]),
                power_w=tuple(row["power_w"]),
            )
    return grid


def raised(grid: Grid, awake_w: Mapping[int, float]) -> Grid:
    """The grid with the awake power of each of its clocks on top, linear between given clocks.

    Args:
        grid: See `grid_of`.
        awake_w: Awake power in W by clock; 0 is the unlocked card and not used.
    """
    known = [clock for clock in sorted(awake_w) if clock > 0]
    powers = [awake_w[clock] for clock in known]

    def row(clock: int, of: GridRow) -> GridRow:
        above_w = float(np.interp(clock, known, powers))
        return GridRow(
            tokens=of.tokens, time_s=of.time_s, power_w=tuple(w + above_w for w in of.power_w)
        )

    return {f: {b: row(f, of) for b, of in rows.items()} for f, rows in grid.items()}


def idle_power_of(frame: pd.DataFrame, column: str = "power_w") -> dict[int, float]:
    """Median of a column of `idle.csv` in W by clock, ascending."""
    medians = frame.groupby("frequency_mhz", sort=True)[column].median()
    return {int(str(clock)): float(power) for clock, power in medians.items()}


def _read_csv(
    path: Path, columns: tuple[str, ...], optional: tuple[str, ...] = OPTIONAL_COLUMNS
) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path)
    except FileNotFoundError:
        raise VoltanaError(f"no {path.name} in {path.parent}: the profile is incomplete") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise VoltanaError(f"cannot read {path}: {error}") from None
    missing = [c for c in columns if c not in frame.columns]
    unknown = [str(c) for c in frame.columns if c not in (*columns, *optional)]
    if missing or unknown:
        raise VoltanaError(
            f"{path}:1: columns must be {', '.join(columns)}; "
            f"missing {', '.join(missing) or 'none'}, unknown {', '.join(unknown) or 'none'}"
        )
    if frame.empty:
        raise VoltanaError(f"{path}: has no rows")
    for column in columns:
        numbers = pd.to_numeric(frame[column], errors="coerce")
        _require(frame, path, column, pd.Series(np.isfinite(numbers)), "must be a finite number")
        frame[column] = numbers
        if column in (*MIXED_POINT, "trial"):
            _require(frame, path, column, numbers == numbers.round(), "must be a whole number")
            frame[column] = numbers.astype(np.int64)
    return frame


def _require(
    frame: pd.DataFrame, path: Path, column: str, holds: pd.Series[bool], rule: str
) -> None:
    if not holds.all():
        row = int(np.argmin(holds.to_numpy()))
        raise VoltanaError(
            f"{column} {rule}, got {frame[column].iloc[row]} ({path}:{row + _HEADER_LINES})"
        )


def _require_clocks(frame: pd.DataFrame, path: Path, clocks_mhz: tuple[int, ...]) -> None:
    holds = frame["frequency_mhz"].isin(clocks_mhz)
    _require(frame, path, "frequency_mhz", holds, "must be one of clocks.supported_mhz")


def _require_unique(frame: pd.DataFrame, path: Path, key: list[str]) -> None:
    repeated = frame.duplicated(key)
    rule = f"must not repeat with the same {', '.join(key)}"
    _require(frame, path, "trial", ~repeated, rule)
