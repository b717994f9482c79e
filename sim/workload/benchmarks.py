"""What load generators write of a run: lengths and latencies of each request, as a client saw them.

- **aiperf**, `profile_export.jsonl` (the folder that holds it will do);
- **guidellm**, `benchmarks.json` (also its folder): of token gaps it keeps each request's mean;
- **bench_serving** of SGLang with `--output-details`: when requests were sent is known where all
  were sent at once (`--request-rate inf` and no `--max-concurrency`), and not otherwise.

A client knows no instance, clock or joule: such a record has no instances, and its energy is NaN.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan, nan
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.records import COMPLETED, FAILED, RequestTable, RunRecord
from voltana.sim.workload.logs import (
    COLUMNS,
    Request,
    Rows,
    is_aiperf,
    is_json_lines,
    read_lines,
    read_rows,
)

FILES: Final = ("profile_export.jsonl", "benchmarks.json")
"""Of a folder that aiperf or guidellm wrote."""
_FAILED: Final = ("errored", "incomplete")
"""guidellm's lists of requests without a whole answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One run of a load generator."""

    program: str
    name: str
    rows: Rows
    duration_s: float = nan
    """As the program says it; NaN where it does not."""

    @property
    def has_arrivals(self) -> bool:
        """Whether it says when each request was sent."""
        return not any(isnan(request.at_s) for _, request in self.rows)

    def record(self, slo_ttft_s: float, slo_itl_s: float) -> RunRecord:
        """The run as a record that metrics, report and validation read.

        Requests whose sending is not known count from 0 each: latencies are right, the time axis
        is not, and `settings` says so.

        Args:
            slo_ttft_s: Promise that it is judged by.
            slo_itl_s: The same of gaps between tokens.

        Raises:
            VoltanaError: It holds no answered request.
        """
        requests = [r for _, r in self.rows]
        if self.has_arrivals:
            requests.sort(key=lambda request: request.at_s)
        if all(r.is_failed for r in requests):
            raise VoltanaError(f"{self.name} of {self.program} holds no answered request")
        start_s = requests[0].at_s if self.has_arrivals else 0.0
        arrival_s = np.array([r.at_s - start_s if self.has_arrivals else 0.0 for r in requests])
        finish_s = arrival_s + np.array([r.latency_s for r in requests])
        gaps, counts, are_single = _gaps(requests)
        none = np.full(len(requests), -1)
        table = RequestTable(
            arrival_s=arrival_s,
            input_tokens=np.array([int(r.input_tokens or 0) for r in requests]),
            output_tokens=np.array([int(r.output_tokens or 0) for r in requests]),
            prefill_id=none,
            decode_id=none,
            first_token_s=arrival_s + np.array([r.ttft_s for r in requests]),
            finish_s=finish_s,
            status=np.array([FAILED if r.is_failed else COMPLETED for r in requests]),
            retractions=np.zeros(len(requests), dtype=np.int64),
        )
        last_s = float(np.nanmax(finish_s, initial=0.0))
        return RunRecord(
            requests=table,
            itl_s=gaps,
            itl_weight=counts,
            instances=[],
            makespan_s=last_s if self.has_arrivals or isnan(self.duration_s) else self.duration_s,
            slo_ttft_s=slo_ttft_s,
            slo_itl_s=slo_itl_s,
            wall_s=last_s,
            settings={
                "benchmark": self.program,
                "send_times": "known" if self.has_arrivals else "unknown",
                "token_gaps": "single" if are_single else "mean of each request",
                "slo_ttft_s": slo_ttft_s,
                "slo_itl_s": slo_itl_s,
            },
        )


def benchmark_file(path: Path) -> Path | None:
    """The file of a benchmark: the path itself, or in a folder aiperf's or guidellm's; or None."""
    found = _recognised(path)
    return None if found is None else found[0]


def _recognised(path: Path) -> tuple[Path, Sequence[Mapping[str, Any]] | None] | None:
    """The file and, of guidellm's, what it holds: it has to be read whole to be known as one."""
    if path.is_dir():
        inside = next((path / name for name in FILES if (path / name).is_file()), None)
        return None if inside is None else _recognised(inside)
    if not path.is_file() or path.suffix == ".gz":
        return None
    try:
        if path.suffix == ".json":
            told = _guidellm(path)
            return None if told is None else (path, told)
        is_one = is_json_lines(path) and (is_aiperf(path) or _is_bench(path))
    except (VoltanaError, OSError, UnicodeDecodeError):
        return None
    return (path, None) if is_one else None


def read_benchmarks(path: Path) -> list[Benchmark]:
    """Every run that a file holds: guidellm's rates, the lines of bench_serving.

    Args:
        path: As of `benchmark_file`.

    Raises:
        VoltanaError: It holds none, or a line of it cannot be read.
    """
    recognised = _recognised(path)
    if recognised is None:
        raise VoltanaError(
            f"{path} is no output of aiperf (profile_export.jsonl), guidellm (benchmarks.json) or "
            "bench_serving (--output-details): name one"
        )
    return _runs(path, *recognised)


def _runs(path: Path, file: Path, told: Sequence[Mapping[str, Any]] | None) -> list[Benchmark]:
    """What a recognised file holds; `path` is how it was named."""
    if told is not None:
        found = list(_of_guidellm(file, told))
    elif is_aiperf(file):
        found = [Benchmark(program="aiperf", name=_name(path), rows=read_rows(file))]
    else:
        found = list(_of_bench_serving(file))
    if not any(each.rows for each in found):
        raise VoltanaError(f"{file}: holds no request")
    return found


