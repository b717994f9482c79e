"""`voltana list`: what there is to name."""

from __future__ import annotations

import re
import shutil
import textwrap
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from voltana.sim.policies.registry import Entry

_LABEL = re.compile(r"[A-Z][A-Za-z]*(, [a-z ]+)?: ")
KINDS = ("profiles", "controllers", "routers", "scalers", "workloads")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("list", short_help="Profiles, controllers, routers, scalers, workloads")(list_names)


def list_names(
    kind: Annotated[
        str | None,
        typer.Argument(help=" or ".join(KINDS) + "; all by name", metavar="KIND"),
    ] = None,
    name: Annotated[
        str | None,
        typer.Argument(
            help="One controller, router or scaler with its whole rule, one profile or its folder."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Profiles as JSON")] = False,
) -> None:
    """List profiles, controllers, routers, scalers or workloads, each with a line of explanation.

    Without KIND the names of all. Of a profile, what of it is measured, calibrated, modelled
    or emulated, and how well the predictor that policies believe fits its tables.

    Controllers, routers and scalers come with their parameters (default, unit, meaning) and their
    source; with NAME one of them with its whole rule. They are given on the command line as
    name:key=value,key=value, lists joined by +, as in ecofreq:margin=0.1,frequencies=1005+1410.
    """
    from voltana.profiles.common.errors import VoltanaError, nearest

    if json and kind != "profiles":
        raise VoltanaError(f"--json is for profiles, got {kind!r}: leave it out")
    printers: dict[str, Callable[[str, str | None], list[str]]] = {
        "profiles": partial(_profiles, as_json=json),
        "controllers": _policies,
        "routers": _policies,
        "scalers": _policies,
        "workloads": _workloads,
    }
    if kind is None:
        for found, names in _names().items():
            typer.echo(f"{found}: {', '.join(names)}")
        return
    if kind not in printers:
        raise VoltanaError(f"nothing called {kind!r} to list{nearest(kind, printers)}")
    if name is not None and kind == "workloads":
        raise VoltanaError(f"{kind} are listed all at once, got {name!r}: leave it out")
    for line in printers[kind](kind, name):
        typer.echo(line)


def _names() -> dict[str, list[str]]:
    from voltana.profiles.catalog import list_profiles
    from voltana.sim.policies.registry import CONTROLLERS, ROUTERS, SCALERS
    from voltana.sim.workload.generate import list_workloads

    found = (list_profiles(), CONTROLLERS, ROUTERS, SCALERS, list_workloads())
    return {kind: list(names) for kind, names in zip(KINDS, found, strict=True)}


def _profiles(kind: str, name: str | None, *, as_json: bool) -> list[str]:
    from voltana.experiments.profile_columns import profiles_json, profiles_text
    from voltana.profiles.catalog import list_profiles

    names = list_profiles() if name is None else [name]
    return [profiles_json(names) if as_json else profiles_text(names)]


def _policies(kind: str, name: str | None) -> list[str]:
    from voltana.profiles.common.errors import VoltanaError, nearest
    from voltana.sim.policies.registry import CONTROLLERS, ROUTERS, SCALERS

    known: dict[str, Mapping[str, Entry[Any]]] = {
        "controllers": CONTROLLERS, "routers": ROUTERS, "scalers": SCALERS,
    }  # fmt: skip
    entries = known[kind]
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
    if name is None:
        lines = [line for key, entry in entries.items()
                 for line in ("", *_policy(key, entry, width, whole=False))]  # fmt: skip
        return lines[1:]
    if name not in entries:
        raise VoltanaError(f"no {kind[:-1]} called {name!r}{nearest(name, entries)}")
    return _policy(name, entries[name], width, whole=True)


def _policy(name: str, entry: Entry[Any], width: int, *, whole: bool) -> list[str]:
    from voltana.sim.policies.registry import CONSTANTS

    lines = _wrap(f"{name}: {entry.rule}", "", width)
    if whole:
        lines += _paragraphs(entry.description, width)
    infos = entry.parameter_infos
    keys = max((len(info.key) + len(info.default) + 1 for info in infos), default=0)
    units = max((len(info.unit) for info in infos), default=0)
    for info in infos:
        cell = f"    {info.key}={info.default}".ljust(keys + 6) + info.unit.ljust(units + 2)
        lines += _wrap(info.meaning, cell, width)
    if entry.constants in ("partly", "invented"):
        lines += _wrap(f"constants: {CONSTANTS[entry.constants]}", "    ", width)
    return [*lines, *_wrap(f"source: {entry.source}", "    ", width)]


def _paragraphs(description: str, width: int) -> list[str]:
    """A docstring but for its first line, which the list shows anyway, filled to the width.

    A line that begins with a label ("Decode: ") begins a new paragraph.
    """
    lines: list[str] = []
    text = ""
    for line in [*description.splitlines()[1:], ""]:
        if text and (not line.strip() or _LABEL.match(line)):
            lines += _wrap(text, "    ", width)
            text = ""
        text = f"{text} {line.strip()}".strip()
    return lines


def _wrap(text: str, head: str, width: int) -> list[str]:
    """`text` after `head`, further lines under its beginning (4 columns in at least)."""
    below = " " * max(len(head), 4)
    return textwrap.wrap(
        text, width, initial_indent=head, subsequent_indent=below, break_on_hyphens=False
    )


def _workloads(kind: str, name: str | None) -> list[str]:
    from voltana.sim.workload.generate import list_workloads

    return [f"{found}: {text}" for found, text in list_workloads().items()]
