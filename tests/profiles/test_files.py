"""A file is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiles.files import replacing, write_text


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
