"""Logs of one's own: each kind as its program writes it, out of order, with failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.workload.traces import open_trace, read_lengths

Lines = list[dict[str, Any]]


def finished(rid: str, at: str, tokens: tuple[int, int], **more: Any) -> dict[str, Any]:  # noqa: ANN401
    """What SGLang logs at a request's end."""
    told = {"id": rid, "prompt_tokens": tokens[0], "completion_tokens": tokens[1], **more}
    return {"timestamp": at, "event": "request.finished", "rid": rid, "out": {"meta_info": told}}


def record(start_ns: int, tokens: tuple[int, int], phase: str = "profiling") -> dict[str, Any]:
    """A line of aiperf's profile_export.jsonl."""
    return {
        "metadata": {"session_num": 0, "x_request_id": "r", "request_start_ns": start_ns,
                     "request_end_ns": start_ns + 10**9, "benchmark_phase": phase,
                     "was_cancelled": False},
        "metrics": {"time_to_first_token": {"value": 45.5, "unit": "ms"},
                    "input_sequence_length": {"value": tokens[0], "unit": "tokens"},
                    "output_sequence_length": {"value": tokens[1], "unit": "tokens"}},
        "error": None,
    }  # fmt: skip


LOGS: dict[str, Lines] = {
    "gateway.jsonl": [  # ended in another order than begun
        {"start_time": "2026-05-04T10:00:01.500Z", "status": 200,
         "usage": {"prompt_tokens": 396, "completion_tokens": 109, "total_tokens": 505}},
        {"start_time": "2026-05-04T12:00:00.000+02:00", "status": 200,
         "usage": {"prompt_tokens": 374, "completion_tokens": 44, "total_tokens": 418}},
    ],
    "responses.jsonl": [
        {"ts": 1777888800000, "response": {"status_code": 200, "body": {
            "object": "chat.completion", "created": 1777888803,
            "usage": {"prompt_tokens": 374, "completion_tokens": 44}}}},
        {"ts": 1777888801500, "response": {"status_code": 200, "body": {
            "object": "response", "usage": {"input_tokens": 396, "output_tokens": 109}}}},
    ],
    "profile_export.jsonl": [
        record(5_000_000_000, (10, 10), "warmup"),
        record(7_000_000_000, (374, 44)),
        record(8_500_000_000, (396, 109)),
    ],
    "sglang.jsonl": [
        {"timestamp": "2026-05-04T10:00:00.000000", "event": "request.received", "rid": "a",
         "obj": {"rid": "a"}},
        # "b" came before the log began: its end less its latency
        finished("b", "2026-05-04T10:00:04.000000", (396, 109), e2e_latency=2.5),
        finished("a", "2026-05-04T10:00:09.000000", (374, 44), e2e_latency=9.0),
    ],
}  # fmt: skip


def write(path: Path, lines: Lines) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("name", sorted(LOGS))
def test_each_kind_gives_the_same_requests(tmp_path: Path, name: str) -> None:
    workload = open_trace(write(tmp_path / name, LOGS[name]))
    assert workload.arrival_s == pytest.approx([0.0, 1.5], abs=1e-6)
    assert workload.input_tokens.tolist() == [374, 396]
    assert workload.output_tokens.tolist() == [44, 109]


REAL = Path(__file__).parent / "logs"
"""Cut from what the programs wrote, long fields left out: aiperf 0.13.0, LiteLLM 1.110.2 and
SGLang 0.5.23, whose log has a request that was refused and one that was aborted."""


@pytest.mark.parametrize(
    ("name", "arrivals_s", "tokens", "dropped"),
    [
        ("profile_export.jsonl", [0, 0.215343966], [(60, 8)] * 2, 1),
        (
            "sglang_0.log",
            [0, 0.805406, 1.128907, 1.412747, 1.720889],
            [(5, 5), (20, 4), (40, 5), (60, 6), (80, 7)],
            1,
        ),
        ("litellm.jsonl", [0, 0.516941, 0.822877], [(10, 20)] * 3, 1),
    ],
)
def test_what_the_programs_wrote(
    name: str, arrivals_s: list[float], tokens: list[tuple[int, int]], dropped: int
) -> None:
    with pytest.raises(VoltanaError, match=rf"{name}:\d+\): trace_drop_failed=true"):
        open_trace(str(REAL / name))
    workload = open_trace(str(REAL / name), drop_failed=True)
    assert workload.arrival_s == pytest.approx(arrivals_s, abs=1e-6)
    assert [*zip(workload.input_tokens, workload.output_tokens, strict=True)] == tokens
    assert f"{dropped} failed" in workload.name


