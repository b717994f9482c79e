"""Generators against the distributions that they name, and the laws of combining workloads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from voltana.experiments.runs import stream_of, workload_of
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.workload.arrivals.shapes import diurnal_rate
from voltana.sim.workload.build_histograms import SOURCES, histogram, moments
from voltana.sim.workload.generate import list_workloads, make_workload, stream_diurnal
from voltana.sim.workload.lengths import (
    DATA,
    LMSYS_MEAN_TOKENS,
    SHAREGPT_CLIENT_MEAN_TOKENS,
    draw_lengths,
    list_lengths,
    source_moments,
)
from voltana.sim.workload.workload import Workload


def test_poisson_gaps_are_exponential() -> None:
    """Kolmogorov-Smirnov on 20,000 gaps at rate 50; one fixed seed, not rejected at 1 %."""
    made = make_workload("sharegpt", rate_rps=50, duration_s=400, seed=5)
    gaps = np.diff(made.arrival_s, prepend=0.0)
    assert stats.kstest(gaps, "expon", args=(0, 1 / 50)).pvalue > 0.01
    assert len(made) == 20_000
    # a test with power: the same gaps are no exponential of a 10 % higher rate
    assert stats.kstest(gaps, "expon", args=(0, 1 / 55)).pvalue < 1e-6


@pytest.mark.parametrize("cv", [0.5, 2.0, 4.0])
def test_gamma_gaps_have_the_given_variation(cv: float) -> None:
    """100,000 gaps: the CV's standard error is below 2.5 % even at CV 4."""
    made = make_workload("lmsys", rate_rps=10, duration_s=10_000, seed=1, arrivals=f"gamma:cv={cv}")
    gaps = np.diff(made.arrival_s, prepend=0.0)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.08)
    assert len(made) / made.duration_s == pytest.approx(10, rel=0.06)


def test_arrivals_and_lengths_are_separate_streams() -> None:
    plain = make_workload("sharegpt", rate_rps=20, duration_s=50, seed=9)
    bursty = make_workload("sharegpt", rate_rps=20, duration_s=50, seed=9, arrivals="gamma:cv=3")
    assert (plain.input_tokens == bursty.input_tokens).all()
    assert (
        plain.content_hash
        == make_workload("sharegpt", rate_rps=20, duration_s=50, seed=9).content_hash
    )
    assert (
        plain.content_hash
        != make_workload("sharegpt", rate_rps=20, duration_s=50, seed=10).content_hash
    )


def test_diurnal_counts_follow_the_rate() -> None:
    """Counts per hour against the integral of the rate: chi-square, 24 cells, not rejected."""
    parts = list(stream_diurnal("lmsys", mean_rps=3, duration_s=86_400, seed=2))
    arrival_s = np.concatenate([p.arrival_s for p in parts])
    assert (np.diff(arrival_s) >= 0).all()
    edges = np.linspace(0, 86_400, 25)
    observed = np.histogram(arrival_s, edges)[0]
    expected = np.diff(diurnal_rate(3)(edges))
    assert stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), 24) > 0.01
    assert observed.max() > 3 * observed.min()  # the day does swing: (1 + .6) / (1 - .6) = 4


def test_a_compressed_day_has_the_shape_of_the_day() -> None:
    """`arrivals = "diurnal:swing=S"`: one period in the duration, its peak at 14/24 of it."""
    made = make_workload(
        "lmsys", rate_rps=40, duration_s=1200, seed=6, arrivals="diurnal:swing=0.5"
    )
    assert len(made) == pytest.approx(40 * 1200, abs=5 * np.sqrt(40 * 1200))
    edges = np.linspace(0, 1200, 25)
    observed = np.histogram(made.arrival_s, edges)[0]
    middle = (edges[1:] + edges[:-1]) / 2
    expected = 50 * 40 * (1 + 0.5 * np.cos(2 * np.pi * (middle / 1200 - 14 / 24)))
    assert stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), 24) > 0.01
    day = make_workload("lmsys", rate_rps=40, duration_s=1200, seed=6, arrivals="diurnal")
    assert np.histogram(day.arrival_s, edges)[0].max() > observed.max()  # .6 swings further


