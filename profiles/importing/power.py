"""Power of one GPU at its top clock, and how time and power move with the clock.

Both come from files of their own, so that a profile says where each of them is from: shipped ones
by name, or any file of the same keys.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from voltana.profiles.common.errors import VoltanaError, nearest
from voltana.profiles.importing.cost import Work
from voltana.profiles.importing.systems import DATA, System
from voltana.profiles.schema import Provenance

POWER_KEYS: Final = (
    "base_w", "w_per_weight_tb_per_s", "w_per_cache_tb_per_s", "w_per_tflop_per_s",
    "idle_top_w", "idle_w",
)  # fmt: skip
POWER_ERROR: Final = 0.25
"""Of a card's power, where its file states none or is of another card; of idle power, too."""
CLOCK_ERRORS: Final = (0.25, 0.4)
"""Of added time and of the exponent, where the file states none: as of a shape taken over."""
CLOCK_KEYS: Final = ("sag", "decode_share", "prefill_share", "phi")


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerModel:
    """W of one GPU at its top clock: base + what it reads + what it computes; idle by clock."""

    name: str
    systems: tuple[str, ...]
    """Cards that it was derived for; on another one it is modelled."""
    base_w: float
    w_per_weight_tb_per_s: float
    w_per_cache_tb_per_s: float
    w_per_tflop_per_s: float
    idle_w: Mapping[float, float]
    """Clock relative to the top one -> W with a model loaded and the clock locked there."""
    provenance: Provenance
    idle_provenance: Provenance
    power_error: float = POWER_ERROR
    """Standard deviation of the power, relative."""
    idle_error: float = POWER_ERROR

    def error(self, system: System) -> float:
        """Relative standard deviation of the power of a card."""
        return self.power_error if system.key in self.systems else POWER_ERROR

    def stated(self, system: System) -> Provenance:
        """Where the power of a card comes from."""
        if system.key in self.systems:
            return self.provenance
        return Provenance(
            status="modelled",
            source=f"{self.provenance.source}; taken over for {system.name}",
            uncertainty="25 %: another card's",
        )

    def loaded_w(self, work: Work, limit_w: float) -> float:
        """Power at the top clock, the power limit aside but for twice it, where no model holds."""
        tera = 1e-12 / work.time_s
        return min(
            self.base_w
            + self.w_per_weight_tb_per_s * work.weight_bytes * tera
            + self.w_per_cache_tb_per_s * work.cache_bytes * tera
            + self.w_per_tflop_per_s * work.flops * tera,
            2.0 * limit_w,
        )

    def idle_at_w(self, relative: float) -> float:
        """Idle power at a clock relative to the top one."""
        return _interpolate(self.idle_w, relative)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockShape:
    """Time and active power against the clock, both relative to the top one.

    With r the relative clock and x = 1/r - 1, a share s of the time at the top clock becomes
    s·(1 + x), the rest (1 - s)·(1 + sag·x²); the power above idle is multiplied by phi(r).
    """

    name: str
    sag: float
    decode_share: Mapping[float, float]
    """Batch size -> share of the time that is bound by the clock."""
    prefill_share: Mapping[float, float]
    """New tokens -> the same of prefill; linear in the logarithm."""
    phi: Mapping[float, float]
    provenance: Provenance
    time_error: float = CLOCK_ERRORS[0]
    """Relative standard deviation of the time that a lower clock adds."""
    power_error: float = CLOCK_ERRORS[1]
    """Standard deviation of an exponent of the relative clock that phi may lack."""

    @property
    def lowest(self) -> float:
        """The lowest relative clock that it is known at."""
        return min(self.phi)

    def phi_at(self, relative: float) -> float:
        """Active power relative to the top clock."""
        return _interpolate(self.phi, relative)

    def time_factor(self, share: float, relative: float) -> float:
        """Time relative to that at the top clock."""
        x = 1.0 / relative - 1.0
        return (1.0 - share) * (1.0 + self.sag * x * x) + share * (1.0 + x)

    def share(self, phase: str, batch: float, tokens: float) -> float:
        """Clock-bound share of an iteration.

        Args:
            phase: "prefill" or "decode".
            batch: Requests.
            tokens: New tokens (prefill) or context tokens (decode) of the batch.
        """
        if phase == "decode":
            return _interpolate(self.decode_share, batch)
        log = {float(np.log(t)): s for t, s in self.prefill_share.items()}
        return _interpolate(log, float(np.log(tokens)))


