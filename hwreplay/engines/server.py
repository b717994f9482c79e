"""One SGLang server on this machine: started, waited for, ended.

Each is a process group of its own. Ending it ends the whole group and removes the shared memory
that it leaves; if this process is killed, a reaper does both.
"""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from voltana.hwreplay.engines.plan import HOST, ServerPlan
from voltana.hwreplay.engines.reaper import Reaper
from voltana.hwreplay.engines.shared_memory import find_shared_memory
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.signals import stops_put_off

POLL_S: Final = 0.5
END_S: Final = 10.0
FLUSH_S: Final = 10.0
"""So long a server is given to become idle before it forgets its cache."""
HOLD: Final = ("/bin/sh", "-c", 'read -r go && exec "$@" </dev/null', "voltana-server")
"""Runs its arguments once it reads a line, and never if its owner dies before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One server that was started here."""

    plan: ServerPlan
    log: Path
    command: tuple[str, ...] = field(repr=False)
    environment: Mapping[str, str] = field(repr=False)
    process: subprocess.Popen[bytes]
    reaper: Reaper = field(repr=False)
    """Ends it if this process is killed."""
    shared_memory: set[Path] = field(default_factory=set, repr=False)
    """Files in /dev/shm that its processes made: they outlive a crash."""

    def is_ready(self) -> bool:
        """Whether it answers its health check."""
        connection = http.client.HTTPConnection(HOST, self.plan.port, timeout=5.0)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except OSError:
            return False
        finally:
            connection.close()

    def freeze_garbage(self) -> None:
        """Keep Python's collector off what was loaded: a full collection stops all streams."""
        connection = http.client.HTTPConnection(HOST, self.plan.port, timeout=10.0)
        try:
            connection.request("POST", "/freeze_gc")
            connection.getresponse().read()
        finally:
            connection.close()

    def empty_cache(self) -> None:
        """Forget every prefix.

        Raises:
            VoltanaError: It has something to compute, and so does not.
        """
        connection = http.client.HTTPConnection(HOST, self.plan.port, timeout=2 * FLUSH_S)
        try:
            connection.request("POST", f"/flush_cache?timeout={FLUSH_S:g}")
            if connection.getresponse().status != http.client.OK:
                raise VoltanaError(
                    f"{self.plan.name} must be idle to forget its cache, it is not: see {self.log}"
                )
        finally:
            connection.close()

    def find_memory(self) -> None:
        """Look for its shared memory, and tell the reaper."""
        self.shared_memory.update(find_shared_memory(self.process.pid))
        self.reaper.guard(self.process.pid, self.shared_memory)

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def kill(self) -> None:
        """End all its processes at once, as a crash of the machine would."""
        self.find_memory()
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.clean()

    def clean(self) -> None:
        """Remove what its processes have left in shared memory; they must have ended."""
        for path in self.shared_memory:
            path.unlink(missing_ok=True)
        self.shared_memory.clear()
        self.reaper.release(self.process.pid)


def spawn(
    command: Sequence[str], environment: Mapping[str, str], log: Path, reaper: Reaper
) -> subprocess.Popen[bytes]:
    """Start a command as the leader of a new process group, which the reaper guards.

    It runs only once the reaper knows of it: a kill -9 of this process finds no server unguarded.

    Args:
        command: Program and arguments.
        environment: The whole of it.
        log: Takes its output, behind what is there.
        reaper: Is told of the group.
    """
    with log.open("ab") as out:
        process = subprocess.Popen(
            (*HOLD, *command),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    reaper.guard(process.pid)
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has been killed already: the wait for it says so
        process.stdin.write(b"\n")
        process.stdin.close()
    return process


def wait_ready(servers: Sequence[Server], limit_s: float) -> None:
    """Wait until every server answers; they are asked side by side, as an answer takes a second.

    Raises:
        VoltanaError: One ended or was too late; the message names its log.
    """
    deadline_s = time.monotonic() + limit_s
    waiting = list(servers)
    while waiting:
        with ThreadPoolExecutor(len(waiting)) as asked:
            answers = list(asked.map(Server.is_ready, waiting))
        waiting = [
            server for server, is_ready in zip(waiting, answers, strict=True) if not is_ready
        ]
        for server in waiting:
            if server.process.poll() is not None:
                code = server.process.returncode
                raise VoltanaError(f"{server.plan.name} server ended with {code}: see {server.log}")
            if time.monotonic() > deadline_s:
                raise VoltanaError(
                    f"{server.plan.name} not ready in {limit_s:g} s: see {server.log}"
                )
        time.sleep(POLL_S if waiting else 0.0)
    for server in servers:
        server.find_memory()


def end(servers: Sequence[Server]) -> None:
    """Ask all servers to end, and kill those that do not; a second Ctrl-C is heard after that."""
    with stops_put_off():
        for server in servers:
            server.find_memory()
        for number in (signal.SIGTERM, signal.SIGKILL):
            for server in servers:
                server.signal(number)
            for server in servers:
                try:
                    server.process.wait(END_S)
                except subprocess.TimeoutExpired:
                    continue
        for server in servers:
            server.clean()
