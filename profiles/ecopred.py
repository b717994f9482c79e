"""EcoPred: the latency predictor the policies use, fitted to the tables as the reference fits it.

Decode, per clock and batch-size range: time = a·batch + b·tokens + c with a, b >= 0, robust.
Prefill, per clock: time = a·tokens + c, fitted on 2,000 < tokens < 20,000 only. Its error against
the tables is real, and the simulator keeps both: the tables are the truth, EcoPred the belief.

RANSAC over non-negative least squares (SciPy) is some fifty lines here; scikit-learn, which the
reference uses for it, would be the heaviest dependency of the project. It is scikit-learn's
algorithm: smallest subsets that fix the coefficients, the median deviation of the times as the
threshold, more inliers win, of as many the better R², and as many trials as find a subset without
an outlier with a probability of 99 %. Its settings are the reference's, by phase, which judges by
squared errors in ms² in decode (against a threshold in ms) and by absolute errors in prefill. The
random subsets are drawn as scikit-learn draws them, so that of one table both make one fit.

Source: VoltanaLLM v0.1, run_profile.py, the two draw.ipynb and lookup_table.py.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.tables import POINT, FloatArray

BATCH_RANGE_ENDS: Final = (4, 8, *range(16, 129, 8), *range(256, 2049, 128))
"""The reference's hard-coded ranges: each ends with, and includes, one of these sizes."""
DECODE_TIME_S: Final = (0.003, 0.300)
"""Decode samples outside are left out of the fit, as in the reference."""
PREFILL_TOKENS: Final = (2_000, 20_000)
PREFILL_PROMPT_TOKENS: Final = (128, 1_024)
"""Mean prompt lengths of the rows fitted: the reference profiles prefill with ShareGPT prompts."""
FALLBACK_S: Final = 0.020
"""The reference's answer where a prediction is not positive."""
COLUMNS: Final = (
    "phase", "frequency_mhz", "batch_size_min", "batch_size_max", "per_request_s", "per_token_s",
    "constant_s", "r2", "mae_s", "mape", "num_points",
)  # fmt: skip
_FOUND: Final = 0.99
"""Probability of having drawn a subset without outliers at which RANSAC ends (scikit-learn's)."""
_ALL_BATCHES: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Coefficients:
    """time_s = per_request_s·batch + per_token_s·tokens + constant_s."""

    per_request_s: float
    per_token_s: float
    constant_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ransac:
    """How outliers are kept out of a fit."""

    subset_points: int
    """Coefficients to be found, the constant included."""
    error_power: int
    """1: absolute errors, in ms, are compared with the threshold; 2: squared ones, in ms²."""
    max_trials: int


DECODE_RANSAC: Final = Ransac(subset_points=3, error_power=2, max_trials=10_000)
PREFILL_RANSAC: Final = Ransac(subset_points=2, error_power=1, max_trials=100_000)


