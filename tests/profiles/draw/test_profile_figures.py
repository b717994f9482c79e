"""What a profile's own report warns of and leaves out, and options that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.profiles.synthetic import rough_profile, write_synthetic_profile
from voltana import profiles
from voltana.experiments.cli import make_app
from voltana.profiles.catalog import list_profiles, load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.draw.profile_figures import poor_fits, write_report


def test_a_poor_fit_is_one_line_with_its_figures(tmp_path: Path) -> None:
    """Tables of random times have no law to be found; the shipped ones have one."""
    (line,) = poor_fits(rough_profile(tmp_path, 1))
    assert "\n" not in line
    assert "MHz: R2 " in line
    assert "MAPE " in line
    for name in list_profiles():
        assert poor_fits(load_profile(name)) == []


def test_a_figure_of_one_point_is_left_out_and_said(tmp_path: Path) -> None:
    made = write_synthetic_profile(
        tmp_path / "p", clocks_mhz=(1000,), batches=(1,), tokens=(64, 128, 256)
    )
    stale = tmp_path / "report/energy_u.png"
    stale.parent.mkdir()
    stale.touch()  # of an earlier, longer run
    report = write_report(made, tmp_path / "report")
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {path.name for path in report.paths} == {"fit_report.csv", "power_surface.png"}
    assert len(report.left_out) == 2
    assert all("it would show one point" in line for line in report.left_out)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--engine", "torch", "--pair", "--device", "cpu"), "--pair must go with --engine sglang"),
        (("--engine", "torch", "--attach", "f.toml"), "--attach must go with --engine sglang"),
        (("--power-w", "100", "--budget", "0s"), "--budget must be > 0, got '0s'"),
        (("--power-w", "100", "--budget", "0.0h"), "--budget must be > 0"),
    ],
)
def test_what_would_mislead_is_refused_in_one_line(
    tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    asked = ["profile", "--model", "toy", "--out", str(tmp_path / "p"), *options]
    done = CliRunner().invoke(make_app(), asked)
    assert isinstance(done.exception, VoltanaError)
    assert said in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (tmp_path / "p").exists()


def test_no_profile_is_measured_into_the_package() -> None:
    out = Path(profiles.__file__).parent / "cpu"
    done = CliRunner().invoke(make_app(), ["profile", "--model", "toy", "--out", str(out)])
    assert isinstance(done.exception, VoltanaError)
    assert "outside the package" in str(done.exception)
    assert "results/profiles/cpu" in str(done.exception)
    assert not out.exists()
