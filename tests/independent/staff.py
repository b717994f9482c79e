"""Who serves: servers are sent away by a written plan and come back, as docs/simulator.md says."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.independent.fleet import Fleet
    from tests.independent.job import Job
    from tests.independent.server import Server

WORDS = {"a": "awake", "p": "parked", "s": "asleep", "x": "stopped", "l": "lent"}
DEPTH = ["parked", "asleep", "stopped", "lent"]


@dataclass(eq=False)
class Place:
    """Where one server is and shall be."""

    server: Server
    now: str = "awake"
    wanted: str = "awake"
    low: str = ""
    """The state that it goes to, is in or comes from."""


class Staff:
    """Asks a written plan every period: a letter a server, prefill first."""

    def __init__(self, fleet: Fleet, plans: list[str], period_s: float, profile: Path) -> None:
        self._fleet, self._plans, self._period_s = fleet, plans, period_s
        self._states: dict[str, dict[str, Any]] = tomllib.loads(
            (profile / "states.toml").read_text()
        )
        self.phases = [[Place(s) for s in fleet.prefill], [Place(s) for s in fleet.decode]]
        self._of = {id(p.server): p for places in self.phases for p in places}
        self.sending = {id(s): 0 for s in fleet.prefill}
        self.wake_ups = 0
        self._other: dict[int, Place] = {}
        fleet.at(period_s, 1, self._ask)

    def pair(self, count: int, switch_s: float, switch_w: float) -> None:
        """The last so many servers of each phase are the two roles of a card; all decode first."""
        self._states["lent"] = {
            "power_w": 0.0, "enter_s": 0.0, "wake_s": switch_s, "change_w": switch_w,
        }  # fmt: skip
        for first, second in zip(*(places[-count:] for places in self.phases), strict=True):
            self._other |= {id(first): second, id(second): first}
            first.now = first.wanted = first.low = "lent"
            first.server.card.leave(0.0, 0.0, lends=True)

    def serving(self, phase: int) -> list[int]:
        """Numbers of those that get new requests."""
        return [i for i, place in enumerate(self.phases[phase]) if place.now == "awake"]

    def _ask(self, now_s: float) -> None:
        plan = self._plans.pop(0) if len(self._plans) > 1 else self._plans[0]
        letters = iter(plan)
        for place in (p for places in self.phases for p in places):
            place.wanted = WORDS[next(letters)]
        self._arrange(now_s)
        self._fleet.at(now_s + self._period_s, 1, self._ask)

    def _arrange(self, now_s: float) -> None:
        """Let all begin what they can, until nobody can."""
        before: list[str] = []
        while before != (before := [p.now for places in self.phases for p in places]):
            self._arrange_once(now_s)

    def _arrange_once(self, now_s: float) -> None:
        for phase, places in enumerate(self.phases):
            wanted = sum(p.wanted == "awake" for p in places)
            for place in places:
                if place.now == "draining" and place.wanted == "awake":
                    place.now = "awake"
                elif place.now == "awake" and place.wanted != "awake":
                    if len(self.serving(phase)) > wanted:
                        place.now = "draining"
                        self.rested(place.server, now_s)
                elif place.now in DEPTH and place.wanted == "awake":
                    other = self._other.get(id(place))
                    if other is None or other.now == "lent":
                        self._go(place, "waking", "wake_s", now_s)
                elif place.now in DEPTH and DEPTH.index(place.wanted) > DEPTH.index(place.now):
                    place.low = place.wanted
                    self._go(place, "falling", "enter_s", now_s)

    def rested(self, server: Server, now_s: float) -> None:
        """It rests, or a cache has left it: perhaps it can go."""
        place = self._of[id(server)]
        is_free = not (server.is_busy or server.is_woken or server.open_jobs)
        if place.now == "draining" and is_free and not self.sending.get(id(server), 0):
            place.low = place.wanted
            self._go(place, "falling", "enter_s", now_s)

    def _go(self, place: Place, way: str, time: str, now_s: float) -> None:
        state = self._states[place.low]
        place.now = way
        place.server.card.leave(now_s, state["change_w"])
        if state[time] > 0:
            self._fleet.at(now_s + state[time], 1, lambda at_s: self._arrive(place, at_s))
        else:
            self._arrive(place, now_s)

    def _arrive(self, place: Place, now_s: float) -> None:
        if place.now == "falling":
            place.now = place.low
            power_w = self._states[place.low]["power_w"]
            place.server.card.leave(now_s, power_w, lends=place.now == "lent")
        else:
            place.now = "awake"
            self.wake_ups += 1
            place.server.card.come_back(now_s)
            place.server.card.rest(now_s, place.server.controller.idle_plan)
        self._arrange(now_s)


class RoundRobinOfServing:
    """In turn among those that serve now, by position."""

    def __init__(self) -> None:
        self._turn = -1

    def route(self, job: Job, fleet: Fleet, now_s: float) -> tuple[int, int]:
        assert fleet.staff is not None
        self._turn += 1
        prefill, decode = fleet.staff.serving(0), fleet.staff.serving(1)
        return prefill[self._turn % len(prefill)], decode[self._turn % len(decode)]
