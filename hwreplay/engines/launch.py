"""Starts real SGLang servers on this machine, on loopback only, for the replay and the profiler.

On the CPU `make engine` installs what they need; with GPUs each server has cards of its own.
Leaving the context ends all of them, however it is left.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from voltana.hwreplay.engines.plan import (
    PROFILE,
    Installation,
    ServerPlan,
    plan_server,
)
from voltana.hwreplay.engines.reaper import Reaper
from voltana.hwreplay.engines.server import Server, end, spawn, wait_ready
from voltana.profiles.engines.sglang_client import Endpoint, Endpoints
from voltana.sim.policies.base import COLOCATED, DECODE, PREFILL, Phase

CPU_START_S: Final = 180.0
GPU_START_S: Final = 900.0
"""A GPU server loads its weights and captures graphs before it is ready."""
PROFILE_START_S: Final = 600.0
PAIR: Final[Mapping[Phase, int]] = {PREFILL: 1, DECODE: 1}


@contextmanager
def run_servers(
    installation: Installation, plans: Sequence[ServerPlan], logs: Path, *, start_s: float
) -> Iterator[list[Server]]:
    """Start servers, wait until each is ready, and end them on exit.

    Args:
        installation: What to start.
        plans: One a server.
        logs: Folder for one log a server.
        start_s: Longest time to wait for all of them.

    Raises:
        VoltanaError: A server ended or was too late.
    """
    with Reaper() as reaper:
        servers: list[Server] = []
        try:
            for plan in plans:
                servers.append(_start(installation, plan, logs, reaper))  # noqa: PERF401 (may fail)
            wait_ready(servers, start_s)
            yield servers
        finally:
            end(servers)


def _start(installation: Installation, plan: ServerPlan, logs: Path, reaper: Reaper) -> Server:
    command = plan.command(installation)
    environment = os.environ | plan.environment()
    if installation.environment_of is not None:
        environment |= installation.environment_of(plan)
    log = logs / f"{plan.name}.log"
    return Server(
        plan=plan,
        log=log,
        command=command,
        environment=environment,
        process=spawn(command, environment, log, reaper),
        reaper=reaper,
    )


def restart(servers: list[Server], server: Server, *, start_s: float = CPU_START_S) -> Server:
    """Start a killed server of a fleet again, on the same ports, and wait until it is ready.

    Args:
        servers: What `run_fleet` gave; the new server takes the old one's place.
        server: The old one.
        start_s: Longest time to wait.

    Raises:
        VoltanaError: It died again or was too late.
    """
    server.clean()
    process = spawn(server.command, server.environment, server.log, server.reaper)
    found = replace(server, process=process)
    servers[servers.index(server)] = found
    wait_ready([found], start_s)
    return found


@contextmanager
def run_fleet(
    installation: Installation,
    logs: Path,
    counts: Mapping[Phase, int] = PAIR,
    *,
    gpus: Mapping[Phase, Sequence[tuple[int, ...]]] | None = None,
    start_s: float | None = None,
    sockets: Path | None = None,
) -> Iterator[list[Server]]:
    """A fleet for a replay, kind by kind.

    Args:
        installation: What to start.
        logs: Folder for one log a server.
        counts: Servers of each kind.
        gpus: Cards of each instance by phase; none: all on the CPU.
        start_s: Longest time to wait for all of them; None: 180, on GPUs 900.
        sockets: Folder for the sockets of forward-pass metrics and batch notices, its path short;
            None publishes neither.

    Raises:
        VoltanaError: The engine is not installed, or a server ended or was too late.
    """
    installation.check()
    plans = [
        plan_server(phase, index, gpus=gpus[phase][index] if gpus else (), sockets=sockets)
        for phase, count in counts.items()
        for index in range(count)
    ]
    limit_s = (GPU_START_S if gpus else CPU_START_S) if start_s is None else start_s
    with run_servers(installation, plans, logs, start_s=limit_s) as servers:
        for server in servers:
            server.freeze_garbage()
        yield servers


@contextmanager
def run_profiled(
    installation: Installation, logs: Path, *, is_pair: bool, gpus: Sequence[int] = ()
) -> Iterator[Endpoints]:
    """What the profiler measures: one server, or a pair as the replay serves.

    Args:
        installation: What to start.
        logs: Folder for one log a server; made.
        is_pair: Prefill and decode apart, KV transferred.
        gpus: Cards that the model is split over; none: the CPU.

    Raises:
        VoltanaError: No such Python, or a server ended or was too late.
    """
    installation.check("--server-python")
    logs.mkdir(parents=True, exist_ok=True)
    sockets = Path(tempfile.mkdtemp(prefix="voltana-"))  # a socket's path must be short
    phases: tuple[Phase, ...] = (PREFILL, DECODE) if is_pair else (COLOCATED,)
    plans = [plan_server(phase, gpus=gpus, sockets=sockets, purpose=PROFILE) for phase in phases]
    try:
        with run_servers(installation, plans, logs, start_s=PROFILE_START_S):
            yield Endpoints(prefill=_endpoint(plans[0]), decode=_endpoint(plans[-1]))
    finally:
        shutil.rmtree(sockets, ignore_errors=True)


def _endpoint(plan: ServerPlan) -> Endpoint:
    assert plan.metrics is not None
    return Endpoint(url=plan.url, metrics=plan.metrics, bootstrap_port=plan.bootstrap_port)
