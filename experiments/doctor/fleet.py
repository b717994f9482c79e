"""What a service's file asks for: whether it is here."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import requests

from voltana.experiments.doctor.finding import ABSENT, BROKEN, OK, Finding, State
from voltana.experiments.doctor.services import find_actuator, find_engine, find_port
from voltana.experiments.extras import needs
from voltana.profiles.catalog import load_profile
from voltana.profiles.common.binding import table
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.device.cards import open_gpu
from voltana.profiles.device.gpu import DeviceError
from voltana.sim.config import read_toml

if TYPE_CHECKING:  # it needs the extra `replay`, and the machine alone is looked at without
    from voltana.hwreplay.agent.agent import AgentConfig

AREA: Final = "fleet"
TIMEOUT_S: Final = 3.0
IPC: Final = "ipc://"


def find_fleet(path: Path) -> list[Finding]:
    """All that a file names.

    Raises:
        VoltanaError: The file cannot be read, or the extra `replay` is not installed.
    """
    with needs("replay", "voltana doctor FLEET.toml"):
        from voltana.hwreplay.agent.attach import read_attached
        from voltana.hwreplay.router.config import LOOPBACK, RouterConfig
        from voltana.hwreplay.serve.config import read_serve_config
    try:
        config = read_serve_config(path)
    except VoltanaError as error:
        try:
            agents = read_attached(path, acts=False)
        except VoltanaError:
            return [_line(str(path), BROKEN, str(error), "mend the file")]
        said = f"voltana agent takes it; voltana serve does not: {error}"
        return [_line(str(path), OK, said), *_instances(agents), *_actuator(path)]
    found = [_line(str(path), OK, "voltana serve takes it")]
    fleet = config.fleet
    if fleet.engine is not None:
        found.append(find_engine(fleet.engine.python))
    host = str(fleet.router_limits.get("host", LOOPBACK))
    if config.port:
        port = find_port(host, config.port, f"{host}:{config.port}")
        found.append(_asked(port))
    defaults = {item.name: item.default for item in fields(RouterConfig)}
    health = str(fleet.router_limits.get("health_path", defaults["health_path"]))
    found += [_server(worker.name, worker.url + health) for worker in fleet.workers]
    if config.token_file is not None:
        found.append(_token(config.token_file))
    if fleet.workers:  # those that are started here bring their own metrics
        found += _instances(read_attached(path, acts=False))
    return found + (_actuator(path) if fleet.emulate is None else [])


def _actuator(path: Path) -> list[Finding]:
    named = table(read_toml(path), "serve", str(path)).get("actuator")
    return [] if named is None else [_asked(find_actuator(Path(str(named))))]


def _instances(agents: Sequence[AgentConfig]) -> list[Finding]:
    """Metrics, cards and energy of each."""
    found = []
    for agent in agents:
        name = agent.name.removeprefix("agent-")
        found.append(_metrics(name, agent.metrics_address))
        found += [_card(name, card, str(agent.settings["profile"])) for card in agent.gpus]
        if agent.dcgm is not None:
            found.append(_dcgm(name, agent.dcgm, agent.gpus))
    return found


def _metrics(name: str, address: str) -> Finding:
    """Whether somebody publishes there whom this user may hear."""
    where = f"{name} metrics"
    if not address.startswith(IPC):
        return _line(where, OK, f"{address}: looked at by voltana agent alone")
    path = Path(address.removeprefix(IPC))
    if not path.is_socket():
        return _line(
            where, BROKEN, f"no socket at {path}",
            "start the server with --enable-forward-pass-metrics and "
            f"--forward-pass-metrics-ipc-name {address.removesuffix('.0')}",
        )  # fmt: skip
    if not os.access(path, os.W_OK):
        return _line(
            where, BROKEN, f"user {os.geteuid()} may not open {path}",
            "start the server with umask 0007 and share its group",
        )  # fmt: skip
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError as error:
            return _line(where, BROKEN, f"{path}: {error.strerror}", "start its server")
    return _line(where, OK, str(path))


def _card(name: str, card: int | str, profile: str) -> Finding:
    """Whether it is here, and of the kind that the profile was measured on."""
    where = f"{name} card {card}"
    try:
        with open_gpu(card) as gpu:
            model = gpu.identity.name
    except DeviceError as error:
        if isinstance(card, str):
            said = f"cannot be opened here, which its actuator and DCGM do without: {error}"
            return _line(where, ABSENT, said)
        return _line(where, BROKEN, str(error), "name the cards of this machine")
    of_profile = load_profile(profile).meta.gpu.name
    if of_profile.removeprefix("NVIDIA ") != model.removeprefix("NVIDIA "):
        return _line(
            where, ABSENT, f"{model}, the profile is of {of_profile}",
            "measure this card: voltana profile",
        )  # fmt: skip
    return _line(where, OK, model)


def _dcgm(name: str, url: str, cards: Iterable[int | str]) -> Finding:
    from voltana.hwreplay.energy.dcgm import DcgmCards

    try:
        power_w = DcgmCards(url, list(cards)).power_w()
    except VoltanaError as error:
        return _line(f"{name} energy", BROKEN, str(error), "start DCGM exporter, or leave dcgm out")
    return _line(f"{name} energy", OK, f"{url} says {power_w:.0f} W")


def _server(name: str, url: str) -> Finding:
    try:
        status = requests.get(url, timeout=TIMEOUT_S).status_code
    except requests.RequestException as error:
        return _line(name, BROKEN, f"{url}: {type(error).__name__}", "start the server")
    address = urlsplit(url).netloc
    if status != requests.codes.ok:
        return _line(name, BROKEN, f"{address} answers {status}", "see the server's log")
    return _line(name, OK, f"{address} answers")


def _token(path: Path) -> Finding:
    from voltana.hwreplay.router.config import read_token

    try:
        read_token(path)
    except VoltanaError as error:
        return _line("token", BROKEN, str(error), "write it, readable by this user")
    return _line("token", OK, str(path))


def _asked(finding: Finding) -> Finding:
    """What a file asks for is broken where it is absent."""
    state: State = OK if finding.state == OK else BROKEN
    return _line(finding.name, state, finding.found, finding.remedy)


def _line(name: str, state: State, found: str, remedy: str = "") -> Finding:
    return Finding(area=AREA, name=name, state=state, found=found, remedy=remedy)
