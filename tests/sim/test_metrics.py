"""The reported numbers against NumPy and hand counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.errors import VoltanaError
from sim.config import make_config
from sim.metrics import attained, describe, weighted_quantile
from sim.results import read_run, write_run
from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run


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
        ({"rate_rps": "fast"}, "rate_rps must be float, got 'fast'"),
        ({"num_decode": 1.5}, "num_decode must be int, got 1.5"),
        ({"num_decode": 0}, "num_decode must be > 0"),
        ({"extrapolate": "maybe"}, "extrapolate must be bool, got 'maybe'"),
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
