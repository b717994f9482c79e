"""Sections of the files that people write, each of the kind that it has to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from profiles.errors import VoltanaError, nearest

T = TypeVar("T")
_WORDS = {str: "a text", int: "a whole number", float: "a number"}


def check_names(given: Iterable[str], known: Iterable[str], what: str, where: str) -> None:
    """Raise VoltanaError for the first name that is not known; the nearest is suggested."""
    names = list(known)
    for name in given:
        if name not in names:
            raise VoltanaError(f"unknown {what} {name!r} ({where}){nearest(name, names)}")


def table(data: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """The section [name]; empty if it is not there. Raises VoltanaError if it is no table."""
    found = data.get(name, {})
    if not isinstance(found, dict):
        raise VoltanaError(f"[{name}] must be a table of keys, got {found!r} ({where})")
    return found


def tables(data: Mapping[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    """The sections [[name]], in order. Raises VoltanaError if they are something else."""
    found = data.get(name, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise VoltanaError(f"[[{name}]] must be tables of keys, got {found!r} ({where})")
    return found


def value(options: Mapping[str, Any], key: str, kind: type[T], default: T, where: str) -> T:
    """One value of that kind. Raises VoltanaError if it is of another."""
    return _converted(options.get(key, default), key, kind, where)


def values(
    options: Mapping[str, Any], key: str, kind: type[T], default: Iterable[T], where: str
) -> tuple[T, ...]:
    """A list of that kind. Raises VoltanaError if it is no list, or one of them is of another."""
    found = options.get(key, list(default))
    if not isinstance(found, list):
        raise VoltanaError(f"{key} must be a list, got {found!r} ({where})")
    return tuple(_converted(entry, key, kind, where) for entry in found)


def _converted(found: Any, key: str, kind: type[T], where: str) -> T:  # noqa: ANN401 (TOML)
    if kind is float and type(found) is int:
        found = float(found)
    if type(found) is not kind:
        raise VoltanaError(f"{key} must be {_WORDS[kind]}, got {found!r} ({where})")
    return found
