"""The clock that a controller sets in a state of the routing MDP: the controller itself is asked.

A state of the MDP stands for a long time under the same load. So for each question a new controller
is made, and asked at a time when no dwell holds it back. A controller that decides by the state
alone (`ecofreq`, `ecomin`, `static`, `dualscale-mpc`, …) answers as it would in service. One that
looks at measured latency or energy has measured nothing and answers with its first clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Final

from voltana.sim.policies.base import DECODE, IdlePlan, InstanceState, PolicyContext
from voltana.sim.policies.registry import make_controller

_NOW_S: Final = 1e6
"""Time at which a controller is asked: longer after the start than any dwell or window."""
_ROUNDS: Final = 8
"""Questions until a clock counts as settled."""


class ControllerClock:
    """What a decode controller does with its clock in each state.

    Args:
        spec: The controller, as on the command line.
        context: What it may know; its phase is decode.

    Raises:
        VoltanaError: There is no such controller, or it cannot be made without a running fleet.
    """

    def __init__(self, spec: str, context: PolicyContext) -> None:
        self._spec = spec
        self._context = context
        self._top_mhz = context.clocks_mhz[-1]
        self._idle = make_controller(spec, context).on_idle(self._state(0, 0, self._top_mhz))
        self.next_mhz = cache(self._next_mhz)
        self.settled_mhz = cache(self._settled_mhz)

    @property
    def idle_plan(self) -> IdlePlan | None:
        """What the controller does with an idle instance; None if it does nothing."""
        return self._idle

    def _next_mhz(self, requests: int, tokens: int, clock_mhz: int) -> int:
        """Its decision in a batch of `requests` with `tokens` of context at a clock; never 0."""
        made = make_controller(self._spec, self._context)
        return made.decide(self._state(requests, tokens, clock_mhz)) or self._top_mhz

    def _settled_mhz(self, requests: int, tokens: int) -> int:
        """The clock at which the controller stays for this batch, beginning at the top clock.

        If it changes its mind for ever, the faster of its last two clocks. For an empty instance,
        the clock at which it is parked.
        """
        if requests == 0:
            return self._top_mhz if self._idle is None else self._idle.clock_mhz
        clock = before = self._top_mhz
        for _ in range(_ROUNDS):
            before, clock = clock, self.next_mhz(requests, tokens, clock)
            if clock == before:
                return clock
        return max(clock, before)

    def reachable_mhz(self, loads: Iterable[tuple[int, int]]) -> tuple[int, ...]:
        """Every clock the controller may set, ascending, beginning at the top clock.

        Args:
            loads: Batches to ask about, as (requests, tokens).
        """
        points = list(loads)
        known, asked = {self._top_mhz}, set[int]()
        if self._idle is not None:
            known.add(self._idle.clock_mhz or self._top_mhz)
        while known - asked:
            clock = min(known - asked)
            asked.add(clock)
            known |= {self.next_mhz(*point, clock) for point in points}
        return tuple(sorted(known))

    def _state(self, requests: int, tokens: int, clock_mhz: int) -> InstanceState:
        return InstanceState(
            instance_id=self._context.instance_id,
            phase=DECODE,
            now_s=_NOW_S,
            clock_mhz=clock_mhz,
            is_busy=requests > 0,
            last_batch_size=requests,
            last_tokens=tokens,
            ended_batch_size=requests,
            ended_tokens=tokens,
            num_running=requests,
            open_requests=requests,
            kv_tokens=tokens,
            kv_capacity_tokens=self._context.kv_capacity_tokens,
        )
