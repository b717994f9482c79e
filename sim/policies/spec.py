"""A policy as one word on the command line: `name:key=value,key=value`.

Each policy declares its parameters as a frozen dataclass whose fields end in their unit
(`margin_frac`, `dwell_s`). The command line takes the field's name with or without the unit
(`margin=0.1`, `margin_frac=0.1`). Lists are joined by `+`, since `,` parts the parameters:
`ecofreq:margin=0.0,frequencies=1005+1410`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

from voltana.profiles.common.binding import convert, optional
from voltana.profiles.common.errors import VoltanaError, nearest

T = TypeVar("T")

UNITS: Final = {
    "_frac": "fraction", "_mhz": "MHz", "_s": "s", "_j": "J", "_w": "W", "_tokens": "tokens",
    "_per_s": "1/s", "_mhz_per_s": "MHz/s", "_mhz_s": "MHz·s", "_ratio": "ratio",
    "_c": "°C", "_c_per_w": "°C/W", "_requests": "requests", "_iterations": "iterations",
}  # fmt: skip
"""Units by a field's ending, which the command line lets the user leave out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """A policy's name and the text of its arguments, not yet checked against the policy."""

    name: str
    arguments: Mapping[str, str]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterInfo:
    """One parameter as `voltana list` shows it."""

    key: str
    """Name on the command line, without the unit."""
    name: str
    """Field of the parameter dataclass; its last word is the unit."""
    kind: str
    unit: str
    """Unit for people; the kind or the choices where there is none."""
    default: str
    meaning: str


def parameter(
    default: T,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> T:
    """Declare a policy parameter.

    Args:
        default: Its value if the user gives none.
        meaning: One line for `voltana list`.
        low: Smallest value allowed, in the parameter's unit.
        high: Largest value allowed, in the parameter's unit.
        choices: Words allowed, for a parameter that is a word.
    """
    made: Any = field(
        default=default,
        metadata={"meaning": meaning, "low": low, "high": high, "choices": choices},
    )
    return made  # type: ignore[no-any-return]


def parse_spec(text: str) -> PolicySpec:
    """Split `name:key=value,key=value`.

    Raises:
        VoltanaError: The name is empty, a part is not `key=value`, or a key comes twice.

    Example:
        >>> parse_spec("static:f=1005").arguments
        {'f': '1005'}
    """
    name, _, rest = text.strip().partition(":")
    if not name.strip():
        raise VoltanaError(
            f"a policy must be name or name:key=value,key=value, got {text!r}: give its name first"
        )
    arguments: dict[str, str] = {}
    for part in rest.split(",") if rest.strip() else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise VoltanaError(
                f"a policy argument must be key=value, got {part!r} (in {text!r}): "
                "join list elements with '+', as in frequencies=1005+1410"
            )
        if key in arguments:
            raise VoltanaError(f"a policy argument must come once, got {key!r} twice (in {text!r})")
        arguments[key] = value
    return PolicySpec(name=name.strip(), arguments=arguments, text=text.strip())


def short_key(name: str) -> str:
    """Field name without its unit.

    Example:
        >>> short_key("dwell_s"), short_key("frequencies_mhz"), short_key("tile")
        ('dwell', 'frequencies', 'tile')
    """
    return name.removesuffix(_suffix(name))


def _suffix(name: str) -> str:
    for suffix in sorted(UNITS, key=len, reverse=True):
        if name.endswith(suffix) and len(name) > len(suffix):
            return suffix
    return ""


def bind_parameters(spec: PolicySpec, parameters: type[T]) -> T:
    """Make the policy's parameter dataclass from the text of a spec.

    Raises:
        VoltanaError: A key is unknown, or a value has the wrong type or lies out of range.
    """
    hints = get_type_hints(parameters)
    declared: dict[str, Field[Any]] = {}
    for item in fields(parameters):  # type: ignore[arg-type]
        declared[short_key(item.name)] = declared[item.name] = item
    values: dict[str, object] = {}
    for key, text in spec.arguments.items():
        if key not in declared:
            known = [short_key(item.name) for item in declared.values()]
            raise VoltanaError(
                f"{spec.name} has no parameter {key!r} (in {spec.text!r})"
                + (nearest(key, known) if known else ": it takes none")
            )
        item = declared[key]
        if item.name in values:
            raise VoltanaError(
                f"a policy argument must come once, got {key!r} twice (in {spec.text!r})"
            )
        where = f"{spec.name}: {key}"
        kind = _kind(hints[item.name])  # of another kind is its author's mistake, whatever the text
        parts = text.split("+") if kind.startswith("list") else text
        value = convert(parts, hints[item.name], where, takes_text=True)
        _check_range(value, item, where)
        values[item.name] = value
    return parameters(**values)


def describe_parameters(parameters: type[object]) -> tuple[ParameterInfo, ...]:
    """The parameters that a policy's dataclass declares, in order."""
    hints = get_type_hints(parameters)
    return tuple(
        ParameterInfo(
            key=short_key(item.name),
            name=item.name,
            kind=_kind(hints[item.name]),
            unit=_unit(item, _kind(hints[item.name])),
            default="required" if item.default is MISSING else _show(item.default),
            meaning=str(item.metadata.get("meaning", "")),
        )
        for item in fields(parameters)  # type: ignore[arg-type]
    )


def _unit(item: Field[Any], kind: str) -> str:
    suffix = _suffix(item.name)
    if suffix == "_per_s" and item.name.endswith("_tokens_per_s"):
        return "tokens/s"
    return UNITS.get(suffix) or "|".join(item.metadata.get("choices", ())) or kind


def _show(value: object) -> str:
    if value is None or value == ():
        return "none"
    if value == "":
        return "required"
    if isinstance(value, tuple):
        return "+".join(str(part) for part in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _kind(hint: Any) -> str:  # noqa: ANN401 (a type expression)
    if get_origin(hint) is tuple:
        return f"list of {_kind(get_args(hint)[0])}"
    hint, _ = optional(hint)
    kinds = {int: "integer", float: "number", bool: "true/false", str: "word"}
    if hint not in kinds:
        raise TypeError(f"a field of type {getattr(hint, '__name__', hint)}")
    return kinds[hint]


def _check_range(value: object, item: Field[Any], where: str) -> None:
    low, high = item.metadata.get("low"), item.metadata.get("high")
    choices = item.metadata.get("choices")
    for part in value if isinstance(value, tuple) else (value,):
        if choices and part not in choices:
            raise VoltanaError(f"{where}: unknown choice {part!r}{nearest(str(part), choices)}")
        if not isinstance(part, (int, float)) or isinstance(part, bool):
            continue
        if not math.isfinite(part):
            raise VoltanaError(f"{where} must be finite, got {part}")
        if low is not None and part < low:
            raise VoltanaError(f"{where} must be >= {low:g}, got {part:g}")
        if high is not None and part > high:
            raise VoltanaError(f"{where} must be <= {high:g}, got {part:g}")