@pytest.mark.parametrize(
    ("arrivals", "rates"),
    [  # of each quarter over the mean, by hand: the integral of the rate
        ("step:ratio=3,at=0.5", (0.5, 0.5, 1.5, 1.5)),
        ("step:ratio=3,at=0.25", (0.4, 1.2, 1.2, 1.2)),
        ("ramp:ratio=3", (0.625, 0.875, 1.125, 1.375)),
        ("ramp:ratio=1", (1.0, 1.0, 1.0, 1.0)),
        ("step", (2 / 3, 2 / 3, 4 / 3, 4 / 3)),
    ],
)
def test_a_step_and_a_ramp_have_their_rates(arrivals: str, rates: tuple[float, ...]) -> None:
    """20,000 requests: each quarter's count is Poisson, so within 4 deviations of its mean."""
    made = make_workload("lmsys", rate_rps=50, duration_s=400, seed=3, arrivals=arrivals)
    counts = np.histogram(made.arrival_s, bins=4, range=(0, 400))[0]
    expected = 5000 * np.array(rates)
    assert counts.sum() == len(made)
    assert np.all(np.abs(counts - expected) < 4 * np.sqrt(expected))
    # gaps at a steady rate are exponential: their variation is 1
    gaps = np.diff(made.arrival_s[made.arrival_s < 100])
    if "step" in arrivals:
        assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.1)


def test_shapes_are_used_by_the_runs_of_a_configuration() -> None:
    config = make_config({"arrivals": "ramp:ratio=9", "rate_rps": 20, "duration_s": 50, "seed": 4})
    whole = workload_of(config)
    streamed = stream_of(replace(config, metrics="sketch"))
    assert streamed is not None
    assert next(streamed).content_hash == whole.content_hash
    assert len(whole.sliced(25, 50)) > 2 * len(whole.sliced(0, 25))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"chunk_requests": 0}, "chunk_requests must be > 0 and finite, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"swing": 1.0}, r"swing must be in \[0, 1\), got 1"),
        ({"duration_s": 0}, "duration_s must be > 0"),
    ],
)
def test_bad_arguments_of_a_stream(arguments: dict[str, float], words: str) -> None:
    values = {"mean_rps": 1.0, "duration_s": 10.0, "seed": 1} | arguments
    with pytest.raises(VoltanaError, match=words):
        list(stream_diurnal("lmsys", **values))  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", [1000, 65_536])
