"""Starts real SGLang prefill and decode servers on this machine, on loopback only.

On the CPU `make engine` installs what they need; with GPUs each server has cards of its own. Each
is a process group, and leaving the context ends all of them, however it is left, and removes the
shared memory that they leave; if this process is killed a reaper does.
"""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Self

from hwreplay.messages.batch_feed import ENVIRONMENT as BATCH_SOCKET
from hwreplay.router.vocabulary import read_vocab_size
from profiles.device.cards import cuda_environment
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

REPLAY_ARGUMENTS: Final = ("--incremental-streaming-output",)
"""Each event of a stream holds its new tokens alone: without it a long answer costs the servers
more with every token, on the cores that they compute on."""
CPU_REPLAY_ARGUMENTS: Final = ("--max-total-tokens", "8192")
CPU_START_S: Final = 180.0
GPU_START_S: Final = 900.0
"""A GPU server loads its weights and captures graphs before it is ready."""

__all__ = [
    "HOST",
    "Engine",
    "Placement",
    "Server",
    "find_shared_memory",
    "restart",
    "run_fleet",
    "server_arguments",
    "server_environment",
]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An installation of SGLang and the model that it serves."""

    python: Path
    """Of the environment that SGLang is installed in."""
    model: Path
    """Folder with the model, or with its config.json alone for `--load-format dummy`."""
    arguments: tuple[str, ...] = ()
    """Further arguments of every server; the last word where one is given twice."""
    environment_of: Callable[[Placement], Mapping[str, str]] | None = field(
        default=None, compare=False, repr=False
    )
    """What a server's environment has besides, e.g. the emulated card that it stands on."""

    @classmethod
    def in_folder(cls, directory: Path) -> Self:
        """What `make engine` fills: `venv/` and `model/`."""
        return cls(python=directory / "venv/bin/python", model=directory / "model")

    def check(self) -> None:
        """Refuse one that is not there.

        Raises:
            VoltanaError: No such Python.
        """
        if shutil.which(self.python) is None:
            raise VoltanaError(
                f"[fleet] must name a Python with SGLang, got {self.python}: on a CPU run `make "
                "engine`, with GPUs `make replay-gpu` installs one"
            )

    def vocab_size(self) -> int:
        """Number of token ids that the model has.

        Raises:
            VoltanaError: Its config.json cannot be read, or does not say.
        """
        found = read_vocab_size(self.model)
        if found is None:
            raise VoltanaError(
                "a model must be a folder whose config.json has its vocab_size, got "
                f"{self.model}: name one in [fleet] model"
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where one server runs."""

    phase: Phase
    instance_id: int
    port: int
    bootstrap_port: int | None
    gpus: tuple[int, ...] = ()
    """Its cards, as NVML numbers them; none: the CPU."""
    sockets: Path | None = None

    @property
    def name(self) -> str:
        """E.g. decode-0."""
        return f"{self.phase}-{self.instance_id}"

    @property
    def batch_socket(self) -> Path | None:
        """Where its plug-in announces batches."""
        return None if self.sockets is None else self.sockets / f"{self.name}.batch"


def server_arguments(engine: Engine, at: Placement) -> tuple[str, ...]:
    """The command that starts one server; on GPUs its tensor parallelism is as wide as its cards.

    Example:
        >>> at = Placement(
        ...     phase="decode", instance_id=0, port=1, bootstrap_port=None, gpus=(2, 3)
        ... )
        >>> command = server_arguments(Engine(python=Path("p"), model=Path("m")), at)
        >>> "--tp-size 2" in " ".join(command)
        True
    """
    arguments = ["--model-path", str(engine.model), "--host", HOST, "--port", str(at.port)]
    arguments += ["--disaggregation-mode", at.phase, *PAIR_ARGUMENTS, *REPLAY_ARGUMENTS]
    if at.bootstrap_port is not None:
        arguments += ["--disaggregation-bootstrap-port", str(at.bootstrap_port)]
    if at.gpus:
        arguments += ["--tp-size", str(len(at.gpus))]
    else:
        arguments += [*CPU_ARGUMENTS, *CPU_REPLAY_ARGUMENTS]
        arguments += CPU_DECODE_ARGUMENTS if at.phase == DECODE else ()
    if at.sockets is not None:
        arguments += metrics_arguments(at.name, at.sockets)[0]
    return (str(engine.python), "-m", "sglang.launch_server", *arguments, *engine.arguments)


def server_environment(at: Placement) -> dict[str, str]:
    """What one server's environment has beyond ours."""
    found = dict(CPU_ENVIRONMENT)
    if at.gpus:
        # The metered card must be the one that runs; the KV transfer's sockets stay on loopback.
        found = cuda_environment(at.gpus) | {"SGLANG_HOST_IP": HOST}
    if at.batch_socket is not None:
        found[BATCH_SOCKET] = str(at.batch_socket)
    return found


@contextmanager
def run_fleet(
    engine: Engine,
    logs: Path,
    *,
    num_prefill: int = 1,
    num_decode: int = 1,
    gpus: Mapping[Phase, Sequence[tuple[int, ...]]] | None = None,
    start_s: float | None = None,
    sockets: Path | None = None,
) -> Iterator[list[Server]]:
    """Start a fleet, wait until every server is ready, and end it on exit.

    Args:
        engine: What to start.
        logs: Folder for one log a server.
        num_prefill: Prefill servers.
        num_decode: Decode servers.
        gpus: Cards of each instance by phase; none: all on the CPU.
        start_s: Longest time to wait for all of them; None: 180, on GPUs 900.
        sockets: Folder for the sockets of forward-pass metrics and batch notices, its path short
            (a socket's may have 107 bytes); None publishes neither.

    Raises:
        VoltanaError: The engine is not installed, or a server died or was too late.
    """
    engine.check()
    counts: dict[Phase, int] = {PREFILL: num_prefill, DECODE: num_decode}
    places = [_place(p, i, gpus, sockets) for p, count in counts.items() for i in range(count)]
    limit_s = (GPU_START_S if gpus else CPU_START_S) if start_s is None else start_s
    with Reaper() as reaper:
        servers: list[Server] = []
        try:
            for place in places:
                server = _start(engine, place, logs, reaper)
                servers.append(server)  # before the next starts: it may fail
            wait_ready(servers, limit_s)
            for server in servers:
                server.guard()
                _freeze_garbage(server)
            yield servers
        finally:
            end(servers)
            for server in servers:
                reaper.release(server.process.pid)


def _place(
    phase: Phase,
    instance_id: int,
    gpus: Mapping[Phase, Sequence[tuple[int, ...]]] | None,
    sockets: Path | None,
) -> Placement:
    return Placement(
        phase=phase,
        instance_id=instance_id,
        port=free_port(),
        bootstrap_port=free_port() if phase == PREFILL else None,
        gpus=gpus[phase][instance_id] if gpus else (),
        sockets=sockets,
    )


def _start(engine: Engine, at: Placement, logs: Path, reaper: Reaper) -> Server:
    command = server_arguments(engine, at)
    environment = os.environ | server_environment(at)
    if engine.environment_of is not None:
        environment |= engine.environment_of(at)
    log = logs / f"{at.name}.log"
    server = Server(
        phase=at.phase,
        instance_id=at.instance_id,
        port=at.port,
        bootstrap_port=at.bootstrap_port,
        process=spawn(command, environment, log),
        log=log,
        command=command,
        environment=environment,
        metrics=None if at.sockets is None else metrics_arguments(at.name, at.sockets)[1],
        batch_socket=at.batch_socket,
        reaper=reaper,
    )
    server.guard()
    return server


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
