"""What one profile directory says: iteration times, power, idle power, EcoPred, engine limits.

Written from docs/profiles.md and docs/simulator.md. Every look-up walks the four or eight corners
of its cell of the table; nothing is prepared but the rows.
"""

from __future__ import annotations

import tomllib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from tests.independent.mixed import Shared

Row = tuple[list[float], list[float], list[float]]
"""Tokens, times in s, powers in W: the medians at one clock and batch size."""


class Hardware:
    """The truth about one profile's iterations, and what policies believe of them."""

    def __init__(self, directory: Path) -> None:
        meta: dict[str, Any] = tomllib.loads((directory / "profile.toml").read_text())
        self.clocks_mhz: list[int] = meta["clocks"]["supported_mhz"]
        self.levels_mhz: list[int] = meta["clocks"]["default_levels_mhz"]
        self.limits: dict[str, int] = meta["engine"]
        self.kv_bytes_per_token: int = meta["model"]["kv_bytes_per_token"]
        self.cards: int = meta["model"]["tensor_parallel"]
        self.spread: dict[str, float] = meta.get("spread", {})
        """Standard deviation over mean of iteration times, by phase."""
        self._rows = {p: _rows(directory / f"{p}.csv") for p in ("prefill", "decode")}
        idle = pd.read_csv(directory / "idle.csv").groupby("frequency_mhz").median()
        self._idle_w = {int(str(clock)): float(watts) for clock, watts in idle["power_w"].items()}
        self._awake_w: dict[int, float] = {}
        if "awake_power_w" in idle:
            awake = idle["awake_power_w"]
            self._awake_w = {int(str(clock)): float(watts) for clock, watts in awake.items()}
        self._belief = pd.read_csv(directory / "ecopred.csv").sort_values("batch_size_max")
        self._corners = cache(self._find_corners)
        self.mixed: Shared | None = None
        if (directory / "mixed.csv").exists():
            self.mixed = Shared(directory / "mixed.csv", self.iteration, self.awake_w)
        self._believed = cache(self._find_belief)

    def top_if_unlocked_mhz(self, clock: int) -> int:
        """An unlocked card (0) runs at its top clock when it works."""
        return clock or self.clocks_mhz[-1]

    def iteration(self, phase: str, clock: int, batch: float, tokens: int) -> tuple[float, float]:
        """Time in s and power in W: linear in tokens, in batch (decode) or 1/batch (prefill), in
        1/clock for time and in the clock for power."""
        time_s = power_w = 0.0
        for (knots, times, powers), of_time, of_power in self._corners(
            phase, self.top_if_unlocked_mhz(clock), batch
        ):
            i = min(bisect_right(knots, tokens), len(knots) - 1) - 1
            part = (tokens - knots[i]) / (knots[i + 1] - knots[i])
            assert 0.0 <= part <= 1.0, f"{phase}: {tokens} tokens at batch {batch} left the grid"
            time_s += of_time * (times[i] + part * (times[i + 1] - times[i]))
            power_w += of_power * (powers[i] + part * (powers[i + 1] - powers[i]))
        if batch < 1:  # a longer prefix never saves time
            time_s = max(time_s, self.iteration(phase, clock, 1, tokens)[0])
        return time_s, power_w + self.awake_w(self.top_if_unlocked_mhz(clock))

    def idle_w(self, clock: int) -> float:
        """Power without work; clock 0 has a row of its own, between clocks it is linear."""
        return _between(self._idle_w, clock)

    def awake_w(self, clock: int) -> float:
        """What a card that has begun to work draws on top, working or waiting."""
        return _between(self._awake_w, clock) if self._awake_w else 0.0

    def believed_s(self, phase: str, clock: int, batch: int, tokens: int) -> float:
        """EcoPred: a line per clock and range of batch sizes; 20 ms where it is not positive."""
        per_request, per_token, constant = self._believed(phase, clock, batch)
        time_s = per_request * batch + constant + per_token * tokens
        return time_s if time_s > 0 else 0.020

    def _find_belief(self, phase: str, clock: int, batch: int) -> tuple[float, float, float]:
        table = self._belief
        part = table[(table["phase"] == phase) & (table["frequency_mhz"] == clock)]
        at = min(bisect_left(part["batch_size_max"].tolist(), batch), len(part) - 1)
        line = part.iloc[at]
        return float(line["per_request_s"]), float(line["per_token_s"]), float(line["constant_s"])

    def _find_corners(self, phase: str, clock: int, batch: float) -> list[tuple[Row, float, float]]:
        """Rows around (clock, batch), each with its weight in time and in power."""
        rows = self._rows[phase]
        low, high, by_clock = _bracket(sorted(rows), clock)
        by_period = (1 / clock - 1 / low) / (1 / high - 1 / low) if high > low else 0.0
        corners = []
        for f, of_time, of_power in (
            (low, 1 - by_period, 1 - by_clock), (high, by_period, by_clock),
        ):  # fmt: skip
            # a chunk with a prefix counts as less than one prompt: time goes on along the line from
            # two prompts to one, power stays that of one
            first, second, part = _bracket(sorted(rows[f]), max(batch, 1))
            power_part = part
            if batch < 1:
                first, second = sorted(rows[f])[:2]
            if phase == "prefill" and second > first:
                part = (1 / batch - 1 / first) / (1 / second - 1 / first)
                power_part = max(part, 0.0)
            corners.append((rows[f][first], of_time * (1 - part), of_power * (1 - power_part)))
            corners.append((rows[f][second], of_time * part, of_power * power_part))
        return [corner for corner in corners if corner[1] or corner[2]]


def _rows(path: Path) -> dict[int, dict[int, Row]]:
    """clock -> batch size -> medians over the trials."""
    table = pd.read_csv(path)
    rows: dict[int, dict[int, Row]] = {}
    for key, part in table.groupby(["frequency_mhz", "batch_size"]):
        medians = part.groupby("tokens")[["time_s", "power_w"]].median()
        clock, batch = (int(str(k)) for k in key)
        rows.setdefault(clock, {})[batch] = (
            [float(t) for t in medians.index],
            medians["time_s"].tolist(),
            medians["power_w"].tolist(),
        )
    return rows


def _bracket(values: Sequence[int], wanted: float) -> tuple[int, int, float]:
    """The two neighbours of `wanted` and its place between them; twice the same at a knot."""
    at = bisect_left(values, wanted)
    if at < len(values) and values[at] == wanted:
        return values[at], values[at], 0.0
    assert 0 < at < len(values), f"{wanted} lies outside {values[0]} to {values[-1]}"
    low, high = values[at - 1], values[at]
    return low, high, (wanted - low) / (high - low)


def _between(watts: dict[int, float], clock: int) -> float:
    if clock in watts:
        return watts[clock]
    low, high, part = _bracket(sorted(c for c in watts if c), clock)
    return watts[low] + part * (watts[high] - watts[low])
