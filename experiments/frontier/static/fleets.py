"""How static fleets are written as configurations, and which search finds the best of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from voltana.experiments.frontier.static.like import Fleet, FleetSearch, Side, counts_name
from voltana.experiments.frontier.static.unlike import Cards, Sides, UnlikeSearch
from voltana.experiments.frontier.trial import Trial
from voltana.profiles.catalog import Profile
from voltana.sim.config import SimConfig
from voltana.sim.policies.base import DECODE, PREFILL, Phase

_PHASES: Final[tuple[Phase, Phase]] = (PREFILL, DECODE)
F = TypeVar("F")


@dataclass(frozen=True, slots=True, kw_only=True)
class CardKind:
    """One kind of card within a phase."""

    name: str
    """Of its profile, as the configuration has it."""
    clocks_mhz: tuple[int, ...]
    """All that it may be locked at, ascending."""
    knots_mhz: tuple[int, ...]
    """Those of them that a search tries first."""
    quiet_mhz: int
    """Where it draws the least at rest: its lock while none of its kind is in use."""

    @classmethod
    def of(cls, name: str, profile: Profile, clocks_mhz: tuple[int, ...]) -> CardKind:
        """Of some of a profile's clocks."""
        rest_power_w = profile.truth().rest_power_w
        return cls(
            name=name,
            clocks_mhz=clocks_mhz,
            knots_mhz=profile_knots(profile, clocks_mhz),
            quiet_mhz=min(clocks_mhz, key=rest_power_w),
        )


Kinds = tuple[tuple[CardKind, ...], tuple[CardKind, ...]]
"""Of prefill's and of decode's instances, in the order of the first instance of each."""


class StaticFleets(Protocol[F]):
    """The static fleets of one load under one router; F is how one is told."""

    @property
    def top(self) -> F:
        """All instances in use, at their top clocks."""
        ...

    def settings(self, fleet: F, cap: int | None) -> dict[str, Any]:
        """Its keys of a configuration, with a limit of the decode batch."""
        ...

    def label(self, fleet: F, cap: int | None) -> str:
        """It in words; no two fleets have the same."""
        ...

    def find(
        self, attempt: Callable[[F, bool], Trial], target: float, *, any_number: bool
    ) -> Trial:
        """The one of least energy, of all instances or of any number of them.

        Args:
            attempt: Runs a fleet, on all repeats or on the first alone.
            target: Attainment that every repeat has to reach.
            any_number: Some instances may rest for the whole run.
        """
        ...


def static_fleets(
    config: SimConfig, router: str, kinds: Kinds, *, has_one_clock: bool = False
) -> StaticFleets[Any]:
    """Those of a configuration: of like cards within each phase, or of unlike ones.

    Args:
        config: The load's.
        router: That all run under.
        kinds: Cards of both phases.
        has_one_clock: One clock for both phases.
    """
    if any(len(of_phase) > 1 for of_phase in kinds):
        return UnlikeFleets(config, router, kinds)
    one = kinds[0][0], kinds[1][0]
    if config.num_colocated:
        return LikeFleets((config.num_colocated, 1), router, one, True, True)
    most = config.num_prefill, config.num_decode
    return LikeFleets(most, router, one, False, has_one_clock)


@dataclass(frozen=True, slots=True)
class LikeFleets:
    """Static fleets of like cards within each phase.

    Where there is one clock, of colocated instances or by will, it is the first side's. That of the
    second changes nothing, so that a search finds its runs known; nor does a colocated fleet's
    second number of instances.
    """

    most: tuple[int, int]
    router: str
    kinds: tuple[CardKind, CardKind]
    is_colocated: bool
    has_one_clock: bool

    @property
    def top(self) -> Fleet:
        """All instances, at the top clock of each phase's cards."""
        (n, m), (prefill, decode) = self.most, self.kinds
        return Side(n, prefill.clocks_mhz[-1]), Side(m, decode.clocks_mhz[-1])

    def settings(self, fleet: Fleet, cap: int | None) -> dict[str, Any]:
        """As of `StaticFleets`."""
        prefill, decode = fleet
        settings: dict[str, Any] = {"router": self.router}
        if self.has_one_clock:
            settings["controller"] = f"static:f={prefill.clock_mhz}"
        else:
            settings["prefill_controller"] = f"static:f={prefill.clock_mhz}"
            settings["decode_controller"] = f"static:f={decode.clock_mhz}"
        if self.is_colocated:
            settings["active_colocated"] = prefill.active
        else:
            settings |= {"active_prefill": prefill.active, "active_decode": decode.active}
        return settings if cap is None else settings | {"max_running_requests": cap}

    def label(self, fleet: Fleet, cap: int | None) -> str:
        """As of `StaticFleets`."""
        prefill, decode = fleet
        clocks = [prefill.clock_mhz] if self.has_one_clock else [s.clock_mhz for s in fleet]
        parts = [f"{'/'.join(map(str, clocks))} MHz"]
        if (prefill.active, decode.active) != self.most:
            split = counts_name(prefill.active, decode.active)
            parts.append(f"{prefill.active}C" if self.is_colocated else split)
        return ", ".join(parts + _cap_words(cap))

    def find(
        self, attempt: Callable[[Fleet, bool], Trial], target: float, *, any_number: bool
    ) -> Trial:
        """As of `StaticFleets`, by `FleetSearch`."""
        prefill, decode = self.kinds
        counts = [range(1 if any_number else n, n + 1) for n in self.most]
        return FleetSearch(
            attempt,
            clocks_mhz=(prefill.clocks_mhz, decode.clocks_mhz),
            knots_mhz=(prefill.knots_mhz, decode.knots_mhz),
            counts=(counts[0], counts[1]),
            target=target,
        ).find()


