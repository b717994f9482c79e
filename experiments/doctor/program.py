"""The program itself: Python, extras, the compiled inner loop, a C compiler."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

from voltana.experiments.doctor.finding import ABSENT, BROKEN, OK, Finding
from voltana.sim.engine import agenda

AREA: Final = "program"
EXTRAS: Final = {
    "replay": "router, agent, serve and replay",
    "report": "voltana report",
    "torch": "voltana profile with the built-in PyTorch decoder",
    "rl": "learning routers with standard libraries",
    "ray": "sweeps over several machines",
    "tables": "new profiles from a data base of kernels",
}
"""Those that give an ability, and which."""


def find_program() -> list[Finding]:
    """All of it."""
    return [_python(), _machine(), *map(_extra, EXTRAS), _compiled(), _compiler()]


def _python() -> Finding:
    version = platform.python_version()
    return Finding(
        area=AREA,
        name="voltana",
        state=OK,
        found=f"{importlib.metadata.version('voltana')} on Python {version}, {sys.executable}",
    )


def _machine() -> Finding:
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    cores = len(os.sched_getaffinity(0))
    return Finding(
        area=AREA,
        name="machine",
        state=OK,
        found=f"{platform.system()} {platform.release()}, {cores} cores, {memory_gib:.0f} GiB",
    )


def _extra(name: str) -> Finding:
    lacking = lacking_of(name)
    if not lacking:
        return Finding(area=AREA, name=name, state=OK, found=f"installed: {EXTRAS[name]}")
    return Finding(
        area=AREA,
        name=name,
        state=ABSENT,
        found=f"lacks {', '.join(lacking)}",
        remedy=f"for {EXTRAS[name]}: pip install 'voltana[{name}]'",
    )


def lacking_of(extra: str) -> list[str]:
    """What of an extra is not installed, or of another version than it must be."""
    lacking = []
    for line in importlib.metadata.requires("voltana") or ():
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            continue  # of every installation
        if not need.marker.evaluate({"extra": extra}):
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(need.name)
            continue
        if not need.specifier.contains(version, prereleases=True):
            lacking.append(f"{need.name}{need.specifier} (has {version})")
    return lacking


def _compiled() -> Finding:
    file = Path(agenda.__file__)
    if file.suffix == ".py":
        return Finding(
            area=AREA,
            name="compiled loop",
            state=ABSENT,
            found="the simulator runs interpreted, with the same results",
            remedy="for a faster one: make fast, in a checkout",
        )
    return Finding(area=AREA, name="compiled loop", state=OK, found=file.name)


def _compiler() -> Finding:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is not None:
        return Finding(area=AREA, name="C compiler", state=OK, found=compiler)
    asked = os.environ.get("CC")
    return Finding(
        area=AREA,
        name="C compiler",
        state=ABSENT if asked is None else BROKEN,
        found="none" if asked is None else f"CC is {asked!r}, which is not there",
        remedy="for emulated cards: install gcc",
    )
