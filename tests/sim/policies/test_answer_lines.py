"""What a policy that breaks the interface is told, to the letter; the rehearsal of a router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.sim.policies.doubles import CLOCKS, make_cluster, make_context
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.answers import (
    MAX_CHARACTERS,
    ControllerAnswers,
    describe,
    fail,
    name_of,
    rehearse,
    route,
)
from voltana.sim.policies.base import (
    Controller,
    IdlePlan,
    InstanceState,
    PolicyContext,
    RequestView,
    Router,
    States,
)

STATE = InstanceState(instance_id=0, phase="decode")
NAME = f"{__name__}.Says"


class Says(Controller):
    """Answers everything with the same."""

    def __init__(self, answer: Any) -> None:  # noqa: ANN401
        self.answer = answer

    def decide(self, state: InstanceState) -> int:
        return self.answer  # type: ignore[no-any-return]

    def initial_clock_mhz(self) -> int:
        return self.answer  # type: ignore[no-any-return]

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return self.answer  # type: ignore[no-any-return]

    def admit_up_to(self, state: InstanceState) -> int | None:
        return self.answer  # type: ignore[no-any-return]

    def hold_s(self, state: InstanceState) -> float:
        return self.answer  # type: ignore[no-any-return]


class Only(Controller):
    """Decides, no more."""

    def decide(self, state: InstanceState) -> int:
        return 0


def asked(answer: object) -> ControllerAnswers:
    return ControllerAnswers(Says(answer), CLOCKS, "decode 0")


CALLS: dict[str, Callable[[object], object]] = {
    "initial": lambda a: asked(a).initial_clock_mhz(),
    "decide": lambda a: asked(a).decide(STATE),
    "idle": lambda a: asked(a).on_idle(STATE),
    "admit": lambda a: asked(a).admit_up_to(STATE),
    "hold": lambda a: asked(a).hold_s(STATE),
    "steady": lambda a: asked(None).steady_iterations(a),
}
CLOCK = "must return a clock of context.clocks_mhz in MHz"


WRONG: list[tuple[str, object, str, str]] = [
    ("initial", 1, f"initial_clock_mhz {CLOCK} (nearest: 1000 or 1200), or 0 for no lock",
     "1 of type int"),
    ("decide", 1350, f"decide {CLOCK} (nearest: 1200 or 1400), or 0 for no lock",
     "1350 of type int"),
    ("decide", -1200, f"decide {CLOCK}, or 0 for no lock", "-1200 of type int"),
    ("decide", 1e3, f"decide {CLOCK}, or 0 for no lock", "1000.0 of type float"),
    ("decide", False, f"decide {CLOCK}, or 0 for no lock", "False of type bool"),
    ("idle", 1000, "on_idle must return an IdlePlan, or None to keep the clock",
     "1000 of type int"),
    ("idle", IdlePlan(after_s=-0.5, clock_mhz=0),
     "after_s of on_idle's plan must be a time >= 0 in s", "-0.5 of type float"),
    ("idle", IdlePlan(after_s=float("inf"), clock_mhz=0),
     "after_s of on_idle's plan must be a time >= 0 in s", "inf of type float"),
    ("idle", IdlePlan(after_s=1.0, clock_mhz=1300),
     f"on_idle's plan {CLOCK} (nearest: 1200 or 1400), or 0 for no lock", "1300 of type int"),
    ("admit", -1, "admit_up_to must return a whole number >= 0, or None", "-1 of type int"),
    ("admit", 2.0, "admit_up_to must return a whole number >= 0, or None", "2.0 of type float"),
    ("hold", -0.5, "hold_s must return a time >= 0 in s", "-0.5 of type float"),
    ("hold", float("inf"), "hold_s must return a time >= 0 in s", "inf of type float"),
    ("hold", None, "hold_s must return a time >= 0 in s", "None of type NoneType"),
    ("steady", -1, "steady_iterations must return a whole number >= 0", "-1 of type int"),
    ("steady", "7", "steady_iterations must return a whole number >= 0", "'7' of type str"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_wrong_answer_is_one_line(number: int) -> None:
    call, answer, rule, shown = WRONG[number]
    with pytest.raises(VoltanaError) as caught:
        CALLS[call](answer)
    assert str(caught.value) == f"controller {NAME} (decode 0): {rule}, got {shown}"


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("initial", 1400), ("decide", 0), ("idle", None), ("admit", None), ("admit", 0),
        ("admit", 7), ("hold", 0), ("hold", 0.25), ("steady", 0),
        ("idle", IdlePlan(after_s=0, clock_mhz=1200)),
    ],
)  # fmt: skip
def test_a_right_answer_passes(call: str, answer: object) -> None:
    assert CALLS[call](answer) == answer


def test_whether_a_controller_admits_or_holds_at_all() -> None:
    own, plain = asked(None), ControllerAnswers(Only(), CLOCKS, "decode 0")
    assert (own.has_admission, own.has_holding) == (True, True)
    assert (plain.has_admission, plain.has_holding) == (False, False)


class Raises(Says):
    """Raises whenever it is asked."""

    def decide(self, state: InstanceState) -> int:
        raise self.answer

    def initial_clock_mhz(self) -> int:
        raise self.answer

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        raise self.answer

    def admit_up_to(self, state: InstanceState) -> int | None:
        raise self.answer

    def hold_s(self, state: InstanceState) -> float:
        raise self.answer


@pytest.mark.parametrize(
    "call", ["decide", "initial_clock_mhz", "on_idle", "admit_up_to", "hold_s"]
)
def test_an_exception_names_the_call_and_the_place_in_the_policy(call: str) -> None:
    answers = ControllerAnswers(Raises(KeyError("x")), CLOCKS, "decode 3")
    arguments = () if call == "initial_clock_mhz" else (STATE,)
    with pytest.raises(VoltanaError) as caught:
        getattr(answers, call)(*arguments)
    text = str(caught.value)
    assert text.startswith(
        f"controller {__name__}.Raises (decode 3): {call} raised KeyError: 'x' ({__file__}:"
    )
    assert isinstance(caught.value.__cause__, KeyError)


class Pairs(Router):
    """Returns, or raises, what it is told; remembers what it was asked."""

    def __init__(self, answer: Any) -> None:  # noqa: ANN401
        self.answer = answer
        self.asked: list[tuple[RequestView, list[InstanceState], list[InstanceState]]] = []

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        self.asked.append((request, list(prefill), list(decode)))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[no-any-return]


VIEW = RequestView(request_id=0, arrival_s=0.0, input_tokens=1, output_tokens=None)


def test_a_router_is_told_the_range_of_both_positions() -> None:
    cluster = make_cluster(2, 3)
    for answer, shown in (((2, 0), "(2, 0) of type tuple"), ((0, 3), "(0, 3) of type tuple"),
                          (None, "None of type NoneType"), ("00", "'00' of type str")):  # fmt: skip
        with pytest.raises(VoltanaError) as caught:
            route(Pairs(answer), VIEW, cluster.prefill, cluster.decode)
        assert str(caught.value) == (
            f"router {__name__}.Pairs: route must return two positions, of prefill in 0 … 1 and of "
            f"decode in 0 … 2, got {shown}: a position is an index into the sequence that route is "
            "given, not an instance_id"
        )
    with pytest.raises(VoltanaError, match=r"^router .*\.Pairs: route raised ValueError: no \("):
        route(Pairs(ValueError("no")), VIEW, cluster.prefill, cluster.decode)
    assert route(Pairs((np.int64(1), 2)), VIEW, cluster.prefill, cluster.decode) == (1, 2)


def test_a_rehearsal_shows_the_last_instance_of_each_phase_and_leaves_the_run_alone() -> None:
    """A second router, with states of its own, and with dice of its own."""
    given = replace(make_context(), num_prefill=2, num_decode=3, cluster=make_cluster(2, 3))
    seen: list[PolicyContext] = []
    drawn: list[float] = []
    router = Pairs((0, 0))

    def make(context: PolicyContext) -> Router:
        seen.append(context)
        drawn.append(context.rng.random())
        return router

    rehearse(make, given)
    ((request, prefill, decode),) = router.asked
    assert request == VIEW
    assert [(s.instance_id, s.phase, s.kv_capacity_tokens) for s in (*prefill, *decode)] == [
        (1, "prefill", 100_000), (2, "decode", 100_000),
    ]  # fmt: skip
    (context,) = seen
    assert context.cluster is not None
    assert context.cluster is not given.cluster
    assert (len(context.cluster.prefill), len(context.cluster.decode)) == (2, 3)
    assert given.rng.random() == np.random.default_rng(0).random()
    rehearse(make, replace(given, cluster=None))
    assert seen[1].cluster is None
    assert drawn[0] == drawn[1]  # a rehearsal repeats, as a run does
    with pytest.raises(VoltanaError) as caught:
        rehearse(lambda context: Pairs((1, 0)), given)
    assert "of prefill in 0 … 0 and of decode in 0 … 0, got (1, 0)" in str(caught.value)
    assert str(caught.value).endswith(
        "not an instance_id (tried with one healthy instance of each phase, as after a fault)"
    )


def test_a_failure_is_of_a_controller_or_of_a_router() -> None:
    for policy, where, start in (
        (Says(0), "decode 1", f"controller {NAME} (decode 1): x raised ValueError: a b"),
        (Pairs(0), "", f"router {__name__}.Pairs: x raised ValueError: a b"),
    ):
        with pytest.raises(VoltanaError) as caught:
            fail(policy, "x", ValueError("a\n  b"), where)
        assert str(caught.value) == start
    assert name_of(Says(0)) == NAME


def test_long_texts_are_cut_and_errors_without_words_are_named() -> None:
    assert describe(ValueError()) == "ValueError"
    fits = "x" * (MAX_CHARACTERS - len("ValueError: "))
    assert describe(ValueError(fits)) == f"ValueError: {fits}"
    assert describe(ValueError(fits + "y")) == f"ValueError: {fits} …"
    assert describe(SyntaxError("odd", ("own.py", 7, 1, "x"))) == "SyntaxError: odd (own.py:7)"
