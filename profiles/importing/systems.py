"""The cards that can be imported, and what of an iteration their kernel tables leave out."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from voltana.profiles.common.errors import VoltanaError, nearest

DATA: Final = Path(__file__).parent / "data"
TAKEN_OVER_ERROR: Final = 0.2
TAKEN_OVER: Final = "about 20 % at the default clock: no measured row is of this kind"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Time of an iteration beside its big kernels, whoever spends it.

    Small kernels and launch gaps go with the layers; scheduling, sampling and detokenising go
    with the requests. Both are fitted to measured gaps between tokens of one engine.
    """

    per_layer_s: float
    per_request_s: float
    status: str
    source: str
    uncertainty: str
    time_error: float
    """Relative standard deviation of decode's times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One card."""

    key: str
    """Its name in the tables, such as h100_sxm."""
    name: str
    devices: tuple[str, ...]
    """Names of the device that its tables may state."""
    memory_bytes: int
    bandwidth_bytes_per_s: float
    power_limit_w: float
    top_mhz: int
    step_mhz: int
    host: str
    """Key of its `Host`."""


def load_system(key: str) -> System:
    """A card by its name in the tables.

    Raises:
        VoltanaError: Not one of `systems.toml`.
    """
    known = _read("systems.toml")
    if key not in known:
        raise VoltanaError(f"unknown system {key!r}{nearest(key, known)}")
    table = dict(known[key])
    return System(key=key, devices=tuple(table.pop("devices")), **table)


def load_host(system: System) -> Host:
    """The time that the tables of a card leave out."""
    table = _read("host.toml")[system.host]
    is_own = system.key in table.pop("systems")
    return Host(
        per_layer_s=table["per_layer_s"],
        per_request_s=table["per_request_s"],
        status="calibrated" if is_own else "modelled",
        source=table["source"] + ("" if is_own else f"; taken over for {system.name}"),
        uncertainty=table["uncertainty"] if is_own else TAKEN_OVER,
        time_error=table["time_error"] if is_own else TAKEN_OVER_ERROR,
    )


@cache
def _text(name: str) -> str:
    return (DATA / name).read_text(encoding="utf-8")


def _read(name: str) -> dict[str, dict[str, Any]]:
    return tomllib.loads(_text(name))
