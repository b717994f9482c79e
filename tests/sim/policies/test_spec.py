"""A policy as one word: what is read from it, what is refused, and how parameters are shown."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.sim.policies.doubles import make_context
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.registry import make_controller, make_router
from voltana.sim.policies.spec import bind_parameters, describe_parameters, parameter, parse_spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Everything:
    """One parameter of each kind."""

    share_frac: float = parameter(0.25, "part of it", low=-0.5, high=1.0)
    levels_mhz: tuple[int, ...] = parameter((), "clocks")
    names: tuple[str, ...] = parameter(("a", "b"), "names in turn")
    f_mhz: int | None = parameter(None, "a clock")
    mode: str = parameter("pack", "how", choices=("pack", "spread"))
    file: str = parameter("", "where it is")
    is_on: bool = parameter(False, "whether")
    rate_tokens_per_s: float = parameter(1.5, "tokens each second")
    gain_per_s: float = parameter(2.0, "a rate")
    tile_requests: int = parameter(128, "requests of a tile", low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """A parameter without a default."""

    f_mhz: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    """Takes none."""


def bound(text: str, kind: type = Everything) -> object:
    return bind_parameters(parse_spec(text), kind)


JOIN = "join list elements with '+', as in frequencies=1005+1410"


def test_a_spec_is_split_at_its_first_colon_and_spaces_are_ignored() -> None:
    spec = parse_spec(" p : f = 3 ,mode=a:b ")
    assert (spec.name, spec.text) == ("p", "p : f = 3 ,mode=a:b")
    assert spec.arguments == {"f": "3", "mode": "a:b"}
    assert parse_spec("p").arguments == parse_spec("p:").arguments == {}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("p", {}),
        ("p:share=-0.5", {"share_frac": -0.5}),
        ("p:share_frac=1", {"share_frac": 1.0}),
        ("p:levels=1005+1410", {"levels_mhz": (1005, 1410)}),
        ("p:names=x", {"names": ("x",)}),
        ("p:f=1005,tile=1", {"f_mhz": 1005, "tile_requests": 1}),
        ("p:f=None", {"f_mhz": None}),
        ("p:mode=spread,file=a/b.toml", {"mode": "spread", "file": "a/b.toml"}),
        ("p:is_on=YES", {"is_on": True}),
        ("p:is_on=1", {"is_on": True}),
        ("p:is_on=0", {"is_on": False}),
        ("p:is_on=no", {"is_on": False}),
        ("p:is_on=False", {"is_on": False}),
        ("p:rate_tokens=2e3", {"rate_tokens_per_s": 2000.0}),
    ],
)
def test_values_become_their_types(text: str, values: dict[str, object]) -> None:
    assert bound(text) == Everything(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            " :f=1",
            "a policy must be name or name:key=value,key=value, got ' :f=1': give its name first",
        ),
        (
            "p:levels=1,2",
            f"a policy argument must be key=value, got '2' (in 'p:levels=1,2'): {JOIN}",
        ),
        (
            "p:f=",
            f"a policy argument must be key=value, got 'f=' (in 'p:f='): {JOIN}",
        ),
        ("p:f=1,f=2", "a policy argument must come once, got 'f' twice (in 'p:f=1,f=2')"),
        (
            "p:f=1,f_mhz=2",
            "a policy argument must come once, got 'f_mhz' twice (in 'p:f=1,f_mhz=2')",
        ),
        ("p:shar=1", "p has no parameter 'shar' (in 'p:shar=1'): did you mean 'share'?"),
        ("p:share=much", "p: share must be a number, got 'much'"),
        ("p:f=1.5", "p: f must be a whole number, got '1.5'"),
        ("p:levels=1+x", "p: levels must be a whole number, got 'x'"),
        ("p:share=nan", "p: share must be finite, got nan"),
        ("p:is_on=perhaps", "p: is_on must be true or false, got 'perhaps'"),
        ("p:mode=pak", "p: mode: unknown choice 'pak': did you mean 'pack'?"),
        ("p:share=-0.51", "p: share must be >= -0.5, got -0.51"),
        ("p:share=1.01", "p: share must be <= 1, got 1.01"),
        ("p:tile=0", "p: tile must be >= 1, got 0"),
    ],
)
def test_mistakes_are_one_line(text: str, message: str) -> None:
    with pytest.raises(VoltanaError) as caught:
        bound(text)
    assert str(caught.value) == message


def test_a_policy_without_parameters_says_so() -> None:
    with pytest.raises(VoltanaError) as caught:
        bound("p:f=1", Nothing)
    assert str(caught.value) == "p has no parameter 'f' (in 'p:f=1'): it takes none"


def test_parameters_as_they_are_listed() -> None:
    shown = [
        (i.key, i.name, i.kind, i.unit, i.default, i.meaning)
        for i in describe_parameters(Everything)
    ]
    assert shown == [
        ("share", "share_frac", "number", "fraction", "0.25", "part of it"),
        ("levels", "levels_mhz", "list of integer", "MHz", "none", "clocks"),
        ("names", "names", "list of word", "list of word", "a+b", "names in turn"),
        ("f", "f_mhz", "integer", "MHz", "none", "a clock"),
        ("mode", "mode", "word", "pack|spread", "pack", "how"),
        ("file", "file", "word", "word", "required", "where it is"),
        ("is_on", "is_on", "true/false", "true/false", "false", "whether"),
        ("rate_tokens", "rate_tokens_per_s", "number", "tokens/s", "1.5", "tokens each second"),
        ("gain", "gain_per_s", "number", "1/s", "2.0", "a rate"),
        ("tile", "tile_requests", "integer", "requests", "128", "requests of a tile"),
    ]
    (needed,) = describe_parameters(Needed)
    assert (needed.key, needed.default, needed.meaning) == ("f", "required", "")


def test_a_module_of_ones_own_that_holds_no_policy() -> None:
    with pytest.raises(VoltanaError) as caught:
        make_controller("tests.sim.policies.doubles", make_context())
    message = str(caught.value)
    assert message.startswith(
        "module 'tests.sim.policies.doubles' holds no controller: it needs CONTROLLER = "
        "Entry(make=…, parameters=…), or name a controller that there is: known are agft, base, "
    )


def test_a_name_that_is_no_module_is_unknown_and_no_more() -> None:
    with pytest.raises(VoltanaError) as caught:
        make_router("eco-root", make_context())
    assert str(caught.value) == "unknown router 'eco-root': did you mean 'ecoroute'?"
