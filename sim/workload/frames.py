"""Files of requests as tables, whole or a sample of their rows; what columns mean is `traces`'."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.workload.logs import is_json_lines

CHUNK_ROWS: Final = 1_000_000
"""Of a CSV that is sampled: no more of it is in memory at once."""
Thinning = Callable[[pd.DataFrame], pd.DataFrame]
"""Takes the next rows of a file, returns those that are kept."""


def thinning(frac: float, seed: int) -> Thinning | None:
    """Keep each row or not by a throw of its own, so that a Poisson stream stays one.

    Args:
        frac: Part of the rows, above 0 and at most 1.
        seed: Of the throws.

    Returns:
        What to call with the rows in order, part by part; None if all are kept.

    Raises:
        VoltanaError: The part is out of range.
    """
    if not 0 < frac <= 1:
        raise VoltanaError(f"trace_sample_frac must be above 0 and at most 1, got {frac:g}")
    if frac == 1:
        return None
    rng = np.random.default_rng(seed)
    return lambda rows: rows[rng.random(len(rows)) < frac]


def read_frame(path: Path, thin: Thinning | None = None) -> pd.DataFrame:
    """The rows of a CSV (also .gz), of JSON lines or of a parquet, numbered from 0 in the file.

    Args:
        path: The file.
        thin: Which rows are kept; all if None.

    Raises:
        VoltanaError: It cannot be read, or no row is left.
    """
    if path.suffix == ".json":
        raise VoltanaError(
            f"{path}: must be guidellm's benchmarks.json, or JSON lines: write one object a line "
            "to a .jsonl"
        )
    try:
        frame = _read(path, thin)
    except pd.errors.ParserWarning:
        raise VoltanaError(f"{path}: rows have more fields than the header names") from None
    except FileNotFoundError:
        raise VoltanaError(f"no such trace file: {path}") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VoltanaError(f"cannot read {path}: {reason}") from None
    if frame.empty:
        raise VoltanaError(f"{path}: holds no requests{' in the sample' if thin else ''}")
    return frame


def _read(path: Path, thin: Thinning | None) -> pd.DataFrame:
    if path.suffix == ".parquet":
        frame = pd.read_parquet(path).reset_index(drop=True)
    elif is_json_lines(path):
        frame = pd.read_json(path, lines=True, dtype=False).reset_index(drop=True)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            if thin is None:
                return pd.read_csv(path, skip_blank_lines=False, index_col=False)
            parts = pd.read_csv(path, skip_blank_lines=False, index_col=False, chunksize=CHUNK_ROWS)
            with parts:
                return pd.concat([thin(part) for part in parts])
    return frame if thin is None else thin(frame)