def test_a_servers_log_has_stamps_and_other_lines(tmp_path: Path) -> None:
    stamp = "[2026-05-04 10:00:09] "
    lines = [stamp + json.dumps(line) for line in LOGS["sglang.jsonl"]]
    chatter = ["[2026-05-04 10:00:00 TP0] Load weight end. elapsed=1.1 s", "INFO: started", ""]
    text = "\n".join([*chatter, lines[0], chatter[0], *lines[1:]])
    for name in ("host_0.log", "host_0.log.2026-05-04_10"):
        (tmp_path / name).write_text(text)
        workload = open_trace(str(tmp_path / name))
        assert workload.arrival_s == pytest.approx([0.0, 1.5], abs=1e-6)
        assert sorted(read_lengths(tmp_path / name)[0].tolist()) == [374, 396]
    stamped = tmp_path / "stamped.jsonl"
    stamped.write_text("\n".join(lines))
    assert len(open_trace(str(stamped))) == 2
    stamped.write_text(text)
    with pytest.raises(VoltanaError, match=r"stamped.jsonl"):
        open_trace(str(stamped))


def test_lengths_of_a_real_benchmark() -> None:
    inputs, outputs = read_lengths(REAL / "bench_serving.jsonl")
    assert (inputs.tolist(), outputs.tolist()) == ([61, 21, 25, 21], [4] * 4)


def test_lengths_of_a_log_and_of_a_benchmark(tmp_path: Path) -> None:
    bench = [{"backend": "sglang", "completed": 2, "input_lens": [374, 396],
              "output_lens": [44, 109], "ttfts": [0.1, 0.2]}]  # fmt: skip
    for name, lines in (("bench.jsonl", bench), ("gateway.jsonl", LOGS["gateway.jsonl"])):
        inputs, outputs = read_lengths(Path(write(tmp_path / name, lines)))
        assert sorted(zip(inputs.tolist(), outputs.tolist(), strict=True)) == [
            (374, 44),
            (396, 109),
        ]


FAILURES: dict[str, dict[str, Any]] = {
    "gateway.jsonl": {"start_time": "2026-05-04T10:00:00Z", "status": 503},
    "responses.jsonl": {"ts": 1777888800000, "error": {"message": "overloaded"}},
    "profile_export.jsonl": record(7_000_000_000, (1, 1)) | {"error": {"code": 500}},
    "sglang.jsonl": finished(
        "c", "2026-05-04T10:00:09.5", (3, 1), e2e_latency=1.0, finish_reason={"type": "abort"}
    ),
}


@pytest.mark.parametrize("name", sorted(FAILURES))
def test_failed_requests_are_refused_or_dropped(tmp_path: Path, name: str) -> None:
    trace = write(tmp_path / name, [*LOGS[name], FAILURES[name]])
    with pytest.raises(VoltanaError, match=rf"{name}:\d+\): trace_drop_failed=true"):
        open_trace(trace)
    workload = open_trace(trace, drop_failed=True)
    assert len(workload) == 2
    assert "1 failed left out" in workload.name


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"usage": {"prompt_tokens": 3, "completion_tokens": 4}}, "must have a time"),
        ({"ts": "noon", "prompt_tokens": 3, "completion_tokens": 4}, "ts must be a date and time"),
        ({"ts": 4, "prompt_tokens": 3, "completion_tokens": 0}, "output_tokens must be >= 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: dict[str, Any], words: str) -> None:
    good = {"ts": 3, "prompt_tokens": 3, "completion_tokens": 4}
    with pytest.raises(VoltanaError, match=rf"{words}.*log.jsonl:2"):
        open_trace(write(tmp_path / "log.jsonl", [good, line]))
