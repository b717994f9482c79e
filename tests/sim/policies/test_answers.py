"""Policies that break the interface: each ends a run with one line that names it."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from tests.sim.policies.doubles import CLOCKS, decode_state, make_context
from voltana.profiles.catalog import Profile, load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.answers import MAX_CHARACTERS, ControllerAnswers, describe, route
from voltana.sim.policies.base import (
    Controller,
    IdlePlan,
    InstanceState,
    RequestView,
    Router,
    States,
)
from voltana.sim.policies.registry import check_policies, make_controller, make_router

Write = Callable[[str], str]

HEAD = """
import math
from dataclasses import dataclass
import numpy as np
from voltana.sim.policies.base import Controller, IdlePlan, Router
from voltana.sim.policies.registry import Entry

@dataclass(frozen=True)
class Parameters:
    pass

"""
CONTROLLER = """
class Mine(Controller):
    '''Mine.'''
    def __init__(self, parameters, context):
        self.clocks_mhz = context.clocks_mhz
    def decide(self, state):
        return self.clocks_mhz[-1]
    {}

CONTROLLER = Entry(make=Mine, parameters=Parameters)
"""
ROUTER = """
class Mine(Router):
    '''Mine.'''
    def __init__(self, parameters, context):
        pass
    def route(self, request, prefill, decode):
        {}

