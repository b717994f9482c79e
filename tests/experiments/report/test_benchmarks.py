"""Outputs of load generators beside our runs, and held against a simulation of their requests."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import voltana
from voltana.experiments.cli import make_app
from voltana.experiments.hardware.validate import run_validation
from voltana.experiments.report.collect import collect
from voltana.experiments.report.page import write_report
from voltana.hwreplay.validate.validate import CLIENTS, Thresholds
from voltana.profiles.common.errors import VoltanaError

SHORT = {"rate_rps": 8, "duration_s": 5, "slo_itl_s": 0.045}


def as_seen_by_a_client(run: voltana.Run, path: Path, *, slower: float = 1.0) -> Path:
    """The run as aiperf would have written it; all gaps of a request are their mean."""
    table = run.requests()
    lines = []
    for i, row in table.iterrows():
        ttft_s = slower * (row["first_token_s"] - row["arrival_s"])
        gaps = int(row["output_tokens"]) - 1
        gap_s = slower * (row["finish_s"] - row["first_token_s"]) / max(gaps, 1)
        metrics = {
            "input_sequence_length": int(row["input_tokens"]),
            "output_sequence_length": int(row["output_tokens"]),
            "time_to_first_token": 1e3 * ttft_s, "request_latency": 1e3 * (ttft_s + gaps * gap_s),
            "inter_chunk_latency": [1e3 * gap_s] * gaps,
        }  # fmt: skip
        metadata = {"session_num": i, "request_start_ns": round((100.0 + row["arrival_s"]) * 1e9)}
        lines.append(
            {"metadata": metadata, "metrics": {k: {"value": v} for k, v in metrics.items()}}
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def run() -> voltana.Run:
    return voltana.simulate(controller="ecofreq", **SHORT)  # type: ignore[arg-type]


def test_a_report_has_both_and_one_promise(run: voltana.Run, tmp_path: Path) -> None:
    run.write(tmp_path / "ours")
    (tmp_path / "aiperf").mkdir()
    as_seen_by_a_client(run, tmp_path / "aiperf" / "profile_export.jsonl")
    as_seen_by_a_client(run, tmp_path / "slow.jsonl", slower=9.0)
    table = collect(tmp_path).table.set_index("run")
    assert list(table.index) == ["ours", "aiperf", "slow"]
    assert set(table["slo_itl_s"]) == {0.045}
    ours, theirs, slow = (table.loc[name] for name in table.index)
    for column in ("ttft_p50_s", "ttft_p99_s", "ttft_attainment", "tpot_p99_s"):
        assert theirs[column] == pytest.approx(ours[column], rel=1e-6)
    assert (theirs["keeps_slo"], slow["keeps_slo"]) == (True, False)
    assert pd.isna(theirs["energy_j"])
    assert theirs["benchmark"] == "aiperf"
    page = tmp_path / "page.html"
    assert write_report(tmp_path, page, target=0.99, wanted=()) == []
    text = page.read_text()
    assert "<td" in text
    assert "slow" in text
    alone = tmp_path / "aiperf"
    with pytest.raises(VoltanaError, match=r"tells no promise.*give --slo-ttft-ms"):
        collect(alone)
    asked = ["report", str(alone), "--slo-ttft-ms", "600", "--slo-itl-ms", "1", "--no-series"]
    make_app()(asked, standalone_mode=False)
    assert (alone / "report.html").stat().st_size > 10_000
    assert not collect(alone, promises=(0.6, 0.001)).table["keeps_slo"].any()


def test_a_verdict_on_latencies_alone(run: voltana.Run, tmp_path: Path) -> None:
    """Simulated from the very file: the client saw the same, or all of it 30 % slower."""
    for name, slower, expected in (("same", 1.0, True), ("slow", 1.3, False)):
        seen = as_seen_by_a_client(run, tmp_path / f"{name}.jsonl", slower=slower)
        again = voltana.simulate(trace=str(seen), controller="ecofreq", slo_itl_s=0.045)
        again.write(tmp_path / f"simulated {name}")
        passes, text, told = run_validation(
            tmp_path / f"simulated {name}", seen, tmp_path / f"verdict {name}",
            thresholds=Thresholds(),
        )  # fmt: skip
        assert passes is expected, text
        verdict = json.loads(told)
        assert verdict["left_out"] == [CLIENTS]
        assert verdict["faults"] == []
        assert "differs" not in text
        errors = {m["metric"]: m for m in verdict["metrics"]}
        assert errors["energy_j"]["observed"] is None
        assert errors["energy_j"]["passes"]
        assert errors["ttft_s.p50"]["error_frac"] == pytest.approx(1 / slower - 1, abs=1e-3)
        assert (tmp_path / f"verdict {name}" / "validation.png").exists()
