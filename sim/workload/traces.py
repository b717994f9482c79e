"""Readers of published request traces. Foreign columns and units end here.

Nothing is dropped or repaired silently: a row that cannot be a request is an error with file,
line, column, rule and value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from voltana.profiles.common.errors import VoltanaError, nearest
from voltana.sim.workload.benchmarks import bench_lengths, find_one
from voltana.sim.workload.fetch import MissingTraceError, named_trace, named_traces
from voltana.sim.workload.frames import Thinning, read_frame, thinning
from voltana.sim.workload.logs import (
    Rows,
    by_arrival,
    is_json_lines,
    is_log,
    read_log,
    read_rows,
)
from voltana.sim.workload.prompts import ANSWER, PREVIOUS, SEGMENTS, THINK_S, Prompts, Turns
from voltana.sim.workload.workload import FloatArray, IntArray, Workload

MOONCAKE_BLOCK_TOKENS: Final = 512
"""Of a block that `hash_ids` names (README of the trace release, kvcache-ai/Mooncake)."""
_HASHES: Final = "hash_ids"
_MAX_TOKENS: Final = 2**31
"""No request is longer; above it a length is a damaged number."""
DAY_S: Final = 86_400.0
MOST_IDLE_S: Final = DAY_S
"""If a trace starts later, its times are probably in another unit or count from 1970. Ours."""
_UNITS_S: Final = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_EPOCH: Final = {unit: (1e8 / factor, 1e10 / factor) for unit, factor in _UNITS_S.items()}
"""Numbers that are times since 1970 in that unit, if they are: from 1973 to 2286."""
Arrivals = Callable[[Any, Path, IntArray], FloatArray]
_FIRST_LINE: Final = 2
"""Line of the first data row of a CSV; of JSON lines it is 1."""


def open_trace(
    name_or_path: str,
    *,
    unit: str | None = None,
    drop_failed: bool = False,
    sample_frac: float = 1.0,
    seed: int = 0,
) -> Workload:
    """A trace file, or a published trace by name (see `voltana.sim.workload.fetch`).

    Args:
        name_or_path: One of `voltana.sim.workload.fetch.named_traces`, or a file.
        unit: As of `read_trace`.
        drop_failed: As of `read_trace`, and so are the next two.
        sample_frac: Part of the requests that is kept.
        seed: Of the sample.

    Raises:
        MissingTraceError: It is not there.
        VoltanaError: It cannot be read.
    """
    is_named = name_or_path in named_traces()
    path = named_trace(name_or_path) if is_named else Path(name_or_path)
    if not path.is_file():
        hint = "" if path.suffix else nearest(name_or_path, named_traces())
        raise MissingTraceError(f"no such trace file: {name_or_path}{hint}")
    return read_trace(path, unit=unit, drop_failed=drop_failed, sample_frac=sample_frac, seed=seed)


def read_trace(
    path: Path,
    fmt: str | None = None,
    *,
    unit: str | None = None,
    drop_failed: bool = False,
    sample_frac: float = 1.0,
    seed: int = 0,
) -> Workload:
    """Read a trace, telling its format by its columns unless it is named.

    Args:
        path: CSV (also .gz), JSON lines or parquet; a log of one's own as of
            `voltana.sim.workload.logs`, or what a load generator wrote (`benchmarks`).
        fmt: `azure`, `burstgpt`, `mooncake` or `plain`; by default the one whose columns match.
        unit: Of numbers in the arrival column: s, ms, us or ns, counted from the first request.
            By default as the format says. Columns that hold dates or durations know their own.
        drop_failed: Leave out requests without output, which BurstGPT logs for failed calls;
            the workload's name says how many.
        sample_frac: Part of the requests that is kept, each by a throw of its own. Of a CSV only
            those are ever in memory, and only those are checked.
        seed: Of the sample.

    Raises:
        VoltanaError: The file can't be read, its columns match no format, or a row breaks a rule.
    """
    thin = thinning(sample_frac, seed)
    rows = None if fmt is not None or path.suffix == ".gz" else _timed_rows(path)
    if rows is not None:
        return _of_log(rows, path, unit, drop_failed=drop_failed, thin=thin)
    frame = read_frame(path, thin)
    format_name = fmt or _detect(frame, path)
    if format_name not in _FORMATS:
        raise VoltanaError(f"unknown trace format {format_name!r}{nearest(format_name, _FORMATS)}")
    columns, arrivals = _FORMATS[format_name]
    _require_columns(frame, columns, path)
    name = path.name
    if drop_failed:
        kept = frame[pd.to_numeric(frame[columns[2]], errors="coerce") != 0]
        name = f"{path.name} ({len(frame) - len(kept)} of {len(frame)} without output left out)"
        frame = kept
        if frame.empty:
            raise VoltanaError(f"{path}: holds no request with output")
    first_line = 1 if is_json_lines(path) else _FIRST_LINE
    lines = frame.index.to_numpy() + first_line
    arrival_s = _arrivals(frame[columns[0]], path, lines, arrivals, unit)
    _require_sorted(arrival_s, frame[columns[0]], path, lines)
    tokens = [_tokens(frame[column], path, lines) for column in columns[1:]]
    return Workload(
        arrival_s=arrival_s,
        input_tokens=tokens[0],
        output_tokens=tokens[1],
        name=name,
        prompts=_prompts(frame, tokens[0], path, lines),
        turns=_turns(frame, path, lines),
    )


def _turns(frame: pd.DataFrame, path: Path, lines: IntArray) -> Turns | None:
    """Who waits for whom, where `Workload.write` wrote it; rows that were left out wait no more."""
    if PREVIOUS not in frame.columns or THINK_S not in frame.columns:
        return None
    previous = pd.to_numeric(frame[PREVIOUS], errors="coerce").to_numpy(dtype=np.float64)
    rows = frame.index.to_numpy()
    earlier = (previous == np.floor(previous)) & (previous >= -1) & (previous < rows)
    _require(earlier, frame[PREVIOUS], path, lines, "must be an earlier row's number, or -1")
    place = np.full(len(rows) and int(rows[-1]) + 2, -1)
    place[rows] = np.arange(len(rows))
    mine = place[previous.astype(np.int64)]  # of -1, the extra last one: -1
    think_s = _seconds(frame[THINK_S], path, lines)
    return Turns(previous=mine, think_s=np.where(mine < 0, 0.0, think_s))


def _answers(frame: pd.DataFrame, path: Path, lines: IntArray) -> IntArray:
    names = pd.to_numeric(frame[ANSWER], errors="coerce").to_numpy(dtype=np.float64)
    is_name = (names == np.floor(names)) & (np.abs(names) < 2**53)
    _require(is_name, frame[ANSWER], path, lines, "must be a segment's name, a whole number")
    return names.astype(np.int64)


def _prompts(
    frame: pd.DataFrame, input_tokens: IntArray, path: Path, lines: IntArray
) -> Prompts | None:
    """What prompts share, where a trace has Mooncake's hashes or `Workload.write` wrote it."""
    if SEGMENTS in frame.columns:
        try:
            prompts = Prompts.of_texts(frame[SEGMENTS].tolist())
        except VoltanaError as error:
            raise VoltanaError(f"{path}: {error}") from None
        if ANSWER not in frame.columns:
            return prompts
        return replace(prompts, answers=_answers(frame, path, lines))
    if _HASHES not in frame.columns:
        return None
    blocks = frame[_HASHES].tolist()
    if not all(isinstance(row, list) for row in blocks):
        raise VoltanaError(f"{path}: {_HASHES} must be a list of whole numbers in each row")
    try:
        return Prompts.of_blocks(blocks, input_tokens, MOONCAKE_BLOCK_TOKENS)
    except VoltanaError as error:
        raise VoltanaError(f"{path}: {error}") from None


