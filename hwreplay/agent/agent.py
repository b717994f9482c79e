"""The agent of one instance: a process that listens, asks the controller and sets the clock.

    engine  ── forward-pass metrics (ZMQ) ──┐
    engine  ── batch notices (datagrams) ───┤ poll ── tracker ── controller ── actuator
    router  ── arrivals and ends (ZMQ) ─────┘       └ clock, energy, decisions (ZMQ) ── router

One thread, no waiting: what comes first is served first, the router's events before the engine's
records. Where several records wait, the controller sees each and the clock follows the newest.
Run by `start_agents`; `attach` runs them under another router. Where a controller looks at the
whole fleet, one process runs all agents, each with its own sockets, over one `Cluster`.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from voltana.hwreplay.agent.guard import GuardLimits
from voltana.hwreplay.agent.loop_record import StaleLimits
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import Phase
from voltana.sim.results import read_json, write_json

READY_POLL_S: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """One agent. A JSON file of the same keys is its command line."""

    phase: Phase
    instance_id: int
    start_ns: int
    """CLOCK_MONOTONIC at the start of the run: the instant that every process calls 0."""
    settings: Mapping[str, Any]
    """The simulated configuration that is replayed, as `SimConfig.as_dict` writes it."""
    metrics_address: str
    """ZMQ address of the engine's forward-pass metrics."""
    event_address: str | None = None
    """ZMQ address of the router's events; None: the engine's word alone."""
    batch_socket: str | None = None
    """Where the engine's plug-in announces batches; `prefill_metrics = "before"` needs it."""
    actuator_socket: str | None = None
    """The actuator's socket; None records decisions and touches nothing."""
    gpus: tuple[int | str, ...] = ()
    """Its cards: NVML's numbers or UUIDs."""
    dcgm: str | None = None
    """Page of the DCGM exporter that counts their energy; None asks NVML."""
    report_address: str | None = None
    """ZMQ address where the router takes clocks, energy and decisions."""
    power_w: float | None = None
    """Stated power of the instance, where no card counts energy. With neither this nor `gpus` no
    energy is reported."""
    stale: StaleLimits = dataclasses.field(default_factory=StaleLimits)
    guard: GuardLimits | None = None
    """Releases the clock while too few samples keep the promise; None leaves it alone."""
    keeps_files: bool = True
    """Write down each clock and, in a dry run, each decision: files that grow with the run."""

    @property
    def name(self) -> str:
        """Stem of its files."""
        return f"agent-{self.phase}-{self.instance_id}"


def start_agents(configs: Sequence[AgentConfig], directory: Path) -> subprocess.Popen[bytes]:
    """Start agents in one process; it ends with its parent or by SIGTERM.

    Each leaves in `directory`: NAME.json (its configuration), NAME.clocks.jsonl (each confirmed
    change of the clock) and, at its end, NAME.report.json (latencies, safe states). The log is
    NAME.log of the first one.
    """
    command = write_agents(configs, directory)
    with (directory / f"{configs[0].name}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=agents_environment(),
        )


def write_agents(configs: Sequence[AgentConfig], directory: Path) -> list[str]:
    """Write the files of agents that share a process; returns its command line."""
    paths = [directory / f"{config.name}.json" for config in configs]
    for config, path in zip(configs, paths, strict=True):
        write_json(msgspec.to_builtins(config, str_keys=True), path)
        ready_file(config, directory).unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", "voltana.hwreplay.agent.process", str(os.getpid())]
    return [*command, *map(str, paths)]


def agents_environment() -> dict[str, str]:
    """Ours, with the modules that we find: policies of a user's own are among them."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}


def await_agents(
    process: subprocess.Popen[bytes],
    configs: Sequence[AgentConfig],
    directory: Path,
    *,
    limit_s: float = 60.0,
) -> None:
    """Wait until all agents of a process listen on their sockets and have set the initial clock.

    Args:
        process: Runs them all.
        configs: In the order in which they get ready.
        directory: Of their logs and ready files.
        limit_s: Longest wait, in s.
    """
    deadline_s = time.monotonic() + limit_s
    config = configs[-1]  # the last to be ready
    log = directory / f"{configs[0].name}.log"
    while not ready_file(config, directory).exists():
        if process.poll() is not None:
            said = log.read_text(errors="replace").strip().splitlines()
            raise VoltanaError(
                f"{config.name} must stay up, it ended with {process.returncode}: "
                + (said[-1] if said else f"see {log}")
            )
        if time.monotonic() > deadline_s:
            raise VoltanaError(f"{config.name} must be ready within {limit_s:g} s: see {log}")
        time.sleep(READY_POLL_S)


def ready_file(config: AgentConfig, directory: Path) -> Path:
    """What an agent makes when it is ready."""
    return directory / f"{config.name}.ready"


def read_agent_config(path: Path) -> AgentConfig:
    """Read the JSON file of an agent.

    Raises:
        VoltanaError: A key is missing, unknown or of the wrong type.
    """
    try:
        return msgspec.convert(read_json(path), AgentConfig, strict=False)
    except msgspec.ValidationError as error:
        raise VoltanaError(
            f"an agent's file must hold its configuration: {error} ({path})"
        ) from None