ROUTER = Entry(make=Mine, parameters=Parameters)
"""
NAMES = (f"voltana_test_policy_{number}" for number in itertools.count())
WORK = make_requests((0.0, 100, 20), (0.01, 50, 20), (0.5, 100, 10))


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    directory = tmp_path_factory.mktemp("profile")
    write_synthetic_profile(directory)
    return load_profile(str(directory))


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module of the user's own; returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write_module(text: str) -> str:
        name = next(NAMES)
        (tmp_path / f"{name}.py").write_text(HEAD + text)
        return name

    return write_module


def one_line(caught: pytest.ExceptionInfo[VoltanaError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 2 * MAX_CHARACTERS + 300
    return text


DECIDE = "def decide(self, state):\n        return "
WRONG_CONTROLLERS = [
    (DECIDE + "1111", "decide must return a clock", "(nearest: 1000 or 1400)", "got 1111"),
    (DECIDE + "-1", "decide must return a clock", "got -1"),
    (DECIDE + "None", "decide must return a clock", "got None"),
    (DECIDE + "'1410'", "decide must return a clock", "got '1410' of type str"),
    (DECIDE + "1410.0", "decide must return a clock", "got 1410.0 of type float"),
    (DECIDE + "False", "decide must return a clock", "got False of type bool"),
    (DECIDE + "[1410]", "decide must return a clock", "got [1410] of type list"),
    (DECIDE + "np.array([1, 2])", "decide must return a clock", "of type ndarray"),
    (DECIDE + "1 / 0", "decide raised ZeroDivisionError: division by zero", ".py:"),
    (DECIDE + "math.sqrt('a\\nb' * 999)", "decide raised TypeError", ".py:"),
    ("def initial_clock_mhz(self):\n        return 1", "initial_clock_mhz must return a clock"),
    ("def initial_clock_mhz(self):\n        return self.x", "initial_clock_mhz raised Attribute"),
    ("def on_idle(self, state):\n        return 5", "on_idle must return an IdlePlan", "got 5"),
    (
        "def on_idle(self, state):\n        return IdlePlan(after_s=-1.0, clock_mhz=0)",
        "after_s of on_idle's plan must be a time >= 0", "got -1.0",
    ),
    (
        "def on_idle(self, state):\n        return IdlePlan(after_s=1.0, clock_mhz=7)",
        "on_idle's plan must return a clock", "got 7",
    ),
    ("def on_idle(self, state):\n        raise KeyError(3)", "on_idle raised KeyError: 3"),
    ("def steady_iterations(self, s, b, t):\n        return -1", "steady_iterations must"),
    ("def steady_iterations(self, s, b, t):\n        return 2.5", "steady_iterations must"),
    ("def admit_up_to(self, state):\n        return -1", "admit_up_to must return a whole number"),
    ("def admit_up_to(self, state):\n        return x", "admit_up_to raised NameError"),
    ("def hold_s(self, state):\n        return -0.5", "hold_s must return a time >= 0 in s"),
    ("def hold_s(self, state):\n        return None", "hold_s must return a time", "got None"),
    ("def hold_s(self, state):\n        return x", "hold_s raised NameError"),
    ("def steady_iterations(self, s, b, t):\n        return x", "steady_iterations raised NameEr"),
]  # fmt: skip


@pytest.mark.parametrize(
    "wrong", WRONG_CONTROLLERS, ids=[str(i) for i in range(len(WRONG_CONTROLLERS))]
)
def test_a_controller_that_breaks_the_interface(
    profile: Profile,
    write: Write,
    wrong: tuple[str, ...],
) -> None:
    method, *words = wrong
    name = write(CONTROLLER.format(method))
    with pytest.raises(VoltanaError) as caught:
        run(profile, WORK, controller=name)
    text = one_line(caught)
    assert f"controller {name}.Mine (" in text
    for word in words:
        assert word in text


@pytest.mark.parametrize("engine", ["coalesced", "reference"])
def test_numpy_integers_are_clocks_and_positions(
    profile: Profile, write: Write, engine: str
) -> None:
    """As argmin and an array of clocks give them; the results are those of plain integers."""
    of_numpy = write(CONTROLLER.format(DECIDE + "np.int64(1000)"))
    plain = write(CONTROLLER.format(DECIDE + "1000"))
    router = write(ROUTER.format("return np.int64(0), np.argmin([1, 0])"))
    settings = {"num_prefill": 2, "num_decode": 2, "router": router, "engine": engine}
    with pytest.raises(VoltanaError, match=r"got \(np.int64\(0\), np.int64\(1\)\)|got \(0, 1\)"):
        run(profile, WORK, controller=of_numpy, **settings)  # one position is left
    settings["router"] = write(ROUTER.format("return np.int64(0), np.argmin([1] * len(decode))"))
    first, _ = run(profile, WORK, controller=of_numpy, **settings)
    second, _ = run(profile, WORK, controller=plain, **settings)
    assert [i.clock_busy_s for i in first.instances] == [i.clock_busy_s for i in second.instances]
    assert {type(clock) for i in first.instances for clock in i.clock_busy_s} == {int}


WRONG_ROUTERS = [
    ("return -1, -1", "got (-1, -1)"),
    ("return 0, 2", "got (0, 2)"),
    ("return None", "got None"),
    ("return 0", "got 0 of type int"),
    ("return 0, 0, 0", "got (0, 0, 0)"),
    ("return 0.0, 0.0", "got (0.0, 0.0)"),
    ("return '00'", "got '00' of type str"),
    ("return prefill[0], decode[0]", "got (InstanceState("),
    ("return decode[9].instance_id, 0", "route raised IndexError", ".py:"),
    ("raise RuntimeError('no\\nidea')", "route raised RuntimeError: no idea", ".py:"),
]


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("wrong", WRONG_ROUTERS, ids=[str(i) for i in range(len(WRONG_ROUTERS))])
def test_a_router_that_breaks_the_interface(
    profile: Profile,
    write: Write,
    wrong: tuple[str, ...],
    num: int,
) -> None:
    body, *words = wrong
    name = write(ROUTER.format(body))
    with pytest.raises(VoltanaError) as caught:
        run(profile, WORK, router=name, num_prefill=num, num_decode=num)
    text = one_line(caught)
    assert f"router {name}.Mine: " in text
    for word in words:
        assert word in text
    assert ("one healthy instance" in text) == (num > 1)


def test_a_router_that_returns_an_instance_id_is_found_before_the_run(
    profile: Profile,
    write: Write,
) -> None:
    """In a simulation it would always be right."""
    least = "min(states, key=lambda s: s.open_requests)"
    by_id = f"return tuple({least}.instance_id for states in (prefill, decode))"
    name = write(ROUTER.format(by_id))
    run(profile, WORK, router=name)  # one instance a phase: id and position are one
    with pytest.raises(VoltanaError, match=r"not an instance_id \(tried with one healthy inst"):
        run(profile, WORK, router=name, num_prefill=2, num_decode=2)
    by_position = f"return tuple(states.index({least}) for states in (prefill, decode))"
    run(profile, WORK, router=write(ROUTER.format(by_position)), num_prefill=2, num_decode=2)


class LastOf(Router):
    """Keeps count, and returns what it is told."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def route(self, request: RequestView, prefill: States, decode: States) -> tuple[int, int]:
        return self.answer  # type: ignore[return-value]  # deliberately anything


def test_the_range_of_positions_is_that_of_the_sequences() -> None:
    view = RequestView(0, 0.0, 1, None)
    states = [decode_state(index=i) for i in (3, 5, 8)]
    assert route(LastOf((0, 2)), view, states[:1], states) == (0, 2)
    assert route(LastOf([np.int32(0), 1]), view, states[:1], states) == (0, 1)
    for wrong in ((1, 0), (0, 3), (0, 8), (0, -1)):
        with pytest.raises(VoltanaError, match="of prefill in 0 … 0 and of decode in 0 … 2"):
            route(LastOf(wrong), view, states[:1], states)


class Fixed(Controller):
    """The top clock, and a plan for idleness."""

    def decide(self, state: InstanceState) -> int:
        return CLOCKS[-1]

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return IdlePlan(after_s=1, clock_mhz=CLOCKS[0])