def _timed_rows(path: Path) -> Rows | None:
    """Requests of a log or of a load generator's output, which must say when they were sent."""
    if is_json_lines(path) and is_log(path):
        return read_rows(path)
    found = find_one(path)
    if found is None:
        return None
    if not found.has_arrivals:
        raise VoltanaError(
            f"{path} does not say when its requests were sent (bench_serving: only if all at once, "
            "--request-rate inf): give it as a workload, whose arrivals are drawn at rate_rps"
        )
    return found.rows


def _log_lengths(path: Path) -> pd.DataFrame | None:
    """Lengths of a log or of a benchmark's output; None if it is neither."""
    if path.suffix == ".gz" or not path.is_file():
        return None
    if path.suffix == ".json":
        found = find_one(path)
        return None if found is None else by_arrival(found.rows, path, drop_failed=False)[0]
    if not is_json_lines(path):
        return None
    return read_log(path, drop_failed=False)[0] if is_log(path) else bench_lengths(path)


def _of_log(
    rows: Rows, path: Path, unit: str | None, *, drop_failed: bool, thin: Thinning | None
) -> Workload:
    """A log's requests; their line numbers name them in errors."""
    if unit is not None:
        raise VoltanaError(f"{path} is a log, whose times know their unit: leave trace_unit out")
    frame, dropped = by_arrival(rows, path, drop_failed=drop_failed)
    frame = frame if thin is None else thin(frame)
    if frame.empty:
        raise VoltanaError(f"{path}: holds no requests in the sample")
    lines = frame.index.to_numpy() + 1
    tokens = [_tokens(frame[column], path, lines) for column in ("input_tokens", "output_tokens")]
    name = f"{path.name} ({dropped} failed left out)" if dropped else path.name
    return Workload(
        arrival_s=frame["arrival_s"].to_numpy(dtype=np.float64),
        input_tokens=tokens[0],
        output_tokens=tokens[1],
        name=name,
    )


