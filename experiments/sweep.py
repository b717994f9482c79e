"""Run the points of a sweep in processes; resumable, one failure does not lose the others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.grid import Point
from experiments.runs import run
from profiles.errors import VoltanaError
from sim.config import SimConfig
from sim.metrics import summarise
from sim.results import read_json, write_json

RESULTS = "results.csv"
FAILURES = "failures.json"


def run_sweep(points: Sequence[Point], directory: Path, *, jobs: int | None = None) -> pd.DataFrame:
    """Run every point that has no result yet and write the tidy table of all.

    Args:
        points: What to run; points with equal configurations share one run.
        directory: Takes `config.toml`, `points/HASH.json`, `results.csv`, `failures.json`.
        jobs: Processes; all cores by default.

    Returns:
        One row a point: its labels, its configuration and the numbers of its summary.

    Raises:
        VoltanaError: Some points failed; those that finished are written all the same.
    """
    store = directory / "points"
    store.mkdir(parents=True, exist_ok=True)
    _write_config(points, directory / "config.toml")
    missing = {p.key: p.config for p in points if not (store / f"{p.key}.json").exists()}
    failures = _run_missing(missing, store, jobs or os.cpu_count() or 1)
    table = tidy(points, store)
    _write_text(table.to_csv(index=False), directory / RESULTS)
    write_json(failures, directory / FAILURES)
    if failures:
        first = next(iter(failures.values()))
        raise VoltanaError(
            f"{len(failures)} of {len(points)} points failed, the first with: {first['error']} "
            f"(all in {directory / FAILURES}; run again to retry)"
        )
    return table


def tidy(points: Sequence[Point], store: Path) -> pd.DataFrame:
    """Collect finished points: labels, configuration, summary, one column a number."""
    rows = []
    for point in points:
        path = store / f"{point.key}.json"
        if path.exists():
            summary = read_json(path)
            rows.append(
                {**point.labels, **point.config.as_dict(), **flat_summary(summary), "hash": point.key}
            )
    return pd.DataFrame(rows)


def read_results(directory: Path) -> pd.DataFrame:
    """The tidy table that `run_sweep` wrote."""
    try:
        return pd.read_csv(directory / RESULTS)
    except FileNotFoundError:
        raise VoltanaError(f"no {RESULTS} in {directory}: is it a sweep's directory?") from None


def _run_missing(
    missing: dict[str, SimConfig], store: Path, jobs: int
) -> dict[str, dict[str, Any]]:
    failures: dict[str, dict[str, Any]] = {}
    with _progress(len(missing)) as progress:
        if jobs == 1:
            for key, config in missing.items():
                _note(failures, key, config, _run_point(config, store / f"{key}.json"))
                progress.advance(progress.task_ids[0])
            return failures
        with ProcessPoolExecutor(max_workers=min(jobs, max(len(missing), 1))) as pool:
            futures = {
                pool.submit(_run_point, config, store / f"{key}.json"): (key, config)
                for key, config in missing.items()
            }
            for future in as_completed(futures):
                key, config = futures[future]
                _note(failures, key, config, _outcome(future))
                progress.advance(progress.task_ids[0])
    return failures


def _note(
    failures: dict[str, dict[str, Any]], key: str, config: SimConfig, error: str | None
) -> None:
    if error is not None:
        failures[key] = {"error": error, "config": config.as_dict()}


def _outcome(future: Future[str | None]) -> str | None:
    try:
        return future.result()
    except BrokenProcessPool:
        return "a worker process died (out of memory, or killed)"


def _run_point(config: SimConfig, path: Path) -> str | None:
    """Run one point in a worker; returns the error of a bad configuration."""
    try:
        summary = summarise(run(config))
    except VoltanaError as error:
        return str(error)
    write_json(summary, path)
    return None


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
    columns = (
        TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        progress.add_task("sweep", total=total)
        yield progress


def flat_summary(summary: dict[str, Any]) -> dict[str, Any]:
    """{"ttft_s": {"p50": …}} becomes {"ttft_p50_s": …}; the clock residency stays in the JSON."""
    flat: dict[str, Any] = {}
    for name, value in summary.items():
        if name == "clock_residency":
            continue
        if isinstance(value, dict):
            stem = name.removesuffix("_s")
            flat |= {f"{stem}_{level}_s": number for level, number in value.items()}
        else:
            flat[name] = value
    return flat


def _write_config(points: Sequence[Point], path: Path) -> None:
    resolved = [{"labels": dict(p.labels), **p.config.as_dict()} for p in points]
    _write_text(tomli_w.dumps({"point": resolved}), path)


def _write_text(text: str, path: Path) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
