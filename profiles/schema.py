"""`profile.toml`: what was profiled, at which clocks, and where every number comes from."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import tomli_w

from voltana.profiles.common.binding import bind, check_names, table
from voltana.profiles.common.errors import VoltanaError

SCHEMA_VERSION: Final = 1
STATUSES: Final = ("measured", "calibrated", "modelled")
QUANTITIES: Final = (
    "clocks", "prefill_time", "prefill_power", "decode_time", "decode_power", "idle_power",
    "kv_capacity",
)  # fmt: skip
"""Every profile states where these come from; further ones may be added."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMeta:
    """The card."""

    name: str
    power_limit_w: float
    """Per GPU."""
    memory_gib: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMeta:
    """The model on one instance."""

    name: str
    tensor_parallel: int
    """GPUs of one instance. Power in the tables is the sum over them."""
    kv_bytes_per_token: int
    """Whole model, all GPUs of the instance together."""
    max_context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMeta:
    """The serving engine and its limits."""

    name: str
    version: str
    max_prefill_tokens: int
    max_running_requests: int
    kv_capacity_tokens: int
    """KV-cache tokens of one decode instance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClocksMeta:
    """SM clocks a policy may lock, ascending."""

    supported_mhz: tuple[int, ...]
    default_levels_mhz: tuple[int, ...]
    """Short list for controllers that use few levels."""

    def __post_init__(self) -> None:
        clocks = self.supported_mhz
        if not clocks or list(clocks) != sorted(set(clocks)) or clocks[0] <= 0:
            raise VoltanaError(f"clocks.supported_mhz must ascend and be > 0, got {list(clocks)}")
        odd = [c for c in self.default_levels_mhz if c not in clocks]
        if odd or not self.default_levels_mhz:
            raise VoltanaError(
                f"clocks.default_levels_mhz must name supported clocks, got {odd or 'none'}"
            )
        if list(self.default_levels_mhz) != sorted(set(self.default_levels_mhz)):
            raise VoltanaError("clocks.default_levels_mhz must ascend")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadMeta:
    """How iteration times vary: standard deviation over mean, for tables without `spread_s`."""

    prefill: float
    decode: float

    def __post_init__(self) -> None:
        if max(self.prefill, self.decode) >= 1.0:
            raise VoltanaError(
                f"spread.prefill and spread.decode are shares of the time and must be < 1, "
                f"got {self.prefill:g} and {self.decode:g}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PerQuantity:
    """A number for each quantity that is uncertain on its own."""

    prefill_time: float
    decode_time: float
    prefill_clock_time: float
    """Of the time that a lower clock adds."""
    decode_clock_time: float
    prefill_power: float
    decode_power: float
    prefill_clock_power: float
    """Of the exponent of the relative clock that power above idle may be multiplied by."""
    decode_clock_power: float
    idle_power: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorsMeta(PerQuantity):
    """How far the numbers may be off: standard deviations, of which `uncertainty` is the evidence.

    Times and powers relative, at the top clock; see `voltana.profiles.uncertainty`.
    """

    def __post_init__(self) -> None:
        for name in (f.name for f in dataclasses.fields(self)):
            value = getattr(self, name)
            if value >= 1.0:
                raise VoltanaError(f"errors.{name} is a standard deviation < 1, got {value:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a number comes from."""

    status: str
    source: str
    uncertainty: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise VoltanaError(
                f"provenance status must be one of {', '.join(STATUSES)}, got {self.status!r}"
            )
        if not self.source:
            raise VoltanaError("provenance source must not be empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileMeta:
    """Everything in `profile.toml`."""

    gpu: GpuMeta
    model: ModelMeta
    engine: EngineMeta
    clocks: ClocksMeta
    provenance: Mapping[str, Provenance]
    errors: ErrorsMeta | None = None
    """None if nobody has stated them."""
    spread: SpreadMeta | None = None
    """None if the tables have a spread of their own, or if it is not known."""

    def __post_init__(self) -> None:
        stated = (*QUANTITIES, "iteration_spread") if self.spread else QUANTITIES
        missing = [q for q in stated if q not in self.provenance]
        if missing:
            raise VoltanaError(f"provenance must be stated for {', '.join(missing)}")


def read_meta(path: Path) -> ProfileMeta:
    """Read and check `profile.toml`.

    Raises:
        VoltanaError: The file is missing or not TOML, a key is missing, unknown or of the wrong
            type, or a value breaks its rule; the message names file and key.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VoltanaError(f"no {path.name} in {path.parent}: is it a profile directory?") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise VoltanaError(f"cannot read {path}: {error}") from None
    version = data.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise VoltanaError(f"{path}: schema_version must be {SCHEMA_VERSION}, got {version!r}")
    where = str(path)
    known = {f.name for f in dataclasses.fields(ProfileMeta)}
    check_names(data, known, "key", where)
    if missing := sorted(known - {"spread", "errors"} - set(data)):
        raise VoltanaError(f"missing table [{missing[0]}] ({where})")
    told = table(data, "provenance", where)
    try:
        return ProfileMeta(
            gpu=_section(GpuMeta, data, "gpu", where),
            model=_section(ModelMeta, data, "model", where),
            engine=_section(EngineMeta, data, "engine", where),
            clocks=_section(ClocksMeta, data, "clocks", where),
            errors=_section(ErrorsMeta, data, "errors", where) if "errors" in data else None,
            spread=_section(SpreadMeta, data, "spread", where) if "spread" in data else None,
            provenance={key: _section(Provenance, told, key, where) for key in told},
        )
    except VoltanaError as error:
        text = str(error)
        raise VoltanaError(text if where in text else f"{where}: {text}") from None


def meta_toml(meta: ProfileMeta) -> str:
    """The text of `profile.toml`."""
    return tomli_w.dumps({"schema_version": SCHEMA_VERSION, **_plain(dataclasses.asdict(meta))})


def _plain(value: Any) -> Any:  # noqa: ANN401 (any TOML value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    return list(value) if isinstance(value, tuple) else value


def _section(kind: type[T], data: Mapping[str, Any], name: str, where: str) -> T:
    """One table of the file, whose numbers are all above 0."""
    section = table(data, name, where)
    found = bind(kind, section, where, section=f" of [{name}]")
    for key in section:
        value = getattr(found, key)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not number > 0:
                raise VoltanaError(f"{name}.{key} must be > 0, got {number} ({where})")
    return found
