"""The one reader and writer of a run directory, for simulated and real runs alike.

A run directory holds `summary.json` (the reported numbers), `settings.json` (resolved
configuration), `requests.parquet` (one row a request), `itl.parquet` (token gaps with counts;
a run of metrics=sketch has `percentiles.json` in place of these two), `instances.json`, and, where
the run kept them, `iterations.parquet` and `timeline.parquet`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_parquet, write_text
from voltana.profiles.common.folders import check, mark
from voltana.sim.metrics import summarise
from voltana.sim.records import InstanceRecord, IterationTable, RequestTable, RunRecord

SCHEMA_VERSION = 1
"""Raised whenever a file or column changes its meaning or goes."""


class BrokenFileError(VoltanaError):
    """A file of a run directory that is there and cannot be read."""


def write_run(record: RunRecord, directory: Path) -> dict[str, Any]:
    """Write a run directory and return its summary. Each file appears whole or not at all."""
    mark(directory, "run")
    summary = {"schema_version": SCHEMA_VERSION, **summarise(record)}
    if record.sketch is None:
        write_parquet(pd.DataFrame(_columns(record.requests)), directory / "requests.parquet")
        gaps = pd.DataFrame({"gap_s": record.itl_s, "count": record.itl_weight})
        write_parquet(gaps, directory / "itl.parquet")
    else:
        write_json(record.sketch.percentiles(), directory / "percentiles.json")
    if record.iterations is not None:
        frame = pd.DataFrame(_columns(record.iterations))
        write_parquet(frame, directory / "iterations.parquet")
    if record.timeline is not None:
        write_parquet(pd.DataFrame(dict(record.timeline)), directory / "timeline.parquet")
    instances = [dataclasses.asdict(i) for i in record.instances]
    write_json(instances, directory / "instances.json")
    write_json(dict(record.settings), directory / "settings.json")
    write_json(summary, directory / "summary.json")
    return summary


def refuse_existing(directory: Path) -> None:
    """Raise VoltanaError if there is a run already, or anything else: nothing is overwritten."""
    check(directory, "run")
    if (directory / "summary.json").exists():
        raise VoltanaError(f"{directory} already holds a run: name another directory")


def read_run(directory: Path) -> RunRecord:
    """Read a run directory back.

    Raises:
        VoltanaError: A file is missing or was written by another schema version.
    """
    summary = read_json(directory / "summary.json")
    if summary.get("schema_version") != SCHEMA_VERSION:
        raise VoltanaError(
            f"{directory} has schema version {summary.get('schema_version')}, "
            f"this program reads {SCHEMA_VERSION}: write the run again"
        )
    settings = read_json(directory / "settings.json")
    if settings.get("metrics") == "sketch":
        raise VoltanaError(
            f"{directory} keeps numbers and no rows (metrics=sketch): run it with metrics=exact"
        )
    gaps = read_frame(directory / "itl.parquet")
    requests = read_frame(directory / "requests.parquet")
    return RunRecord(
        requests=RequestTable(**_arrays(requests)),
        itl_s=gaps["gap_s"].to_numpy(dtype=np.float64),
        itl_weight=gaps["count"].to_numpy(dtype=np.int64),
        instances=[_instance(i) for i in read_json(directory / "instances.json")],
        makespan_s=summary["makespan_s"],
        slo_ttft_s=settings["slo_ttft_s"],
        slo_itl_s=settings["slo_itl_s"],
        wall_s=summary["wall_s"],
        settings=settings,
        iterations=_optional_iterations(directory / "iterations.parquet"),
        timeline=_optional_timeline(directory / "timeline.parquet"),
    )


def write_json(value: Any, path: Path) -> None:  # noqa: ANN401 (any JSON value)
    """Write strict JSON (NaN becomes null), whole or not at all."""
    write_text(json.dumps(finite(value), indent=1) + "\n", path)


def read_json(path: Path) -> Any:  # noqa: ANN401 (any JSON value)
    """Read one JSON file of a run directory."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VoltanaError(f"no {path.name} in {path.parent}: is it a run directory?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise VoltanaError(f"cannot read {path}: {error}") from None


def finite(value: Any) -> Any:  # noqa: ANN401 (any JSON value)
    """A JSON value with NaN and infinity replaced by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def _columns(table: RequestTable | IterationTable) -> dict[str, Any]:
    columns = {f.name: getattr(table, f.name) for f in dataclasses.fields(table)}
    return {name: column for name, column in columns.items() if column is not None}


def _arrays(frame: pd.DataFrame) -> dict[str, Any]:
    return {str(name): frame[name].to_numpy() for name in frame.columns}


def read_frame(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """Read one parquet file of a run directory, or only some columns of it.

    Raises:
        VoltanaError: It is not there.
        BrokenFileError: It is cut short, or something else.
    """
    try:
        return pd.read_parquet(path, columns=columns)
    except FileNotFoundError:
        raise VoltanaError(f"no {path.name} in {path.parent}: is it a run directory?") from None
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these two
        raise _broken(path, error) from None


def check_frames(directory: Path) -> None:
    """Whether each parquet file of a run directory is whole, by its footer alone.

    Raises:
        BrokenFileError: One is not.
    """
    for path in sorted(directory.glob("*.parquet")):
        try:
            pq.read_metadata(path)
        except (OSError, ValueError) as error:
            raise _broken(path, error) from None


def _broken(path: Path, error: Exception) -> BrokenFileError:
    reason = " ".join(str(error).split()).partition(". ")[0]
    return BrokenFileError(f"cannot read {path}, is it cut short? ({reason}): write the run again")


def _instance(values: dict[str, Any]) -> InstanceRecord:
    for key in ("clock_busy_s", "clock_idle_s"):
        values[key] = {int(clock): seconds for clock, seconds in values[key].items()}
    return InstanceRecord(**values)


def _optional_iterations(path: Path) -> IterationTable | None:
    return IterationTable(**_arrays(read_frame(path))) if path.exists() else None


def _optional_timeline(path: Path) -> dict[str, Any] | None:
    return _arrays(read_frame(path)) if path.exists() else None
