"""Readers of logs, as JSON lines: when each request came, its tokens and, where told, its latency.

Three kinds are told by their keys; what load generators write as a whole is in `benchmarks`:

- **access log** of an OpenAI-compatible server or gateway: a time (`TIMES`; ISO 8601, or seconds,
  milliseconds, microseconds or nanoseconds since 1970) and the token counts of `usage`, which may
  stand in the line itself, in `usage`, in `response` or in `response.body`;
- **aiperf**, `profile_export.jsonl`: `metadata.request_start_ns` and
  `metrics.input_sequence_length`, `metrics.output_sequence_length`, latencies in ms; warm-up
  requests do not count;
- **SGLang**, `--log-requests --log-requests-format json`: each `request.finished` with the time of
  its `request.received`, or else its own less `e2e_latency`. Its files are called
  `HOST_RANK.log`, and a time in brackets stands before each object; on its standard output other
  lines stand between, which a `.log` may hold.

A line is written when a request ends, so lines are put in the order of arrival. Failed requests
(an error, a status from 400 on or `failure`, cancelled, no usage) are an error unless they are to
be dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any, Final, NamedTuple

import pandas as pd

from voltana.profiles.common.errors import VoltanaError

TIMES: Final = (
    "start_time", "startTime", "request_time", "created_at", "timestamp", "time", "ts", "created",
)  # fmt: skip
"""The first of these keys that a line has: the earlier name the beginning of a request."""
INPUTS: Final = ("prompt_tokens", "input_tokens")
OUTPUTS: Final = ("completion_tokens", "output_tokens")
COLUMNS: Final = ("arrival_s", "input_tokens", "output_tokens")
_STAMP: Final = re.compile(r"^\[\d{4}-\d\d-\d\d[^\]]*\] ?")
"""What SGLang's loggers put before a line."""
_FAILED: Final = ("failure", "failed", "error")
"""A status in words; `failure` is LiteLLM's."""
_DAWN_S: Final = 1e8
"""Numbers from here on are times since 1970; each unit is a thousand of the one above."""
Line = tuple[int, dict[str, Any]]


class Request(NamedTuple):
    """One request of a log."""

    at_s: float
    """Arrival, on the log's own clock; NaN where it has none."""
    input_tokens: Any = None
    """As the log has it; None for a failed one's, like the output's."""
    output_tokens: Any = None
    ttft_s: float = nan
    """To the first token; NaN where the log does not say, as are the next two."""
    latency_s: float = nan
    """To the last one."""
    gaps_s: Sequence[float] = ()
    """Between successive tokens, or pieces of the stream."""

    @property
    def is_failed(self) -> bool:
        """Whether it tells no lengths."""
        return self.input_tokens is None or self.output_tokens is None


Rows = Sequence[tuple[int, Request]]
"""Requests with the number of their line, or whatever counts them in their file, less 1."""


def is_json_lines(path: Path) -> bool:
    """Whether a file is JSON lines by its name; a server's log may have been rotated."""
    return ".jsonl" in path.suffixes[-2:] or _is_log_file(path)


def _is_log_file(path: Path) -> bool:
    return ".log" in path.suffixes[-2:]


def is_log(path: Path) -> bool:
    """Whether the first object of a file of JSON lines is of one of the three kinds."""
    try:
        _, first = next(read_lines(path))
    except (StopIteration, VoltanaError, OSError, UnicodeDecodeError):
        return False
    return _kind(first) is not None


def is_aiperf(path: Path) -> bool:
    """Whether a log is one that aiperf wrote."""
    return _kind(next(read_lines(path), (0, {}))[1]) == "aiperf"


def read_log(path: Path, *, drop_failed: bool) -> tuple[pd.DataFrame, int]:
    """The requests of a log, by arrival, the first one at 0.

    Args:
        path: JSON lines.
        drop_failed: Leave failed requests out.

    Returns:
        Columns `COLUMNS`, index: numbers of their lines less 1; and how many were left out.

    Raises:
        VoltanaError: A line that is no JSON object, has no time or is of no kind, or a failed
            request that is not to be dropped; with file and line.
    """
    return by_arrival(read_rows(path), path, drop_failed=drop_failed)


def read_rows(path: Path) -> Rows:
    """Every request of a log in the order of its lines, failed ones too.

    Raises:
        VoltanaError: A line that is no JSON object, has no time or is of no kind.
    """
    kind = None
    rows: list[tuple[int, Request]] = []
    received: dict[str, float] = {}
    for number, line in read_lines(path):
        kind = kind or _kind(line)
        where = f"{path}:{number}"
        found = _READERS[kind or "access"](line, received, where)
        if found is not None:
            rows.append((number - 1, found))
    return rows


def by_arrival(rows: Rows, path: Path, *, drop_failed: bool) -> tuple[pd.DataFrame, int]:
    """Rows as `read_log` returns them.

    Args:
        rows: Requests of a file.
        path: The file, for errors.
        drop_failed: Leave failed requests out.

    Raises:
        VoltanaError: A failed request that is not to be dropped, or no other.
    """
    kept = [(n, r) for n, r in rows if not r.is_failed]
    if len(kept) < len(rows) and not drop_failed:
        first = next(n for n, r in rows if r.is_failed)
        raise VoltanaError(
            f"a request must have succeeded and tell its tokens ({path}:{first + 1}): "
            "trace_drop_failed=true leaves out those that did not"
        )
    if not kept:
        raise VoltanaError(f"{path}: holds no request with output")
    kept.sort(key=lambda row: row[1].at_s)
    start_s = kept[0][1].at_s
    frame = pd.DataFrame([r[:3] for _, r in kept], columns=[*COLUMNS], index=[n for n, _ in kept])
    frame["arrival_s"] -= start_s
    return frame, len(rows) - len(kept)


