"""Checks what a policy answers against the interface of `voltana.sim.policies.base`.

Both drivers, the simulator and the replay, take a policy's answers through this module. An answer
that breaks the interface, or an exception that the policy raises, becomes a one-line error with the
policy's name.
"""

from __future__ import annotations

import math
import operator
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, NoReturn

import numpy as np

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import (
    DECODE,
    PREFILL,
    UNLOCKED_MHZ,
    Cluster,
    Controller,
    IdlePlan,
    InstanceState,
    Phase,
    PolicyContext,
    RequestView,
    Router,
    States,
)
from voltana.sim.policies.parts.clocks import nearest_two_mhz

MAX_CHARACTERS: Final = 300
"""Longest text of a message or value that an error shows; the rest is cut off."""


class ControllerAnswers:
    """Asks one instance's controller and checks what it says.

    The simulator's inner loop asks `decide` itself and comes here with a new answer only.
    """

    def __init__(self, controller: Controller, clocks_mhz: Sequence[int], where: str) -> None:
        """Check the answers of one controller.

        Args:
            controller: The policy.
            clocks_mhz: Supported clocks, ascending.
            where: The instance, for an error message.
        """
        self.controller = controller
        self.has_admission = type(controller).admit_up_to is not Controller.admit_up_to
        self.has_holding = type(controller).hold_s is not Controller.hold_s
        """Whether the controller has these methods of its own; if not, it need not be asked."""
        self._clocks_mhz = clocks_mhz
        self._allowed_mhz = frozenset((UNLOCKED_MHZ, *clocks_mhz))
        self._where = where

    def initial_clock_mhz(self) -> int:
        """The clock before the first decision.

        Raises:
            VoltanaError: The controller raised, or answered no supported clock; so do the others.
        """
        try:
            answer: object = self.controller.initial_clock_mhz()
        except Exception as error:  # noqa: BLE001 (a policy may raise anything)
            self.fail("initial_clock_mhz", error)
        return self.clock_mhz(answer, "initial_clock_mhz")

    def decide(self, state: InstanceState) -> int:
        """The decision, checked."""
        try:
            answer: object = self.controller.decide(state)
        except Exception as error:  # noqa: BLE001 (a policy may raise anything)
            self.fail("decide", error)
        return self.clock_mhz(answer)

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        """The plan for an idle instance, checked."""
        try:
            plan: object = self.controller.on_idle(state)
        except Exception as error:  # noqa: BLE001 (a policy may raise anything)
            self.fail("on_idle", error)
        if plan is None:
            return None
        if not isinstance(plan, IdlePlan):
            self._refuse("on_idle must return an IdlePlan, or None to keep the clock", plan)
        after_s: object = plan.after_s
        if not (isinstance(after_s, (int, float)) and 0 <= after_s < math.inf):
            self._refuse("after_s of on_idle's plan must be a time >= 0 in s", after_s)
        clock_mhz = self.clock_mhz(plan.clock_mhz, "on_idle's plan")
        return IdlePlan(after_s=after_s, clock_mhz=clock_mhz)

    def admit_up_to(self, state: InstanceState) -> int | None:
        """The most requests that may run, checked."""
        try:
            answer: object = self.controller.admit_up_to(state)
        except Exception as error:  # noqa: BLE001 (a policy may raise anything)
            self.fail("admit_up_to", error)
        return None if answer is None else self._count(answer, "admit_up_to", ", or None")

    def hold_s(self, state: InstanceState) -> float:
        """How long the queue waits for more, checked."""
        try:
            answer: object = self.controller.hold_s(state)
        except Exception as error:  # noqa: BLE001 (a policy may raise anything)
            self.fail("hold_s", error)
        if not (isinstance(answer, (int, float)) and 0 <= answer < math.inf):
            self._refuse("hold_s must return a time >= 0 in s", answer)
        return answer

    def clock_mhz(self, answer: object, call: str = "decide") -> int:
        """Check a clock that the method `call` returned; as a plain integer."""
        try:
            clock_mhz = operator.index(answer)  # type: ignore[arg-type]
        except TypeError:
            clock_mhz = -1
        if clock_mhz not in self._allowed_mhz or isinstance(answer, bool):
            close = " or ".join(map(str, nearest_two_mhz(self._clocks_mhz, clock_mhz)))
            near = f" (nearest: {close})" if clock_mhz > 0 else ""
            self._refuse(
                f"{call} must return a clock of context.clocks_mhz in MHz{near}, "
                f"or {UNLOCKED_MHZ} for no lock",
                answer,
            )
        return clock_mhz

    def steady_iterations(self, answer: object) -> int:
        """Check a number that `steady_iterations` returned; as a plain integer."""
        return self._count(answer, "steady_iterations")

    def _count(self, answer: object, call: str, other: str = "") -> int:
        try:
            count = operator.index(answer)  # type: ignore[arg-type]
        except TypeError:
            count = -1
        if count < 0:
            self._refuse(f"{call} must return a whole number >= 0{other}", answer)
        return count

    def fail(self, call: str, error: Exception) -> NoReturn:
        """Report in one line that the controller raised. A VoltanaError passes as it is."""
        fail(self.controller, call, error, self._where)

    def _refuse(self, rule: str, answer: object) -> NoReturn:
        raise VoltanaError(
            f"controller {name_of(self.controller)} ({self._where}): {rule}, got {_show(answer)}"
        )