def read_lengths(path: Path) -> tuple[IntArray, IntArray]:
    """Input and output tokens of a file's requests, in its order; arrivals are not looked at.

    Args:
        path: As `read_trace` takes, with the two length columns of one of its formats; or what
            SGLang's `bench_serving --output-details` writes.

    Returns:
        Input and output tokens, each of shape (n,), all >= 1.

    Raises:
        VoltanaError: As `read_trace`.
    """
    frame = _log_lengths(path)
    frame = read_frame(path) if frame is None else frame
    for columns, _ in _FORMATS.values():
        if set(columns[1:]) <= set(frame.columns):
            lines = frame.index.to_numpy() + (1 if is_json_lines(path) else _FIRST_LINE)
            inputs, outputs = (_tokens(frame[column], path, lines) for column in columns[1:])
            return inputs, outputs
    known = "; ".join(", ".join(columns[1:]) for columns, _ in _FORMATS.values())
    raise VoltanaError(
        f"{path}:1: a workload's file must have columns of lengths ({known}), got "
        f"{', '.join(map(str, frame.columns))}: name the columns so"
    )


def _arrivals(
    column: pd.Series[Any], path: Path, lines: IntArray, of_format: Arrivals, unit: str | None
) -> FloatArray:
    """Seconds from the start of the run, by what the column holds, the unit or the format."""
    if pd.api.types.is_datetime64_any_dtype(column):
        _require_no_unit(column, unit, path)
        return _timestamps(column, path, lines)
    if pd.api.types.is_timedelta64_dtype(column):
        _require_no_unit(column, unit, path)
        _require(column.notna().to_numpy(), column, path, lines, "must be a duration")
        return _from_first(column.dt.total_seconds(), path, lines)
    if unit is not None:
        if of_format is _timestamps:
            raise VoltanaError(f"{column.name} of {path} holds dates: leave trace_unit out")
        return _from_first(column, path, lines) * _UNITS_S[unit]
    arrival_s = of_format(column, path, lines)
    if of_format is not _timestamps:
        _require_early(column, arrival_s, path, lines)
    return arrival_s


def _require_no_unit(column: pd.Series[Any], unit: str | None, path: Path) -> None:
    if unit is not None:
        raise VoltanaError(
            f"{column.name} of {path} has type {column.dtype}, which knows its unit: leave "
            "trace_unit out"
        )


def _require_early(
    column: pd.Series[Any], arrival_s: FloatArray, path: Path, lines: IntArray
) -> None:
    """Refuse times since 1970 and times in another unit: the run would idle for days or years."""
    first = float(pd.to_numeric(column.iloc[0]))
    # a format that counts from its first request may count from 1970, but in its own unit only
    if arrival_s[0] <= MOST_IDLE_S and first < _EPOCH["ms"][0]:
        return
    likely = next((unit for unit, (low, high) in _EPOCH.items() if low <= first < high), None)
    if likely is None:
        days = arrival_s[0] / DAY_S
        seems = f"{days:,.0f} days after the start: set trace_unit to s, ms, us or ns"
    else:
        date = pd.Timestamp(first * _UNITS_S[likely], unit="s")
        seems = f"which as {likely} since 1970 is {date:%Y-%m-%d}: set trace_unit={likely}"
    raise VoltanaError(
        f"{column.name} must start near 0, got {column.iloc[0]} ({path}:{lines[0]}), {seems}, "
        "which counts from the first request"
    )