def test_right_answers_pass_as_they_are() -> None:
    answers = ControllerAnswers(Fixed(), CLOCKS, "decode 0")
    assert answers.initial_clock_mhz() == 0
    assert answers.decide(decode_state()) == 1400
    assert answers.on_idle(decode_state()) == IdlePlan(after_s=1, clock_mhz=1000)
    assert [answers.steady_iterations(n) for n in (0, 5, np.int64(7))] == [0, 5, 7]


def test_an_error_for_users_passes_as_it_is() -> None:
    class Says(Fixed):
        def decide(self, state: InstanceState) -> int:
            raise VoltanaError("margin must be >= 0, got -1")

    with pytest.raises(VoltanaError, match=r"^margin must be >= 0, got -1$"):
        ControllerAnswers(Says(), CLOCKS, "decode 0").decide(decode_state())


def test_describe_names_the_last_place_in_the_policys_file() -> None:
    """Not the one inside a library, which tells its author nothing."""
    with pytest.raises(re.error) as caught:
        re.compile("(")
    assert re.fullmatch(
        r"error: missing \).* \(.*test_answers\.py:\d+\)", describe(caught.value, __file__)
    )
    assert "test_answers" not in describe(caught.value)
    assert len(describe(ValueError("x" * 10_000))) < MAX_CHARACTERS + 10


IMPORTS = [
    ("import nosuchlib", "ModuleNotFoundError: No module named 'nosuchlib'"),
    ("from voltana.sim.policies import nosuch", "ImportError: cannot import name 'nosuch'"),
    ("def f(:", "SyntaxError: invalid syntax"),
    ("x = 1 / 0", "ZeroDivisionError: division by zero"),
]


@pytest.mark.parametrize(("line", "words"), IMPORTS, ids=[line for line, _ in IMPORTS])
def test_a_module_that_fails_to_import_says_where(write: Write, line: str, words: str) -> None:
    name = write(line + "\n")
    at = HEAD.count("\n") + 1
    for kind, make in (("controller", make_controller), ("router", make_router)):
        with pytest.raises(VoltanaError) as caught:
            make(name, make_context())
        text = one_line(caught)
        assert text.startswith(f"cannot import {kind} {name!r}: {words}")
        assert text.endswith(f"{name}.py:{at})")
        assert name not in sys.modules


NOT_MADE = [
    (
        CONTROLLER.format("").replace("(Controller)", ""),
        "must be a voltana.sim.policies.base.Controller",
    ),
    (CONTROLLER.format("").replace(", context)", ")"), "cannot make controller"),
    (CONTROLLER.format("").replace("def decide", "def decided"), "abstract method decide"),
    (CONTROLLER.format("").replace("=Parameters", "=dict"), "must be a dataclass of numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), NOT_MADE, ids=[words for _, words in NOT_MADE])
def test_a_policy_that_cannot_be_made(write: Write, text: str, words: str) -> None:
    name = write(text)
    with pytest.raises(VoltanaError) as caught:
        make_controller(name, make_context())
    assert words in one_line(caught)
    assert repr(name) in str(caught.value)


def test_a_line_about_a_module_is_whole(write: Write) -> None:
    """What was asked for, what is wrong with it and what to do, for controllers and routers."""
    of = "must be a voltana.sim.policies.base."
    derive = "got a Mine: derive your class from it"
    path = "set PYTHONPATH to its folder"
    known, near = "known are agft, base", "did you mean 'least-requests'?"
    plain = write(CONTROLLER.format("").replace("(Controller)", ""))
    routes = write(ROUTER.format("pass").replace("(Router)", ""))
    lines = [
        (make_controller, plain, f"controller {plain!r} {of}Controller, {derive}"),
        (make_router, routes, f"router {routes!r} {of}Router, {derive}"),
        (make_router, "nosuch.x", f"cannot import router 'nosuch.x': no module 'nosuch'; {path}"),
        (make_controller, "json", f"unknown controller 'json': {known}"),
        (make_controller, "no-module", f"unknown controller 'no-module': {known}"),
        (make_controller, "qqqq", f"unknown controller 'qqqq': {known}"),
        (make_router, "least-request", f"unknown router 'least-request': {near}"),
    ]
    for make, name, start in lines:
        with pytest.raises(VoltanaError) as caught:
            make(name, make_context())
        assert one_line(caught).startswith(start)
        ending = f" (a module of yours: {path})"
        assert str(caught.value).endswith(ending) == (name == "qqqq")


def test_parameters_of_a_kind_that_cannot_be_written(write: Write) -> None:
    text = CONTROLLER.format("").replace(
        "\nclass Mine", "\n@dataclass\nclass Parameters:\n    x: dict = None\n\nclass Mine"
    )
    for value in ("1", "word"):
        with pytest.raises(VoltanaError) as caught:
            check_policies(write(text) + f":x={value}", "random")
        assert "must be a dataclass of numbers, words or lists" in one_line(caught)
        assert "TypeError: a field of type dict" in str(caught.value)
