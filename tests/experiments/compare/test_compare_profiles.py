"""Comparing the shape of two profiles: a pair whose difference is known, and one that differs."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from voltana.experiments.cli import make_app
from voltana.experiments.compare.profiles import compare_profiles
from voltana.profiles.catalog import Profile, load_profile, write_profile
from voltana.profiles.common.errors import VoltanaError

NAME = "a100-80g-sxm/llama-3.1-8b"


def changed(directory: Path, decode_factor: float, per_request_s: float) -> Profile:
    """The shipped profile at its top clock, its times changed in a known way."""
    base = load_profile(NAME)
    prefill, decode = (
        table[(table["frequency_mhz"] == base.clocks_mhz[-1]) & (table["trial"] == 0)]
        for table in (base.prefill, base.decode)
    )
    keep = decode["batch_size"].isin([1, 2, 8, 9, 64, 65, 128, 129, 256, 257])
    decode = decode[keep & decode["tokens"].between(decode["batch_size"] * 64, 200_000)]
    prefill = prefill[prefill["batch_size"].isin([1, 4])]
    times_s = decode_factor * decode["time_s"] + per_request_s * decode["batch_size"]
    meta = base.meta
    return write_profile(
        directory,
        meta,
        prefill.assign(time_s=2.0 * prefill["time_s"], power_w=1.5 * prefill["power_w"]),
        decode.assign(time_s=times_s),
        base.idle,
    )


def test_a_pure_factor_has_no_difference_in_shape(tmp_path: Path) -> None:
    """Times 3 in decode, 2 in prefill, power 1.5 in prefill: the scales, and shapes off by 0."""
    found = compare_profiles(changed(tmp_path / "p", 3.0, 0.0), load_profile(NAME))
    scales = {(s.phase, s.quantity): s.scale for s in found.shapes}
    assert scales == pytest.approx(
        {("prefill", "time_s"): 2.0, ("decode", "time_s"): 3.0, ("prefill", "power_w"): 1.5,
         ("decode", "power_w"): 1.0}, rel=1e-4,
    )  # fmt: skip
    assert all(s.p90_off < 1e-4 for s in found.shapes)  # six digits are written
    ours, theirs = found.costs
    assert ours.per_token_s == pytest.approx(3.0 * theirs.per_token_s, rel=1e-3)
    assert ours.constant_s == pytest.approx(3.0 * theirs.constant_s, rel=1e-3)
    assert {step.batch_size for step in found.steps} >= {128, 256}
    assert all(math.isclose(s.ours, s.theirs, abs_tol=1e-4) for s in found.steps)


def test_a_cost_per_request_is_found_as_such(tmp_path: Path) -> None:
    """50 µs more for every request of a batch: the fit says so, and the shape is off.

    Within 5 %: the fit is by relative error, so that its weights change with the times.
    """
    found = compare_profiles(changed(tmp_path / "p", 1.0, 50e-6), load_profile(NAME))
    ours, theirs = found.costs
    assert ours.per_request_s - theirs.per_request_s == pytest.approx(50e-6, rel=0.05)
    assert ours.constant_s == pytest.approx(theirs.constant_s, rel=0.05)
    (decode,) = (s for s in found.shapes if (s.phase, s.quantity) == ("decode", "time_s"))
    assert decode.median_off > 0.02


def test_the_command_writes_a_note_with_its_figure(tmp_path: Path) -> None:
    changed(tmp_path / "p", 3.0, 0.0)
    out = tmp_path / "note"
    done = CliRunner().invoke(
        make_app(), ["compare-profiles", str(tmp_path / "p"), NAME, "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert (out / "note.md").read_text() in done.output
    assert "| decode | iteration time | " in done.output
    assert {path.name for path in out.iterdir()} == {
        "note.md", "comparison.png", "comparison.svg", "shape.csv", "points.csv",
        "voltana.json",
    }  # fmt: skip
    shapes = pd.read_csv(out / "shape.csv").set_index(["phase", "quantity"])
    assert shapes.loc[("decode", "time_s"), "scale"] == pytest.approx(3.0, rel=1e-4)


def test_profiles_without_common_ground_are_refused(tmp_path: Path) -> None:
    profile = changed(tmp_path / "p", 1.0, 0.0)
    far = profile.decode.assign(tokens=profile.decode["tokens"] * 1_000_000)
    beyond = write_profile(tmp_path / "q", profile.meta, profile.prefill, far, profile.idle)
    with pytest.raises(VoltanaError, match="decode points within both profiles, got 0"):
        compare_profiles(beyond, load_profile(NAME))
