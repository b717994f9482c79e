"""The house keeps its shape: few unlike files a room, short files."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT

ROOMS = ("profiles", "sim", "hwreplay", "experiments")
LISTS = {
    "experiments/commands",
    "sim/policies/controllers",
    "sim/policies/routers",
    "sim/policies/reconstructed",
}
"""Verbs and policies: like things, as many as there are."""
FILES = 10
LINES = 400


def sources(room: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in (ROOT / room).rglob("*.py")]


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_holds_more_unlike_files_than_a_reader_keeps_in_mind(room: str) -> None:
    held: dict[str, int] = {}
    for path in sources(room):
        folder, _, name = path.rpartition("/")
        held[folder] = held.get(folder, 0) + (name != "__init__.py")
    assert {f: n for f, n in held.items() if n > FILES and f not in LISTS} == {}


@pytest.mark.parametrize("room", ROOMS)
def test_no_file_is_longer_than_it_may_be(room: str) -> None:
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in sources(room)}
    assert {path: count for path, count in lines.items() if count > LINES} == {}
