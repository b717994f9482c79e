"""Policies with one knob each: from safe to cheap, so that they can meet at equal attainment.

A contender is written `controller + router`, each as on the command line. One place in it may hold
a range `{safe..cheap}`, and `{}` elsewhere takes the same value:

    ecofreq:margin={-0.4..0.4} + ecoroute
    ecomin:headroom={0.5..0} + slo-pack:headroom={}

Without the knob, at its default, it is a policy too: the one that a user gets. Without a range the
controller's own knob is taken (`KNOBS`); one that has none is told promises
that are tighter or looser than the true ones (configuration key `aim_ratio`); fixed clocks have
nothing to turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.policies.registry import check_policies
from voltana.sim.policies.spec import parse_spec

KNOBS: Final[Mapping[str, tuple[str, float, float]]] = {
    "ecofreq": ("margin", -0.5, 0.5),
    "ecomin": ("headroom", 0.6, -0.6),
    "pid": ("target", 0.3, 1.0),
    "miad": ("danger", 0.4, 1.2),
    "greenllm": ("slack", 0.3, 1.0),
    "powercap": ("draw", 1.0, 0.3),
}
"""Parameter, safe end and cheap end, by controller. The ranges are ours."""
AIM: Final = ("aim_ratio", 0.4, 1.6)
"""Of every other controller."""
WITHOUT: Final = ("static", "boost")
"""Controllers that look at no promise."""
_RANGE: Final = re.compile(r"\{(-?[\d.]+)\.\.(-?[\d.]+)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A policy whose settings are known once its knob is."""

    controller: str
    """As it is called in tables: its given name, or its text without what the knob sets."""
    router: str
    """The router's name in tables; static pairs are run under it too, to be compared."""
    plain: Mapping[str, str]
    """Configuration keys with the knob at its default."""
    settings: Mapping[str, str]
    """Configuration keys; `{}` stands for the knob's value."""
    knob: str
    """What is turned, for the reader; empty if nothing is."""
    safe: float
    cheap: float

    def at(self, position: float) -> dict[str, Any]:
        """Configuration keys with the knob that far (0: safe, 1: cheap)."""
        return {k: v.replace("{}", self.value_text(position)) for k, v in self.settings.items()}

    def value_text(self, position: float) -> str:
        """The knob's value as it is written into the settings."""
        return f"{self.safe + position * (self.cheap - self.safe):.4f}"


def parse_contender(text: str, extra: Mapping[str, Any] | None = None) -> Contender:
    """Read `controller + router`, with further configuration keys in `extra` (`name`, …).

    Raises:
        VoltanaError: It is not of that form, has two ranges, or names an unknown key or policy.
    """
    parts = [part.strip() for part in text.split(" + ")]
    if len(parts) != 2 or not all(parts):
        raise VoltanaError(f"a contender is written 'controller + router', got {text!r}")
    settings = {"controller": parts[0], "router": parts[1]}
    further = dict(extra or {})
    name = str(further.pop("name", ""))
    settings |= {key: str(value) for key, value in further.items()}
    found = [m for value in settings.values() for m in _RANGE.finditer(value)]
    if len(found) > 1:
        raise VoltanaError(f"a contender has one range {{safe..cheap}}, got two (in {text!r})")
    if found:
        safe, cheap = float(found[0][1]), float(found[0][2])
        knob = next(_knob_name(k, v) for k, v in settings.items() if _RANGE.search(v))
        settings = {k: _RANGE.sub("{}", v) for k, v in settings.items()}
    else:
        settings, (knob, safe, cheap) = _with_own_knob(settings)
    plain = _without_knob(settings)
    made = Contender(
        controller=name or plain["controller"], router=plain["router"], plain=plain,
        settings=settings, knob=knob, safe=safe, cheap=cheap,
    )  # fmt: skip
    for values in (made.at(0.0), made.at(1.0), plain):
        config = make_config(values, where=f"contender {text!r}")
        for controller in (config.prefill_controller_spec, config.decode_controller_spec):
            check_policies(controller, config.router)
    return made


def _with_own_knob(settings: dict[str, str]) -> tuple[dict[str, str], tuple[str, float, float]]:
    spec = parse_spec(settings["controller"])
    own = {settings.get(f"{phase}_controller", "") for phase in ("prefill", "decode")}
    names = {parse_spec(text).name for text in own if text} or {spec.name}
    if names <= set(WITHOUT):
        return settings, ("", 0.0, 0.0)
    if names == {spec.name} and spec.name in KNOBS and own == {""}:
        parameter, safe, cheap = KNOBS[spec.name]
        if parameter not in spec.arguments:
            joint = "," if spec.arguments else ":"
            controller = f"{settings['controller']}{joint}{parameter}={{}}"
            return settings | {"controller": controller}, (parameter, safe, cheap)
    return settings | {"aim_ratio": "{}"}, AIM


def _knob_name(key: str, value: str) -> str:
    before = value[: value.index("{")].rstrip("=")
    return re.split(r"[:,]", before)[-1] or key


def _without_knob(settings: Mapping[str, str]) -> dict[str, str]:
    """The settings without what the knob sets: a parameter of a policy, or a whole key."""
    plain = {}
    for key, text in settings.items():
        if text == "{}":
            continue
        if "{}" in text:
            spec = parse_spec(text)
            kept = ",".join(f"{k}={v}" for k, v in spec.arguments.items() if v != "{}")
            text = f"{spec.name}:{kept}" if kept else spec.name
        plain[key] = text
    return plain
