"""Starts real SGLang prefill and decode servers on this machine's CPU, on loopback only.

`make engine` installs what they need. Each server is a process group of its own, and leaving the
context ends all of them, however it is left, and removes the shared memory that they leave.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from hwreplay.batch_feed import ENVIRONMENT as BATCH_SOCKET
from profiles.errors import VoltanaError
from sim.policies.base import DECODE, PREFILL, Phase

HOST: Final = "127.0.0.1"
POLL_S: Final = 0.5
END_S: Final = 10.0
SHARED_MEMORY: Final = "/dev/shm/"
PROCESS_GROUP: Final = 2
"""Its field in /proc/PID/stat, counted after the command's name."""
ENVIRONMENT: Final = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MC_FORCE_TCP": "1",
    "MOONCAKE_PROTOCOL": "tcp",
    "SGLANG_HOST_IP": HOST,
}
COMMON: Final = (
    "--skip-tokenizer-init --device cpu --attention-backend torch_native --dtype bfloat16"
    f" --host {HOST} --max-total-tokens 8192 --max-running-requests 16 --mem-fraction-static 0.1"
    " --sleep-on-idle --disaggregation-transfer-backend mooncake"
)


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

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://{HOST}:{self.port}"

    def kill(self) -> None:
        """End all its processes at once, as a crash of the machine would."""
        self.shared_memory.update(find_shared_memory(self.process.pid))
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.clean()

    def clean(self) -> None:
        """Remove what its processes have left in shared memory; they must have ended."""
        for path in self.shared_memory:
            path.unlink(missing_ok=True)
        self.shared_memory.clear()

    def is_ready(self) -> bool:
        """Whether the server answers its health check."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5.0)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except OSError:
            return False
        finally:
            connection.close()


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
    servers: list[Server] = []
    try:
        for phase, instance_id in phases:
            servers.append(_start(python, directory / "model", logs, phase, instance_id, sockets))
        _wait(servers, start_s)
        yield servers
    finally:
        _end(servers)


def _start(
    python: Path, model: Path, logs: Path, phase: Phase, instance_id: int, sockets: Path | None
) -> Server:
    port = _free_port()
    arguments = [*COMMON.split(), "--model-path", str(model), "--port", str(port)]
    arguments += ["--disaggregation-mode", phase]
    bootstrap_port = _free_port() if phase == PREFILL else None
    if bootstrap_port is not None:
        arguments += ["--disaggregation-bootstrap-port", str(bootstrap_port)]
    else:  # without a backup on the host, a decode server without a GPU dies at start
        arguments += ["--disaggregation-decode-retraction-backup", "cpu_tensor"]
    name = f"{phase}-{instance_id}"
    environment, metrics, batch_socket = os.environ | ENVIRONMENT, None, None
    if sockets is not None:
        metrics, batch_socket = f"ipc://{sockets / name}", sockets / f"{name}.batch"
        environment[BATCH_SOCKET] = str(batch_socket)
        arguments += ["--enable-forward-pass-metrics", "--forward-pass-metrics-worker-id", name]
        arguments += ["--forward-pass-metrics-ipc-name", metrics]
        metrics += ".0"  # the engine adds its data-parallel rank
    command = (str(python), "-m", "sglang.launch_server", *arguments)
    log = logs / f"{name}.log"
    return Server(
        phase=phase,
        instance_id=instance_id,
        port=port,
        bootstrap_port=bootstrap_port,
        process=_spawn(command, environment, log),
        log=log,
        command=command,
        environment=environment,
        metrics=metrics,
        batch_socket=batch_socket,
    )


def restart(servers: list[Server], server: Server, *, start_s: float = 180) -> Server:
    """Start a killed server of a fleet again, on the same ports, and wait until it is ready.

    Args:
        servers: What `run_fleet` gave; the new server takes the old one's place.
        server: The old one.
        start_s: Longest time to wait.

    Raises:
        VoltanaError: It died again or was too late.
    """
    server.clean()
    process = _spawn(server.command, server.environment, server.log)
    found = replace(server, process=process)
    servers[servers.index(server)] = found
    _wait([found], start_s)
    return found


def _spawn(
    command: tuple[str, ...], environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _wait(servers: list[Server], limit_s: float) -> None:
    deadline_s = time.monotonic() + limit_s
    waiting = list(servers)
    while waiting:
        waiting = [server for server in waiting if not server.is_ready()]
        for server in waiting:
            if server.process.poll() is not None:
                code = server.process.returncode
                raise VoltanaError(f"{server.phase} server ended with {code}: see {server.log}")
            if time.monotonic() > deadline_s:
                raise VoltanaError(f"{server.phase} not ready in {limit_s} s: see {server.log}")
        time.sleep(POLL_S if waiting else 0.0)
    for server in servers:
        server.shared_memory.update(find_shared_memory(server.process.pid))


def _end(servers: list[Server]) -> None:
    for server in servers:
        server.shared_memory.update(find_shared_memory(server.process.pid))
    for number in (signal.SIGTERM, signal.SIGKILL):
        for server in servers:
            try:
                os.killpg(server.process.pid, number)
            except ProcessLookupError:
                continue
        for server in servers:
            try:
                server.process.wait(END_S)
            except subprocess.TimeoutExpired:
                continue
    for server in servers:
        server.clean()


def find_shared_memory(process_group: int) -> list[Path]:
    """Files in /dev/shm that the processes of a group have mapped: load reports, semaphores."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[PROCESS_GROUP]) != process_group:
                continue
            maps = (stat.parent / "maps").read_text()
        except OSError:
            continue  # it has just ended
        for line in maps.splitlines():
            path = line.partition(SHARED_MEMORY)[2]
            if path and not path.endswith(" (deleted)"):
                found.add(Path(SHARED_MEMORY + path))
    return sorted(found)
