"""The whole report: what was found, and which abilities that makes."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from voltana.experiments.doctor.cards import find_cards, may_lock
from voltana.experiments.doctor.finding import ABSENT, BROKEN, OK, Finding
from voltana.experiments.doctor.fleet import find_fleet
from voltana.experiments.doctor.program import find_program, lacking_of
from voltana.experiments.doctor.services import (
    ACTUATORS,
    ENGINES,
    find_actuators,
    find_engine,
    find_engines,
    find_ports,
    find_zeusd,
)

MARKS: Final = {OK: "+", ABSENT: "-", BROKEN: "!"}
WIDTH: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """Something that people want to do."""

    what: str
    lacks: tuple[str, ...]
    """Nothing, where it can be done here."""


def examine(file: Path | None, engines: Sequence[Path]) -> list[Finding]:
    """Look at everything; nothing is set, started or left behind.

    Args:
        file: A service's file, whose needs are looked at too; None looks at the machine alone.
        engines: Pythons with SGLang, beside those at the usual places.
    """
    found = [*find_program(), *find_cards()]
    found += [find_engine(python) for python in engines] or find_engines(ENGINES)
    if file is None:
        return [*found, *find_actuators(ACTUATORS), find_zeusd(), *find_ports()]
    return [*found, find_zeusd(), *find_fleet(file)]


def abilities(found: Sequence[Finding]) -> list[Ability]:
    """What can be done, and what the rest lacks."""
    works = {item.name for item in found if item.state == OK}
    has_card = any(item.area == "cards" and item.name.startswith("GPU ") and item.state == OK
                   for item in found)  # fmt: skip
    lacks_replay = tuple(lacking_of("replay"))[:1] and ("the extra replay",)
    lacks_card = () if has_card else ("a GPU",)
    lacks_engine = () if "SGLang" in works else ("SGLang",)
    lacks_maker = () if {"SGLang", "torch"} & works else ("SGLang or the extra torch",)
    lacks_setter = (
        () if {"actuator", "zeusd"} & works or (has_card and may_lock())
        else ("an actuator, zeusd or root",)
    )  # fmt: skip
    return [
        Ability(what="simulate, sweep, recommend", lacks=()),
        Ability(what="watch running servers, set nothing (agent)", lacks=lacks_replay),
        Ability(what="serve, clocks left alone (serve)", lacks=lacks_replay),
        Ability(what="replay on real servers", lacks=(*lacks_replay, *lacks_engine)),
        Ability(what="measure energy on cards", lacks=lacks_card),
        Ability(what="measure a profile of a card", lacks=(*lacks_card, *lacks_maker)),
        Ability(what="set clocks (agent --act, serve)",
                lacks=(*lacks_replay, *lacks_card, *lacks_setter)),
    ]  # fmt: skip


def is_well(found: Sequence[Finding]) -> bool:
    """Whether nothing is broken."""
    return all(item.state != BROKEN for item in found)


def as_json(found: Sequence[Finding]) -> str:
    """One object: findings, abilities, verdict."""
    whole: dict[str, Any] = {
        "is_well": is_well(found),
        "abilities": [{"what": a.what, "can": not a.lacks, "lacks": a.lacks}
                      for a in abilities(found)],
        "findings": [asdict(item) for item in found],
    }  # fmt: skip
    return json.dumps(whole, indent=1)


def as_text(found: Sequence[Finding]) -> str:
    """For people: abilities first, then each area, remedies under their findings."""
    lines = ["can do here"]
    for ability in abilities(found):
        without = f": lacks {', '.join(ability.lacks)}" if ability.lacks else ""
        lines.append(f"  {'-' if ability.lacks else '+'} {ability.what}{without}")
    for area in dict.fromkeys(item.area for item in found):
        lines += ["", area]
        for item in found:
            if item.area == area:
                lines += _wrap(f"{item.name}: {item.found}", f"  {MARKS[item.state]} ")
                lines += _wrap(item.remedy, "      -> ") if item.remedy else []
    broken = [item.name for item in found if item.state == BROKEN]
    lines += ["", f"broken: {', '.join(broken)}" if broken else "nothing is broken"]
    return "\n".join(lines)


def _wrap(text: str, head: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
