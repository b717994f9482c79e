"""What people write becomes typed values, or one line that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from voltana.profiles.common.binding import EXAMPLE, bind, convert, converted, table, tables
from voltana.profiles.common.errors import VoltanaError


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    name: str
    port: int = 80
    wait_s: float | None = 2.0
    mode: Literal["fast", "safe"] | None = None
    folder: Path | None = None
    clocks_mhz: tuple[int, ...] = ()
    cards: Mapping[Literal["a", "b"], tuple[tuple[int, ...], ...]] = field(
        default_factory=dict, metadata={EXAMPLE: "e.g. {a = [[0]]}"}
    )
    is_open: bool = False


def test_each_value_becomes_what_its_field_says() -> None:
    values: dict[str, Any] = {
        "name": "x", "port": 8e1, "wait_s": 3, "mode": "safe", "folder": "/tmp/x",
        "clocks_mhz": [1, np.int64(2)], "cards": {"a": [[0, 1], [2]]}, "is_open": True,
    }  # fmt: skip
    made = bind(Server, values, "a.toml")
    assert made == Server(
        name="x", port=80, wait_s=3.0, mode="safe", folder=Path("/tmp/x"),
        clocks_mhz=(1, 2), cards={"a": ((0, 1), (2,))}, is_open=True,
    )  # fmt: skip
    assert type(made.port) is int
    assert type(made.wait_s) is float
    assert [type(clock) for clock in made.clocks_mhz] == [int, int]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nam": "x"}, "unknown key 'nam' of [s] (a.toml): did you mean 'name'?"),
        ({"port": 1}, "missing key 'name' of [s] (a.toml)"),
        ({"name": 3}, "name must be a text, got 3 (a.toml)"),
        ({"name": "x", "port": "80"}, "port must be a whole number, got '80' (a.toml)"),
        ({"name": "x", "port": True}, "port must be a whole number, got True (a.toml)"),
        ({"name": "x", "port": 1.5}, "port must be a whole number, got 1.5 (a.toml)"),
        ({"name": "x", "port": None}, "port must be a whole number, got None (a.toml)"),
        ({"name": "x", "wait_s": True}, "wait_s must be a number, got True (a.toml)"),
        ({"name": "x", "mode": "slow"}, "mode must be one of fast, safe, got 'slow' (a.toml)"),
        ({"name": "x", "folder": 1}, "folder must be a path, got 1 (a.toml)"),
        ({"name": "x", "clocks_mhz": 5}, "clocks_mhz must be a list, got 5 (a.toml)"),
        ({"name": "x", "clocks_mhz": ["5"]}, "clocks_mhz must be a whole number, got '5' (a.toml)"),
        ({"name": "x", "cards": [0]}, "cards must be e.g. {a = [[0]]}, got [0] (a.toml)"),
        ({"name": "x", "is_open": 1}, "is_open must be true or false, got 1 (a.toml)"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(VoltanaError) as caught:
        bind(Server, values, "a.toml", section=" of [s]")
    assert str(caught.value) == message


def test_text_stands_for_a_value_only_on_a_command_line() -> None:
    texts = {"port": "80", "wait_s": "none", "is_open": "Yes", "name": "null"}
    found = converted(Server, texts, "--set", takes_text=True)
    assert found == {"port": 80, "wait_s": None, "is_open": True, "name": "null"}
    with pytest.raises(VoltanaError, match="is_open must be true or false, got 'perhaps'"):
        convert("perhaps", bool, "is_open", takes_text=True)
    # what Python's int() would take, and nobody means
    with pytest.raises(VoltanaError, match="port must be a whole number, got '1_0'"):
        convert("1_0", int, "port", takes_text=True)


def test_a_field_that_is_given_may_not_be_written() -> None:
    assert bind(Server, {"port": 1}, "", fixed={"name": "y"}).name == "y"
    with pytest.raises(VoltanaError, match="unknown key 'name'"):
        bind(Server, {"name": "x"}, "", fixed={"name": "y"})


def test_a_section_is_a_table() -> None:
    assert table({}, "base", "a.toml") == {}
    with pytest.raises(VoltanaError, match=r"\[base\] must be a table of keys, got 3 \(a.toml\)"):
        table({"base": 3}, "base", "a.toml")
    with pytest.raises(VoltanaError, match=r"\[\[load\]\] must be tables of keys, got \{\}"):
        tables({"load": {}}, "load", "a.toml")