class EcoPred:
    """Predicts iteration times from fitted coefficients; scalar and fast.

    Args:
        table: Rows of `ecopred.csv`.
        top_mhz: Clock of an unlocked card.

    A clock between fitted ones is interpolated linearly, one outside extrapolated from the two
    nearest; a batch size above the last range uses the last range.
    """

    __slots__ = ("_by_clock", "_decode", "_ends", "_lines", "_prefill", "_top_mhz")

    def __init__(self, table: pd.DataFrame, top_mhz: int) -> None:
        self._top_mhz = top_mhz
        self._ends: list[int] = []
        self._decode: dict[int, list[Coefficients]] = {}
        self._prefill: dict[int, list[Coefficients]] = {}
        self._by_clock: dict[tuple[str, int], list[Coefficients]] = {}
        self._lines: dict[str, dict[int, tuple[float, float]]] = {"prefill": {}, "decode": {}}
        """Lines asked for so far, by phase and clock << 20 | batch size."""
        ordered = table.sort_values(["phase", "frequency_mhz", "batch_size_max"])
        for row in ordered.itertuples(index=False):
            kept = self._decode if row.phase == "decode" else self._prefill
            kept.setdefault(int(str(row.frequency_mhz)), []).append(
                Coefficients(*(float(str(getattr(row, c))) for c in COLUMNS[4:7]))
            )
        decode = ordered[ordered["phase"] == "decode"]
        self._ends = sorted({int(e) for e in decode["batch_size_max"]})
        if any(len(c) != len(self._ends) for c in self._decode.values()):
            raise VoltanaError("ecopred.csv: every clock needs the same batch ranges")
        if not self._decode or not self._prefill:
            raise VoltanaError("ecopred.csv: needs rows of both phases")

    def predict_s(self, phase: str, clock_mhz: int, batch_size: int, tokens: int) -> float:
        """Predicted duration of one iteration in seconds, always > 0.

        Args:
            phase: "prefill" or "decode".
            clock_mhz: SM clock; 0 is unlocked, which runs at the top clock.
            batch_size: Requests.
            tokens: New tokens (prefill) or context tokens (decode) of the whole batch.
        """
        line = self._lines[phase].get((clock_mhz << 20) | batch_size)
        if line is None:
            line = self.predict_line(phase, clock_mhz, batch_size)
        time_s = line[0] + line[1] * tokens
        return time_s if time_s > 0 else FALLBACK_S

    def predict_line(self, phase: str, clock_mhz: int, batch_size: int) -> tuple[float, float]:
        """The prediction as (constant in s, slope in s/token) at a fixed batch size.

        Args:
            phase: "prefill" or "decode".
            clock_mhz: SM clock; 0 is unlocked.
            batch_size: Requests.
        """
        c = self._coefficients(phase, clock_mhz, batch_size)
        line = (c.per_request_s * batch_size + c.constant_s, c.per_token_s)
        self._lines[phase][(clock_mhz << 20) | batch_size] = line
        return line

    def _coefficients(self, phase: str, clock_mhz: int, batch_size: int) -> Coefficients:
        ranges = self._by_clock.get((phase, clock_mhz))
        if ranges is None:
            ranges = self._at_clock(phase, clock_mhz)
        if len(ranges) == 1:
            return ranges[0]
        i = bisect_left(self._ends, batch_size)
        return ranges[i] if i < len(ranges) else ranges[-1]

    def _at_clock(self, phase: str, clock_mhz: int) -> list[Coefficients]:
        fitted = self._decode if phase == "decode" else self._prefill
        clock = clock_mhz or self._top_mhz
        if clock in fitted or len(fitted) == 1:
            ranges = fitted.get(clock) or next(iter(fitted.values()))
        else:
            clocks = sorted(fitted)
            at = min(max(bisect_left(clocks, clock) - 1, 0), len(clocks) - 2)
            low, high = clocks[at], clocks[at + 1]
            weight = (clock - low) / (high - low)
            ranges = [_blend(a, b, weight) for a, b in zip(fitted[low], fitted[high], strict=True)]
        self._by_clock[phase, clock_mhz] = ranges
        return ranges


def _blend(a: Coefficients, b: Coefficients, weight: float) -> Coefficients:
    return Coefficients(
        a.per_request_s + weight * (b.per_request_s - a.per_request_s),
        a.per_token_s + weight * (b.per_token_s - a.per_token_s),
        a.constant_s + weight * (b.constant_s - a.constant_s),
    )