def read_lines(path: Path) -> Iterator[Line]:
    """The JSON objects of a file of lines, with their numbers from 1.

    Raises:
        VoltanaError: A line is none.
    """
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            told = _STAMP.sub("", text.strip())
            if not told or (_is_log_file(path) and not told.startswith("{")):
                continue
            try:
                line = json.loads(told)
            except ValueError as error:
                raise VoltanaError(f"cannot read {path}:{number}: {error}") from None
            if not isinstance(line, dict):
                raise VoltanaError(f"a line must be a JSON object ({path}:{number})")
            yield number, line


def _kind(line: Mapping[str, Any]) -> str | None:
    if isinstance(line.get("metadata"), dict) and isinstance(line.get("metrics"), dict):
        return "aiperf" if "request_start_ns" in line["metadata"] else None
    if str(line.get("event", "")).startswith("request."):
        return "sglang"
    return "access" if _usage(line) is not None or _is_failed(line) else None


def _access(line: dict[str, Any], _: dict[str, float], where: str) -> Request:
    # an OpenAI response's own `created` is read where the line around it has no time
    holders = (line, line.get("response"), _body(line))
    key, value = next(
        ((k, h[k]) for h in holders if isinstance(h, dict) for k in TIMES if h.get(k) is not None),
        ("", None),
    )
    if value is None:
        raise VoltanaError(f"a line must have a time ({', '.join(TIMES)}), got none ({where})")
    usage = None if _is_failed(line) else _usage(line)
    at_s = seconds(value, key, where)
    return Request(at_s) if usage is None else Request(at_s, *usage)


def _aiperf(line: dict[str, Any], _: dict[str, float], where: str) -> Request | None:
    metadata, metrics = line.get("metadata") or {}, line.get("metrics") or {}
    if metadata.get("benchmark_phase", metadata.get("credit_phase", "profiling")) != "profiling":
        return None
    start = metadata.get("request_start_ns")
    if start is None:
        raise VoltanaError(f"metadata.request_start_ns must be there ({where})")
    at_s = seconds(start, "metadata.request_start_ns", where, unit_s=1e-9)
    if line.get("error") or metadata.get("was_cancelled"):
        return Request(at_s)
    told = {k: v.get("value") if isinstance(v, dict) else v for k, v in metrics.items()}
    return Request(
        at_s, told.get("input_sequence_length"), told.get("output_sequence_length"),
        ttft_s=_from_ms(told.get("time_to_first_token")),
        latency_s=_from_ms(told.get("request_latency")),
        gaps_s=[_from_ms(gap) for gap in told.get("inter_chunk_latency") or ()],
    )  # fmt: skip


def _from_ms(value: object) -> float:
    return float(value) * 1e-3 if isinstance(value, int | float) else nan


def _sglang(line: dict[str, Any], received: dict[str, float], where: str) -> Request | None:
    event, rid = line.get("event"), str(line.get("rid"))
    if event not in ("request.received", "request.finished"):
        return None
    if "timestamp" not in line:
        raise VoltanaError(f"timestamp must be there ({where})")
    at_s = seconds(line["timestamp"], "timestamp", where)
    if event == "request.received":
        received[rid] = at_s
        return None
    told = (line.get("out") or {}).get("meta_info") or {}
    at_s = received.pop(rid, at_s - float(told.get("e2e_latency") or 0.0))
    reason = told.get("finish_reason")
    if isinstance(reason, dict) and reason.get("type") == "abort":
        return Request(at_s)
    return Request(at_s, told.get("prompt_tokens"), told.get("completion_tokens"))


_READERS: Final = {"access": _access, "aiperf": _aiperf, "sglang": _sglang}


def _usage(line: Mapping[str, Any]) -> tuple[Any, Any] | None:
    response = line.get("response")
    for holder in (line, response, _body(line)):
        if not isinstance(holder, dict):
            continue
        for told in (holder.get("usage"), holder):
            if isinstance(told, dict):
                both = [next((told[k] for k in keys if told.get(k) is not None), None)
                        for keys in (INPUTS, OUTPUTS)]  # fmt: skip
                if both[0] is not None and both[1] is not None:
                    return both[0], both[1]
    return None


def _body(line: Mapping[str, Any]) -> Any:  # noqa: ANN401 (JSON)
    response = line.get("response")
    return response.get("body") if isinstance(response, dict) else None


def _is_failed(line: Mapping[str, Any]) -> bool:
    response = line.get("response")
    inner = response if isinstance(response, dict) else {}
    codes = (line.get("status"), line.get("status_code"), inner.get("status_code"))
    return bool(line.get("error")) or any(map(_is_bad_status, codes))


def _is_bad_status(code: object) -> bool:
    if isinstance(code, str) and not code.isdecimal():
        return code.lower() in _FAILED
    return isinstance(code, int | str) and int(code) >= 400


def seconds(value: object, key: str, where: str, *, unit_s: float | None = None) -> float:
    """Seconds since 1970, or since whatever small numbers count from.

    Args:
        value: A number, or a date and time as ISO 8601.
        key: Its name, for an error.
        where: File and line.
        unit_s: Of a number, in s; by default told by its size.

    Raises:
        VoltanaError: It is neither.
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            moment = pd.to_datetime(value, errors="coerce", utc=True)
            if pd.isna(moment):
                raise VoltanaError(
                    f"{key} must be a date and time or a number, got {value!r} ({where})"
                ) from None
            return float(moment.timestamp())
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise VoltanaError(
            f"{key} must be a date and time or a number >= 0, got {value!r} ({where})"
        )
    number = float(value)
    if unit_s is not None:
        return number * unit_s
    while number >= _DAWN_S * 1e3:
        number /= 1e3
    return number
