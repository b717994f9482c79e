"""A fleet's power budget: the highest clocks at which nothing it may do exceeds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.engine.machine import Machine
from voltana.sim.policies.base import (
    COLOCATED,
    DECODE,
    PREFILL,
    UNLOCKED_MHZ,
    Controller,
    IdlePlan,
    InstanceState,
    Phase,
)


class Card(NamedTuple):
    """What an instance may draw depends on."""

    phase: Phase
    machine: Machine


class PowerBudget:
    """What the fleet may draw, kept by ceilings on clocks.

    An instance in service counts with the most that its profile's table has at a clock, in its
    phase; one out of service, or on its way out, with what it draws. The ceilings are the same
    share of every card's own range, from its lowest clock to its top one, each rounded down to a
    clock that the card has: of like cards one clock. The share is the largest at which these sums
    stay within the budget. It is lowered when an instance begins to wake, and raised when one has
    gone. A lower one is commanded at once and holds from the next iteration that begins after the
    actuation latency: an instance that is back sooner, from a parked clock, may overdraw the budget
    until then.
    """

    def __init__(self, budget_w: float, cards: Iterable[Card]) -> None:
        """See the class.

        Args:
            budget_w: Of the whole fleet, hosts aside.
            cards: All kinds of them that the fleet has.
        """
        self._budget_w = budget_w
        kinds = list(dict.fromkeys(cards))
        shares = {card: _shares(card.machine.models.clocks_mhz) for card in kinds}
        self._ladder = sorted({s for of_card in shares.values() for s in of_card}, reverse=True)
        self._clocks_mhz: list[dict[Card, int]] = [
            {
                card: max(
                    f
                    for f, own in zip(card.machine.models.clocks_mhz, of_card, strict=True)
                    if own <= share
                )
                for card, of_card in shares.items()
            }
            for share in self._ladder
        ]
        """By step down the ladder."""
        self._most_w: dict[tuple[Card, int], float] = {}

    def most_w(self, card: Card, clock_mhz: int) -> float:
        """The most that an instance in service draws at a clock, working or waiting."""
        key = card, clock_mhz
        if key not in self._most_w:
            truth = card.machine.truth
            busy_w = max(_busy_w(card.machine, phase, clock_mhz) for phase in _phases(card.phase))
            if card.phase == COLOCATED:
                busy_w *= card.machine.mixed.most_power_ratio
            self._most_w[key] = max(busy_w, truth.idle_power_w(clock_mhz))
        return self._most_w[key]

    def ceilings_mhz(self, in_service: Sequence[Card], away_w: float) -> Mapping[Card, int]:
        """The highest clock of each kind of card.

        Args:
            in_service: The card of each instance in service, or on its way back.
            away_w: What the others draw together.

        Raises:
            VoltanaError: Even the lowest clocks draw more than the budget.
        """
        most_w = 0.0
        for clocks_mhz in self._clocks_mhz:
            most_w = away_w + sum(self.most_w(card, clocks_mhz[card]) for card in in_service)
            if most_w <= self._budget_w:
                return clocks_mhz
        raise VoltanaError(
            f"budget_w={self._budget_w:g} is less than {len(in_service)} instances in service may "
            f"draw at their lowest clock, {most_w:.0f} W: raise it, or take fewer instances"
        )


def _shares(clocks_mhz: Sequence[int]) -> list[float]:
    """Where each clock is between the lowest, 0, and the top, 1."""
    lowest, top = clocks_mhz[0], clocks_mhz[-1]
    return [(f - lowest) / max(top - lowest, 1) for f in clocks_mhz]


def _phases(phase: Phase) -> Sequence[Phase]:
    return (PREFILL, DECODE) if phase == COLOCATED else (phase,)


def _busy_w(machine: Machine, phase: Phase, clock_mhz: int) -> float:
    truth = machine.truth
    if phase == DECODE:
        batches = {int(b) for b in machine.profile.decode["batch_size"]}
        rows = [truth.decode_row(clock_mhz, batch) for batch in sorted(batches)]
    else:
        rows = list(truth.prefill_rows(clock_mhz).values())
    return max(max(row[3]) for row in rows)


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
