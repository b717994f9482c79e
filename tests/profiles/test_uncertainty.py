"""Draws from a profile's errors: by hand on closed forms, valid on every shipped profile."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.profiles import synthetic
from voltana.profiles.catalog import Profile, list_profiles, load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.schema import ErrorsMeta, meta_toml, read_meta
from voltana.profiles.uncertainty import Factors, draw_factors, draw_profile

ERRORS = ErrorsMeta(
    prefill_time=0.2, decode_time=0.1, prefill_clock_time=0.3, decode_clock_time=0.3,
    prefill_power=0.2, decode_power=0.1, prefill_clock_power=0.4, decode_clock_power=0.4,
    idle_power=0.2,
)  # fmt: skip


def drawn_alone(profile: Profile, monkeypatch: pytest.MonkeyPatch, **factors: float) -> Profile:
    """A draw in which only some factors differ from those that change nothing."""
    still = {f.name: 0.0 if f.name.endswith("clock_power") else 1.0
             for f in dataclasses.fields(Factors)}  # fmt: skip
    monkeypatch.setattr(
        "voltana.profiles.uncertainty.draw_factors", lambda *_: Factors(**(still | factors))
    )
    return draw_profile(profile, 1)


@pytest.fixture
def profile() -> Profile:
    found = load_profile("h100-sxm/qwen3-8b")
    return dataclasses.replace(found, meta=dataclasses.replace(found.meta, errors=ERRORS))


def test_each_factor_moves_what_it_says(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(of: Profile, clock: int = 990) -> tuple[float, float]:  # half of 1,980 MHz
        frame = of.decode
        is_it = (frame["frequency_mhz"] == clock) & (frame["batch_size"] == 64)
        found = frame[is_it & (frame["tokens"] == 32_768)].iloc[0]
        return float(found["time_s"]), float(found["power_w"])

    still = drawn_alone(profile, monkeypatch)
    pd.testing.assert_frame_equal(still.decode, profile.decode)
    pd.testing.assert_frame_equal(still.prefill, profile.prefill)
    slow = drawn_alone(profile, monkeypatch, decode_time=1.1)
    assert row(slow)[0] == pytest.approx(1.1 * row(profile)[0])
    # the time that half the clock adds, twice; at the top clock nothing
    steep = drawn_alone(profile, monkeypatch, decode_clock_time=2.0)
    added_s = row(profile)[0] - row(profile, 1980)[0]
    assert row(steep)[0] == pytest.approx(row(profile, 1980)[0] + 2 * added_s)
    assert row(steep, 1980)[0] == row(profile, 1980)[0]
    # but never more than the clock has fallen
    steepest = drawn_alone(profile, monkeypatch, decode_clock_time=50.0)
    assert row(steepest)[0] == pytest.approx(2 * row(profile, 1980)[0])
    idle_w = float(profile.idle_power_w(990))
    bent = drawn_alone(profile, monkeypatch, decode_clock_power=1.0)
    assert row(bent)[1] == pytest.approx(idle_w + 0.5 * (row(profile)[1] - idle_w))
    assert row(bent, 1980)[1] == row(profile, 1980)[1]
    hot = drawn_alone(profile, monkeypatch, decode_power=1.5)
    assert row(hot)[1] == pytest.approx(1.5 * row(profile)[1])
    assert drawn_alone(profile, monkeypatch, decode_power=5.0).decode["power_w"].max() == 700.0
    warm = drawn_alone(profile, monkeypatch, idle_power=1.25)
    assert warm.idle_power_w(990) == pytest.approx(1.25 * idle_w)
    assert row(warm) == row(profile)


@pytest.mark.parametrize("name", list_profiles())
def test_draws_of_shipped_profiles_stay_valid(name: str) -> None:
    """More tokens never take less time, a higher clock never more; power keeps its limits."""
    nominal = load_profile(name)
    limit_w = nominal.meta.gpu.power_limit_w * nominal.meta.model.tensor_parallel
    for number in (1, 2):
        drawn = draw_profile(nominal, number)
        for phase in ("prefill", "decode"):
            frame = getattr(drawn, phase)
            by_tokens = frame.sort_values("tokens").groupby(["frequency_mhz", "batch_size"])
            assert (by_tokens["time_s"].diff().dropna() >= -1e-12).all()
            by_clock = frame.sort_values("frequency_mhz").groupby(["batch_size", "tokens"])
            assert (by_clock["time_s"].diff().dropna() <= 1e-12).all()
            fallen_w = -by_clock["power_w"].diff().dropna().min()
            told = getattr(nominal, phase).sort_values("frequency_mhz")
            known_w = -told.groupby(["batch_size", "tokens"])["power_w"].diff().dropna().min()
            assert fallen_w <= max(1.5 * known_w, 1e-9)
            assert frame["power_w"].max() <= limit_w * (1 + 1e-9)
            busy = frame.merge(drawn.idle.groupby("frequency_mhz")["power_w"].median(),
                               on="frequency_mhz", suffixes=("", "_idle"))  # fmt: skip
            assert (busy["power_w"] >= busy["power_w_idle"] - 1e-9).all()
        pd.testing.assert_frame_equal(drawn.fitted, nominal.fitted)
        assert drawn.believed is nominal


def test_factors_are_as_wide_as_stated_and_repeat() -> None:
    found = [draw_factors(ERRORS, number) for number in range(1, 2001)]
    assert draw_factors(ERRORS, 7) == found[6]
    # a normal number cut at two deviations has a standard deviation of 0.93 or so of its own
    logs = np.log([f.decode_time for f in found])
    assert logs.mean() == pytest.approx(0.0, abs=0.01)
    assert logs.std() == pytest.approx(0.1 * 0.96, rel=0.05)
    powers = np.array([f.prefill_clock_power for f in found])
    assert powers.std() == pytest.approx(0.4 * 0.96, rel=0.05)
    assert abs(np.corrcoef(logs, powers)[0, 1]) < 0.07


def test_a_profile_without_errors_is_refused(tmp_path: Path) -> None:
    profile = synthetic.write_synthetic_profile(tmp_path / "p")
    with pytest.raises(VoltanaError, match=r"states no errors.*add \[errors\]"):
        draw_profile(profile, 1)
    path = tmp_path / "p" / "profile.toml"
    stated = dataclasses.replace(profile.meta, errors=ERRORS)
    path.write_text(meta_toml(stated))
    assert read_meta(path) == stated
    path.write_text(meta_toml(stated).replace("idle_power = 0.2", "idle_power = 1.2"))
    with pytest.raises(VoltanaError, match=r"errors.idle_power is a standard deviation < 1"):
        read_meta(path)
