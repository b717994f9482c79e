"""What `run_limit_s` leaves behind: the beginning of the whole run, counted by one definition."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import run
from voltana.profiles.catalog import Profile
from voltana.sim.records import COMPLETED, IN_FLIGHT, REJECTED, RequestTable
from voltana.sim.workload.workload import Workload

SLO_TTFT_S, SLO_ITL_S = 0.3, 0.0062
SETTINGS = {"slo_ttft_s": SLO_TTFT_S, "slo_itl_s": SLO_ITL_S, "kv_capacity_tokens": 390}
"""Under these some keep both promises, some one, some none, and some are rejected."""


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile"))


@pytest.fixture(scope="module")
def workload() -> Workload:
    rng = np.random.default_rng(3)
    return Workload(
        arrival_s=np.cumsum(rng.exponential(0.02, 300)),
        input_tokens=rng.integers(1, 300, 300),
        output_tokens=rng.integers(1, 120, 300),
    )


def counted(whole: RequestTable, cut_s: float) -> dict[str, float]:
    """One request after the other, from what became of it in the run that was not cut."""
    total = ttft_of = ttft_kept = both_of = both_kept = 0
    for arrival, outputs, first, finish, status in zip(
        whole.arrival_s, whole.output_tokens, whole.first_token_s, whole.finish_s, whole.status,
        strict=True,
    ):  # fmt: skip
        if arrival >= cut_s:
            continue
        total += 1
        if status == REJECTED:
            ttft_of, both_of = ttft_of + 1, both_of + 1
            continue
        in_time = first - arrival <= SLO_TTFT_S
        if first < cut_s or cut_s - arrival > SLO_TTFT_S:
            ttft_of += 1
            ttft_kept += first < cut_s and in_time
        if finish < cut_s:
            both_of += 1
            both_kept += in_time and (finish - first) / max(outputs - 1, 1) <= SLO_ITL_S
        elif cut_s - arrival > SLO_TTFT_S and not (first < cut_s and in_time):
            both_of += 1
    return {
        "requests_total": total,
        "ttft_attainment": ttft_kept / ttft_of,
        "attainment": both_kept / both_of,
    }


@pytest.mark.parametrize("engine", ["reference", "coalesced"])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.01])
def test_a_cut_run_is_judged_by_what_is_decided(
    profile: Profile, workload: Workload, engine: str, share: float
) -> None:
    """Cuts between arrivals and, the last, after all of them; both logs to the last digit."""
    whole, _ = run(profile, workload, engine=engine, **SETTINGS)
    cut_s = float(workload.arrival_s[-1]) * share
    assert {COMPLETED, REJECTED} == set(whole.requests.status)
    expected = counted(whole.requests, cut_s)
    record, exact = run(profile, workload, engine=engine, run_limit_s=cut_s, **SETTINGS)
    _, sketched = run(
        profile, workload, engine=engine, run_limit_s=cut_s, metrics="sketch", **SETTINGS
    )
    assert len(record.requests) == expected["requests_total"]
    for name, value in expected.items():
        assert exact[name] == value, name
    for name, number in exact.items():
        if isinstance(number, float | int) and name != "wall_s":
            assert sketched[name] == pytest.approx(number, rel=1e-12), name
    if share < 1:
        assert exact["requests_in_flight"] > 0
        assert IN_FLIGHT in record.requests.status
        assert 0 < exact["attainment"] < 1


def test_a_run_that_is_cut_before_its_first_arrival_has_decided_nothing(
    profile: Profile, workload: Workload
) -> None:
    cut_s = float(workload.arrival_s[0]) / 2
    for metrics in ("exact", "sketch"):
        _, summary = run(profile, workload, run_limit_s=cut_s, metrics=metrics)
        assert summary["requests_total"] == 0
        assert summary["attainment"] == summary["ttft_attainment"] == 1.0
        assert math.isnan(summary["ttft_s"]["p50"])


def test_an_old_request_without_a_token_has_missed_and_a_young_one_is_open(
    tmp_path: Path,
) -> None:
    """Prefill takes 0.5 s, the promise is 0.75 s, two come at 0 and 1 one at a time, cut at 1.25.

    Decode of 4 s a token: neither has a first token. The first has waited 1.25 s and has missed,
    the second 0.25 s and may still make it.
    """
    slow = write_synthetic_profile(
        tmp_path, time_s=lambda p, f, b, t: 0.5 if p == "prefill" else 4.0
    )
    two = Workload(
        arrival_s=np.array([0.0, 1.0]),
        input_tokens=np.array([4, 4]),
        output_tokens=np.array([2, 2]),
    )
    for metrics in ("exact", "sketch"):
        _, summary = run(slow, two, run_limit_s=1.25, slo_ttft_s=0.75, metrics=metrics)
        assert summary["requests_total"] == summary["requests_in_flight"] == 2
        assert summary["ttft_attainment"] == summary["attainment"] == 0.0
        _, summary = run(slow, two, run_limit_s=1.25, slo_ttft_s=1.5, metrics=metrics)
        assert summary["ttft_attainment"] == summary["attainment"] == 1.0  # nothing is decided
