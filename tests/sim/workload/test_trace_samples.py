"""Long traces: Azure's published week by its format, and samples that are never whole in memory."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from voltana.experiments.runs import workload_of
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.workload import frames
from voltana.sim.workload.traces import open_trace, read_trace

WEEK = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:00.017335+00:00,2399,6
2024-05-10 00:00:01+00:00,76,15
2024-05-12 12:00:00.009930+00:00,2376,6
2024-05-16 23:59:59.999999+00:00,4031,20
"""


def test_a_week_as_azure_publishes_it(tmp_path: Path) -> None:
    """Times of 2024 have their zone, and no fraction on a full second."""
    path = tmp_path / "AzureLLMInferenceTrace_code_1week.csv"
    path.write_text(WEEK)
    read = open_trace(str(path))
    expected_s = [0.0, 0.007405, 0.99007, 2.5 * 86_400, 7 * 86_400 - 1e-6 - 0.00993]
    assert read.arrival_s.tolist() == pytest.approx(expected_s, abs=1e-9)
    assert read.input_tokens.tolist() == [2162, 2399, 76, 2376, 4031]
    assert read.output_tokens.tolist() == [5, 6, 15, 6, 20]


def long_trace(path: Path, count: int) -> Path:
    """A request a second whose prompt says which it is."""
    rows = (f"{k},{k + 1},{1 + k % 9}" for k in range(count))
    path.write_text("\n".join(["arrival_s,input_tokens,output_tokens", *rows]) + "\n")
    return path


def test_a_sample_is_of_rows_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5,000 a tenth, within four deviations; the same however the file is cut into parts."""
    path = long_trace(tmp_path / "t.csv", 5000)
    whole = read_trace(path, sample_frac=0.1, seed=7)
    monkeypatch.setattr(frames, "CHUNK_ROWS", 617)
    read = read_trace(path, sample_frac=0.1, seed=7)
    assert read.content_hash == whole.content_hash
    assert abs(len(read) - 500) <= 4 * math.sqrt(5000 * 0.1 * 0.9)
    np.testing.assert_array_equal(read.arrival_s, read.input_tokens - 1.0)
    np.testing.assert_array_equal(read.output_tokens, 1 + (read.input_tokens - 1) % 9)
    halves = np.histogram(read.arrival_s, bins=2, range=(0, 5000))[0]
    assert abs(halves[0] - halves[1]) <= 4 * math.sqrt(len(read))
    # each seed has its own, by the configuration too
    told = {"trace": str(path), "trace_sample_frac": 0.1}
    made = [workload_of(make_config(told | {"seed": seed})) for seed in (7, 8)]
    assert made[0].content_hash == read.content_hash != made[1].content_hash
    assert len(workload_of(make_config({"trace": str(path)}))) == 5000


def test_what_is_wrong_in_a_sample_is_told_by_its_line(tmp_path: Path) -> None:
    path = long_trace(tmp_path / "t.csv", 2000)
    lines = path.read_text().splitlines()
    kept = int(read_trace(path, sample_frac=0.1, seed=1).input_tokens[30])
    lines[kept] = f"{kept - 1},{kept},-3"  # its line is one more, for the header
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(VoltanaError, match=rf"got -3 \(.*t\.csv:{kept + 1}\)"):
        read_trace(path, sample_frac=0.1, seed=1)
    with pytest.raises(VoltanaError, match=r"must be above 0 and at most 1, got 1\.5"):
        read_trace(path, sample_frac=1.5)
    with pytest.raises(VoltanaError, match="holds no requests in the sample"):
        read_trace(path, sample_frac=1e-9)
    with pytest.raises(VoltanaError, match="trace_sample_frac must be > 0"):
        make_config({"trace_sample_frac": 0})


def test_a_log_is_sampled_too(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    row = '{{"timestamp": {}, "usage": {{"prompt_tokens": {}, "completion_tokens": 5}}}}\n'
    path.write_text("".join(row.format(1.7e9 + k, k + 1) for k in range(400)))
    read = read_trace(path, sample_frac=0.25, seed=2)
    assert 60 < len(read) < 140
    np.testing.assert_array_equal(read.arrival_s, read.input_tokens - 1.0)
    with pytest.raises(VoltanaError, match="holds no requests in the sample"):
        read_trace(path, sample_frac=1e-9)
