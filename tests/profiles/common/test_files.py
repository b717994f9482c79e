"""A file is there whole or not at all."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from tests.conftest import ROOT
from voltana.profiles.common.files import (
    replacing,
    write_bytes,
    write_csv,
    write_figure,
    write_parquet,
    write_text,
)


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text("old", path)
    with pytest.raises(RuntimeError, match="half way"), replacing(path) as partial:
        partial.write_text("ne")
        assert path.read_text() == "old"
        raise RuntimeError("half way")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"
    write_text("new", path)
    assert path.read_text() == "new"


def test_of_two_writers_the_first_one_stays_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path, is_first_kept=True) as slow:
        slow.write_text("second")
        with replacing(path, is_first_kept=True) as quick:
            quick.write_text("first")
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_svg_has_no_date(tmp_path: Path) -> None:
    write_figure(Figure(), tmp_path / "a.svg")
    assert "<dc:date>" not in (tmp_path / "a.svg").read_text()


LIMIT_BYTES = 4096
LARGE: dict[str, Callable[[Path], None]] = {
    "a.txt": lambda path: write_text("x" * 20_000, path),
    "a.bin": lambda path: write_bytes(b"x" * 20_000, path),
    "a.csv": lambda path: write_csv(pd.DataFrame({"x": np.arange(9999)}), path),
    "a.parquet": lambda path: write_parquet(
        pd.DataFrame({"x": np.random.default_rng(1).random(9999)}), path
    ),
    "a.png": lambda path: write_figure(Figure(figsize=(9, 9), facecolor="blue"), path, dpi=900),
    "a.svg": lambda path: write_figure(_drawn(), path),
}


def _drawn() -> Figure:
    figure = Figure()
    figure.subplots().plot(np.arange(999) % 7)
    return figure


def write_beyond_the_limit(name: str, folder: str) -> None:
    """Run in a process of its own, whose files may not grow beyond the limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))
    path = Path(folder) / name
    try:
        LARGE[name](path)
    except OSError as error:
        sys.stdout.write(f"{error.filename}|{error.strerror}")


@pytest.mark.parametrize("name", LARGE)
def test_where_there_is_no_room_the_old_file_stays_and_the_error_names_it(
    tmp_path: Path, name: str
) -> None:
    # a file too large for its limit stands for a full disk: the same calls fail in the same places
    path = tmp_path / name
    path.write_text("old")
    arguments = f"{name!r}, {str(tmp_path)!r}"
    module = "tests.profiles.common.test_files"
    call = f"import {module} as mine; mine.write_beyond_the_limit({arguments})"
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    file, _, reason = done.stdout.partition("|")
    assert file == str(path), done.stderr
    assert "File too large" in reason
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == [name]
