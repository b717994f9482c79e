"""`voltana list`: what there is to name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sim.policies.registry import Entry

KINDS = ("profiles", "controllers", "routers", "workloads")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("list")(list_names)


def list_names(
    kind: Annotated[str, typer.Argument(help=" or ".join(KINDS), metavar="KIND")],
) -> None:
    """List profiles, controllers, routers or workloads, each with a line of explanation.

    Controllers and routers come with their parameters, defaults and meaning; they are given on the
    command line as name:key=value,key=value, lists joined by +, as in
    ecofreq:margin=0.1,frequencies=1005+1410.
    """
    from profiles.errors import VoltanaError, nearest

    printers = {
        "profiles": _profiles, "controllers": _controllers, "routers": _routers,
        "workloads": _workloads,
    }  # fmt: skip
    if kind not in printers:
        raise VoltanaError(f"nothing called {kind!r} to list{nearest(kind, printers)}")
    for line in printers[kind]():
        typer.echo(line)


def _profiles() -> list[str]:
    from profiles.catalog import list_profiles, load_profile
    from profiles.ecopred import fit_report

    lines = []
    for name in list_profiles():
        profile = load_profile(name)
        meta = profile.meta
        statuses = sorted({p.status for p in meta.provenance.values()})
        lines.append(
            f"{name}: {meta.gpu.name}, {meta.model.name}, TP{meta.model.tensor_parallel}, "
            f"{meta.clocks.supported_mhz[0]}-{meta.clocks.supported_mhz[-1]} MHz, "
            f"{' and '.join(statuses)}"
        )
        for phase, fit in fit_report(profile.fitted).groupby("phase"):
            lines.append(
                f"    EcoPred {phase}, by clock: R2 >= {fit['r2'].min():.3f}, MAE "
                f"{fit['mae_ms'].min():.1f}-{fit['mae_ms'].max():.1f} ms, "
                f"MAPE <= {fit['mape_pct'].max():.1f} %"
            )
    return lines


def _controllers() -> list[str]:
    from sim.policies.registry import CONTROLLERS

    return [line for name, entry in CONTROLLERS.items() for line in _policy(name, entry)]


def _routers() -> list[str]:
    from sim.policies.registry import ROUTERS

    return [line for name, entry in ROUTERS.items() for line in _policy(name, entry)]


def _policy(name: str, entry: Entry[Any]) -> list[str]:
    lines = [f"{name}: {entry.rule}"]
    lines += [
        f"    {info.key}={info.default}  {info.meaning} ({info.kind})"
        for info in entry.parameter_infos
    ]
    return lines


def _workloads() -> list[str]:
    from sim.workload.generate import list_workloads

    return [f"{name}: {text}" for name, text in list_workloads().items()]
