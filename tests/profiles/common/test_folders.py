"""An output folder says what it holds, and what is foreign is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.folders import MARKER, check, claim, held


def test_a_folder_is_made_and_marked_and_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "a"
    claim(folder, "sweep")
    assert json.loads((folder / MARKER).read_text()) == {"holds": "sweep"}
    (folder / "results.csv").write_text("x")
    claim(folder, "sweep")
    assert held(folder) == "sweep"
    with pytest.raises(VoltanaError, match=r"a holds a sweep, not a frontier: name another folder"):
        claim(folder, "frontier")


def test_files_of_others_are_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(VoltanaError, match=r"files that are of no run \(thesis\.txt\): name an em"):
        claim(tmp_path, "run")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_hidden_files_do_not_count(tmp_path: Path) -> None:
    (tmp_path / ".gitkeep").touch()
    claim(tmp_path, "run")
    assert held(tmp_path) == "run"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("profile.toml", "profile"), ("summary.json", "run"), ("frontier.csv", "frontier")],
)
def test_a_folder_without_a_marker_is_told_by_its_files(
    tmp_path: Path, name: str, kind: str
) -> None:
    (tmp_path / name).touch()
    assert held(tmp_path) == kind
    with pytest.raises(VoltanaError, match=f"holds a {kind}, not a sweep"):
        check(tmp_path, "sweep")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"holds": 3}'])
def test_a_marker_that_says_nothing_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MARKER).write_text(text)
    with pytest.raises(VoltanaError, match="does not say what the folder holds"):
        check(tmp_path, "sweep")