class UnlikeFleets:
    """Static fleets with unlike cards within a phase: one clock and one number a kind of card.

    A fleet is a `Side` for each kind, prefill's first. Of a kind of which some are in use the
    others lie at its clock too, as in a fleet of like cards.
    """

    def __init__(self, config: SimConfig, router: str, kinds: Kinds) -> None:
        """Args: the load's configuration, the router of all, cards of both phases."""
        self._router, self._kinds = router, kinds
        self._names = [
            config.mixed_profiles.get(phase, [of_phase[0].name] * config.counts[phase])
            for phase, of_phase in zip(_PHASES, kinds, strict=True)
        ]
        self._counts = [
            [names.count(kind.name) for kind in of_phase]
            for names, of_phase in zip(self._names, kinds, strict=True)
        ]

    @property
    def top(self) -> Sides:
        """All instances, at each kind's top clock."""
        return tuple(
            Side(count, kind.clocks_mhz[-1])
            for of_phase, counts in zip(self._kinds, self._counts, strict=True)
            for kind, count in zip(of_phase, counts, strict=True)
        )

    def settings(self, fleet: Sides, cap: int | None) -> dict[str, Any]:
        """As of `StaticFleets`: instances in use come first, else in the order that was given."""
        settings: dict[str, Any] = {"router": self._router}
        for phase, names, of_phase, sides in zip(
            _PHASES, self._names, self._kinds, self._of_phases(fleet), strict=True
        ):
            known = {kind.name: side for kind, side in zip(of_phase, sides, strict=True)}
            rank = [names[:i].count(name) for i, name in enumerate(names)]
            order = sorted(range(len(names)), key=lambda i: rank[i] >= known[names[i]].active)
            clocks = [str(known[names[i]].clock_mhz) for i in order]
            settings[f"active_{phase}"] = sum(side.active for side in sides)
            settings[f"{phase}_controller"] = f"static:f={'+'.join(clocks)}"
            settings[f"{phase}_profiles"] = "+".join(names[i] for i in order)
        return settings if cap is None else settings | {"max_running_requests": cap}

    def label(self, fleet: Sides, cap: int | None) -> str:
        """As of `StaticFleets`; kinds are joined by +, one that is not in use has no clock."""
        phases = self._of_phases(fleet)
        clocks = ["+".join(str(s.clock_mhz) if s.active else "–" for s in p) for p in phases]
        parts = [f"{'/'.join(clocks)} MHz"]
        counts = [[s.active for s in sides] for sides in phases]
        if counts != self._counts:
            parts.append(
                "".join("+".join(map(str, c)) + p for c, p in zip(counts, "PD", strict=True))
            )
        return ", ".join(parts + _cap_words(cap))

    def find(
        self, attempt: Callable[[Sides, bool], Trial], target: float, *, any_number: bool
    ) -> Trial:
        """As of `StaticFleets`, by `UnlikeSearch`."""
        cards = [
            [
                Cards(
                    counts=range(0 if any_number else count, count + 1),
                    clocks_mhz=kind.clocks_mhz,
                    knots_mhz=kind.knots_mhz,
                    quiet_mhz=kind.quiet_mhz,
                )
                for kind, count in zip(of_phase, counts, strict=True)
            ]
            for of_phase, counts in zip(self._kinds, self._counts, strict=True)
        ]
        return UnlikeSearch(attempt, cards=(cards[0], cards[1]), target=target).find()

    def _of_phases(self, fleet: Sides) -> tuple[Sides, Sides]:
        split = len(self._kinds[0])
        return fleet[:split], fleet[split:]


def _cap_words(cap: int | None) -> list[str]:
    return [] if cap is None else [f"at most {cap} together"]


def profile_knots(profile: Profile, clocks_mhz: Sequence[int]) -> tuple[int, ...]:
    """Of those clocks the ones at which the profile has decode tables."""
    tables = {int(c) for c in profile.decode["frequency_mhz"].unique()}
    return tuple(c for c in clocks_mhz if c in tables)
