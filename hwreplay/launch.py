"""Starts real SGLang prefill and decode servers on this machine's CPU, on loopback only.

`make engine` installs what they need. Each server is a process group of its own, and leaving the
context ends all of them, however it is left, and removes the shared memory that they leave; if this
process is killed a reaper does.
"""

from __future__ import annotations

import http.client
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from hwreplay.batch_feed import ENVIRONMENT as BATCH_SOCKET
from profiles.engines.reaper import Reaper
from profiles.engines.sglang_server import (
    CPU_ARGUMENTS,
    CPU_DECODE_ARGUMENTS,
    CPU_ENVIRONMENT,
    HOST,
    PAIR_ARGUMENTS,
    clean,
    end,
    find_shared_memory,
    free_port,
    is_ready,
    kill,
    metrics_arguments,
    spawn,
    wait_ready,
)
from profiles.errors import VoltanaError
from sim.policies.base import DECODE, PREFILL, Phase

REPLAY_ARGUMENTS: Final = ("--max-total-tokens", "8192", "--incremental-streaming-output")
"""Each event of a stream holds its new tokens alone: without it a long answer costs the servers
more with every token, on the cores that they compute on."""

__all__ = ["HOST", "Server", "find_shared_memory", "restart", "run_fleet"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One running engine server."""

    phase: Phase
    instance_id: int
    port: int
    bootstrap_port: int | None
    """Where decode servers ask a prefill server for its KV; None for a decode server."""
    process: subprocess.Popen[bytes]
    log: Path
    command: tuple[str, ...] = field(repr=False)
    environment: Mapping[str, str] = field(repr=False)
    shared_memory: set[Path] = field(default_factory=set, repr=False)
    """Files in /dev/shm that its processes made: they outlive a crash."""
    metrics: str | None = None
    """ZMQ address of its forward-pass metrics, where they were asked for."""
    batch_socket: Path | None = None
    """Where its plug-in announces batches, where that was asked for."""
    reaper: Reaper | None = field(default=None, repr=False)
    """Ends it if this process is killed."""

    def guard(self) -> None:
        """Let the reaper know of its processes and files."""
        if self.reaper is not None:
            self.reaper.guard(self.process.pid, self.shared_memory)

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://{HOST}:{self.port}"

    def kill(self) -> None:
        """End all its processes at once, as a crash of the machine would."""
        kill(self)

    def is_ready(self) -> bool:
        """Whether the server answers its health check."""
        return is_ready(self.port)


@contextmanager
def run_fleet(
    directory: Path,
    logs: Path,
    *,
    num_prefill: int = 1,
    num_decode: int = 1,
    start_s: float = 180,
    sockets: Path | None = None,
) -> Iterator[list[Server]]:
    """Start a fleet, wait until every server is ready, and end it on exit.

    Args:
        directory: What `make engine` filled: `venv/` and `model/`.
        logs: Folder for one log a server.
        num_prefill: Prefill servers.
        num_decode: Decode servers.
        start_s: Longest time to wait for all of them.
        sockets: Folder for the sockets of forward-pass metrics and batch notices, its path short
            (a socket's may have 107 bytes); None publishes neither.

    Raises:
        VoltanaError: The engine is not installed, or a server died or was too late.
    """
    python = directory / "venv/bin/python"
    if not (directory / ".installed").is_file():
        raise VoltanaError(f"no SGLang in {directory}: run `make engine`")
    phases: list[tuple[Phase, int]] = [(PREFILL, i) for i in range(num_prefill)]
    phases += [(DECODE, i) for i in range(num_decode)]
    with Reaper() as reaper:
        servers: list[Server] = []
        try:
            for phase, instance_id in phases:
                started = _start(python, directory / "model", logs, phase, instance_id, sockets)
                servers.append(replace(started, reaper=reaper))
                servers[-1].guard()
            wait_ready(servers, start_s)
            for server in servers:
                server.guard()
                _freeze_garbage(server)
            yield servers
        finally:
            end(servers)
            for server in servers:
                reaper.release(server.process.pid)


def _start(
    python: Path, model: Path, logs: Path, phase: Phase, instance_id: int, sockets: Path | None
) -> Server:
    port = free_port()
    arguments = [*CPU_ARGUMENTS, *PAIR_ARGUMENTS, *REPLAY_ARGUMENTS]
    arguments += ["--model-path", str(model), "--port", str(port), "--disaggregation-mode", phase]
    bootstrap_port = free_port() if phase == PREFILL else None
    if bootstrap_port is not None:
        arguments += ["--disaggregation-bootstrap-port", str(bootstrap_port)]
    else:
        arguments += CPU_DECODE_ARGUMENTS
    name = f"{phase}-{instance_id}"
    environment, metrics, batch_socket = os.environ | CPU_ENVIRONMENT, None, None
    if sockets is not None:
        batch_socket = sockets / f"{name}.batch"
        environment[BATCH_SOCKET] = str(batch_socket)
        published, metrics = metrics_arguments(name, sockets)
        arguments += published
    command = (str(python), "-m", "sglang.launch_server", *arguments)
    log = logs / f"{name}.log"
    return Server(
        phase=phase,
        instance_id=instance_id,
        port=port,
        bootstrap_port=bootstrap_port,
        process=spawn(command, environment, log),
        log=log,
        command=command,
        environment=environment,
        metrics=metrics,
        batch_socket=batch_socket,
    )


def _freeze_garbage(server: Server) -> None:
    """Keep Python's collector off what was loaded at start: a full collection stops all streams."""
    connection = http.client.HTTPConnection(HOST, server.port, timeout=10.0)
    try:
        connection.request("POST", "/freeze_gc")
        connection.getresponse().read()
    finally:
        connection.close()


def restart(servers: list[Server], server: Server, *, start_s: float = 180) -> Server:
    """Start a killed server of a fleet again, on the same ports, and wait until it is ready.

    Args:
        servers: What `run_fleet` gave; the new server takes the old one's place.
        server: The old one.
        start_s: Longest time to wait.

    Raises:
        VoltanaError: It died again or was too late.
    """
    clean(server)
    if server.reaper is not None:
        server.reaper.release(server.process.pid)
    process = spawn(server.command, server.environment, server.log)
    found = replace(server, process=process)
    servers[servers.index(server)] = found
    found.guard()
    wait_ready([found], start_s)
    found.guard()
    return found
