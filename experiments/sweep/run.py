"""Run the points of a sweep side by side; resumable, one failure does not lose the others."""

from __future__ import annotations

import os
import socket
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w

from voltana.experiments.progress import progress_bar
from voltana.experiments.sweep.executors import Executor, Outcome, check_executor, open_executor
from voltana.experiments.sweep.grid import Point
from voltana.experiments.sweep.store import ResultStore, open_store
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_csv, write_text
from voltana.profiles.common.folders import FolderKind, claim
from voltana.sim.config import SimConfig
from voltana.sim.results import read_json, write_json

RESULTS = "results.csv"
FAILURES = "failures.json"
POINTS = "points"
RESIDENCY = "residency.json"
NEEDED = ("energy_j", "ttft_attainment", "itl_attainment")
"""Columns that a table of results must have."""

Configs = dict[str, SimConfig]
Failures = dict[str, dict[str, Any]]
Residency = Mapping[str, Mapping[str, float]]
"""Phase, clock in MHz, share of busy time."""


def run_sweep(
    points: Sequence[Point],
    directory: Path,
    *,
    jobs: int | None = None,
    executor: str = "processes",
    store: str | Path | None = None,
    kind: FolderKind = "sweep",
) -> pd.DataFrame:
    """Run every point that has no result yet and write the tidy table of all.

    Args:
        points: What to run; points with equal configurations share one run.
        directory: Takes `config.toml`, `results.csv`, `residency.json`, `failures.json`.
        jobs: Processes; all cores by default.
        executor: One of `voltana.experiments.sweep.executors.EXECUTORS`.
        store: Where results are kept by key, a folder or an fsspec URL, to be shared with other
            sweeps and machines; by default `points` in the directory.
        kind: What the directory holds, see `voltana.profiles.common.folders`.

    Returns:
        One row a point: its labels, its configuration and the numbers of its summary.

    Raises:
        VoltanaError: There is no such executor, or the directory holds something else. Or some
            points failed; those that finished are written all the same.
    """
    check_executor(executor)
    claim(directory, kind)
    results = open_store(store or directory / POINTS)
    _write_config(points, directory / "config.toml")
    failures = run_missing(points, results, jobs=jobs, executor=executor)
    table = tidy(points, results)
    write_json(_residency(points, results), directory / RESIDENCY)
    write_csv(table, directory / RESULTS)
    write_json(failures, directory / FAILURES)
    if failures:
        first = next(iter(failures.values()))
        raise VoltanaError(
            f"{len(failures)} of {len(points)} points failed, the first with: {first['error']} "
            f"(all in {directory / FAILURES}; run again to retry)"
        )
    return table


def run_missing(
    points: Iterable[Point],
    results: ResultStore,
    *,
    jobs: int | None = None,
    executor: str = "processes",
) -> Failures:
    """Run the points that a store lacks into it; what failed, by key.

    Args:
        points: What to run.
        results: Where results are kept.
        jobs: Processes; all cores by default.
        executor: One of `voltana.experiments.sweep.executors.EXECUTORS`.
    """
    missing = {p.key: p.config for p in points if not results.has(p.key)}
    if not missing:
        return {}
    with open_executor(executor, min(jobs or os.cpu_count() or 1, len(missing))) as opened:
        return _run_missing(missing, results, opened)


def run_or_raise(points: Iterable[Point], results: ResultStore, *, jobs: int | None = None) -> None:
    """Like `run_missing`, where one run that fails is one too many.

    Args:
        points: What to run.
        results: Where results are kept.
        jobs: Processes; all cores by default.

    Raises:
        VoltanaError: A run failed; with the first one's error.
    """
    for failure in run_missing(points, results, jobs=jobs).values():
        raise VoltanaError(failure["error"])


def tidy(points: Sequence[Point], store: ResultStore | Path) -> pd.DataFrame:
    """Collect finished points: labels, configuration, summary, one column a number."""
    results = open_store(store) if isinstance(store, Path) else store
    rows = [
        {**p.labels, **p.config.as_dict(), **flat_summary(results.get(p.key)), "hash": p.key}
        for p in points
        if results.has(p.key)
    ]
    return pd.DataFrame(rows)