def read_one(path: Path) -> Benchmark:
    """The run of a file that holds one.

    Raises:
        VoltanaError: As of `read_benchmarks`, or it holds several.
    """
    return _only(path, read_benchmarks(path))


def find_one(path: Path) -> Benchmark | None:
    """The same, or None if the file is no benchmark: it is read once to know both."""
    recognised = _recognised(path)
    return None if recognised is None else _only(path, _runs(path, *recognised))


def _only(path: Path, found: list[Benchmark]) -> Benchmark:
    if len(found) > 1:
        raise VoltanaError(
            f"{path} holds {len(found)} runs ({', '.join(each.name for each in found[:3])}, …): "
            "run the load generator at one rate, or keep one of them"
        )
    return found[0]


def bench_lengths(path: Path) -> pd.DataFrame | None:
    """Lengths of the answered requests of SGLang's bench_serving; None if the file is none.

    Columns input_tokens and output_tokens, all runs of the file one after the other; index: numbers
    of their lines less 1.
    """
    if not _is_bench(path):
        return None
    rows = [row for each in _of_bench_serving(path) for row in each.rows if not row[1].is_failed]
    return pd.DataFrame(
        [(r.input_tokens, r.output_tokens) for _, r in rows],
        columns=[*COLUMNS[1:]],
        index=[n for n, _ in rows],
    )


def _gaps(requests: list[Request]) -> tuple[Any, Any, bool]:
    """Gaps and how many tokens waited that long; whether each gap was seen by itself."""
    gaps: list[float] = []
    counts: list[int] = []
    are_single = True
    for request in requests:
        pieces = 0 if request.is_failed else int(request.output_tokens) - 1
        if len(request.gaps_s):
            gaps += request.gaps_s
            counts += [1] * len(request.gaps_s)
        elif pieces > 0:
            are_single = False
            gaps.append((request.latency_s - request.ttft_s) / pieces)
            counts.append(pieces)
    known = [isfinite(gap) for gap in gaps]
    return (
        np.array([g for g, k in zip(gaps, known, strict=True) if k], dtype=np.float64),
        np.array([c for c, k in zip(counts, known, strict=True) if k], dtype=np.int64),
        are_single,
    )


def _name(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _guidellm(path: Path) -> list[Mapping[str, Any]] | None:
    """The benchmarks of a guidellm report; None if the file is none."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    found = told.get("benchmarks") if isinstance(told, dict) else None
    is_one = isinstance(found, list) and all(isinstance(b.get("requests"), dict) for b in found)
    return found if is_one else None


def _of_guidellm(path: Path, found: Sequence[Mapping[str, Any]]) -> Iterator[Benchmark]:
    for i, each in enumerate(found):
        lists = each["requests"]
        told = [(r, True) for r in lists.get("successful") or ()]
        told += [(r, False) for kind in _FAILED for r in lists.get(kind) or ()]
        rows = [(n, _guidellm_request(r, is_whole=w)) for n, (r, w) in enumerate(told)]
        name = path.stem if len(found) == 1 else f"{path.stem} {i + 1}"
        yield Benchmark(program="guidellm", name=name, rows=rows)


def _guidellm_request(told: Mapping[str, Any], *, is_whole: bool) -> Request:
    at_s = _number(told.get("request_start_time"))
    if not is_whole:
        return Request(at_s)
    outputs, mean_ms = told.get("output_tokens"), _number(told.get("inter_token_latency_ms"))
    ttft_s = _number(told.get("time_to_first_token_ms")) * 1e-3
    latency_s = ttft_s + mean_ms * 1e-3 * ((outputs or 1) - 1) if (outputs or 0) > 1 else ttft_s
    return Request(at_s, told.get("prompt_tokens"), outputs, ttft_s=ttft_s, latency_s=latency_s)


def _is_bench(path: Path) -> bool:
    _, line = next(read_lines(path), (0, {}))
    return all(isinstance(line.get(key), list) for key in ("input_lens", "output_lens"))


def _of_bench_serving(path: Path) -> Iterator[Benchmark]:
    for number, line in read_lines(path):
        inputs, outputs = line.get("input_lens"), line.get("output_lens")
        if not isinstance(inputs, list) or not isinstance(outputs, list):
            raise VoltanaError(f"input_lens and output_lens must be lists ({path}:{number})")
        count = len(inputs)
        errors = line.get("errors") or [""] * count
        ttfts = line.get("ttfts") or [nan] * count
        itls = line.get("itls") or [[]] * count
        if not len(outputs) == len(errors) == len(ttfts) == len(itls) == count:
            raise VoltanaError(f"lists of one run must be of one length ({path}:{number})")
        is_at_once = line.get("request_rate") == inf and line.get("max_concurrency") is None
        at_s = 0.0 if is_at_once else nan
        lists = zip(inputs, outputs, errors, ttfts, itls, strict=True)
        rows = [(number - 1, _bench_request(at_s, each)) for each in lists]
        duration_s = _number(line.get("duration"))
        name = f"{path.stem} {number}"
        yield Benchmark(program="bench_serving", name=name, rows=rows, duration_s=duration_s)


def _bench_request(at_s: float, told: tuple[Any, ...]) -> Request:
    inputs, outputs, error, ttft, gaps = told
    if error or not outputs:
        return Request(at_s)
    ttft_s, gaps_s = _number(ttft), [_number(gap) for gap in gaps]
    return Request(
        at_s, inputs, outputs, ttft_s=ttft_s, latency_s=ttft_s + sum(gaps_s), gaps_s=gaps_s
    )


def _number(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else nan  # type: ignore[arg-type]