def test_streamed_requests_do_not_depend_on_the_chunk(chunk: int) -> None:
    def joined(size: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        parts = stream_diurnal(
            "azure-code", mean_rps=2, duration_s=40_000, seed=4, chunk_requests=size
        )
        arrays = [np.stack([p.arrival_s, p.input_tokens, p.output_tokens]) for p in parts]
        assert all(a.shape[1] <= size for a in arrays)
        return np.concatenate(arrays, axis=1)

    assert (joined(chunk) == joined(7_777)).all()


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_histograms_keep_the_moments_of_their_source(name: str, shared_data: Path) -> None:
    """Means within 2 %, median and p90 within 5 % (or 2 tokens), correlation within .03."""
    file, limit = SOURCES[name]
    source = pd.read_csv(shared_data / "traces" / file)
    source = source[(source["input_tokens"] >= 1) & (source["output_tokens"] >= 1)]
    if limit is not None:
        source = source[source["input_tokens"] + source["output_tokens"] <= limit]
    drawn = draw_lengths(name, 200_000, np.random.default_rng(0))
    for real, made in zip((source["input_tokens"], source["output_tokens"]), drawn, strict=True):
        assert made.mean() == pytest.approx(real.mean(), rel=0.02)
        for level in (50, 90):
            wanted = np.percentile(real, level)
            assert np.percentile(made, level) == pytest.approx(wanted, rel=0.05, abs=2)
    real_r = np.corrcoef(source["input_tokens"], source["output_tokens"])[0, 1]
    assert np.corrcoef(*drawn)[0, 1] == pytest.approx(real_r, abs=0.03)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_shipped_histograms_are_what_the_builder_makes(name: str, shared_data: Path) -> None:
    file, limit = SOURCES[name]
    made = histogram(pd.read_csv(shared_data / "traces" / file), limit)
    pd.testing.assert_frame_equal(pd.read_csv(DATA / f"{name}.csv.gz"), made)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_drawn_lengths_keep_the_limits_and_means_of_their_source(name: str) -> None:
    """200,000 draws against the moments that ship with the histogram; none passes a limit."""
    source = source_moments().loc[name]
    inputs, outputs = draw_lengths(name, 200_000, np.random.default_rng(1))
    assert min(inputs.min(), outputs.min()) >= 1
    assert inputs.max() <= source["input_max"]
    assert outputs.max() <= source["output_max"]
    assert (inputs + outputs).max() <= source["total_max"]
    assert inputs.mean() == pytest.approx(source["input_mean"], rel=0.02)
    assert outputs.mean() == pytest.approx(source["output_mean"], rel=0.02)
    assert outputs.std() == pytest.approx(source["output_std"], rel=0.03)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_shipped_moments_are_those_of_the_source(name: str, shared_data: Path) -> None:
    file, limit = SOURCES[name]
    made = moments(pd.read_csv(shared_data / "traces" / file), limit)
    assert source_moments().loc[name].to_dict() == pytest.approx(made)


def test_sharegpt_of_the_client_has_the_published_means() -> None:
    """Standard errors at 400,000 draws are 0.9 and 0.3 tokens; bins add under 1 %."""
    inputs, outputs = draw_lengths("sharegpt-client", 400_000, np.random.default_rng(3))
    assert inputs.mean() == pytest.approx(SHAREGPT_CLIENT_MEAN_TOKENS[0], rel=0.02)
    assert outputs.mean() == pytest.approx(SHAREGPT_CLIENT_MEAN_TOKENS[1], rel=0.01)
    assert (inputs + outputs).max() <= 3000


def test_lmsys_has_the_published_means() -> None:
    """400,000 draws; the standard errors are 0.3 and 0.6 tokens, allowed are four of them."""
    inputs, outputs = draw_lengths("lmsys", 400_000, np.random.default_rng(8))
    assert inputs.mean() == pytest.approx(LMSYS_MEAN_TOKENS[0], abs=1.2)
    assert outputs.mean() == pytest.approx(LMSYS_MEAN_TOKENS[1], abs=2.4)
    assert np.corrcoef(np.log(inputs), np.log(outputs))[0, 1] > 0.1


REQUESTS = st.lists(
    st.tuples(st.floats(0, 100), st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=30
)


def workload(rows: list[tuple[float, int, int]]) -> Workload:
    rows = sorted(rows)
    arrays = list(zip(*rows, strict=True))
    return Workload(
        arrival_s=np.array(arrays[0]),
        input_tokens=np.array(arrays[1], dtype=np.int64),
        output_tokens=np.array(arrays[2], dtype=np.int64),
    )


@given(rows=REQUESTS, factor=st.floats(0.1, 10))
def test_scaling_keeps_requests_and_divides_time(
    rows: list[tuple[float, int, int]], factor: float
) -> None:
    made = workload(rows)
    scaled = made.scaled(factor)
    assert scaled.arrival_s == pytest.approx(made.arrival_s / factor)
    assert (scaled.input_tokens == made.input_tokens).all()


@given(rows=REQUESTS, cut=st.floats(0.01, 99.99))
def test_slices_part_the_workload(rows: list[tuple[float, int, int]], cut: float) -> None:
    made = workload(rows)
    left, right = made.sliced(0, cut), made.sliced(cut, 101)
    assert len(left) + len(right) == len(made)
    assert np.concatenate([left.arrival_s, right.arrival_s + cut]) == pytest.approx(made.arrival_s)


@given(a=REQUESTS, b=REQUESTS)
def test_superposing_loses_nothing(
    a: list[tuple[float, int, int]], b: list[tuple[float, int, int]]
) -> None:
    both = workload(a).superposed(workload(b))
    rows = zip(both.arrival_s, both.input_tokens, both.output_tokens, strict=True)
    assert sorted((float(t), int(i), int(o)) for t, i, o in rows) == sorted([*a, *b])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "sharegp"}, "unknown workload 'sharegp'.*did you mean 'sharegpt'"),
        ({"rate_rps": 0}, "rate_rps must be > 0 and finite, got 0"),
        ({"duration_s": float("inf")}, "duration_s must be > 0 and finite"),
        (
            {"arrivals": "gamma"},
            "arrivals must be poisson, gamma:cv=NUMBER > 0, diurnal.*got 'gamma'",
        ),
        ({"arrivals": "gamma:cv=-1"}, "arrivals must be"),
        ({"arrivals": "diurnal:swing=2"}, r"swing must be in \[0, 1\), got 2"),
        ({"arrivals": "diurnal:swing=x"}, "arrivals must be"),
        ({"arrivals": "diurnal:ratio=2"}, "arrivals must be"),
        ({"arrivals": "step:ratio=0"}, "ratio must be > 0 and finite, got 0"),
        ({"arrivals": "step:at=1"}, r"a step must lie in \(0, 1\) of the duration, got 1"),
        ({"arrivals": "ramp:ratio=inf"}, "ratio must be > 0 and finite, got inf"),
        ({"arrivals": "ramp:swing=0.2"}, "arrivals must be"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], words: str) -> None:
    values = {"name": "sharegpt", "rate_rps": 1.0, "duration_s": 1.0, "seed": 1} | arguments
    with pytest.raises(VoltanaError, match=words):
        make_workload(**values)  # type: ignore[arg-type]


def test_every_listed_workload_can_be_made() -> None:
    """Sessions begin at random: 40 requests on average, give or take seven."""
    for name in list_workloads():
        count = len(make_workload(name, rate_rps=20, duration_s=2, seed=0))
        assert count == 40 if name in list_lengths() else 10 < count < 80
