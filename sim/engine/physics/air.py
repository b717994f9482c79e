"""What a configuration's `temperature` says: the card's cooling and its leakage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.policies.spec import bind_parameters, parameter, parse_spec

_NAME: Final = "air"


@dataclass(frozen=True, slots=True, kw_only=True)
class AirParameters:
    """Parameters of `temperature=air`; all values are ours, none is measured on a card."""

    leakage_frac: float = parameter(
        0.004, "how much more power a degree makes, of the table's", low=0.0, high=0.1
    )
    resistance_c_per_w: float = parameter(0.1, "°C that a watt of a card adds in the end", low=0.0)
    time_s: float = parameter(30.0, "time constant of a card with its heat sink", low=1e-3)
    ambient_c: float = parameter(30.0, "temperature of the air that comes in, °C")
    table_c: float = parameter(50.0, "temperature at which the table's power holds, °C")


def air_of(config: SimConfig) -> AirParameters | None:
    """The cooling of a configuration's cards, if it has any.

    Raises:
        VoltanaError: It is none, or stands beside a power limit, whose fit knows no temperature.
    """
    if config.temperature is None:
        return None
    if config.power_cap_w is not None:
        raise VoltanaError(
            "temperature is not for cards under a power limit, got "
            f"temperature={config.temperature} beside power_cap_w={config.power_cap_w}: leave one "
            "out"
        )
    return parse_temperature(config.temperature)


def parse_temperature(text: str) -> AirParameters:
    """What a configuration's `temperature` says.

    Raises:
        VoltanaError: It is not `air`, or a parameter is not one of it.

    Example:
        >>> parse_temperature("air:leakage=0.01").leakage_frac
        0.01
    """
    spec = parse_spec(text)
    if spec.name != _NAME:
        raise VoltanaError(f"temperature must be {_NAME} or {_NAME}:key=value, got {text!r}")
    return bind_parameters(spec, AirParameters)
