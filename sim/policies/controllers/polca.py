"""POLCA: clock caps for the whole fleet under one power budget.

Each instance has its controller object, as everywhere; all of them share one plan (`Cluster.share`)
that measures, decides for the fleet, and tells each what it may do.
"""

from __future__ import annotations

from dataclasses import dataclass

from voltana.sim.policies.base import (
    DECODE,
    PREFILL,
    UNLOCKED_MHZ,
    Cluster,
    Controller,
    InstanceState,
    PolicyContext,
)
from voltana.sim.policies.parts.clocks import fleet_power_w, nearest_clock_mhz
from voltana.sim.policies.spec import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class PolcaParameters:
    """Parameters of `polca`: the source's where not said otherwise."""

    budget_w: float | None = parameter(
        None, "power budget of the fleet; none: share_frac of its modelled draw at full load", low=1
    )
    share_frac: float = parameter(
        0.8, "budget as a part of that draw (ours; the source oversubscribes a row by 30 %)",
        low=0.05, high=2.0,
    )  # fmt: skip
    low_frac: float = parameter(0.80, "budget's part above which decode is capped", low=0, high=1)
    high_frac: float = parameter(
        0.89, "budget's part above which decode is capped more, then prefill too", low=0, high=1
    )
    low_release_frac: float = parameter(
        0.75, "budget's part below which decode is free again", low=0, high=1
    )
    high_release_frac: float = parameter(
        0.84, "budget's part below which the harder caps and the brake are undone", low=0, high=1
    )
    mild_mhz: int = parameter(1275, "first cap of decode; snapped to a supported clock", low=1)
    hard_mhz: int = parameter(1110, "second cap of decode; snapped", low=1)
    prefill_mhz: int = parameter(1305, "cap of prefill; snapped", low=1)
    lag_s: float = parameter(40.0, "time from a command to the caps in force", low=0)
    brake_lag_s: float = parameter(5.0, "time from the brake's command to its effect", low=0)
    period_s: float = parameter(2.0, "window of the fleet's measured power (ours)", low=0.01)


FREE, MILD, HARD, HARD_ALL, BRAKE = range(5)
"""Levels of POLCA's plan, from no caps to every instance at its lowest clock."""


class PolcaPlan:
    """Measures the fleet's power by its energy counters, and sets the level of caps by it.

    Args:
        parameters: Budget, thresholds, caps and lags.
        context: The supported clocks and the power model.
        fleet: Every instance's live state.
    """

    def __init__(self, parameters: PolcaParameters, context: PolicyContext, fleet: Cluster) -> None:
        p = parameters
        self._parameters = p
        self._fleet = fleet
        self.budget_w = p.share_frac * fleet_power_w(context) if p.budget_w is None else p.budget_w
        self.level = FREE
        """The level in force."""
        self._commands: list[tuple[float, int]] = []
        self._measured_s = self._energy_j = 0.0

    def level_at(self, now_s: float) -> int:
        """The level in force now."""
        while self._commands and self._commands[0][0] <= now_s:
            self.level = self._commands.pop(0)[1]
        elapsed_s = now_s - self._measured_s
        if elapsed_s >= self._parameters.period_s:
            energy_j = 0.0
            for state in (*self._fleet.prefill, *self._fleet.decode):
                state.refresh()
                energy_j += state.energy_j
            use = (energy_j - self._energy_j) / elapsed_s / self.budget_w
            self._measured_s, self._energy_j = now_s, energy_j
            self._command(self.next_level(use), now_s)
        return self.level

    def next_level(self, use: float) -> int:
        """The level to ask for at this power over budget, from the one in force."""
        p, level = self._parameters, self.level
        if use > 1.0:
            return BRAKE
        if use > p.high_frac:
            return HARD if level < HARD else max(level, HARD_ALL)
        if level >= HARD:
            return MILD if use < p.high_release_frac else level
        if use > p.low_frac:
            return MILD
        return FREE if use < p.low_release_frac else level

    def _command(self, level: int, now_s: float) -> None:
        """Send a command unless one is on its way; only the brake overtakes."""
        asked = self._commands[-1][1] if self._commands else self.level
        if level == asked or (self._commands and level != BRAKE):
            return
        p = self._parameters
        if level == BRAKE:
            self._commands = [(now_s + p.brake_lag_s, level)]
        else:
            self._commands.append((now_s + p.lag_s, level))


class Polca(Controller):
    """Clock caps by the fleet's power over its budget: decode first, then prefill, at last all.

    p = measured power / budget, over the last 2 s. p > 0.80: decode at 1275 MHz. p > 0.89: decode
    at 1110, and if that is in force already, prefill at 1305 MHz. p > 1: every instance at its
    lowest clock (the brake). Below 0.84 the harder caps and the brake fall back to 1275, below 0.75
    that goes too. A command acts 40 s later, the brake after 5 s; until then no other is sent,
    but for the brake. Without a cap: no lock.

    Source: POLCA, arXiv 2308.12908. There decode stands for the low-priority jobs and
    prefill for the high-priority ones; clocks are the A100's, snapped to the profile's. Ours: the
    brake's clock is the profile's lowest, where the source brakes to 288 MHz, and its release.
    """

    __slots__ = ("caps_mhz", "plan")

    def __init__(self, parameters: PolcaParameters, context: PolicyContext) -> None:
        fleet = context.observe_cluster("polca")
        p, clocks = parameters, context.clocks_mhz
        mild, hard, prefill = (
            nearest_clock_mhz(clocks, f) for f in (p.mild_mhz, p.hard_mhz, p.prefill_mhz)
        )
        self.caps_mhz: tuple[int, ...] = {
            PREFILL: (UNLOCKED_MHZ, UNLOCKED_MHZ, UNLOCKED_MHZ, prefill, clocks[0]),
            DECODE: (UNLOCKED_MHZ, mild, hard, hard, clocks[0]),
        }[context.phase]
        """By level, as clock locks of this instance's own card; 0: no cap."""
        self.plan = fleet.share(
            f"polca {parameters}", lambda: PolcaPlan(parameters, context, fleet)
        )

    def decide(self, state: InstanceState) -> int:
        return self.caps_mhz[self.plan.level_at(state.now_s)]