def route(router: Router, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
    """Ask the router for a pair of positions, and check it.

    Args:
        router: The policy.
        request: The request that has just arrived.
        prefill: Healthy prefill instances.
        decode: Healthy decode instances.

    Raises:
        VoltanaError: The router raised, or did not answer a position in each of the sequences.
    """
    answer: object = None
    try:
        answer = router.route(request, prefill, decode)
        first, second = answer
        if 0 <= first < len(prefill) and 0 <= second < len(decode):
            if type(first) is type(second) is int:
                return first, second
            return operator.index(first), operator.index(second)
    except Exception as error:  # noqa: BLE001 (a policy may raise anything)
        if answer is None and _is_raised_below(error):
            fail(router, "route", error)
    raise VoltanaError(
        f"router {name_of(router)}: route must return two positions, of prefill in 0 … "
        f"{len(prefill) - 1} and of decode in 0 … {len(decode) - 1}, got {_show(answer)}: a "
        "position is an index into the sequence that route is given, not an instance_id"
    )


def rehearse(make: Callable[[PolicyContext], Router], context: PolicyContext) -> None:
    """Make a second router and let it route once with one instance of each phase left.

    In a simulation every instance is always there, so that `instance_id` equals the position. A
    router that returns the wrong one of the two would fail on hardware only, after a fault.

    Raises:
        VoltanaError: As `route`.
    """
    phases: tuple[tuple[Phase, int], ...] = (
        (PREFILL, context.num_prefill), (DECODE, context.num_decode),
    )  # fmt: skip
    cluster = Cluster()
    cluster.prefill, cluster.decode = (
        [
            InstanceState(instance_id=i, phase=phase, kv_capacity_tokens=context.kv_capacity_tokens)
            for i in range(count)
        ]
        for phase, count in phases
    )
    alone = replace(
        context,
        cluster=None if context.cluster is None else cluster,
        rng=np.random.default_rng(0),
    )
    view = RequestView(request_id=0, arrival_s=0.0, input_tokens=1, output_tokens=None)
    try:
        route(make(alone), view, cluster.prefill[-1:], cluster.decode[-1:])
    except VoltanaError as error:
        raise VoltanaError(
            f"{error} (tried with one healthy instance of each phase, as after a fault)"
        ) from error


def fail(policy: object, call: str, error: Exception, where: str = "") -> NoReturn:
    """Report in one line that a policy raised: its name, the exception and its place.

    Args:
        policy: The controller, router or scaler.
        call: Name of the method that raised.
        error: What it raised.
        where: The instance, if there is one to name.

    Raises:
        VoltanaError: Always; an error that is one already passes as it is.
    """
    if isinstance(error, VoltanaError):
        raise error
    kinds = (kind for base, kind in _KINDS.items() if isinstance(policy, base))
    place = f" ({where})" if where else ""
    file = getattr(sys.modules.get(type(policy).__module__), "__file__", None)
    raise VoltanaError(
        f"{next(kinds, 'scaler')} {name_of(policy)}{place}: {call} raised {describe(error, file)}"
    ) from error


_KINDS: Final[dict[type[object], str]] = {Controller: "controller", Router: "router"}


def name_of(policy: object) -> str:
    """Module and class: what a user names it by, and where it is."""
    return f"{type(policy).__module__}.{type(policy).__qualname__}"


def describe(error: Exception, file: str | None = None) -> str:
    """An exception in one line: type, message, and the last place in `file`, or else of all.

    Example:
        >>> describe(KeyError("no"))
        "KeyError: 'no'"
    """
    places = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<")
    ]
    if isinstance(error, SyntaxError) and error.filename:
        places, message = [(error.filename, error.lineno)], error.msg
    else:
        message = str(error)
    own = [place for place in places if place[0] == file] or places
    said = _shorten(f"{type(error).__name__}: {message}" if message else type(error).__name__)
    return f"{said} ({own[-1][0]}:{own[-1][1]})" if own else said


def _is_raised_below(error: Exception) -> bool:
    """Whether the error comes from a function that the catching one called."""
    return error.__traceback__ is not None and error.__traceback__.tb_next is not None


def _show(value: object) -> str:
    return _shorten(f"{value!r} of type {type(value).__name__}")


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_CHARACTERS else f"{line[:MAX_CHARACTERS]} …"
