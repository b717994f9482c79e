"""Emulated cards of the shipped A100 profile, whose time stands where a test puts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.profiles.conftest import library_dir  # noqa: F401 (fixture)
from voltana.hwreplay.emulated.card import Card
from voltana.hwreplay.emulated.state import Behaviour, create_cards, open_cards

PROFILE = "a100-80g-sxm/llama-3.1-8b"


@dataclass(frozen=True, slots=True)
class Bench:
    """One card, its file, and the folder of its library."""

    card: Card
    path: Path
    library: Path

    def at(self, now_s: float) -> Bench:
        """Let the card's time be `now_s`."""
        self.card.faults.frozen_s = now_s
        return self

    def lock(self, clock_mhz: int) -> int:
        """NVML's call; its code."""
        return int(self.card.library.voltana_lock(self.card.address, clock_mhz))

    def reading_w(self) -> float:
        return float(self.card.library.voltana_reading_w(self.card.address))

    def counter_j(self) -> float:
        return float(self.card.library.voltana_counter_j(self.card.address))


MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench(library_dir: Path, tmp_path: Path) -> MakeBench:  # noqa: F811
    """Makes a card with a `Behaviour` of the given values, at second 0."""

    def make(*, num_cards: int = 1, profile: str = PROFILE, **behaviour: float) -> Bench:
        path = tmp_path / "cards"
        create_cards(path, profile, num_cards, library_dir, Behaviour(**behaviour))
        return Bench(open_cards(path, library_dir)[0], path, library_dir).at(0.0)

    return make