def load_power(name: str) -> PowerModel:
    """A shipped power model by name, or a file of one.

    Raises:
        VoltanaError: Neither, or a key is missing, unknown or of a wrong kind.
    """
    table, path = _read(name, "power", "--power-from", (*POWER_KEYS, "idle_status", "idle_source"))
    try:
        return PowerModel(
            name=path.stem,
            systems=tuple(table.get("systems", ())),
            base_w=float(table["base_w"]),
            w_per_weight_tb_per_s=float(table["w_per_weight_tb_per_s"]),
            w_per_cache_tb_per_s=float(table["w_per_cache_tb_per_s"]),
            w_per_tflop_per_s=float(table["w_per_tflop_per_s"]),
            idle_w=_points(table["idle_w"]) | {1.0: float(table["idle_top_w"])},
            provenance=_provenance(table),
            idle_provenance=Provenance(status=table["idle_status"], source=table["idle_source"],
                                       uncertainty=table.get("idle_uncertainty", "")),
            power_error=float(table.get("power_error", POWER_ERROR)),
            idle_error=float(table.get("idle_error", POWER_ERROR)),
        )  # fmt: skip
    except (TypeError, ValueError, AttributeError) as error:
        raise VoltanaError(f"cannot use {path}: {error}") from None


def load_clock_shape(name: str) -> ClockShape:
    """A shipped clock shape by name, or a file of one. Raises as `load_power` does."""
    table, path = _read(name, "clocks", "--clock-shape", CLOCK_KEYS)
    try:
        phi = _points(table["phi"])
        if max(phi) != 1.0 or phi[1.0] != 1.0 or min(phi) <= 0.0:
            raise VoltanaError("phi must end with 1 at the relative clock 1")
        return ClockShape(
            name=path.stem,
            sag=float(table["sag"]),
            decode_share=_points(table["decode_share"]),
            prefill_share=_points(table["prefill_share"]),
            phi=phi,
            provenance=_provenance(table),
            time_error=float(table.get("time_error", CLOCK_ERRORS[0])),
            power_error=float(table.get("power_error", CLOCK_ERRORS[1])),
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise VoltanaError(f"cannot use {path}: {error}") from None


def shipped(kind: str) -> list[str]:
    """Names of the shipped files: of "power" or "clocks"."""
    return sorted(path.stem for path in (DATA / kind).glob("*.toml"))


def _read(name: str, kind: str, option: str, keys: tuple[str, ...]) -> tuple[dict[str, Any], Path]:
    path = DATA / kind / f"{name}.toml" if name in shipped(kind) else Path(name)
    if not path.is_file():
        raise VoltanaError(
            f"{option} must be a shipped name or a TOML file, got {name!r}"
            f"{nearest(name, shipped(kind))}"
        )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise VoltanaError(f"cannot read {path}: {error}") from None
    missing = [key for key in (*keys, "status", "source") if key not in table]
    if missing:
        raise VoltanaError(f"{path}: missing key {missing[0]!r}: see the shipped ones in {DATA}")
    return table, path


def _provenance(table: Mapping[str, Any]) -> Provenance:
    return Provenance(
        status=table["status"], source=table["source"], uncertainty=table.get("uncertainty", "")
    )


def _points(table: Mapping[str, float]) -> dict[float, float]:
    return {float(key): float(value) for key, value in table.items()}


def _interpolate(points: Mapping[float, float], at: float) -> float:
    xs = sorted(points)
    return float(np.interp(at, xs, [points[x] for x in xs]))
