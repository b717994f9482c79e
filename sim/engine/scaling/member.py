"""One instance on its way out of service and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from voltana.profiles.states import LOW_STATES, PowerStates, StateMeta
from voltana.sim.engine.instance import Instance
from voltana.sim.policies.base import AWAKE, PowerState
from voltana.sim.policies.scalers.base import LENT, Wanted

CHANGING: Final = "changing"
"""What a record calls the ways out and back."""
_DEPTHS: Final[tuple[Wanted, ...]] = (*LOW_STATES, LENT)


class Member:
    """Moves one instance between its states.

    awake → draining → falling → parked, asleep or stopped → waking → awake. A draining instance
    gets no new requests and ends those it has; one that is wanted again meanwhile is awake at
    once. Ways out and back are gone to their end. From a light sleep there is a way to a deeper
    one, and back to service only.
    """

    def __init__(
        self,
        instance: Instance,
        states: PowerStates,
        call_at: Callable[[float, Callable[[float], None]], None],
        changed: Callable[[float], None],
    ) -> None:
        """See the class.

        Args:
            instance: Which.
            states: Power and times of its states.
            call_at: The agenda's.
            changed: Called with the time when its state is another one.
        """
        self.instance = instance
        self.state = instance.state
        self.wanted: Wanted = AWAKE
        self.num_sending = 0
        """KV caches on their way from here, which hold it in service."""
        self._low: Wanted = "parked"
        """Where the way out leads, or has led."""
        self._states = states
        self._call_at = call_at
        self._changed = changed
        instance.on_rest = self.rest

    @property
    def draws_fully(self) -> bool:
        """Whether it may draw what it draws at work, or soon will."""
        return self.state.power_state in (AWAKE, "draining", "waking")

    def move(self, now_s: float, *, may_leave: bool) -> None:
        """Begin what is wanted, if the present state has a way there.

        Args:
            now_s: The present.
            may_leave: Whether it may leave service: others stay.
        """
        present, wanted = self.state.power_state, self.wanted
        if present in ("falling", "waking") or present == wanted:
            return
        if present == "draining":
            if wanted == AWAKE:
                self._become(AWAKE, now_s)
        elif present == AWAKE:
            if may_leave:
                self._become("draining", now_s)
                self.rest(now_s)
        elif wanted == AWAKE:
            meta = self._meta()
            self._change("waking", meta.change_w, meta.wake_s, now_s, self._wake_up)
        elif _DEPTHS.index(wanted) > _DEPTHS.index(self._low):
            self._fall(now_s)

    def rest(self, now_s: float) -> None:
        """It may have run out of work: if it is to leave and holds nothing, it does."""
        state = self.state
        if state.power_state != "draining" or state.open_requests or self.num_sending:
            return
        if self.instance.is_parked:
            self._fall(now_s)

    def _meta(self) -> StateMeta:
        """Of the state that the way out leads to."""
        low = self._low
        assert low != AWAKE
        assert low != LENT
        return self._states.of(low)

    def _fall(self, now_s: float) -> None:
        assert self.wanted != AWAKE
        self._low = self.wanted
        if self._low != "parked":
            self.instance.forget()
        meta = self._meta()
        self._change("falling", meta.change_w, meta.enter_s, now_s, self._land)

    def _change(
        self,
        name: PowerState,
        power_w: float,
        time_s: float,
        now_s: float,
        then: Callable[[float], None],
    ) -> None:
        self.instance.track.go_away(now_s, CHANGING, power_w)
        if time_s > 0:
            self._become(name, now_s)
            self._call_at(now_s + time_s, then)
        else:
            self.state.power_state = name
            then(now_s)

    def _land(self, now_s: float) -> None:
        """The way out has ended, wherever it is wanted by now."""
        assert self._low != AWAKE
        self.instance.track.go_away(now_s, self._low, self._meta().power_w)
        self._become(self._low, now_s)

    def _wake_up(self, now_s: float) -> None:
        self.instance.track.come_back(now_s)
        self.state.power_state = AWAKE
        self.instance.park(now_s)
        self._become(AWAKE, now_s)

    def _become(self, name: PowerState, now_s: float) -> None:
        self.state.power_state = name
        self._changed(now_s)


class Role(Member):
    """One of the two roles of a card that switches.

    It begins to wake when the card has left the other role. As long as it is lent it draws nothing:
    what the card draws is in the other role's books.
    """

    def __init__(
        self,
        instance: Instance,
        states: PowerStates,
        call_at: Callable[[float, Callable[[float], None]], None],
        changed: Callable[[float], None],
        lent: StateMeta,
    ) -> None:
        """See the class.

        Args:
            instance: As of `Member`, and so are the next three.
            states: Power and times of states, which a role does not have.
            call_at: The agenda's.
            changed: Called with the time when its state is another one.
            lent: Power and time of the switch to this role.
        """
        super().__init__(instance, states, call_at, changed)
        self._lent = lent
        self.other: Role = self
        """The card's other role."""

    def lend(self, now_s: float) -> None:
        """The run begins with the card in its other role."""
        self.wanted = self._low = LENT
        self.instance.track.go_away(now_s, LENT, 0.0)
        self.state.power_state = LENT

    def move(self, now_s: float, *, may_leave: bool) -> None:
        is_here = self.state.power_state != LENT
        if is_here or self.other.state.power_state == LENT:
            super().move(now_s, may_leave=may_leave)

    def _meta(self) -> StateMeta:
        return self._lent
