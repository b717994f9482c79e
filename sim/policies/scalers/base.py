"""What a scaler sees and what it may decide: state in, wanted states out, every `period_s`.

Pure as controllers and routers are (`voltana.sim.policies.base`). A driver asks it, sends
instances that are no longer wanted away once they have ended what they have, and wakes others; what
the states cost and how long waking takes is the profile's (`voltana.profiles.states`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from voltana.profiles.states import LOW_STATES, LowState, PowerStates
from voltana.sim.policies.base import AWAKE, Phase, PolicyContext, States

Wanted = Literal["awake", "parked", "asleep", "stopped", "lent"]
WANTED: Final[tuple[Wanted, ...]] = (AWAKE, *LOW_STATES)
"""Of an instance that has one role."""
LENT: Final = "lent"
"""Of a role: its card is in the other one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Instances of one phase that run on like cards."""

    instances: tuple[int, ...]
    """By `instance_id`."""
    policy: PolicyContext
    """Their models."""
    states: PowerStates
    """Their power and times out of service."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalerContext:
    """What a scaler may know when it is made."""

    policy: PolicyContext
    """The models, the promises, the size of the fleet: as controllers and routers know them. Its
    phase is "colocated" where instances are."""
    states: PowerStates
    """Power and times of instances out of service."""
    kinds: Mapping[Phase, Sequence[Kind]] = field(default_factory=dict)
    """By phase, of a fleet of unlike instances; empty where all are alike."""
    budget_w: float | None = None
    """What the whole fleet may draw; None if that is not limited. The driver keeps it by limiting
    clocks; a scaler may leave more of it to fewer instances."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What came and what ended since the scaler was asked last."""

    window_s: float
    requests: int
    """That arrived."""
    input_tokens: int
    """Of their prompts."""
    squared_input_tokens: int
    """Sum of the squares of their prompts' lengths."""
    finished_requests: int
    finished_tokens: int
    """Output tokens of the requests that ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetView:
    """The whole fleet at one instant; `InstanceState.power_state` says who is in service."""

    now_s: float
    prefill: States
    """None of a colocated fleet."""
    decode: States
    """Or the colocated ones, whose `phase` says so."""
    demand: Demand


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is wanted from now on: a state for every instance, and clocks."""

    prefill: Sequence[Wanted]
    """By `instance_id`, and as many as in the view; if there are any, at least one awake."""
    decode: Sequence[Wanted]
    prefill_mhz: int = 0
    """Base clock of prefill instances, which the controller `base` runs at; 0: none chosen. Those
    whose card has no such clock run at their top one."""
    decode_mhz: int = 0


class Scaler(ABC):
    """Says how many instances serve; see the module."""

    period_s: float
    """Time between two questions, > 0."""
    num_switching: int = 0
    """The last so many prefill and as many decode instances are one card each, the first with the
    first and so on, in one of its two roles at a time: of each pair one is wanted awake, the other
    lent. All decode at first."""
    knows_kinds: bool = False
    """Whether it plans by the models of each kind, where instances of a phase are unlike."""
    switch_s: float = 0.0
    """From the end of one role, all work done, to the first request of the other."""

    @abstractmethod
    def plan(self, view: FleetView) -> Plan:
        """What is wanted from now on, of a fleet in which all were awake at first."""


_READY: Final = ("awake", "draining", "waking", "falling", "parked", "asleep", "stopped")
"""Who serves soonest."""


def keep(states: States, count: int, low: LowState) -> list[Wanted]:
    """Want so many awake: those who serve now or soonest, of equals the first; the others `low`.

    Args:
        states: The instances of one phase.
        count: How many are wanted; one at least, all at most.
        low: What the others shall be.
    """
    order = sorted(range(len(states)), key=lambda i: (_READY.index(states[i].power_state), i))
    chosen = set(order[: min(max(count, 1), len(states))])
    return [AWAKE if i in chosen else low for i in range(len(states))]
