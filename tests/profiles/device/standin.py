"""Emulated cards under words of their own, for tests that run in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd

from voltana.hwreplay.emulated.build import environment
from voltana.hwreplay.emulated.card import Card, Cards
from voltana.hwreplay.emulated.state import create_cards, open_cards
from voltana.profiles.catalog import Profile, load_profile

ROOT = Path(__file__).resolve().parents[3]
IDLE_W = 250.0
NO_PERMISSION = 4


@cache
def flat_profile() -> Profile:
    """The shipped A100's card, but 250 W at rest whatever the clock."""
    profile = load_profile("a100-80g-sxm/llama-3.1-8b")
    clocks_mhz = (0, profile.clocks_mhz[0], profile.clocks_mhz[-1])
    idle = pd.DataFrame({"frequency_mhz": clocks_mhz, "trial": 0, "power_w": IDLE_W})
    return replace(profile, idle=idle)


class Standin:
    """Cards at rest. Processes started with `env` see them and no others."""

    def __init__(self, library_dir: Path, state_path: Path) -> None:
        self._library_dir = library_dir
        self._path = state_path
        self._make(1)
        self.env = os.environ | environment(library_dir, state_path) | {"PYTHONPATH": str(ROOT)}

    def _make(self, num_cards: int) -> None:
        create_cards(self._path, flat_profile(), num_cards, self._library_dir)
        self.cards: Cards = open_cards(self._path, self._library_dir)
        for card in self.cards:
            card.faults.temperature_c = 40

    def __getitem__(self, field: str) -> int:
        look = self.cards[0].look()
        if field == "locked_mhz":
            return look.wanted_mhz
        if field in ("power_mw", "limit_mw"):
            return round((look.power_w if field == "power_mw" else look.power_limit_w) * 1e3)
        return int(getattr(look, field))

    def __setitem__(self, field: str, value: int) -> None:
        if field == "num_gpus":
            self._make(value)
        else:
            for card in self.cards:
                _set(card, field, value)

    def popen(self, code: str) -> subprocess.Popen[str]:
        """Start `code` in a fresh interpreter that sees these cards."""
        return subprocess.Popen(
            [sys.executable, "-c", code],
            env=self.env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str) -> str:
        """Run `code`; returns what it printed, fails with its stderr if it failed."""
        process = self.popen(code)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out.strip()


def _set(card: Card, field: str, value: int) -> None:
    if field == "deny_lock":
        card.faults.lock_error = NO_PERMISSION if value else 0
    elif field == "lost":
        (card.lose if value else card.find_again)()
    elif field == "limit_mw":
        card.set_power_limit(value / 1e3)
    else:
        assert hasattr(card.faults, field)
        setattr(card.faults, field, value)


def put(**values: int) -> None:
    """The same within a process that sees the cards."""
    with Cards() as cards:
        for field, value in values.items():
            _set(cards[0], field, value)
