"""Is one policy better than another, whatever the card is like within the profile's stated errors?

Both are run on the nominal profile and on each draw from its errors, on the same requests. A policy
beats another in a draw if it keeps the target and the other does not, or spends more energy.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from voltana.experiments.compare.policies import keeps_promise
from voltana.experiments.runs import profile_of
from voltana.experiments.sweep.grid import Point
from voltana.experiments.sweep.run import run_or_raise
from voltana.experiments.sweep.store import FolderStore
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig

SURE: Final = 0.95
"""Share of the draws in which a verdict has to be the same."""
BETTER, WORSE, UNDECIDED = "better", "not better", "undecided"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A policy against another over draws from a profile's errors."""

    draws: int
    saving_pct: tuple[float, float, float]
    """2.5, 50 and 97.5 % quantiles over the draws, whatever promises are kept."""
    chance: float
    """Share of the draws in which the policy beats the other."""
    kept: float
    """Share in which it keeps the target."""
    other_kept: float
    is_better: bool
    """On the nominal profile."""

    @property
    def verdict(self) -> str:
        """`better`, `not better`, or `undecided` if more than 5 % of the draws say otherwise."""
        agreeing = self.chance if self.is_better else 1.0 - self.chance
        if agreeing < SURE:
            return UNDECIDED
        return BETTER if self.is_better else WORSE

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"verdict": self.verdict}

    def text(self, other: str) -> str:
        """One line."""
        low, middle, high = self.saving_pct
        return (
            f"{self.verdict} than {other}: saves {middle:.1f} % [{low:.1f}, {high:.1f}] over "
            f"{self.draws} draws of the profile's errors, better in {100 * self.chance:.0f} % of "
            f"them; keeps the promise in {100 * self.kept:.0f} % ({other}: "
            f"{100 * self.other_kept:.0f} %)"
        ).replace(f"{UNDECIDED} than", "undecided against")


@dataclass(frozen=True, slots=True)
class Run:
    """Of one run what a comparison needs."""

    energy_j: float
    is_kept: bool

    def beats(self, other: Run) -> bool:
        """Whether it keeps the target, and at less energy if the other does, too."""
        return self.is_kept and (not other.is_kept or self.energy_j < other.energy_j)


def compare_drawn(nominal: tuple[Run, Run], drawn: Sequence[tuple[Run, Run]]) -> Drawn:
    """Pairs of a policy's run and the other's, on the nominal profile and on each draw."""
    savings = [100.0 * (1.0 - a.energy_j / b.energy_j) for a, b in drawn]
    low, middle, high = map(float, np.percentile(savings, [2.5, 50.0, 97.5]))
    return Drawn(
        draws=len(drawn),
        saving_pct=(low, middle, high),
        chance=float(np.mean([a.beats(b) for a, b in drawn])),
        kept=float(np.mean([a.is_kept for a, _ in drawn])),
        other_kept=float(np.mean([b.is_kept for _, b in drawn])),
        is_better=nominal[0].beats(nominal[1]),
    )


def require_drawable(config: SimConfig) -> None:
    """Refuse a comparison over draws, before anything runs.

    Raises:
        VoltanaError: The profile states no errors, or the configuration is of one draw already.
    """
    if config.profile_draw is not None:
        raise VoltanaError(
            f"--uncertainty draws profiles itself, got profile_draw={config.profile_draw}: leave "
            "one out"
        )
    profile_of(dataclasses.replace(config, profile_draw=1))


def static_max_under(config: SimConfig) -> SimConfig:
    """The same configuration with every clock at its top, under the same router."""
    return dataclasses.replace(
        config, controller="static", prefill_controller=None, decode_controller=None, aim_ratio=None
    )


def against_static_max(config: SimConfig, draws: int) -> Drawn:
    """One configuration against static-max under its own router, on the same requests and draws.

    Args:
        config: The policy; its profile is the nominal one.
        draws: How many, numbered from 1.

    Raises:
        VoltanaError: See `require_drawable`; or a run failed.
    """
    require_drawable(config)
    top = static_max_under(config)
    numbers = [None, *range(1, draws + 1)]
    pairs = [
        tuple(
            Point(labels={}, config=dataclasses.replace(each, profile_draw=number))
            for each in (config, top)
        )
        for number in numbers
    ]
    with tempfile.TemporaryDirectory() as folder:
        store = FolderStore(Path(folder))
        run_or_raise((p for pair in pairs for p in pair), store)
        found = [(_run(store.get(a.key)), _run(store.get(b.key))) for a, b in pairs]
    return compare_drawn(found[0], found[1:])


def _run(summary: Mapping[str, Any]) -> Run:
    return Run(float(summary["energy_j"]), keeps_promise(summary))
