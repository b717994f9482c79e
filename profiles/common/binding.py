"""What people write in files and on the command line, made into the typed values of the program.

Types come from a dataclass's own annotations; msgspec converts. A mistake is one line: the key, the
rule, the value, the place, and of a wrong name the nearest right one.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import numpy as np

from voltana.profiles.common.errors import VoltanaError, nearest

T = TypeVar("T")
EXAMPLE: Final = "example"
"""Field metadata: how a value of a compound type is written, e.g. "e.g. [3, 512]"."""
_WORDS: Final = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path",
}  # fmt: skip
_TRUTH: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def bind(
    kind: type[T],
    values: Mapping[str, Any],
    where: str,
    *,
    section: str = "",
    fixed: Mapping[str, Any] | None = None,
) -> T:
    """Make a dataclass from plain values.

    Args:
        kind: The dataclass.
        values: By field name, as TOML or JSON has them.
        where: The file or option that they come from, for errors.
        section: The table within the file, for errors, e.g. " of [router]".
        fixed: Fields that are given here, and that `values` may not have.

    Raises:
        VoltanaError: A key is unknown or missing, or a value is of the wrong type.
    """
    given = dict(fixed or {})
    made = converted(kind, values, where, section=section, without=given)
    for item in fields(kind):  # type: ignore[arg-type]
        is_optional = item.default is not MISSING or item.default_factory is not MISSING
        if item.name not in made and item.name not in given and not is_optional:
            raise VoltanaError(f"missing key {item.name!r}{section}{_place(where)}")
    return kind(**given, **made)


def converted(
    kind: type[Any],
    values: Mapping[str, Any],
    where: str,
    *,
    section: str = "",
    without: Iterable[str] = (),
    takes_text: bool = False,
) -> dict[str, Any]:
    """The values, each of the type that the dataclass `kind` declares for its key.

    Args:
        kind: The dataclass.
        values: By field name.
        where: The file or option that they come from, for errors.
        section: The table within the file, for errors.
        without: Fields that `values` may not have.
        takes_text: Whether "30" may stand for 30, as on a command line.

    Raises:
        VoltanaError: A key is unknown, or a value is of the wrong type.
    """
    taken = set(without)
    declared = {f.name: f for f in fields(kind) if f.name not in taken}
    check_names(values, declared, "key", where, section)
    hints = get_type_hints(kind)
    return {
        key: convert(
            value, hints[key], key, where,
            example=declared[key].metadata.get(EXAMPLE, ""), takes_text=takes_text,
        )
        for key, value in values.items()
    }  # fmt: skip


def convert(
    value: Any,  # noqa: ANN401 (whatever was written)
    hint: Any,  # noqa: ANN401 (a type expression)
    key: str,
    where: str = "",
    *,
    example: str = "",
    takes_text: bool = False,
) -> Any:  # noqa: ANN401 (of the type that `hint` names)
    """One value as the type `hint`; a whole number may be written 3.0, and none may be left out.

    Args:
        value: As it was written.
        hint: A scalar type, a literal, a list of these as `tuple[…, ...]`, or any of them or None.
        key: Its name, for errors.
        where: The file or option that it comes from, for errors.
        example: How it is written, for errors, where the type alone would not tell.
        takes_text: Whether "30" may stand for 30.

    Raises:
        VoltanaError: It is of another type.
    """
    inner, is_optional = optional(hint)
    is_none = value is None or (takes_text and str(value).lower() == "none")
    if is_optional and is_none:
        return None
    if get_args(inner)[1:] == (...,) and not example:
        if not isinstance(value, list | tuple):
            raise VoltanaError(f"{key} must be a list, got {value!r}{_place(where)}")
        one = get_args(inner)[0]
        return tuple(convert(v, one, key, where, takes_text=takes_text) for v in value)
    try:
        return _plain(value, inner, takes_text)
    except (msgspec.ValidationError, KeyError):
        rule = example or _rule(inner)
        raise VoltanaError(f"{key} must be {rule}, got {value!r}{_place(where)}") from None


def optional(hint: Any) -> tuple[Any, bool]:  # noqa: ANN401 (a type expression)
    """A type without its None, and whether it had one."""
    if get_origin(hint) not in (types.UnionType, Union):
        return hint, False
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return kinds[0], len(kinds) < len(get_args(hint))


def choices(hint: Any) -> tuple[str, ...]:  # noqa: ANN401 (a type expression)
    """The words that a literal type, or one of these or None, allows; empty for other types."""
    inner, _ = optional(hint)
    return get_args(inner) if get_origin(inner) is Literal else ()


def _plain(value: Any, hint: Any, takes_text: bool) -> Any:  # noqa: ANN401 (msgspec's own)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and hint is int and value.is_integer():
        value = int(value)
    if isinstance(value, str) and takes_text and hint is bool:
        return _TRUTH[value.lower()]
    is_text = isinstance(value, str) and takes_text
    return msgspec.convert(value, hint, strict=not is_text, dec_hook=_path)


def _path(kind: type[Any], value: Any) -> Any:  # noqa: ANN401 (msgspec's own)
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError  # msgspec makes it a ValidationError


def _rule(hint: Any) -> str:  # noqa: ANN401 (a type expression)
    words = choices(hint)
    return f"one of {', '.join(words)}" if words else _WORDS.get(hint, str(hint))


def _place(where: str) -> str:
    return f" ({where})" if where else ""


def check_names(
    given: Iterable[str], known: Iterable[str], what: str, where: str, section: str = ""
) -> None:
    """Refuse the first name that is not known, and suggest the nearest.

    Args:
        given: Names as they were written.
        known: Names that there are.
        what: What they name: key, section, policy.
        where: The file or option that they come from.
        section: The table within the file.

    Raises:
        VoltanaError: A name is not known.
    """
    names = list(known)
    for name in given:
        if name not in names:
            raise VoltanaError(
                f"unknown {what} {name!r}{section}{_place(where)}{nearest(name, names)}"
            )


def table(data: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """The section [name] of a file; empty if it is not there.

    Args:
        data: The file.
        name: The section's.
        where: The file's name, for errors.

    Raises:
        VoltanaError: It is no table.
    """
    found = data.get(name, {})
    if not isinstance(found, dict):
        raise VoltanaError(f"[{name}] must be a table of keys, got {found!r} ({where})")
    return found


def tables(data: Mapping[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    """The sections [[name]] of a file, in order; empty if there are none.

    Args:
        data: The file.
        name: The sections'.
        where: The file's name, for errors.

    Raises:
        VoltanaError: They are something else.
    """
    found = data.get(name, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise VoltanaError(f"[[{name}]] must be tables of keys, got {found!r} ({where})")
    return found


def value(options: Mapping[str, Any], key: str, kind: type[T], default: T, where: str) -> T:
    """One value of a section.

    Args:
        options: The section.
        key: The value's name.
        kind: Its type.
        default: What it is where the section does not have it.
        where: The file's name, for errors.

    Raises:
        VoltanaError: It is of another type.
    """
    found: T = convert(options.get(key, default), kind, key, where)
    return found


def values(
    options: Mapping[str, Any], key: str, kind: type[T], default: Iterable[T], where: str
) -> tuple[T, ...]:
    """A list of a section; the arguments are those of `value`.

    Args:
        options: The section.
        key: The list's name.
        kind: The type of each entry.
        default: What it is where the section does not have it.
        where: The file's name, for errors.

    Raises:
        VoltanaError: It is no list, or an entry is of another type.
    """
    hint: Any = tuple[kind, ...]  # type: ignore[valid-type]
    found: tuple[T, ...] = convert(options.get(key, list(default)), hint, key, where)
    return found
