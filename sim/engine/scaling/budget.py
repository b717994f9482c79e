"""A fleet's power budget: the highest clock at which nothing it may do exceeds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.step_model import StepModel
from voltana.sim.policies.base import (
    DECODE,
    UNLOCKED_MHZ,
    Controller,
    IdlePlan,
    InstanceState,
    Phase,
)


class PowerBudget:
    """What the fleet may draw, kept by a ceiling on clocks.

    An instance in service counts with the most that the profile's table has at a clock, in its
    phase; one out of service, or on its way out, with what it draws. The ceiling is the highest
    clock, the same for all, at which these sums stay within the budget. It is lowered when an
    instance begins to wake, and raised when one has gone. A lower one is commanded at once and
    holds from the next iteration that begins after the actuation latency: an instance that is back
    sooner, from a parked clock, may overdraw the budget until then.
    """

    def __init__(self, budget_w: float, profile: Profile, truth: StepModel) -> None:
        """See the class.

        Args:
            budget_w: Of the whole fleet, hosts aside.
            profile: Whose tables say what a phase draws at most.
            truth: The same tables as a function.
        """
        self._budget_w = budget_w
        self._clocks_mhz = profile.clocks_mhz
        self._truth = truth
        self._batches = sorted({int(b) for b in profile.decode["batch_size"]})
        self._most_w: dict[tuple[Phase, int], float] = {}

    def most_w(self, phase: Phase, clock_mhz: int) -> float:
        """The most that an instance in service draws at a clock, working or waiting."""
        key = phase, clock_mhz
        if key not in self._most_w:
            truth = self._truth
            if phase == DECODE:
                rows = [truth.decode_row(clock_mhz, batch) for batch in self._batches]
            else:
                rows = list(truth.prefill_rows(clock_mhz).values())
            busy_w = max(max(row[3]) for row in rows)
            self._most_w[key] = max(busy_w, truth.idle_power_w(clock_mhz))
        return self._most_w[key]

    def ceiling_mhz(self, phases: Sequence[Phase], away_w: float) -> int:
        """The highest clock for all.

        Args:
            phases: Of each instance in service, or on its way back.
            away_w: What the others draw together.

        Raises:
            VoltanaError: Even the lowest clock draws more than the budget.
        """
        most_w = 0.0
        for clock in reversed(self._clocks_mhz):
            most_w = away_w + sum(self.most_w(phase, clock) for phase in phases)
            if most_w <= self._budget_w:
                return clock
        raise VoltanaError(
            f"budget_w={self._budget_w:g} is less than {len(phases)} instances in service may draw "
            f"at their lowest clock, {most_w:.0f} W: raise it, or take fewer instances"
        )


class Capped(Controller):
    """Another controller, never above the ceiling that the budget leaves its instance."""

    def __init__(self, inner: Controller, ceiling_mhz: int) -> None:
        """See the class.

        Args:
            inner: Who decides.
            ceiling_mhz: Before the first decision.
        """
        self.inner = inner
        self._first_mhz = ceiling_mhz

    def decide(self, state: InstanceState) -> int:
        return _within(self.inner.decide(state), state.ceiling_mhz)

    def initial_clock_mhz(self) -> int:
        return _within(self.inner.initial_clock_mhz(), self._first_mhz)

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        plan = self.inner.on_idle(state)
        if plan is None:
            return None
        clock_mhz = _within(plan.clock_mhz, state.ceiling_mhz)
        return IdlePlan(after_s=plan.after_s, clock_mhz=clock_mhz)

    def admit_up_to(self, state: InstanceState) -> int | None:
        return self.inner.admit_up_to(state)

    def hold_s(self, state: InstanceState) -> float:
        return self.inner.hold_s(state)

    def steady_iterations(self, state: InstanceState, batch_size: int, tokens: int) -> int:
        return self.inner.steady_iterations(state, batch_size, tokens)

    def learnt(self) -> Mapping[str, float]:
        return self.inner.learnt()


class CappedOracle(Capped):
    """The same of a controller whose clocks are in force at once."""

    acts_at_once = True


def capped(inner: Controller, ceiling_mhz: int) -> Controller:
    """The controller under a ceiling.

    Args:
        inner: Who decides.
        ceiling_mhz: Before the first decision.
    """
    make = CappedOracle if inner.acts_at_once else Capped
    return make(inner, ceiling_mhz)


def _within(clock_mhz: int, ceiling_mhz: int) -> int:
    return ceiling_mhz if clock_mhz == UNLOCKED_MHZ else min(clock_mhz, ceiling_mhz)
