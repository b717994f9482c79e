"""What `voltana serve` is told: `[simulate]`, `[fleet]`, `[router]` and `[serve]` of one file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from voltana.hwreplay.agent.guard import FLOOR, RESUME, GuardLimits
from voltana.hwreplay.replay.config import ReplayConfig, make_fleet_config
from voltana.hwreplay.view.reload import check_sim_reload, refusal, refuse_changes
from voltana.profiles.common.binding import bind, check_names, table
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import read_toml

SECTION: Final = "serve"
FLEET_KEYS: Final = ("actuator", "gpus", "power_w", "emulate")
"""Of [serve]: what a replay's [replay] calls so too."""
DEFAULT_PORT: Final = 8000
DRAIN_S: Final = 30.0
"""Of a service, unless [router] drain_s says else: longer than the router's own default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """One service."""

    fleet: ReplayConfig
    """Servers, policies, router, cards and actuator, as a replay has them."""
    token_file: Path | None = None
    """File with the bearer token that every request but the health check must carry."""
    guard_floor: float = FLOOR
    """An agent gives its clock back below this share of kept samples in the last minute."""
    guard_resume: float = RESUME
    """And takes it again at this share."""
    dcgm: str | None = None
    """Page of a DCGM exporter that counts the energy of `gpus`, e.g. http://127.0.0.1:9400/metrics;
    without it NVML does."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level of the lines in the log; requests and the course of things are info."""

    def __post_init__(self) -> None:
        GuardLimits(floor=self.guard_floor, resume=self.guard_resume)  # refuses what contradicts
        if self.dcgm is not None and not self.fleet.gpus:
            raise VoltanaError(
                f"[{SECTION}] dcgm must have gpus whose energy it counts: name them, e.g. gpus = "
                "{prefill = [[0]], decode = [[1]]}"
            )

    @property
    def guard(self) -> GuardLimits:
        """Of each agent."""
        return GuardLimits(floor=self.guard_floor, resume=self.guard_resume)

    @property
    def drain_s(self) -> float:
        """How long open requests may take to end, after SIGTERM."""
        return float(self.fleet.router_limits.get("drain_s", DRAIN_S))

    @property
    def port(self) -> int:
        """That the router listens on."""
        return int(self.fleet.router_limits.get("port", DEFAULT_PORT))

    @property
    def has_access_log(self) -> bool:
        """A line for each request, unless [router] access_log says no."""
        return bool(self.fleet.router_limits.get("access_log", True))


def read_serve_config(path: Path) -> ServeConfig:
    """Read a service's TOML file; relative paths in it start at the present folder.

    Raises:
        VoltanaError: The file cannot be read, or a key or value is wrong.
    """
    data, where = read_toml(path), str(path)
    check_names(data, ("simulate", "fleet", "router", SECTION), "table", where)
    own = table(data, SECTION, where)
    names = [item.name for item in dataclasses.fields(ServeConfig) if item.name != "fleet"]
    check_names(own, (*FLEET_KEYS, *names), "key", where, f" of [{SECTION}]")
    of_fleet = {key: value for key, value in own.items() if key in FLEET_KEYS}
    fleet = make_fleet_config(data, of_fleet, where, section=SECTION)
    rest = {key: value for key, value in own.items() if key not in FLEET_KEYS}
    return bind(ServeConfig, rest, where, section=f" of [{SECTION}]", fixed={"fleet": fleet})


def check_reload(old: ServeConfig, new: ServeConfig, where: str) -> None:
    """Refuse a file that a running service cannot take.

    Args:
        old: As it serves now.
        new: The file as it is now.
        where: The file's name.

    Raises:
        VoltanaError: Something beside policy and promises has changed.
    """
    check_sim_reload(old.fleet.sim, new.fleet.sim, where)
    before, after = dict(old.fleet.router_limits), dict(new.fleet.router_limits)
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            raise refusal(f"[router] {name}", where)
    refuse_changes(old.fleet, new.fleet, where, section=SECTION, but=("sim", "router_limits"))
    refuse_changes(old, new, where, section=SECTION, but=("fleet",))
