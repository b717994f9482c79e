"""Starting and ending SGLang server processes, for the profiler and for the replay harness.

Each server is a process group of its own. Ending it ends the whole group and removes the shared
memory that it leaves; a server on a CPU listens on loopback only.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

from profiles.errors import VoltanaError
from profiles.signals import stops_put_off

HOST: Final = "127.0.0.1"
POLL_S: Final = 0.5
END_S: Final = 10.0
SHARED_MEMORY: Final = "/dev/shm/"
PROCESS_GROUP: Final = 2
"""Its field in /proc/PID/stat, counted after the command's name."""
MAPS_INODE: Final = 4
CPU_ENVIRONMENT: Final = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MC_FORCE_TCP": "1",
    "MOONCAKE_PROTOCOL": "tcp",
    "SGLANG_HOST_IP": HOST,
}
CPU_ARGUMENTS: Final = tuple(
    (
        "--skip-tokenizer-init --device cpu --attention-backend torch_native --dtype bfloat16"
        f" --host {HOST} --max-running-requests 16 --mem-fraction-static 0.1 --sleep-on-idle"
    ).split()
)
"""What a server on a CPU needs. Without --sleep-on-idle idle schedulers spin on the same cores."""
PAIR_ARGUMENTS: Final = ("--disaggregation-transfer-backend", "mooncake")
CPU_DECODE_ARGUMENTS: Final = ("--disaggregation-decode-retraction-backup", "cpu_tensor")
"""Without a backup on the host, a decode server without a GPU dies at start."""


class ServerProcess(Protocol):
    """A server that was started here."""

    @property
    def port(self) -> int: ...

    @property
    def process(self) -> subprocess.Popen[bytes]: ...

    @property
    def log(self) -> Path:
        """Named after the server."""

    @property
    def shared_memory(self) -> set[Path]:
        """Files in /dev/shm that its processes made: they outlive a crash."""


def metrics_arguments(name: str, sockets: Path) -> tuple[tuple[str, ...], str]:
    """Arguments that make a server publish forward-pass metrics, and the address to subscribe to.

    Args:
        name: Of the server.
        sockets: Folder for the socket, its path short (a socket's may have 107 bytes).
    """
    address = f"ipc://{sockets / name}"
    arguments = (
        *("--enable-forward-pass-metrics", "--forward-pass-metrics-worker-id", name),
        *("--forward-pass-metrics-ipc-name", address),
    )
    return arguments, f"{address}.0"  # the engine adds its data-parallel rank


def spawn(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a command as the leader of a new process group; its output is appended to `log`."""
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def free_port() -> int:
    """A port of the loopback that nobody had a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def is_ready(port: int) -> bool:
    """Whether the server on a port answers its health check."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        connection.close()


def wait_ready(servers: Sequence[ServerProcess], limit_s: float) -> None:
    """Wait until every server answers.

    Raises:
        VoltanaError: One ended or was too late; the message names its log.
    """
    deadline_s = time.monotonic() + limit_s
    waiting = list(servers)
    while waiting:
        waiting = [server for server in waiting if not is_ready(server.port)]
        for server in waiting:
            name = server.log.stem
            if server.process.poll() is not None:
                code = server.process.returncode
                raise VoltanaError(f"{name} server ended with {code}: see {server.log}")
            if time.monotonic() > deadline_s:
                raise VoltanaError(f"{name} not ready in {limit_s:g} s: see {server.log}")
        time.sleep(POLL_S if waiting else 0.0)
    for server in servers:
        server.shared_memory.update(find_shared_memory(server.process.pid))


def kill(server: ServerProcess) -> None:
    """End a server's processes at once, as a crash of the machine would."""
    server.shared_memory.update(find_shared_memory(server.process.pid))
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    clean(server)


def clean(server: ServerProcess) -> None:
    """Remove what its processes have left in shared memory; they must have ended."""
    for path in server.shared_memory:
        path.unlink(missing_ok=True)
    server.shared_memory.clear()


def end(servers: Sequence[ServerProcess]) -> None:
    """Ask all servers to end, and kill those that do not; a second Ctrl-C is heard after that."""
    with stops_put_off():
        _end(servers)


def _end(servers: Sequence[ServerProcess]) -> None:
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
        clean(server)


def find_shared_memory(process_group: int) -> list[Path]:
    """Files in /dev/shm that the processes of a group have mapped: load reports, semaphores.

    By inode, as the C library makes a semaphore under another name than the one it has then.
    """
    mapped = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[PROCESS_GROUP]) != process_group:
                continue
            maps = (stat.parent / "maps").read_text()
        except OSError:
            continue  # it has just ended
        for line in maps.splitlines():
            if SHARED_MEMORY in line:
                mapped.add(int(line.split()[MAPS_INODE]))
    return [path for path in sorted(Path(SHARED_MEMORY).iterdir()) if _inode(path) in mapped]


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None
