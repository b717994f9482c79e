"""Agents beside anybody's router: attached to running servers by their forward-pass metrics alone.

    server ── forward-pass metrics (ZMQ) ── agent ── actuator, only with --act
                                              └── /metrics, one log line an event

Without --act an agent is a shadow: it decides, says what its clocks would have saved, and touches
nothing. `[simulate]` and `[serve]` of the file are a service's; of `[fleet]` the metrics' addresses
are read, of one phase, of both, or of servers that do both.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry, start_http_server

from voltana.hwreplay.agent.agent import AgentConfig
from voltana.hwreplay.agent.guard import FLOOR, RESUME, GuardLimits
from voltana.hwreplay.agent.process import run_configs
from voltana.hwreplay.clock import RunClock
from voltana.hwreplay.messages.agent_reports import AgentReport
from voltana.hwreplay.messages.log_lines import ENVIRONMENT, say, start_log
from voltana.hwreplay.view.instance_metrics import METHOD, InstanceMetrics
from voltana.profiles.common.binding import EXAMPLE, bind, check_names, convert, table
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.folders import claim
from voltana.sim.config import make_config, read_toml
from voltana.sim.policies.base import COLOCATED, DECODE, PREFILL, Phase

LOG: Final = logging.getLogger("voltana.agent")
LOOPBACK: Final = "127.0.0.1"
SERVICE_KEYS: Final = ("emulate", "token_file", "log_level")
"""Of [serve], which agents do without."""
MINUTE_S: Final = 60.0
TERMINATED: Final = 128 + signal.SIGTERM
PHASES: Final[tuple[Phase, ...]] = (PREFILL, DECODE, COLOCATED)
GPUS_EXAMPLE: Final = (
    'e.g. {decode = [[0]]}, {decode = [["GPU-…"]]}, or {decode = ["/run/cards"]}, a file of UUIDs'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachKeys:
    """Keys of [serve] that an agent reads; a service has more."""

    actuator: Path | None = None
    gpus: Mapping[Phase, tuple[tuple[int | str, ...] | str, ...]] = field(
        default_factory=dict, metadata={EXAMPLE: GPUS_EXAMPLE}
    )
    power_w: float | None = None
    dcgm: str | None = None
    guard_floor: float = FLOOR
    guard_resume: float = RESUME


def read_attached(path: Path, *, acts: bool) -> list[AgentConfig]:
    """The agents of a service's file, for servers that run under another router.

    Args:
        path: TOML.
        acts: Whether they set clocks; else nothing is touched.

    Raises:
        VoltanaError: The file cannot be read, a key or value is wrong, or --act has no actuator.
    """
    data, where = read_toml(path), str(path)
    check_names(data, ("simulate", "fleet", "router", "serve"), "table", where)
    known = {item.name for item in dataclasses.fields(AttachKeys)}
    serve = table(data, "serve", where)
    check_names(serve, (*known, *SERVICE_KEYS), "key", where, " of [serve]")
    given = {key: value for key, value in serve.items() if key in known}
    own = bind(AttachKeys, given, where, section=" of [serve]")
    if acts and (own.actuator is None or not own.gpus):
        raise VoltanaError(
            "--act needs [serve] actuator, the socket of `voltana actuator`, and gpus, the cards "
            f"of each instance ({where}): name both, or leave --act out"
        )
    fleet = table(data, "fleet", where)
    addresses = {phase: _addresses(fleet, phase, where) for phase in PHASES}
    if not any(addresses.values()):
        raise VoltanaError(
            "[fleet] must list running servers with their metrics, e.g. decode = [{metrics = "
            f'"ipc:///tmp/decode-0.0"}}] ({where})'
        )
    sim = make_config(table(data, "simulate", where) | _counts(addresses, where), where=where)
    sockets = table(fleet, "batch_sockets", where)
    shared: dict[str, Any] = {
        "start_ns": RunClock().start_ns,
        "settings": sim.as_dict(),
        "actuator_socket": str(own.actuator) if acts else None,
        "power_w": own.power_w,
        "dcgm": own.dcgm,
        "guard": GuardLimits(floor=own.guard_floor, resume=own.guard_resume),
    }
    return [
        AgentConfig(
            phase=phase,
            instance_id=index,
            metrics_address=address,
            batch_socket=sockets.get(f"{phase}-{index}"),
            gpus=_gpus(own, phase, index, len(found), where),
            **shared,
        )
        for phase, found in addresses.items()
        for index, address in enumerate(found)
    ]


def _counts(addresses: Mapping[Phase, list[str]], where: str) -> dict[str, int]:
    """Keys of a configuration; of the phase that is elsewhere there is one instance at least."""
    apart = {f"num_{phase}": max(len(addresses[phase]), 1) for phase in (PREFILL, DECODE)}
    if not addresses[COLOCATED]:
        return apart
    if addresses[PREFILL] or addresses[DECODE]:
        raise VoltanaError(
            f"[fleet] must list colocated servers, or prefill and decode ones, got both ({where}): "
            "give each kind a file and an agent of its own"
        )
    return {f"num_{COLOCATED}": len(addresses[COLOCATED])}


def _addresses(fleet: Mapping[str, Any], phase: Phase, where: str) -> list[str]:
    entries = convert(fleet.get(phase, []), tuple[Any, ...], phase, where)
    found = []
    for index, entry in enumerate(entries):
        address = entry.get("metrics") if isinstance(entry, dict) else None
        if not isinstance(address, str):
            raise VoltanaError(
                f"{phase}-{index} must name its forward-pass metrics, e.g. {{metrics = "
                f'"ipc:///tmp/{phase}-{index}.0"}}, got {entry!r} ({where}): start SGLang with '
                "--enable-forward-pass-metrics --forward-pass-metrics-ipc-name "
                f"ipc:///tmp/{phase}-{index}"
            )
        found.append(address)
    return found


def _gpus(
    own: AttachKeys, phase: Phase, index: int, count: int, where: str
) -> tuple[int | str, ...]:
    if not own.gpus:
        return ()
    cards = own.gpus.get(phase, ())
    if len(cards) != count:
        raise VoltanaError(
            f"gpus.{phase} must list the cards of {count} instances, got {list(cards)} ({where})"
        )
    found = cards[index]
    return _uuids_in(Path(found)) if isinstance(found, str) else found


def _uuids_in(path: Path) -> tuple[str, ...]:
    """The cards that a file names, as `nvidia-smi --query-gpu=uuid --format=csv,noheader` does.

    Raises:
        VoltanaError: It cannot be read, or is empty.
    """
    try:
        found = tuple(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise VoltanaError(f"cannot read the cards in {path}: {error}") from None
    if not found:
        raise VoltanaError(f"{path} must name a card a line by its UUID, it is empty")
    return found


def _new_folder(directory: Path) -> Path:
    """A folder for this start: an agent that is started again leaves what is there."""
    claim(directory, "decisions")
    folder = directory / datetime.now(tz=UTC).strftime("%Y%m%dT%H%M%SZ")
    folder.mkdir()
    return folder


class MetricsPage:
    """Takes reports in their own process and shows them at /metrics."""

    def __init__(self, port: int, host: str = LOOPBACK) -> None:
        """Listen.

        Raises:
            VoltanaError: The port is taken.
        """
        registry = CollectorRegistry()
        self._instances = InstanceMetrics(registry)
        self._told_s = 0.0
        try:
            self._server, _ = start_http_server(port, host, registry)
        except OSError as error:
            raise VoltanaError(
                f"the agent cannot show its metrics on {host}:{port}: {error.strerror}"
            ) from None
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def send(self, report: AgentReport) -> None:
        """Count it; once a minute each instance has a line in the log."""
        self._instances.take(report)
        self._instances.show()  # the page is served by a thread of its own
        if report.at_s - self._told_s >= MINUTE_S:
            self._told_s = report.at_s
            self.tell()

    def tell(self) -> None:
        """A line for each instance."""
        for report in self._instances.last:
            say(
                LOG,
                logging.INFO,
                "minute",
                instance=f"{report.phase}-{report.instance_id}",
                mode="act" if report.acts else "shadow",
                clock_mhz=report.clock_mhz,
                wished_mhz=report.wish_mhz,
                decisions=report.decisions,
                energy_j=report.energy_j,
                estimated_saved_j=round(report.saved_j, 3),
                method=METHOD,
                observed_s=round(report.observed_s, 6),
                predicted_s=round(report.predicted_s, 6),
                attainment=report.attainment,
            )

    def close(self) -> None:
        """Agents end one by one; the page stays to the end of their process."""


def attach(
    path: Path, *, acts: bool, port: int, directory: Path | None, host: str = LOOPBACK
) -> None:
    """Run the agents of a file until a signal ends them; clocks are given back.

    Args:
        path: A service's TOML file.
        acts: Whether they set clocks.
        port: Of /metrics; 0 takes a free one.
        host: Address of /metrics: whoever reaches it can read it.
        directory: Takes a folder for each start, with each decision and clock, and a report at the
            end; None keeps none.

    Raises:
        VoltanaError: A wrong configuration, a controller that cannot see what it looks at, or an
            actuator that does not answer.
    """
    os.environ.setdefault(ENVIRONMENT, "info")
    start_log("agent")
    configs = read_attached(path, acts=acts)
    if directory is None:
        configs = [dataclasses.replace(config, keeps_files=False) for config in configs]
    page = MetricsPage(port, host)
    with tempfile.TemporaryDirectory(prefix="voltana-agent-") as temporary:
        folder = Path(temporary) if directory is None else _new_folder(directory)
        mode = "act" if acts else "shadow"
        say(LOG, logging.INFO, "attaching", mode=mode, agents=len(configs), metrics=page.url)
        try:
            run_configs(configs, folder, lambda: True, page)
        except SystemExit as end:
            page.tell()
            say(LOG, logging.INFO, "ended, clocks are given back")
            if end.code not in (TERMINATED, 128 + signal.SIGINT):
                raise
