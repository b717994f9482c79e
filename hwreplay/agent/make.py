"""What an agent is made of: its controller's loop, its meter, its connection to the actuator."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from voltana.hwreplay.actuator.client import (
    ActuatorClient,
    ActuatorLostError,
    ClockSetter,
    DryRun,
    caps_from_power,
)
from voltana.hwreplay.agent.agent import AgentConfig
from voltana.hwreplay.agent.control import ControlLoop
from voltana.hwreplay.agent.energy_meter import EnergyMeter
from voltana.hwreplay.agent.guard import Guard, GuardedClock
from voltana.hwreplay.clock import RunClock
from voltana.hwreplay.view.context import PolicySource, check_notices, decides_before
from voltana.hwreplay.view.engine_only import engine_only
from voltana.hwreplay.view.tracker import InstanceTracker
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.device.cards import open_gpu, open_gpus
from voltana.profiles.device.gpu import DriverMissingError
from voltana.sim.policies.base import COLOCATED, DECODE, PREFILL, Controller

DCGM_PERIOD_S: Final = 0.5
"""The exporter reads no faster than ten times a second, and is asked over HTTP."""
MakeCaps = Callable[[], Mapping[int, float]]
"""Gives the power limit in W that stands for each clock."""


def make_loop(
    config: AgentConfig,
    directory: Path,
    clock: RunClock,
    source: PolicySource,
    make_caps_w: MakeCaps,
    guard: Guard,
) -> tuple[InstanceTracker, ControlLoop]:
    """The state that is kept and the loop that acts on it.

    Args:
        config: The agent's.
        directory: Takes what a dry run records.
        clock: The run's.
        source: Makes the controller.
        make_caps_w: As in `connect`.
        guard: Stands before the actuator.

    Raises:
        VoltanaError: A wrong setting, or the actuator does not answer.
    """
    settings = source.config
    has_socket = config.batch_socket is not None
    if config.phase != COLOCATED or config.event_address:
        check_notices(settings, config.phase, config.name, has_socket=has_socket)
    controller = make_controller(config, source)
    tracker = source.make_tracker(config.phase, config.instance_id)
    if config.actuator_socket is not None and not config.gpus:
        raise VoltanaError(
            f"an agent's actuator must have gpus to set, {config.name} has none: list them, or "
            "leave actuator_socket out for a dry run"
        )
    actuator: ClockSetter = (
        DryRun(record_file(config, directory, "decisions"))
        if config.actuator_socket is None
        else connect(config, make_caps_w)
    )
    loop = ControlLoop(
        controller,
        tracker,
        GuardedClock(actuator, guard),
        predictor=source.profile.predictor(),
        clocks_mhz=source.profile.meta.clocks.supported_mhz,
        limits=config.stale,
        decides_before=decides_before(settings, config.phase),
        now_s=clock.now_s(),
    )
    return tracker, loop


def make_controller(config: AgentConfig, source: PolicySource) -> Controller:
    """The controller of an agent's instance; without a router it sees the engine alone."""
    make = source.make_controller if config.event_address else partial(engine_only, source)
    return make(config.phase, config.instance_id)


def record_file(config: AgentConfig, directory: Path, kind: str) -> Path:
    """Where an agent writes down what comes at every turn."""
    return directory / f"{config.name}.{kind}.jsonl" if config.keeps_files else Path(os.devnull)


def make_meter(config: AgentConfig) -> EnergyMeter | None:
    """Reads its cards, DCGM exporter or a stated power; None where it has none of them."""
    if config.dcgm is not None and config.gpus:
        from voltana.hwreplay.energy.dcgm import DcgmCards  # an HTTP client few agents need

        page = DcgmCards(config.dcgm, _uuids(config, may_lack_driver=True))
        return EnergyMeter([page], period_s=DCGM_PERIOD_S, repeats=True)
    gpus = open_gpus(config.gpus, config.power_w)
    return EnergyMeter(gpus) if gpus else None


def connect(config: AgentConfig, make_caps_w: MakeCaps) -> ActuatorClient:
    """A connection to the actuator; `make_caps_w` is asked where it limits power.

    Raises:
        ActuatorLostError: A dry run has none, or it does not answer.
    """
    if config.actuator_socket is None:
        raise ActuatorLostError("a dry run has no actuator")
    return ActuatorClient(
        Path(config.actuator_socket),
        [card if isinstance(card, int) else i for i, card in enumerate(config.gpus)],
        uuids=_uuids(config),
        make_caps_w=make_caps_w,
    )


def _uuids(config: AgentConfig, *, may_lack_driver: bool = False) -> list[str]:
    """Of the instance's cards: beyond a container's border others number them otherwise.

    Args:
        config: Cards by number or UUID; a UUID needs no driver here.
        may_lack_driver: Without one a number stays what it is, the host's.
    """
    found = []
    for card in config.gpus:
        if isinstance(card, str):
            found.append(card)
            continue
        try:
            with open_gpu(card) as gpu:
                found.append(gpu.identity.uuid)
        except DriverMissingError:
            if not may_lack_driver:
                raise
            found.append(str(card))
    return found


def caps_w(config: AgentConfig, profile: Profile) -> dict[int, float]:
    """The power limit of one GPU that stands for each clock: the most it draws there."""
    tables = {PREFILL: [profile.prefill], DECODE: [profile.decode]}
    table = pd.concat(tables.get(config.phase, [profile.prefill, profile.decode]))
    highest_w = table.groupby("frequency_mhz")["power_w"].max() / len(config.gpus)
    clocks_mhz = profile.clocks_mhz
    power_w = np.interp(clocks_mhz, highest_w.index.to_numpy(), highest_w.to_numpy())
    with open_gpu(config.gpus[0]) as gpu:
        lowest_w, _ = gpu.power_limit_range_w()
        range_w = (lowest_w, gpu.power_limit_w())
    return caps_from_power(dict(zip(clocks_mhz, power_w.tolist(), strict=True)), range_w=range_w)
