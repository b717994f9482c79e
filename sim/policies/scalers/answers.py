"""Asks a scaler and checks what it says, for every driver."""

from __future__ import annotations

from collections.abc import Sequence

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.answers import fail, name_of
from voltana.sim.policies.base import AWAKE, States
from voltana.sim.policies.scalers.base import LENT, WANTED, FleetView, Plan, Scaler


def ask(scaler: Scaler, view: FleetView, clocks_mhz: Sequence[int]) -> Plan:
    """The scaler's plan, checked.

    Args:
        scaler: The policy.
        view: What it sees.
        clocks_mhz: Supported clocks.

    Raises:
        VoltanaError: It raised, or its plan is none for this fleet.
    """
    try:
        plan: object = scaler.plan(view)
    except Exception as error:  # noqa: BLE001 (a policy may raise anything)
        fail(scaler, "plan", error)
    where = f"scaler {name_of(scaler)}: plan"
    if not isinstance(plan, Plan):
        raise VoltanaError(f"{where} must return a Plan, got a {type(plan).__name__}")
    count = scaler.num_switching
    _check(f"{where}.prefill", plan.prefill, view.prefill, count)
    _check(f"{where}.decode", plan.decode, view.decode, count)
    if count:
        _check_pairs(where, plan.prefill[-count:], plan.decode[-count:])
    for clock_mhz in (plan.prefill_mhz, plan.decode_mhz):
        if clock_mhz != 0 and clock_mhz not in clocks_mhz:
            raise VoltanaError(
                f"{where}: base clocks must be supported ones, or 0 for none, got {clock_mhz!r}"
            )
    return plan


def _check_pairs(where: str, prefill: Sequence[object], decode: Sequence[object]) -> None:
    """A card that switches has one role."""
    for roles in zip(prefill, decode, strict=True):
        if set(roles) != {AWAKE, LENT}:
            raise VoltanaError(
                f"{where} must want a card that switches {AWAKE} in one role and {LENT} in the "
                f"other, got {roles[0]} in prefill and {roles[1]} in decode"
            )


def _check(where: str, wanted: Sequence[object], states: States, num_switching: int) -> None:
    words = list(wanted)
    plain = words[: len(words) - num_switching]
    if len(words) != len(states) or any(word not in WANTED for word in plain):
        raise VoltanaError(
            f"{where} must have one of {', '.join(WANTED)} for each of {len(states)} instances, "
            f"got {words}"
        )
    if states and AWAKE not in words:
        raise VoltanaError(f"{where} must leave one instance {AWAKE}, got {words}")
