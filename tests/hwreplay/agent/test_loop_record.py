"""What an agent leaves of its loop: latencies and safe states, in bounded memory."""

from __future__ import annotations

import pytest

from voltana.hwreplay.agent.loop_record import MAX_KEPT, MAX_SAFE_STATES, Latencies, LoopReport


def test_histogram_counts_every_value() -> None:
    latencies = Latencies()
    assert latencies.as_dict() == {"num": 0}
    for value_s in [0.0005] * 98 + [0.003, 9.0]:
        latencies.add(value_s)
    found = latencies.as_dict()
    assert found["histogram"] == [[0.001, 98], [0.005, 1], [None, 1]]
    assert found["max_s"] == 9.0


def test_latencies_of_a_long_run_take_no_more_memory_and_keep_their_quantiles() -> None:
    """1 to 3 N in a row, a third of them kept: the sample's quantiles lie within 5 standard errors
    (q (1 - q) / N under the root, of the range)."""
    latencies, total = Latencies(), 3 * MAX_KEPT
    for number in range(total):
        latencies.add(number / total)
    found = latencies.as_dict()
    assert (len(latencies), len(latencies.kept_s)) == (total, MAX_KEPT)
    assert found["num"] == sum(count for _, count in found["histogram"]) == total
    assert found["max_s"] == (total - 1) / total
    for q in (50, 90, 99):
        error = (q / 100 * (1 - q / 100) / MAX_KEPT) ** 0.5
        assert found[f"p{q}_s"] == pytest.approx(q / 100, abs=5 * error)


def test_the_report_keeps_so_many_safe_states_and_counts_all() -> None:
    report = LoopReport()
    for i in range(MAX_SAFE_STATES + 5):
        report.enter_safe(float(i), "again")
    found = report.as_dict()
    assert found["counts"] == {"safe_states": MAX_SAFE_STATES + 5}
    assert len(found["safe_states"]) == MAX_SAFE_STATES
