"""A card: its clock, its power and its energy, iteration by iteration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol


class Tables(Protocol):
    """What a card is told of its iterations; see `tests.independent.hardware`."""

    cards: int

    def iteration(
        self, phase: str, clock: int, batch: float, tokens: int
    ) -> tuple[float, float]: ...

    def idle_w(self, clock: int) -> float: ...

    def awake_w(self, clock: int) -> float: ...


class Card:
    """Clock and energy of one server's GPUs."""

    def __init__(
        self, hardware: Tables, phase: str, first_mhz: int, lag_s: float, stall_s: float
    ) -> None:
        self._hardware, self._phase, self._lag_s = hardware, phase, lag_s
        self._stall_s = stall_s * hardware.cards
        self.clock = self._asked = first_mhz
        self._coming: list[tuple[float, int]] = []
        self.changes = self.iterations = 0
        self.busy_j = self.idle_j = 0.0
        self.window_j: tuple[float, float] | None = None
        """The energy counter at the first start and at the last end of an iteration."""
        self.busy_s: dict[int, float] = {}
        self.away_w: float | None = None
        """What it draws out of service; None in service."""
        self.away_j = self.away_s = 0.0
        self._idle_from_s = 0.0
        self._plan: tuple[float, int] | None = None
        self.air: Mapping[str, float] | None = None
        """Cooling and leakage of its cards, by the names of docs/simulator.md; None: no matter."""
        self.warm_c = math.nan

    def _drawn_j(self, power_w: float, time_s: float) -> float:
        """Energy of a stretch at that power of the table; the cards warm up or cool down."""
        air = self.air
        if air is None:
            return power_w * time_s
        kelvin_per_w = air["resistance_c_per_w"] / self._hardware.cards

        def excess_c(at_w: float) -> float:
            """Above the table's temperature, in the end: e = ambient - table + r P (1 + k e)."""
            start = air["ambient"] - air["table"] + kelvin_per_w * at_w
            return start / (1.0 - kelvin_per_w * at_w * air["leakage"])

        if math.isnan(self.warm_c):
            self.warm_c = excess_c(self._hardware.idle_w(self.clock))
        end_c = excess_c(power_w)
        rate = (1.0 - kelvin_per_w * power_w * air["leakage"]) / air["time"]
        left_c = (self.warm_c - end_c) * math.exp(-rate * time_s)
        area = end_c * time_s + (self.warm_c - end_c - left_c) / rate
        self.warm_c = end_c + left_c
        return power_w * (time_s + air["leakage"] * area)

    def ask(self, now_s: float, clock: int) -> None:
        """A command; what was asked for last is not asked again."""
        if clock != self._asked:
            self._asked = clock
            self._coming.append((now_s + self._lag_s, clock))

    def _take_next(self) -> float:
        """The clock changes; returns how long that holds up a busy card."""
        clock, before = self._coming.pop(0)[1], self.clock
        self.clock = clock
        self.changes += clock != before
        return self._stall_s if clock != before else 0.0

    def work(self, start_s: float, batch: float, tokens: int, noise: float) -> float:
        """One iteration; returns when it ends. A change of clock inside it splits it."""
        if self.window_j is None:
            self.window_j = (self.busy_j + self.idle_j + self.away_j, 0.0)
        stall_s = 0.0
        while self._coming and self._coming[0][0] <= start_s:
            stall_s += self._take_next()
        at_s, left = start_s, 1.0
        while True:
            time_s, power_w = self._hardware.iteration(self._phase, self.clock, batch, tokens)
            time_s *= noise
            work_s = at_s + stall_s
            end_s = work_s + left * time_s
            is_split = bool(self._coming) and self._coming[0][0] < end_s
            until_s = max(self._coming[0][0], work_s) if is_split else end_s
            self.busy_j += self._drawn_j(power_w, until_s - at_s)
            self.busy_s[self.clock] = self.busy_s.get(self.clock, 0.0) + until_s - at_s
            if not is_split:
                break
            left -= (until_s - work_s) / time_s
            at_s = until_s
            stall_s = self._take_next()
        self.iterations += 1
        self.window_j = (self.window_j[0], self.busy_j + self.idle_j + self.away_j)
        return end_s

    def rest(self, now_s: float, plan: tuple[float, int] | None) -> None:
        """Work has run out."""
        self._idle_from_s = now_s
        self._plan = (now_s + plan[0], plan[1]) if plan else None

    def pass_idle(self, now_s: float) -> None:
        """Book idle time up to `now_s`, with the clock changes that fall into it."""
        if self._plan and self._plan[0] <= now_s:
            self.ask(*self._plan)
            self._plan = None
        while self._coming and self._coming[0][0] <= now_s:
            self._book_idle(self._coming[0][0])
            self._take_next()
        self._book_idle(now_s)

    def leave(self, now_s: float, power_w: float) -> None:
        """Out of service, or in another state there."""
        self.pass_idle(now_s)
        self._plan = None
        self.away_w = power_w

    def come_back(self, now_s: float) -> None:
        self.pass_idle(now_s)
        self.away_w = None

    def _book_idle(self, until_s: float) -> None:
        spent_s = max(until_s - self._idle_from_s, 0.0)
        if self.away_w is not None:
            self.away_j += spent_s * self.away_w
            self.away_s += spent_s
            self._idle_from_s += spent_s
            return
        awake_w = self._hardware.awake_w(self.clock) if self.window_j else 0.0
        self.idle_j += self._drawn_j(self._hardware.idle_w(self.clock) + awake_w, spent_s)
        self._idle_from_s += spent_s
