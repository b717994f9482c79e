"""What load generators wrote, read as a run and as a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.sim.workload.test_logs import REAL
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.metrics import summarise
from voltana.sim.records import RunRecord
from voltana.sim.workload.benchmarks import benchmark_file, read_benchmarks, read_one
from voltana.sim.workload.traces import open_trace, read_lengths

# two answered requests and a failed one; the first sent at 100 s, the second 2 s later:
# first tokens after 0.5 and 1.0 s, gaps 0.1 and 0.3 s, and 0.2 s
INPUTS, OUTPUTS = (374, 396), (3, 2)


def guidellm(starts_s: tuple[float, ...] = (102.0, 100.0)) -> dict[str, Any]:
    def request(i: int, start_s: float, ttft_ms: float, itl_ms: float) -> dict[str, Any]:
        return {"request_start_time": start_s, "prompt_tokens": INPUTS[i],
                "output_tokens": OUTPUTS[i], "time_to_first_token_ms": ttft_ms,
                "inter_token_latency_ms": itl_ms}  # fmt: skip

    answered = [request(1, starts_s[0], 1000.0, 200.0), request(0, starts_s[1], 500.0, 200.0)]
    lists = {"successful": answered, "errored": [{"request_start_time": 101.0}], "incomplete": []}
    return {"benchmarks": [{"requests": lists}]}


def aiperf() -> list[dict[str, Any]]:
    def line(start_ns: int, i: int, ttft: float, gaps: list[float]) -> dict[str, Any]:
        metrics = {
            "input_sequence_length": INPUTS[i], "output_sequence_length": OUTPUTS[i],
            "time_to_first_token": ttft, "request_latency": ttft + sum(gaps),
            "inter_chunk_latency": gaps,
        }  # fmt: skip
        return {"metadata": {"request_start_ns": start_ns, "benchmark_phase": "profiling"},
                "metrics": {k: {"value": v} for k, v in metrics.items()}}  # fmt: skip

    failed = {"metadata": {"request_start_ns": 101 * 10**9}, "metrics": {}, "error": {"code": 500}}
    return [line(102 * 10**9, 1, 1000.0, [200.0]), failed,
            line(100 * 10**9, 0, 500.0, [100.0, 300.0])]  # fmt: skip


def bench(rate: float) -> dict[str, Any]:
    return {
        "request_rate": rate, "max_concurrency": None, "duration": 4.0,
        "input_lens": [*INPUTS, 50], "output_lens": [*OUTPUTS, 0], "errors": ["", "", "refused"],
        "ttfts": [0.5, 1.0, 0.0], "itls": [[0.1, 0.3], [0.2], []],
    }  # fmt: skip


def write(folder: Path, program: str, rate: float = float("inf")) -> Path:
    if program == "guidellm":
        path = folder / "benchmarks.json"
        path.write_text(json.dumps(guidellm()))
        return path
    lines = aiperf() if program == "aiperf" else [bench(rate)]
    path = folder / ("profile_export.jsonl" if program == "aiperf" else "bench.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


PROGRAMS = ("aiperf", "guidellm", "bench_serving")


def record_of(path: Path) -> RunRecord:
    return read_one(path).record(slo_ttft_s=0.6, slo_itl_s=0.25)


@pytest.mark.parametrize("program", PROGRAMS)
def test_latencies_by_hand(tmp_path: Path, program: str) -> None:
    summary = summarise(record_of(write(tmp_path, program)))
    assert (summary["requests_completed"], summary["requests_failed"]) == (2, 1)
    assert summary["ttft_s"]["p50"] == pytest.approx(0.5)
    assert summary["ttft_s"]["p99"] == pytest.approx(1.0)
    assert summary["ttft_attainment"] == pytest.approx(1 / 3)
    # three gaps: two of the first request, one of the second; guidellm knows the first's mean alone
    assert summary["gaps_total"] == 3
    assert summary["itl_s"]["mean"] == pytest.approx(0.2)
    assert summary["itl_attainment"] == pytest.approx(1.0 if program == "guidellm" else 2 / 3)
    assert summary["tpot_s"]["p50"] == pytest.approx(0.2)
    assert summary["e2e_s"]["p50"] == pytest.approx(0.9)
    assert summary["makespan_s"] == pytest.approx(1.2 if program == "bench_serving" else 3.2)
    assert np.isnan(summary["energy_j"])
    assert np.isnan(summary["energy_per_output_token_j"])


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_same_requests_as_a_trace(tmp_path: Path, program: str) -> None:
    path = write(tmp_path, program)
    with pytest.raises(VoltanaError, match="trace_drop_failed=true"):
        open_trace(str(path))
    workload = open_trace(str(path), drop_failed=True)
    assert workload.arrival_s.tolist() == ([0, 0] if program == "bench_serving" else [0, 2])
    assert workload.input_tokens.tolist() == [*INPUTS]
    assert workload.output_tokens.tolist() == [*OUTPUTS]
    assert "1 failed left out" in workload.name
    if program == "bench_serving":
        assert [x.tolist() for x in read_lengths(path)] == [[*INPUTS], [*OUTPUTS]]


def test_a_folder_is_its_file_and_foreign_files_are_none(tmp_path: Path) -> None:
    for program in ("aiperf", "guidellm"):
        folder = tmp_path / program
        folder.mkdir()
        assert benchmark_file(folder) is None
        path = write(folder, program)
        assert benchmark_file(folder) == path
        assert read_one(folder).program == program
    for name, text in (("a.json", "{}"), ("b.json", "no"), ("c.jsonl", '{"a": 1}\n'), ("d.md", "")):
        (tmp_path / name).write_text(text)
        assert benchmark_file(tmp_path / name) is None
    with pytest.raises(VoltanaError, match="is no output of aiperf"):
        read_benchmarks(tmp_path / "a.json")


def test_when_requests_were_sent_may_not_be_known(tmp_path: Path) -> None:
    path = write(tmp_path, "bench_serving", rate=4.0)
    found = read_one(path)
    assert not found.has_arrivals
    record = found.record(0.6, 0.25)
    assert record.settings["send_times"] == "unknown"
    assert record.makespan_s == 4.0
    with pytest.raises(VoltanaError, match="give it as a workload"):
        open_trace(str(path))


def test_several_runs_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    one = guidellm()["benchmarks"]
    path.write_text(json.dumps({"benchmarks": one + one}))
    assert [each.name for each in read_benchmarks(path)] == ["two 1", "two 2"]
    with pytest.raises(VoltanaError, match=r"holds 2 runs \(two 1, two 2"):
        open_trace(str(path))


def test_what_the_programs_wrote() -> None:
    found = read_one(REAL / "profile_export.jsonl")
    record = found.record(slo_ttft_s=0.0077, slo_itl_s=0.006)
    summary = summarise(record)
    assert (summary["requests_completed"], summary["requests_failed"]) == (2, 1)
    assert summary["ttft_attainment"] == pytest.approx(1 / 3)  # 7.67 and 7.83 ms
    assert summary["gaps_total"] == 6  # of 8 tokens each in 4 pieces
    assert summary["itl_attainment"] == pytest.approx(3 / 6)


def test_guidellms_own_numbers() -> None:
    """guidellm 0.8.1 against stub servers: its means of the very requests that are read."""
    path = REAL / "benchmarks.json"
    told = json.loads(path.read_text())["benchmarks"][0]["metrics"]
    record = record_of(path)
    summary = summarise(record)
    assert record.settings["token_gaps"] == "mean of each request"
    for ours, theirs in (("ttft_s", "time_to_first_token_ms"), ("itl_s", "inter_token_latency_ms")):
        own = told[theirs]["successful"]
        assert summary[ours]["mean"] == pytest.approx(own["mean"] * 1e-3, rel=1e-9)
    assert summary["gaps_total"] == told["inter_token_latency_ms"]["successful"]["count"] == 40
    # it ends a request with its stream, which is up to 2 ms after the last token here
    own = told["request_latency"]["successful"]["mean"]
    assert own - 0.002 < summary["e2e_s"]["mean"] < own


def test_the_programs_own_means() -> None:
    """bench_serving 0.5.23 against stub servers: its summary of the very lists that are read."""
    path = REAL / "bench_serving_details.jsonl"
    told = json.loads(path.read_text())
    summary = summarise(record_of(path))
    assert summary["requests_completed"] == told["completed"] == 8
    for ours, theirs in (("ttft_s", "ttft"), ("itl_s", "itl")):
        assert summary[ours]["mean"] == pytest.approx(told[f"mean_{theirs}_ms"] * 1e-3, rel=1e-9)
    # it ends a request with its stream, which is a little after the last token
    assert summary["e2e_s"]["mean"] == pytest.approx(told["mean_e2e_latency_ms"] * 1e-3, rel=1e-3)
    assert summary["tpot_s"]["mean"] == pytest.approx(told["mean_tpot_ms"] * 1e-3, rel=1e-3)
    assert open_trace(str(path)).input_tokens.tolist() == told["input_lens"]