def read_results(directory: Path) -> pd.DataFrame:
    """The tidy table that `run_sweep` wrote.

    Raises:
        VoltanaError: There is none, it has no row, or it is something else.
    """
    path = directory / RESULTS
    try:
        table = pd.read_csv(path)
    except (FileNotFoundError, NotADirectoryError):
        raise VoltanaError(f"no {RESULTS} in {directory}: is it a sweep's directory?") from None
    except ValueError as error:  # empty, binary, or of uneven rows
        raise VoltanaError(
            f"{path} is no table of results ({' '.join(str(error).split())}): run the sweep again"
        ) from None
    check_results(table, path, NEEDED)
    return table


def check_results(table: pd.DataFrame, path: Path, needed: Sequence[str]) -> None:
    """Whether it has rows, and numbers in the columns that are needed.

    Args:
        table: What was read.
        path: Where from, for the message.
        needed: Columns of numbers.

    Raises:
        VoltanaError: It has not.
    """
    if table.empty:
        raise VoltanaError(f"{path} holds no finished run: run the sweep again")
    for name in needed:
        if name not in table or not pd.api.types.is_numeric_dtype(table[name]):
            raise VoltanaError(
                f"{path} has no numbers {name}: is it a result of voltana simulate or sweep?"
            )


def read_residency(directory: Path, keys: Iterable[str]) -> dict[str, Residency]:
    """Clock shares by key of those runs whose shares were kept, wherever their results are."""
    path = directory / RESIDENCY
    if path.exists():
        kept = read_json(path)
        return {key: kept[key] for key in dict.fromkeys(keys) if key in kept}
    points = directory / POINTS  # of an earlier version
    found = [key for key in dict.fromkeys(keys) if (points / f"{key}.json").exists()]
    return {key: _shares(read_json(points / f"{key}.json")) for key in found}


def _residency(points: Sequence[Point], results: ResultStore) -> dict[str, Residency]:
    keys = dict.fromkeys(p.key for p in points)
    return {key: _shares(results.get(key)) for key in keys if results.has(key)}


def _shares(summary: Mapping[str, Any]) -> Residency:
    shares: Residency = summary.get("clock_residency", {})
    return shares


def _run_missing(missing: Configs, store: ResultStore, executor: Executor) -> Failures:
    """Run what is missing; the points that were running when a process died run again, alone."""
    failures: Failures = {}
    with progress_bar("simulating", len(missing), kept=store.place) as bar:
        lost: Configs = {}
        for key, outcome in _outcomes(missing, store, executor):
            if outcome.is_lost:
                lost[key] = missing[key]
                continue
            _keep(key, outcome, missing[key], store, failures)
            bar.advance()
        for key, outcome in _outcomes(lost, store, executor, at_once=1):
            _keep(key, outcome, missing[key], store, failures)
            bar.advance()
    return failures


def _outcomes(
    configs: Configs, store: ResultStore, executor: Executor, *, at_once: int | None = None
) -> Iterator[tuple[str, Outcome]]:
    """How each point ended; known results are skipped. `at_once` bounds how many are under way."""
    queue = deque(_own_order(configs))
    running = 0
    while queue or running:
        while queue and running < (at_once or executor.capacity):
            key = queue.popleft()
            if store.has(key):  # another machine that shares the store was faster
                yield key, Outcome()
            else:
                executor.submit(key, configs[key])
                running += 1
        if running:
            for key, outcome in executor.wait():
                running -= 1
                yield key, outcome


def _own_order(configs: Configs) -> list[str]:
    """The points in an order of this process's own: those who share a store start far apart."""
    keys = list(configs)
    start = zlib.crc32(f"{socket.gethostname()} {os.getpid()}".encode()) % max(len(keys), 1)
    return keys[start:] + keys[:start]


def _keep(
    key: str, outcome: Outcome, config: SimConfig, store: ResultStore, failures: Failures
) -> None:
    if outcome.summary is not None:
        store.put(key, outcome.summary)
    elif outcome.is_lost or outcome.error is not None:
        error = outcome.error or "its process died (out of memory, or killed)"
        failures[key] = {"error": error, "config": config.as_dict()}


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
    write_text(tomli_w.dumps({"point": resolved}), path)
