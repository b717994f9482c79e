"""A run of like decode iterations, or a single iteration: what it takes, in closed form.

Between a join, a leave, a clock change and a knot of the table a batch is fixed and its context
grows by one token a request. Iteration k = 0, 1, … of a run then lasts first_s + k·step_s at
first_w + k·step_w, so that time and energy are sums of 1, k and k². With noise iteration k lasts
multipliers[k] times as long, and the sums are differences of running sums
(`voltana.sim.engine.physics.noise`).
"""

from __future__ import annotations

import math
from typing import Final

from voltana.sim.engine.physics.noise import Multipliers

_SAME_INSTANT: Final = 1e-12
"""Relative; sums of iteration times are rounded, so that equal instants may differ by this."""


class Run:
    """The work that one instance has begun; its track fills it anew for each.

    Attributes:
        start_s: When its first iteration began.
        count: Its iterations, the one that is running included.
        duration_s: What they take together.
        lead_s: What the first of them takes.
        first_s: Duration of the first iteration, noise aside.
        step_s: How much longer each iteration is than the one before.
        first_w: Power of the first iteration.
        step_w: How much more power each iteration draws than the one before.
        line_end_tokens: Context tokens up to which times and power go on like this.
        multipliers: Of the block of noise that the run lies in; None without noise.
        at: Place in that block of the first iteration.
    """

    __slots__ = (
        "at", "count", "duration_s", "first_s", "first_w", "lead_s", "line_end_tokens",
        "multipliers", "start_s", "step_s", "step_w",
    )  # fmt: skip

    def __init__(self) -> None:
        self.start_s = 0.0
        self.count = 0
        self.duration_s = self.lead_s = 0.0
        self.first_s = self.step_s = 0.0
        self.first_w = self.step_w = 0.0
        self.line_end_tokens = 0.0
        self.multipliers: Multipliers | None = None
        self.at = 0

    def iteration_s(self, k: int) -> float:
        """Duration of iteration k, from 0."""
        time_s = self.first_s + k * self.step_s
        if self.multipliers is not None:
            time_s *= self.multipliers[0][self.at + k]
        return time_s

    def power_w(self, k: int) -> float:
        """Power during iteration k, from 0."""
        return self.first_w + k * self.step_w

    def part_j(self, ended: int, elapsed_s: float) -> float:
        """Energy of the first `elapsed_s` of the iteration after those that have ended."""
        return self.power_w(ended) * elapsed_s

    def elapsed_s(self, count: int) -> float:
        """Duration of the first `count` iterations."""
        multipliers = self.multipliers
        if multipliers is None:
            return count * self.first_s + self.step_s * (0.5 * count * (count - 1))
        sums, k_sums, at = multipliers[1], multipliers[2], self.at
        total = sums[at + count] - sums[at]
        pairs = k_sums[at + count] - k_sums[at] - at * total
        return total * self.first_s + self.step_s * pairs

    def energy_j(self, count: int) -> float:
        """Energy of the first `count` iterations."""
        if count == 1:
            return self.first_w * self.lead_s
        multipliers = self.multipliers
        if multipliers is None:  # sums of 1, k and k² over the iterations
            ones, pairs = float(count), 0.5 * count * (count - 1)
            squares = pairs * (2 * count - 1) / 3.0
        else:
            _, sums, k_sums, k2_sums = multipliers
            at, end = self.at, self.at + count
            ones = sums[end] - sums[at]
            shifted = k_sums[end] - k_sums[at]
            pairs = shifted - at * ones
            squares = k2_sums[end] - k2_sums[at] - at * (2.0 * shifted - at * ones)
        first_s, step_s, first_w, step_w = self.first_s, self.step_s, self.first_w, self.step_w
        energy_j = ones * first_w * first_s + (first_w * step_s + step_w * first_s) * pairs
        return energy_j + step_w * step_s * squares

    def ended_before(self, now_s: float) -> int:
        """Iterations that have ended before `now_s`, never the last of the run.

        One that ends at this very instant is yet to: decode comes last, so that a router still
        sees it run, a joiner joins at its end, and a run's limit cuts it.
        """
        first_s, step_s, last = self.first_s, self.step_s, self.count - 1
        since_s = now_s - self.start_s - _SAME_INSTANT * max(1.0, now_s)
        if last == 0 or (since_s < first_s and self.multipliers is None):
            return 0
        # k·first + k(k-1)/2·step = since, in the form that does not cancel
        half = first_s - 0.5 * step_s
        root = math.sqrt(max(half * half + 2.0 * step_s * since_s, 0.0))
        count = min(max(int(2.0 * since_s / (half + root)), 0), last)
        if self.multipliers is None:
            return count
        while count < last and self.elapsed_s(count + 1) <= since_s:
            count += 1
        while count > 0 and self.elapsed_s(count) > since_s:
            count -= 1
        return count