def fit(prefill: pd.DataFrame, decode: pd.DataFrame, *, seed: int = 1) -> pd.DataFrame:
    """Fit EcoPred to the two tables; deterministic in `seed` (the reference's is 1).

    Args:
        prefill: Rows of the prefill table (frequency_mhz, batch_size, tokens, time_s).
        decode: Rows of the decode table, the same columns.
        seed: Of the random subsets RANSAC tries, anew for each fit as in the reference.

    Returns:
        Rows of `ecopred.csv`: coefficients with R², mean absolute error (s), mean absolute
        percentage error (a fraction) and the number of points, per clock and batch range.
    """
    rows = [*_fit_prefill(prefill, seed), *_fit_decode(decode, seed)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def fit_report(fitted: pd.DataFrame) -> pd.DataFrame:
    """R², MAE in ms and MAPE in % per phase and clock.

    Each is the mean over the clock's batch ranges, weighted by their points. For the two errors
    that is the error over all points. R² is not: every range is held against the spread of its own
    times, so that a range whose times hardly differ counts as badly as it fits, and the figure is
    lower than one R² over all points of the clock would be.
    """
    rows = []
    for (phase, clock), part in fitted.groupby(["phase", "frequency_mhz"], sort=True):
        mean = {c: float(np.average(part[c], weights=part["num_points"]))
                for c in ("r2", "mae_s", "mape")}  # fmt: skip
        rows.append((phase, clock, mean["r2"], 1e3 * mean["mae_s"], 100 * mean["mape"]))
    return pd.DataFrame(rows, columns=["phase", "frequency_mhz", "r2", "mae_ms", "mape_pct"])


def read_ecopred(path: Path, clocks_mhz: tuple[int, ...]) -> tuple[pd.DataFrame, EcoPred]:
    """Read `ecopred.csv`.

    Args:
        path: The file.
        clocks_mhz: Supported clocks, ascending.

    Raises:
        VoltanaError: A wrong header, a value that is no number or breaks its rule, a clock that is
            not supported or lacks a phase, or batch ranges that leave a gap or overlap.
    """
    try:
        table = pd.read_csv(path)
    except FileNotFoundError:
        raise VoltanaError(f"no {path.name} in {path.parent}: the profile is incomplete") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise VoltanaError(f"cannot read {path}: {error}") from None
    if list(table.columns) != list(COLUMNS):
        raise VoltanaError(f"{path}:1: columns must be {', '.join(COLUMNS)}")
    _check_values(table, path, clocks_mhz)
    _check_coverage(table, path)
    return table, EcoPred(table, clocks_mhz[-1])


def _check_values(table: pd.DataFrame, path: Path, clocks_mhz: tuple[int, ...]) -> None:
    numbers = table[list(COLUMNS[1:])].apply(pd.to_numeric, errors="coerce").astype(float)
    slopes = numbers[["per_request_s", "per_token_s"]]
    wholes = numbers[["frequency_mhz", "batch_size_min", "batch_size_max"]]
    rules: tuple[tuple[str, pd.Series[bool]], ...] = (
        ("phase must be prefill or decode", table["phase"].isin(("prefill", "decode"))),
        ("numbers must be finite", np.isfinite(numbers).all(axis=1)),
        ("clock and batch sizes must be whole", (wholes == wholes.round()).all(axis=1)),
        ("frequency_mhz must be a supported clock", numbers["frequency_mhz"].isin(clocks_mhz)),
        ("per_request_s and per_token_s must be >= 0", (slopes >= 0).all(axis=1)),
        (
            "batch_size_min must be in 1..batch_size_max",
            numbers["batch_size_min"].between(1, numbers["batch_size_max"]),
        ),
    )
    for rule, holds in rules:
        if not holds.all():
            line = int(np.argmin(holds.to_numpy())) + 2
            raise VoltanaError(f"{rule} ({path}:{line}): write the profile anew, or mend the line")


def _check_coverage(table: pd.DataFrame, path: Path) -> None:
    """Both phases at the same clocks; batch ranges from 1 on, without gap, overlap or repeat."""
    clocks = {phase: set(part["frequency_mhz"]) for phase, part in table.groupby("phase")}
    lonely = clocks.get("prefill", set()) ^ clocks.get("decode", set())
    if lonely or not clocks:
        raise VoltanaError(
            f"ecopred.csv must have both phases at every clock, {sorted(lonely) or 'no clock'} has "
            f"not ({path})"
        )
    for (phase, clock), part in table.groupby(["phase", "frequency_mhz"]):
        ordered = part.sort_values("batch_size_min")
        starts = ordered["batch_size_min"].tolist()
        wanted = [1, *(end + 1 for end in ordered["batch_size_max"].tolist()[:-1])]
        if starts != wanted:
            raise VoltanaError(
                f"batch ranges of {phase} at {clock} MHz must begin at {wanted} so as to meet, "
                f"they begin at {starts} ({path})"
            )


def _fit_prefill(table: pd.DataFrame, seed: int) -> Iterator[tuple[object, ...]]:
    prompt = table["tokens"] / table["batch_size"]
    wanted = table["tokens"].between(*PREFILL_TOKENS, inclusive="neither") & prompt.between(
        *PREFILL_PROMPT_TOKENS
    )
    for clock, part in table.groupby("frequency_mhz", sort=True):
        chosen = part[wanted.loc[part.index]]
        used = chosen if chosen["tokens"].nunique() >= 3 else part
        x = np.column_stack([np.zeros(len(used)), used["tokens"].to_numpy(float)])
        y = used["time_s"].to_numpy(float)
        coefficients = ransac(x, y, PREFILL_RANSAC, seed)
        yield ("prefill", clock, 1, _ALL_BATCHES, *coefficients, *_errors(x, y, coefficients))


def _fit_decode(table: pd.DataFrame, seed: int) -> Iterator[tuple[object, ...]]:
    bounds = _ranges_with_points(table)
    for clock, part in table.groupby("frequency_mhz", sort=True):
        for low, high in bounds:
            chosen = part[part["batch_size"].between(low, high)]
            kept = chosen[chosen["time_s"].between(*DECODE_TIME_S, inclusive="neither")]
            used = kept if len(kept) >= 3 else chosen
            x = used[list(POINT[1:])].to_numpy(dtype=float)
            y = used["time_s"].to_numpy(dtype=float)
            coefficients = ransac(x, y, DECODE_RANSAC, seed)
            yield ("decode", clock, low, high, *coefficients, *_errors(x, y, coefficients))


def _ranges_with_points(table: pd.DataFrame) -> list[tuple[int, int]]:
    """The reference's ranges, an empty one merged with the next that holds grid points."""
    per_clock = [set(p["batch_size"]) for _, p in table.groupby("frequency_mhz")]
    common = set.intersection(*per_clock)
    bounds: list[tuple[int, int]] = []
    low = 1
    for end in BATCH_RANGE_ENDS:
        if any(low <= b <= end for b in common):
            bounds.append((low, end))
            low = end + 1
    if not bounds:
        raise VoltanaError("decode table: no batch size is profiled at every clock")
    return bounds


def ransac(x: FloatArray, y: FloatArray, settings: Ransac, seed: int) -> tuple[float, float, float]:
    """Least squares over the inliers of the subset that has most of them.

    Args:
        x: Batch size and tokens, shape (points, 2).
        y: Times in s, shape (points,).
        settings: Subset size and number of tries.
        seed: Of the subsets.
    """
    size, count = settings.subset_points, len(y)
    if count <= size:
        return _least_squares(x, y)
    rng = np.random.RandomState(seed)  # scikit-learn's generator: the same subsets
    time_ms = 1e3 * y
    deviation_ms = float(np.median(np.abs(time_ms - np.median(time_ms))))
    threshold = max(deviation_ms, 1e-9)  # flat times would leave no inlier to rounding
    best, best_count, best_r2 = np.ones(count, dtype=bool), 1, -math.inf
    trial, trials = 0, float(settings.max_trials)
    while trial < trials:
        trial += 1
        subset = rng.permutation(count)[:size]
        error_ms = np.abs(_apply(x, _least_squares(x[subset], time_ms[subset])) - time_ms)
        inliers = error_ms**settings.error_power <= threshold
        found = int(inliers.sum())
        if found < best_count:
            continue
        r2 = _r2(error_ms[inliers], time_ms[inliers])
        if found == best_count and r2 < best_r2:
            continue
        best, best_count, best_r2 = inliers, found, r2
        trials = min(trials, _trials_needed(found / count, size))
    return _least_squares(x[best], y[best])


def _trials_needed(inlier_frac: float, size: int) -> float:
    """Subsets to be drawn until one is free of outliers with a probability of 99 %.

    Fischler and Bolles, Random sample consensus, CACM 24 (1981).

    Example:
        >>> _trials_needed(0.5, 3), _trials_needed(1.0, 3)
        (35.0, 1.0)
    """
    hit = max(1.0 - inlier_frac**size, float(np.spacing(1)))
    return float(math.ceil(math.log(1.0 - _FOUND) / math.log(hit))) if hit < 1.0 else math.inf


def _r2(error: FloatArray, y: FloatArray) -> float:
    spread = float(((y - y.mean()) ** 2).sum())
    return 1.0 - float((error**2).sum()) / spread if spread > 0 else 1.0


def _least_squares(x: FloatArray, y: FloatArray) -> tuple[float, float, float]:
    """Slopes >= 0 and a free constant: centring takes the constant out of the constraint."""
    centre, level = x.mean(axis=0), float(y.mean())
    scale = np.maximum(np.abs(x - centre).max(axis=0), 1.0)
    slopes = nnls((x - centre) / scale, y - level)[0] / scale
    return float(slopes[0]), float(slopes[1]), level - float(slopes @ centre)


def _apply(x: FloatArray, coefficients: tuple[float, float, float]) -> FloatArray:
    return np.asarray(x @ np.array(coefficients[:2]) + coefficients[2])


def _errors(
    x: FloatArray, y: FloatArray, coefficients: tuple[float, float, float]
) -> tuple[float, float, float, int]:
    error = _apply(x, coefficients) - y
    return _r2(error, y), float(np.abs(error).mean()), float(np.abs(error / y).mean()), len(y)
