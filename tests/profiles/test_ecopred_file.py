"""A hand-edited `ecopred.csv` is read strictly: each broken rule is one message."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from voltana.profiles.catalog import list_profiles, load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.ecopred import COLUMNS, fit_report
from voltana.profiles.places import DATA

NAME = "a100-80g-sxm/llama-3.1-8b"
Edit = Callable[[pd.DataFrame], pd.DataFrame]


def put(column: str, value: str | float) -> Edit:
    """Set a cell of the third row (line 4 of the file)."""

    def edit(table: pd.DataFrame) -> pd.DataFrame:
        changed = table.astype(object)
        changed.loc[2, column] = value
        return changed

    return edit


def edited(directory: Path, edit: Edit) -> Path:
    shutil.copytree(DATA / NAME, directory)
    path = directory / "ecopred.csv"
    edit(pd.read_csv(path)).to_csv(path, index=False)
    return directory


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (put("phase", "warm-up"), r"phase must be prefill or decode \(.*ecopred\.csv:4\)"),
        (put("constant_s", "fast"), r"numbers must be finite \(.*:4\)"),
        (put("per_token_s", float("inf")), r"numbers must be finite \(.*:4\)"),
        (put("per_token_s", -1e-6), r"per_token_s must be >= 0 \(.*:4\)"),
        (put("batch_size_min", 1.5), r"batch sizes must be whole \(.*:4\)"),
        (put("batch_size_max", 0), r"batch_size_min must be in 1\.\.batch_size_max \(.*:4\)"),
        (put("frequency_mhz", 901), r"must be a supported clock \(.*:4\)"),
        (lambda t: t.drop(index=2), r"both phases at every clock, \[900\] has not"),
        (lambda t: t.iloc[:0], "no clock has not"),
        (lambda t: t.drop(index=t.index[t["batch_size_max"] == 16]), "so as to meet"),
        (lambda t: pd.concat([t, t.iloc[[-1]]]), "so as to meet"),
    ],
)
def test_a_broken_rule_is_named(tmp_path: Path, edit: Edit, said: str) -> None:
    directory = edited(tmp_path / "p", edit)
    with pytest.raises(VoltanaError, match=said) as caught:
        load_profile(directory)
    assert "\n" not in str(caught.value)


def test_the_shipped_files_keep_the_rules() -> None:
    assert len(list_profiles()) >= 3
    for name in list_profiles():
        assert not load_profile(name).fitted.empty


def test_r2_of_the_report_is_the_mean_of_the_ranges_weighted_by_points() -> None:
    """Two ranges with R² 1.0 (30 points) and 0.2 (10 points): 0.8."""
    rows = [("decode", 1000, 1, 8, 0.0, 0.0, 1.0, 1.0, 0.001, 0.01, 30),
            ("decode", 1000, 9, 16, 0.0, 0.0, 1.0, 0.2, 0.003, 0.05, 10)]  # fmt: skip
    (found,) = fit_report(pd.DataFrame(rows, columns=list(COLUMNS))).to_dict("records")
    assert (found["r2"], found["mae_ms"], found["mape_pct"]) == pytest.approx((0.8, 1.5, 2.0))
