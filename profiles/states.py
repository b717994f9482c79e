"""`states.toml`: what an instance draws when it is out of service, and how long it takes to return.

Beside the tables of a profile, each state with its own provenance:

- *parked*: all is loaded, the clock is locked at the lowest.
- *asleep*: the process lives, its weights are in the host's memory; KV cache and CUDA context are
  gone.
- *stopped*: no process; weights come from disk and the engine starts anew.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

import tomli_w

from voltana.profiles.common.binding import bind, check_names, table
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.schema import Provenance

STATES_FILE: Final = "states.toml"
LowState: TypeAlias = Literal["parked", "asleep", "stopped"]
LOW_STATES: Final[tuple[LowState, ...]] = ("parked", "asleep", "stopped")
"""From the lightest sleep to the deepest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateMeta:
    """One state: power of the whole instance, times of the ways in and out, where they are from."""

    power_w: float
    enter_s: float
    """From service, all work done, into the state."""
    wake_s: float
    """From the wish to wake to the first request that may come."""
    change_w: float
    """Power on both ways."""
    status: str
    """As of a provenance: measured, calibrated or modelled."""
    source: str

    def __post_init__(self) -> None:
        for name in ("power_w", "enter_s", "wake_s", "change_w"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise VoltanaError(f"{name} of a state must be >= 0 and finite, got {value}")
        Provenance(status=self.status, source=self.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerStates:
    """The states of one profile."""

    parked: StateMeta
    asleep: StateMeta
    stopped: StateMeta

    def of(self, name: LowState) -> StateMeta:
        """The state of that name."""
        found: StateMeta = getattr(self, name)
        return found


def read_states(path: Path) -> PowerStates | None:
    """Read a `states.toml`; None if there is none.

    Raises:
        VoltanaError: It cannot be read, a state or key is missing or unknown, or a value breaks
            its rule; the message names file and key.
    """
    if not path.is_file():
        return None
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise VoltanaError(f"cannot read {path}: {error}") from None
    check_names(data, set(LOW_STATES), "state", str(path))
    return PowerStates(**{name: _state(data, name, path) for name in LOW_STATES})


def _state(data: dict[str, object], name: LowState, path: Path) -> StateMeta:
    return bind(StateMeta, table(data, name, str(path)), str(path), section=f" of [{name}]")


def states_toml(states: PowerStates) -> str:
    """The text of `states.toml`."""
    return tomli_w.dumps(dataclasses.asdict(states))
