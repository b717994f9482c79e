"""The reported numbers against NumPy and hand counts."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.metrics import attained, describe, summarise, tpot_s, ttft_s, weighted_quantile
from voltana.sim.policies.base import Phase
from voltana.sim.records import (
    CANCELLED,
    COMPLETED,
    FAILED,
    IN_FLIGHT,
    REJECTED,
    InstanceRecord,
    RequestTable,
    RunRecord,
)
from voltana.sim.results import read_run, write_run
from voltana.sim.sketches import RELATIVE_ERROR, RunSketch


@given(
    sample=st.lists(st.tuples(st.floats(0, 10), st.integers(0, 5)), min_size=1, max_size=50),
    fraction=st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]),
)
def test_weighted_quantile_is_numpys_on_the_repeated_sample(
    sample: list[tuple[float, int]], fraction: float
) -> None:
    values, weights = (np.array(c) for c in zip(*sample, strict=True))
    repeated = np.repeat(values, weights)
    if len(repeated) == 0:
        assert np.isnan(weighted_quantile(values, weights, fraction))
        return
    expected = np.quantile(repeated, fraction, method="inverted_cdf")
    assert weighted_quantile(values, weights, fraction) == expected
    assert describe(values, weights)["mean"] == pytest.approx(repeated.mean())


def test_a_quantile_k_of_n_is_the_kth_value() -> None:
    """Nearest rank: k/n of n values lie at or below the k-th, whatever k/n rounds to (0.07·100 is
    7.000000000000001 in floating point)."""
    for n in (*range(1, 61), 100, 150, 200):
        values, weights = np.arange(1.0, n + 1), np.ones(n, dtype=np.int64)
        for k in range(1, n + 1):
            assert weighted_quantile(values, weights, k / n) == k


def hand_made() -> RunRecord:
    """Ten seconds under promises of 1 s (TTFT) and 0.25 s (ITL); all sums are exact in binary.

    | request | TTFT | TPOT | ends as | keeps |
    | --- | --- | --- | --- | --- |
    | 0 | 1 | 1/2 over 2 gaps = 0.25 | completed | both, each to the last bit |
    | 1 | 1.25 | 0.25 | completed | ITL alone |
    | 2 | 0.5 | 1 | completed | TTFT alone |
    | 3 | - | - | rejected | nothing |
    | 4 | 0.5 | - | in flight after its first token | TTFT; of both together nothing is decided |
    | 5 | 0.5 | - | failed after its first token | nothing |
    | 6 | - | - | cancelled | nothing |
    | 7 | 0.25 | none: a single token | completed | both |
    """
    never = float("nan")
    rows = [
        (0.0, 3, 1.0, 1.5, COMPLETED), (0.5, 2, 1.75, 2.0, COMPLETED),
        (1.0, 2, 1.5, 2.5, COMPLETED), (1.0, 9, never, never, REJECTED),
        (1.5, 9, 2.0, never, IN_FLIGHT), (1.5, 9, 2.0, never, FAILED),
        (1.5, 9, never, never, CANCELLED), (2.0, 1, 2.25, 2.25, COMPLETED),
    ]  # fmt: skip
    arrival, outputs, first, finish, status = (np.array(c) for c in zip(*rows, strict=True))
    number = np.arange(len(rows))
    requests = RequestTable(
        arrival_s=arrival, input_tokens=number + 1, output_tokens=outputs, prefill_id=number,
        decode_id=number, first_token_s=first, finish_s=finish, status=status, retractions=number,
    )  # fmt: skip
    return RunRecord(
        requests=requests, itl_s=np.array([0.25, 0.5, 0.125]), itl_weight=np.array([2, 1, 5]),
        instances=[
            used("prefill", 0, busy={1000: 1.0, 1400: 3.0}, idle_s=6.0, busy_j=800.0, idle_j=60.0),
            used("prefill", 1, busy={1000: 4.0}, idle_s=6.0, busy_j=200.0, idle_j=30.0),
            used("decode", 0, busy={0: 0.5}, idle_s=9.5, busy_j=400.0, idle_j=10.0),
        ],
        makespan_s=10.0, slo_ttft_s=1.0, slo_itl_s=0.25, wall_s=3.0,
    )  # fmt: skip


def used(
    phase: Phase,
    number: int,
    *,
    busy: dict[int, float],
    idle_s: float,
    busy_j: float,
    idle_j: float,
) -> InstanceRecord:
    return InstanceRecord(
        phase=phase, instance_id=number, busy_s=sum(busy.values()), idle_s=idle_s,
        busy_energy_j=busy_j, idle_energy_j=idle_j, busy_window_energy_j=busy_j + 7.0,
        num_iterations=11 + number, clock_busy_s=busy, clock_idle_s={0: idle_s},
        num_clock_changes=3 + number, num_retractions=5 + number,
    )  # fmt: skip


def test_every_number_of_a_run_counted_by_hand() -> None:
    """Definitions of NOMENCLATURE.md; energy 800 + 200 + 400 busy, 60 + 30 + 10 idle."""
    summary = summarise(hand_made())
    samples = {name: summary.pop(name) for name in ("ttft_s", "itl_s", "tpot_s", "e2e_s")}
    assert summary == {
        "requests_total": 8, "requests_completed": 4, "requests_rejected": 1,
        "requests_failed": 2, "requests_in_flight": 1, "gaps_total": 8,
        "makespan_s": 10.0, "energy_j": 1500.0, "prefill_energy_j": 1000.0,
        "decode_energy_j": 400.0, "idle_energy_j": 100.0, "energy_busy_window_j": 1421.0,
        "ttft_attainment": 4 / 8, "itl_attainment": 7 / 8, "attainment": 2 / 7,
        "goodput_rps": 0.2, "goodput_per_j": 2 / 1500, "throughput_tokens_per_s": 0.8,
        "energy_per_request_j": 375.0, "energy_per_output_token_j": 1500 / 8,
        "clock_changes": 10, "retractions": 16, "iterations": 34, "wall_s": 3.0,
        "clock_residency": {"prefill": {"1000": 5 / 8, "1400": 3 / 8}, "decode": {"0": 1.0}},
    }  # fmt: skip
    # of the six that came: 0.25, 0.5, 0.5, 0.5, 1, 1.25
    assert samples["ttft_s"] == {"mean": 4 / 6, "p50": 0.5, "p90": 1.25, "p99": 1.25}
    # of eight: five times 0.125, twice 0.25, once 0.5
    assert samples["itl_s"] == {"mean": 1.625 / 8, "p50": 0.125, "p90": 0.5, "p99": 0.5}
    assert samples["tpot_s"] == {"mean": 0.5, "p50": 0.25, "p90": 1.0, "p99": 1.0}
    # 1.5, 1.5, 1.5, 0.25
    assert samples["e2e_s"] == {"mean": 4.75 / 4, "p50": 1.5, "p90": 1.5, "p99": 1.5}


def test_a_promise_is_kept_to_the_last_bit_and_by_what_has_finished() -> None:
    """Row by row; and a promise one bit shorter is broken by request 0 alone."""
    record = hand_made()
    assert attained(record).tolist() == [True, *[False] * 6, True]
    assert ttft_s(record).tolist()[:3] == [1.0, 1.25, 0.5]
    assert np.isnan(ttft_s(record)).tolist() == [False] * 3 + [True] + [False] * 2 + [True, False]
    assert tpot_s(record)[[0, 1, 2, 7]].tolist() == [0.25, 0.25, 1.0, 0.0]
    assert np.isnan(tpot_s(record)[3:7]).all()
    tighter = summarise(replace(record, slo_ttft_s=np.nextafter(1.0, 0.0)))
    assert tighter["ttft_attainment"] == 3 / 8
    assert tighter["attainment"] == 1 / 7
    tighter = summarise(replace(record, slo_itl_s=np.nextafter(0.25, 0.0)))
    assert tighter["itl_attainment"] == 5 / 8
    assert tighter["attainment"] == 1 / 7


def test_sketched_counts_keep_the_same_promises() -> None:
    """`hand_made` as a run without rows reports it: it knows no failures, so that 5 and 6 too are
    in flight, 6 without a token for longer than the promise."""
    made = hand_made()
    status = np.where(made.requests.status >= FAILED, IN_FLIGHT, made.requests.status)
    record = replace(made, requests=replace(made.requests, status=status))
    requests, done = record.requests, record.requests.status == COMPLETED
    going = requests.status == IN_FLIGHT
    sketch = RunSketch(slo_ttft_s=1.0, slo_itl_s=0.25)
    sketch.counts["arrived"] = 8
    sketch.reject()
    ttft = ttft_s(record)
    sketch.add_first_tokens(ttft[~np.isnan(ttft)])
    sketch.add_finished(
        ttft[done], (requests.finish_s - requests.arrival_s)[done], requests.output_tokens[done]
    )
    sketch.add_gaps(record.itl_s, record.itl_weight)
    sketch.add_in_flight(ttft[going], 10.0 - requests.arrival_s[going])
    exact, short = summarise(record), summarise(replace(record, sketch=sketch))
    assert (short["ttft_attainment"], short["attainment"]) == (5 / 8, 2 / 6)
    for key, value in short.items():
        if key in ("ttft_s", "itl_s", "tpot_s", "e2e_s"):
            assert value == pytest.approx(exact[key], rel=RELATIVE_ERROR), key
        else:
            assert value == exact[key], key


def test_a_run_in_which_nothing_happened_has_no_quotients() -> None:
    """Everything rejected at time 0: no samples, no gap (kept, as none was late), 0/0 undefined."""
    record = hand_made()
    requests = record.requests
    columns = {f.name: getattr(requests, f.name) for f in fields(requests)}
    only = RequestTable(**{k: v[3:4] for k, v in columns.items() if v is not None})
    none = summarise(
        replace(
            record, requests=only, itl_s=np.array([]), itl_weight=np.array([], dtype=np.int64),
            instances=[used("prefill", 0, busy={}, idle_s=0.0, busy_j=0.0, idle_j=0.0)],
            makespan_s=0.0,
        )
    )  # fmt: skip
    assert none["itl_attainment"] == 1.0
    assert none["ttft_attainment"] == none["attainment"] == 0.0
    undefined = ("goodput_rps", "goodput_per_j", "throughput_tokens_per_s", "energy_per_request_j",
                 "energy_per_output_token_j")  # fmt: skip
    assert all(np.isnan(none[key]) for key in undefined)
    assert all(np.isnan(number) for number in none["ttft_s"].values())
    assert none["clock_residency"] == {"prefill": {}, "decode": {}}


def test_attainment_is_per_request_per_token_and_both(tmp_path: Path) -> None:
    """Steps of 0.5 s; A: TTFT 1.0, TPOT 0.5. B waits for the prefill: TTFT 1.25."""
    profile = write_synthetic_profile(tmp_path, time_s=lambda p, f, b, t: 0.5)
    requests = make_requests((0.0, 4, 3), (0.25, 4, 3))
    record, summary = run(profile, requests, slo_ttft_s=1.0, slo_itl_s=0.5)
    assert summary["ttft_attainment"] == 0.5
    assert summary["itl_attainment"] == 1.0
    assert attained(record).tolist() == [True, False]
    assert summary["goodput_rps"] == 1 / 2.5
    record, summary = run(profile, requests, slo_ttft_s=9.0, slo_itl_s=0.4)
    assert summary["itl_attainment"] == summary["attainment"] == 0.0


def test_a_run_directory_reads_back_equal(tmp_path: Path) -> None:
    profile = write_synthetic_profile(tmp_path / "profile")
    record, summary = run(
        profile, make_requests((0.0, 40, 5), (0.1, 9, 9)), record_iterations=True,
        timeline_interval_s=0.01,
    )  # fmt: skip
    written = write_run(record, tmp_path / "run")
    again = read_run(tmp_path / "run")
    assert {**summary, "schema_version": 1} == written
    assert write_run(again, tmp_path / "again") == written
    assert again.iterations is not None
    with pytest.raises(VoltanaError, match=r"no summary\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rate": 3}, "unknown key 'rate'.*did you mean 'rate_rps'"),
        ({"rate_rps": -1}, "rate_rps must be > 0 and finite, got -1.0"),
        ({"rate_rps": "fast"}, "rate_rps must be a number, got 'fast'"),
        ({"num_decode": 1.5}, "num_decode must be a whole number, got 1.5"),
        ({"num_decode": 0}, "num_decode must be > 0"),
        ({"extrapolate": "maybe"}, "extrapolate must be true or false, got 'maybe'"),
        ({"first_token": "tail"}, "first_token must be one of decode, prefill, got 'tail'"),
        ({"slo_itl_s": float("nan")}, "slo_itl_s must be > 0 and finite, got nan"),
    ],
)
def test_bad_configuration_is_one_line(values: dict[str, object], words: str) -> None:
    with pytest.raises(VoltanaError, match=words):
        make_config(values)


def test_text_values_become_their_types() -> None:
    config = make_config({"num_decode": "3", "extrapolate": "true", "run_limit_s": "none"})
    assert (config.num_decode, config.extrapolate, config.run_limit_s) == (3, True, None)
    assert (
        config.content_hash() == make_config({"extrapolate": True, "num_decode": 3}).content_hash()
    )
