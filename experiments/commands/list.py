"""`voltana list`: what there is to name."""

from __future__ import annotations

import re
import shutil
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from voltana.experiments.options import AsJson, that_begin

if TYPE_CHECKING:
    from collections.abc import Mapping

    from voltana.sim.policies.registry import Entry

_LABEL = re.compile(r"[A-Z][A-Za-z]*(, [a-z ]+)?: ")
KINDS = ("profiles", "controllers", "routers", "scalers", "workloads", "traces")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("list", short_help="Profiles, policies, workloads, traces")(list_names)


def _complete_kind(incomplete: str) -> list[str]:
    return that_begin(incomplete, KINDS)


def list_names(
    kind: Annotated[
        str | None,
        typer.Argument(
            help=" or ".join(KINDS) + "; all by name",
            metavar="KIND",
            autocompletion=_complete_kind,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Argument(
            help="One controller, router or scaler with its whole rule, or the module of your own; "
            "one profile or its folder."
        ),
    ] = None,
    json: AsJson = False,
) -> None:
    """List profiles, controllers, routers, scalers, workloads or traces, with a line on each.

    Without KIND the names of all. Of a profile, what of it is measured, calibrated, modelled or
    emulated, and how well the predictor that policies believe fits its tables. Of a published
    trace, its licence and source, and whether its file is here.

    Controllers, routers and scalers come with their parameters (default, unit, meaning) and their
    source; with NAME one of them with its whole rule. They are given on the command line as
    name:key=value,key=value, lists joined by +, as in ecofreq:margin=0.1,frequencies=1005+1410.
    """
    from voltana.experiments.show import print_result
    from voltana.profiles.common.errors import VoltanaError, nearest

    if kind is None:
        named = _names()
        lines = (f"{found}: {', '.join(names)}" for found, names in named.items())
        print_result(named, *lines, as_json=json)
        return
    if kind not in KINDS:
        raise VoltanaError(f"nothing called {kind!r} to list{nearest(kind, KINDS)}")
    if name is not None and kind in ("workloads", "traces"):
        raise VoltanaError(f"{kind} are listed all at once, got {name!r}: leave it out")
    if kind == "profiles":
        _print_profiles(name, as_json=json)
    elif kind in ("workloads", "traces"):
        told = _workloads() if kind == "workloads" else _traces()
        print_result(told, *(f"{found}: {text}" for found, text in told.items()), as_json=json)
    else:
        _print_policies(kind, name, as_json=json)


def _names() -> dict[str, list[str]]:
    from voltana.profiles.catalog import list_profiles
    from voltana.sim.policies.registry import CONTROLLERS, ROUTERS, SCALERS
    from voltana.sim.workload.fetch import named_traces
    from voltana.sim.workload.generate import list_workloads

    found = (list_profiles(), CONTROLLERS, ROUTERS, SCALERS, list_workloads(), named_traces())
    return {kind: list(names) for kind, names in zip(KINDS, found, strict=True)}


def _print_profiles(name: str | None, *, as_json: bool) -> None:
    from voltana.experiments.profile_columns import profiles_json, profiles_text
    from voltana.profiles.catalog import list_profiles

    names = list_profiles() if name is None else [name]
    typer.echo(profiles_json(names) if as_json else profiles_text(names))


def _workloads() -> dict[str, str]:
    from voltana.sim.workload.generate import list_workloads

    return list_workloads()


def _traces() -> dict[str, str]:
    from voltana.sim.workload.fetch import TRACES, is_here

    return {
        name: f"{trace.citation}; {trace.licence}; "
        + ("here" if is_here(name) else f"fetched at first use from {trace.url}")
        for name, trace in sorted(TRACES.items())
    }


def _print_policies(kind: str, name: str | None, *, as_json: bool) -> None:
    from voltana.experiments.show import print_result
    from voltana.sim.policies.registry import CONTROLLERS, ROUTERS, SCALERS, find_entry
    from voltana.sim.policies.spec import parse_spec

    known: dict[str, Mapping[str, Entry[Any]]] = {
        "controllers": CONTROLLERS, "routers": ROUTERS, "scalers": SCALERS,
    }  # fmt: skip
    entries = known[kind]
    if name is not None:
        name = parse_spec(name).name
        entries = {name: find_entry(name, kind.removesuffix("s"))}
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
    lines = [line for key, entry in entries.items()
             for line in ("", *_policy(key, entry, width, whole=name is not None))]  # fmt: skip
    told = {key: _policy_dict(entry) for key, entry in entries.items()}
    print_result(told, *lines[1:], as_json=as_json)


def _policy_dict(entry: Entry[Any]) -> dict[str, Any]:
    return {
        "rule": entry.rule,
        "description": entry.description,
        "constants": entry.constants,
        "source": entry.source,
        "parameters": [asdict(info) for info in entry.parameter_infos],
    }


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
    source = entry.source or "yours, as its docstring names no source"
    return [*lines, *_wrap(f"source: {source}", "    ", width)]


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
