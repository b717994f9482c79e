"""What runs beside: actuator, zeusd, SGLang's installations, ports."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from voltana.experiments.doctor.finding import ABSENT, BROKEN, OK, Finding, State
from voltana.hwreplay.actuator.client import ActuatorClient, ActuatorLostError
from voltana.hwreplay.messages.actuation import Operation
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.device.gpu import DeviceError
from voltana.profiles.device.zeusd import Zeusd

AREA: Final = "services"
ENGINE_AREA: Final = "engine"
ACTUATORS: Final = (Path("/run/voltana/actuator.sock"), Path("/run/voltana.sock"))
"""Where the documentation puts it."""
ZEUSD: Final = "/run/zeusd/zeusd.sock"
ZEUSD_PLACES: Final = ("ZEUSD_SOCK_PATH", "ZEUSD_HOST_PORT")
"""Variables that name it to zeusd's own clients."""
ENGINES: Final = (Path(".engine/venv/bin/python"), Path(".engine-gpu/bin/python"))
"""Where `make engine` and `make replay-gpu` install SGLang."""
ENGINE_S: Final = 120.0
"""A cold import of SGLang takes its time."""
FIRST, LAST = (0, 5, 14), (0, 5, 23)
"""Versions of SGLang whose forward-pass metrics are known."""
LOOPBACK: Final = "127.0.0.1"
PORTS: Final = {8000: "voltana serve and router", 9470: "voltana agent's /metrics"}
PROBE: Final = """
import importlib.metadata as m, json, sglang
plugins = [e.name for e in m.entry_points(group="sglang.srt.plugins")]
print(json.dumps({"version": m.version("sglang"), "plugins": plugins}))
"""


def find_actuators(sockets: Sequence[Path]) -> list[Finding]:
    """Those at the usual places that are there, or one that says that none is."""
    there = [path for path in sockets if path.exists()]
    if not there:
        return [
            Finding(
                area=AREA,
                name="actuator",
                state=ABSENT,
                found=f"none at {' or '.join(map(str, sockets))}",
                remedy="to set clocks: sudo voltana actuator, or deploy/systemd",
            )
        ]
    return [find_actuator(path) for path in there]


def find_actuator(path: Path) -> Finding:
    """Shake hands with one, which sets nothing."""
    try:
        client = ActuatorClient(path, (), make_caps_w=dict)
    except ActuatorLostError as error:
        return Finding(
            area=AREA,
            name="actuator",
            state=BROKEN,
            found=str(error),
            remedy=f"start it for this user: --uid {os.geteuid()}",
        )
    except VoltanaError as error:
        return Finding(area=AREA, name="actuator", state=BROKEN, found=str(error))
    with closing(client):
        does = "limits power" if client.operation == Operation.CAP else "locks clocks"
    return Finding(
        area=AREA, name="actuator", state=OK, found=f"{path} answers this user, and {does}"
    )


def find_zeusd() -> Finding:
    """Where its own clients look for it, then where its unit puts it."""
    named = [os.environ[name] for name in ZEUSD_PLACES if os.environ.get(name)]
    address = named[0] if named else ZEUSD
    if not named and not Path(ZEUSD).exists():
        return Finding(area=AREA, name="zeusd", state=ABSENT, found=f"none at {ZEUSD}")
    try:
        found = Zeusd(address).discover()
    except DeviceError as error:
        return Finding(area=AREA, name="zeusd", state=BROKEN, found=str(error))
    if not found.can_control:
        return Finding(
            area=AREA,
            name="zeusd",
            state=ABSENT,
            found=f"{address} reads alone",
            remedy="to set clocks: start it as root with --enable gpu-control",
        )
    cards = ", ".join(found.names)
    return Finding(
        area=AREA,
        name="zeusd",
        state=OK,
        found=f"{address} sets {cards}: voltana actuator --zeusd {address} needs no root",
    )


def find_engines(pythons: Sequence[Path]) -> list[Finding]:
    """SGLang of each Python that is there, or a line that says how to get one."""
    found = [find_engine(python) for python in pythons if python.exists()]
    return found or [
        Finding(
            area=ENGINE_AREA,
            name="SGLang",
            state=ABSENT,
            found=f"not in {' or '.join(map(str, pythons))}",
            remedy="for real engines: make engine (CPU), make replay-gpu (GPUs), or name the "
            "Python of yours with --engine",
        )
    ]


def find_engine(python: Path) -> Finding:
    """Import SGLang where it is installed: what only lies there may not run here."""
    try:
        done = subprocess.run(
            [python, "-c", PROBE], capture_output=True, text=True, timeout=ENGINE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return _engine(python, BROKEN, f"does not start: {error}", "install it again")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return _engine(python, BROKEN, f"does not import: {last}", "install it again")
    told = json.loads(done.stdout.splitlines()[-1])
    version = told["version"]
    said = f"{version}, {python}"
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    if not FIRST <= numbers <= LAST:
        first, last = (".".join(map(str, v)) for v in (FIRST, LAST))
        return _engine(python, BROKEN, f"{said}: not tried", f"install {first} to {last}")
    if not told["plugins"]:
        return _engine(
            python, OK, f"{said}, without our plug-in",
            'for prefill_metrics = "before": pip install hwreplay/engines/sglang/observer there',
        )  # fmt: skip
    return _engine(python, OK, f"{said}, plug-ins {', '.join(told['plugins'])}")


def _engine(python: Path, state: State, found: str, remedy: str = "") -> Finding:
    return Finding(area=ENGINE_AREA, name="SGLang", state=state, found=found, remedy=remedy)


def find_ports() -> list[Finding]:
    """The defaults: whether a service could listen there now."""
    return [find_port(LOOPBACK, port, f"{port} ({user})") for port, user in PORTS.items()]


def find_port(host: str, port: int, name: str) -> Finding:
    """Whether it can be bound.

    Args:
        host: Address.
        port: On it.
        name: Of the finding.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Finding(
                area="ports",
                name=name,
                state=ABSENT,
                found=f"taken ({error.strerror})",
                remedy="name another, or end what listens there: ss -ltnp",
            )
    return Finding(area="ports", name=name, state=OK, found="free")
