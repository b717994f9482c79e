"""Errors checked by hand on two small runs, and the whole command on two simulated ones."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.conftest import ROOT
from tests.profiles.synthetic import write_synthetic_profile
from voltana.experiments.hardware.validate import run_validation
from voltana.hwreplay.validate.validate import (
    Comparison,
    ProfileModel,
    Thresholds,
    Validation,
    cdf,
    predict_iterations,
    validate,
)
from voltana.hwreplay.validate.verdict_page import markdown
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.records import (
    COMPLETED,
    FAILED,
    IN_FLIGHT,
    REJECTED,
    InstanceRecord,
    IterationTable,
    RequestTable,
    RunRecord,
)
from voltana.sim.results import write_run


def instance(energy_j: float, clock_mhz: int) -> InstanceRecord:
    return InstanceRecord(
        phase="decode",
        instance_id=0,
        busy_s=4.0,
        idle_s=6.0,
        busy_energy_j=energy_j,
        idle_energy_j=100.0,
        busy_window_energy_j=energy_j,
        num_iterations=3,
        clock_busy_s={clock_mhz: 3.0, 1410: 1.0},
        clock_idle_s={},
        num_clock_changes=1,
        num_retractions=0,
    )


def run(*, ttft_s: float, gap_s: float, energy_j: float, clock_mhz: int = 1005) -> RunRecord:
    """Two requests of 3 tokens: every TTFT and gap is the one given."""
    arrival_s = np.array([0.0, 1.0])
    first_s = arrival_s + ttft_s
    return RunRecord(
        requests=RequestTable(
            arrival_s=arrival_s,
            input_tokens=np.array([10, 20]),
            output_tokens=np.array([3, 3]),
            prefill_id=np.zeros(2, dtype=np.int64),
            decode_id=np.zeros(2, dtype=np.int64),
            first_token_s=first_s,
            finish_s=first_s + 2 * gap_s,
            status=np.ones(2, dtype=np.int64),
            retractions=np.zeros(2, dtype=np.int64),
        ),
        itl_s=np.array([gap_s]),
        itl_weight=np.array([4]),
        instances=[instance(energy_j, clock_mhz)],
        makespan_s=10.0,
        slo_ttft_s=0.6,
        slo_itl_s=0.06,
        wall_s=1.0,
        settings={"slo_ttft_s": 0.6, "slo_itl_s": 0.06, "seed": 13},
        iterations=IterationTable(
            phase=np.array(["decode", "decode", "prefill"]),
            instance_id=np.zeros(3, dtype=np.int64),
            start_s=np.array([0.0, 1.0, 2.0]),
            duration_s=np.array([0.02, 0.04, 0.1]),
            batch_size=np.array([1, 2, 1]),
            tokens=np.array([10, 20, 50]),
            clock_mhz=np.array([1005, 1005, 0]),
            energy_j=np.zeros(3),
        ),
    )


class MillisecondAToken:
    """A model of 1 ms a token that knows up to 20 tokens."""

    def predict_s(self, phase: str, clock_mhz: int, batch_size: float, tokens: float) -> float:
        if tokens > 20:
            raise VoltanaError("outside")
        return tokens * 1e-3


class Beyond:
    def predict_s(self, phase: str, clock_mhz: int, batch_size: float, tokens: float) -> float:
        return 0.2


def by_name(found: Validation) -> dict[str, Comparison]:
    return {c.metric: c for c in found.comparisons}


def test_errors_by_hand() -> None:
    """440 J + 100 J idle against 400 + 100: +8 %; per token of 6: the same; TTFT 0.11/0.10."""
    found = validate(
        run(ttft_s=0.11, gap_s=0.019, energy_j=440.0),
        run(ttft_s=0.10, gap_s=0.020, energy_j=400.0),
        thresholds=Thresholds(),
    )
    rows = by_name(found)
    assert rows["energy_j"].error_frac == pytest.approx(0.08)
    assert rows["energy_per_output_token_j"].observed == pytest.approx(500 / 6)
    assert rows["energy_per_output_token_j"].error_frac == pytest.approx(0.08)
    assert rows["decode_energy_j"].error_frac == pytest.approx(0.10)
    assert rows["ttft_s.p50"].error_frac == pytest.approx(0.10)
    assert rows["itl_s.p99"].error_frac == pytest.approx(-0.05)
    assert rows["tpot_s.p50"].error_frac == pytest.approx(-0.05)
    assert rows["e2e_s.p50"].error_frac == pytest.approx(0.148 / 0.140 - 1)
    assert rows["throughput_tokens_per_s"].observed == pytest.approx(0.6)
    assert math.isnan(rows["prefill_energy_j"].error_frac)
    assert [c.metric for c in found.comparisons if not c.passes] == [
        "energy_j",
        "energy_per_output_token_j",
    ]
    assert not found.passes
    assert found.notes == []


def test_limits_are_inclusive_and_can_be_lifted() -> None:
    pair = (run(ttft_s=0.12, gap_s=0.02, energy_j=400), run(ttft_s=0.1, gap_s=0.02, energy_j=400))
    assert not validate(*pair, thresholds=Thresholds()).passes
    assert validate(*pair, thresholds=Thresholds(p50_frac=0.2000001, p99_frac=None)).passes
    with pytest.raises(VoltanaError, match="p50_frac must be >= 0"):
        Thresholds(p50_frac=-0.1)


def test_a_metric_of_one_side_only_fails_and_of_neither_is_not_judged() -> None:
    both = run(ttft_s=0.1, gap_s=0.02, energy_j=400)
    empty = dataclasses.replace(both, itl_s=np.array([]), itl_weight=np.array([], dtype=np.int64))
    assert not by_name(validate(both, empty, thresholds=Thresholds()))["itl_s.p50"].passes
    row = by_name(validate(empty, empty, thresholds=Thresholds()))["itl_s.p50"]
    assert row.passes
    assert not row.is_judged


def test_iterations_are_predicted_one_by_one() -> None:
    """Decode: 10 ms for 20 and 20 for 40, -50 %; the prefill of 50 tokens lies outside."""
    observed = run(ttft_s=0.1, gap_s=0.02, energy_j=400)
    found = validate(
        observed, observed, thresholds=Thresholds(), model=MillisecondAToken(), beyond=Beyond()
    )
    assert found.points is not None
    assert found.points["predicted_s"].tolist() == pytest.approx([0.01, 0.02, 0.2])
    assert found.points["is_inside"].tolist() == [True, True, False]
    assert found.iteration_errors["decode"] == pytest.approx(
        {
            "num": 2,
            "total_error_frac": -0.5,
            "median_error_frac": -0.5,
            "mape_frac": 0.5,
            "p90_abs_error_frac": 0.5,
        }
    )
    assert found.iteration_errors["prefill"]["total_error_frac"] == pytest.approx(1.0)
    assert any("1 of 3 iterations lie outside" in note for note in found.notes)
    assert observed.iterations is not None
    alone = predict_iterations(observed.iterations, MillisecondAToken())
    assert alone["predicted_s"].isna().tolist() == [False, False, True]


def test_iterations_of_both_phases_are_predicted_by_the_profile_s_rule(tmp_path: Path) -> None:
    """Prompts alone 0.5 s, a step 0.25 s, both 0.625 s with half of the step hidden."""
    profile = write_synthetic_profile(
        tmp_path, time_s=lambda phase, f, b, t: 0.5 if phase == "prefill" else 0.25
    )
    model = ProfileModel(profile.truth(), profile.mixed_step(overlap_frac=0.5))
    ones, none = np.ones(4, dtype=np.int64), np.zeros(4, dtype=np.int64)
    table = IterationTable(
        phase=np.array(["colocated"] * 4), instance_id=none, start_s=np.arange(4.0),
        duration_s=np.array([0.5, 0.25, 0.625, 0.5]), clock_mhz=1400 * ones,
        energy_j=np.ones(4), batch_size=np.array([0, 2, 2, 0]), tokens=np.array([0, 40, 42, 0]),
        chunk_requests=np.array([1, 0, 1, 0]), chunk_tokens=np.array([64, 0, 64, 0]),
    )  # fmt: skip
    found = predict_iterations(table, model)
    assert found["predicted_s"].tolist() == found["observed_s"].tolist() == [0.5, 0.25, 0.625]
    assert predict_iterations(table, MillisecondAToken())["predicted_s"].isna().all()


def test_tokens_in_front_of_a_prompt_are_attended_to() -> None:
    """T² / (c·(c + 2p)) of one prompt, c = 100 behind 400, is 100 / 900; nothing else changes."""
    seen: list[float] = []

    class Listens:
        def predict_s(self, phase: str, clock_mhz: int, batch_size: float, tokens: float) -> float:
            seen.append(batch_size)
            return 1.0

    zeros = np.zeros(3, dtype=np.int64)
    table = IterationTable(
        phase=np.array(["prefill", "prefill", "decode"]), instance_id=zeros, start_s=np.arange(3.0),
        duration_s=np.ones(3), clock_mhz=zeros, energy_j=np.ones(3), batch_size=np.array([1, 2, 3]),
        tokens=np.array([100, 100, 100]), prefix_tokens=np.array([400, 0, 50]),
    )  # fmt: skip
    predict_iterations(table, Listens())
    assert seen == pytest.approx([1 / 9, 2, 3])


def test_turns_are_paired_by_their_row_and_so_is_what_they_found() -> None:
    """Found 0 and 6 tokens in one run, 5 and 0 in the other, whose order is the reverse."""
    base = run(ttft_s=0.1, gap_s=0.02, energy_j=400)
    ours = with_requests(base, cached_tokens=np.array([0, 6]), workload_row=np.array([0, 1]))
    theirs = with_requests(
        base, input_tokens=np.array([20, 10]), arrival_s=np.array([0.9, 1.4]),
        cached_tokens=np.array([5, 0]), workload_row=np.array([1, 0]),
    )  # fmt: skip
    found = validate(ours, theirs, thresholds=Thresholds(energy_frac=9, p50_frac=9, p99_frac=9))
    assert not found.faults
    assert found.cached == {
        "requests": 2, "same": 1, "simulated": 6, "observed": 5, "apart": 1,
        "arrivals_apart_s": pytest.approx(1.4),
    }  # fmt: skip
    assert any("1 of 2 requests found the same number" in note for note in found.notes)
    other = with_requests(theirs, workload_row=np.array([0, 1]))
    assert validate(ours, other, thresholds=Thresholds()).faults


def test_differences_between_the_runs_are_said() -> None:
    base = run(ttft_s=0.1, gap_s=0.02, energy_j=400)
    other = dataclasses.replace(base, settings={**base.settings, "seed": 14}, iterations=None)
    found = validate(base, other, thresholds=Thresholds())
    notes = " ".join(found.notes)
    for words in ("seed differs: 13 simulated, 14", "no iterations"):
        assert words in notes
    assert found.passes


def with_requests(record: RunRecord, **columns: Any) -> RunRecord:  # noqa: ANN401
    return dataclasses.replace(record, requests=dataclasses.replace(record.requests, **columns))


def test_another_workload_or_a_run_that_did_not_end_fails_whatever_the_errors_are() -> None:
    base = run(ttft_s=0.1, gap_s=0.02, energy_j=400)
    cut_off = {"is_complete": False, "incomplete_reason": "agent decode-0 ended"}
    cases = [
        (with_requests(base, input_tokens=np.array([10, 21])), "request lengths differ"),
        (with_requests(base, arrival_s=np.array([0.0, 1.2])), "differ by up to 0.200 s"),
        (with_requests(base, status=np.array([COMPLETED, IN_FLIGHT])), "(1 in_flight)"),
        (with_requests(base, status=np.array([COMPLETED, FAILED])), "(1 failed)"),
        (dataclasses.replace(base, settings={**base.settings, **cut_off}), "agent decode-0 ended"),
    ]
    for observed, words in cases:
        found = validate(base, observed, thresholds=Thresholds(energy_frac=9, p50_frac=9))
        (fault,) = found.faults
        assert words in fault
        assert not found.passes
        assert found.as_dict()["passes"] is False
        text = markdown(found, simulated="a", observed="b", figure="f.png")
        assert f"**Verdict: fails** ({fault}" in text
    rejected = with_requests(base, status=np.array([COMPLETED, REJECTED]))
    assert validate(rejected, rejected, thresholds=Thresholds()).passes


def test_energy_of_a_stated_power_is_reported_and_not_judged() -> None:
    """440 + 100 J against 400 + 100 is +8 %, over the limit of 5 %: no power was measured."""
    ours, theirs = (run(ttft_s=0.1, gap_s=0.02, energy_j=j) for j in (440.0, 400.0))
    stated = dataclasses.replace(theirs, settings={**theirs.settings, "is_power_measured": False})
    assert not validate(ours, theirs, thresholds=Thresholds()).passes
    found = validate(ours, stated, thresholds=Thresholds())
    assert found.passes
    assert by_name(found)["energy_j"].error_frac == pytest.approx(0.08)
    assert not by_name(found)["energy_j"].is_judged
    text = markdown(found, simulated="a", observed="b", figure="f.png")
    assert "Not judged: energy, as power was stated and not measured." in text
    assert "| energy_j | 540 J | 500 J | +8.0 % |  |  |" in text


def test_residency_and_report() -> None:
    found = validate(
        run(ttft_s=0.1, gap_s=0.02, energy_j=400, clock_mhz=1005),
        run(ttft_s=0.1, gap_s=0.02, energy_j=400, clock_mhz=705),
        thresholds=Thresholds(),
    )
    assert found.residency["observed"]["decode"] == {"705": 0.75, "1410": 0.25}
    text = markdown(found, simulated="a", observed="b", figure="f.png")
    assert "**Verdict: passes**" in text
    assert "| decode | 705 MHz | 0.0 % | 75.0 % |" in text
    assert "| ttft_s.p50 | 100.00 ms | 100.00 ms | +0.0 % | 10 % | pass |" in text


def test_cdf_counts_weights() -> None:
    values, fractions = cdf(np.array([3.0, 1.0]), np.array([1, 3]))
    assert values.tolist() == [1.0, 3.0]
    assert fractions.tolist() == [0.75, 1.0]


def test_a_fleet_of_which_a_profile_is_gone_is_compared_without_iterations(tmp_path: Path) -> None:
    base = run(ttft_s=0.1, gap_s=0.02, energy_j=400)
    told = {"profile": "a100-80g-sxm/llama-3.1-8b", "num_decode": 1, "num_prefill": 1}
    told["decode_profiles"] = str(tmp_path / "nowhere")
    write_run(dataclasses.replace(base, settings={**base.settings, **told}), tmp_path / "r")
    found = run_validation(tmp_path / "r", tmp_path / "r", tmp_path / "v", thresholds=Thresholds())
    assert found[0]
    assert json.loads(found[2])["iterations"] == {}


@pytest.mark.slow
def test_command_on_two_run_directories(tmp_path: Path) -> None:
    write_run(run(ttft_s=0.11, gap_s=0.02, energy_j=440), tmp_path / "sim")
    write_run(run(ttft_s=0.10, gap_s=0.02, energy_j=400), tmp_path / "real")
    command = [sys.executable, "-m", "voltana.experiments.cli", "validate"]
    command += [str(tmp_path / "sim"), str(tmp_path / "real")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "| energy_j | 540 J | 500 J | +8.0 % | 5 % | FAIL |" in done.stdout
    folder = tmp_path / "real" / "validation"
    assert (folder / "validation.md").read_text().strip() == done.stdout.strip()
    assert (folder / "validation.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((folder / "validation.json").read_text())
    assert found["passes"] is False
    energy = pd.DataFrame(found["metrics"]).set_index("metric").loc["energy_j"]
    assert energy["error_frac"] == pytest.approx(0.08)
    lenient = [*command, "--energy-pct", "10", "--p50-pct", "11", "--json"]
    lenient += ["--profile", "a100-80g-sxm/llama-3.1-8b", "--out", str(tmp_path / "v")]
    done = subprocess.run(lenient, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["iterations"]["decode"]["num"] == 2