def _seconds(column: pd.Series[Any], path: Path, lines: IntArray) -> FloatArray:
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    _require(np.isfinite(numbers), column, path, lines, "must be a finite number of seconds")
    _require(numbers >= 0, column, path, lines, "must be >= 0")
    return numbers


def _milliseconds(column: pd.Series[Any], path: Path, lines: IntArray) -> FloatArray:
    return _seconds(column, path, lines) * 1e-3


def _from_first(column: pd.Series[Any], path: Path, lines: IntArray) -> FloatArray:
    seconds = _seconds(column, path, lines)
    return np.asarray(seconds - seconds[0])


def _timestamps(column: pd.Series[Any], path: Path, lines: IntArray) -> FloatArray:
    moments = pd.to_datetime(column, errors="coerce", utc=True, format="ISO8601")
    _require(moments.notna().to_numpy(), column, path, lines, "must be a date and time")
    elapsed = (moments - moments.iloc[0]).dt.total_seconds().to_numpy(dtype=np.float64)
    rising = np.diff(elapsed, prepend=0.0) >= 0
    _require(rising, column, path, lines, "must not be earlier than the row before")
    return np.asarray(elapsed)


_FORMATS: Final[dict[str, tuple[tuple[str, str, str], Arrivals]]] = {
    "azure": (("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _timestamps),
    "burstgpt": (("Timestamp", "Request tokens", "Response tokens"), _from_first),
    "mooncake": (("timestamp", "input_length", "output_length"), _milliseconds),
    "plain": (("arrival_s", "input_tokens", "output_tokens"), _seconds),
}
"""Format -> columns of arrival, input and output, and how arrival becomes seconds from 0."""


def _detect(frame: pd.DataFrame, path: Path) -> str:
    for name, (columns, _) in _FORMATS.items():
        if set(columns) <= set(frame.columns):
            return name
    lengths = next((c for c, _ in _FORMATS.values() if set(c[1:]) <= set(frame.columns)), None)
    if lengths is not None:
        raise VoltanaError(
            f"{path}:1: holds lengths and no arrivals ({lengths[0]} is missing): give it as a "
            "workload, whose arrivals are drawn at rate_rps"
        )
    expected = "; ".join(f"{n}: {', '.join(c)}" for n, (c, _) in _FORMATS.items())
    found = ", ".join(str(c) for c in frame.columns)
    raise VoltanaError(f"{path}:1: columns {found} are of no known format ({expected})")


def _require_columns(frame: pd.DataFrame, columns: tuple[str, ...], path: Path) -> None:
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        raise VoltanaError(f"{path}:1: missing column {', '.join(missing)}")


def _tokens(column: pd.Series[Any], path: Path, lines: IntArray) -> IntArray:
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    is_number = np.isfinite(numbers) & (not pd.api.types.is_bool_dtype(column))
    _require(is_number, column, path, lines, "must be a whole number")
    _require(numbers == np.floor(numbers), column, path, lines, "must be a whole number")
    remedy = (
        " (trace_drop_failed=true leaves out requests without output)"
        if (numbers == 0).any()
        else ""
    )
    _require(numbers >= 1, column, path, lines, f"must be >= 1{remedy}")
    _require(numbers <= _MAX_TOKENS, column, path, lines, f"must be <= {_MAX_TOKENS}")
    return numbers.astype(np.int64)


def _require_sorted(
    arrival_s: FloatArray, column: pd.Series[Any], path: Path, lines: IntArray
) -> None:
    rising = np.diff(arrival_s, prepend=0.0) >= 0
    _require(rising, column, path, lines, "must not fall from one row to the next: sort the file")


def _require(
    holds: npt.NDArray[np.bool_], column: pd.Series[Any], path: Path, lines: IntArray, rule: str
) -> None:
    if not holds.all():
        row = int(np.argmin(holds))
        raise VoltanaError(f"{column.name} {rule}, got {column.iloc[row]} ({path}:{lines[row]})")
