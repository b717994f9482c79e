"""What a router is told: its workers, its limits, its policy's configuration."""

from __future__ import annotations

import ipaddress
import math
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from voltana.profiles.common.binding import bind, converted, table
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig, make_config, read_toml
from voltana.sim.policies.base import COLOCATED, DECODE, PREFILL, Phase

LOOPBACK: Final = "127.0.0.1"
BACKLOG: Final = 1024
"""Connections that wait to be taken."""
BOOTSTRAP_PORT: Final = 8998
"""SGLang's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """One engine server."""

    phase: Phase
    instance_id: int
    url: str
    """Base URL, e.g. http://127.0.0.1:30000."""
    bootstrap_host: str | None = None
    """Prefill: where decode servers reach it for the KV; none = the URL's host."""
    bootstrap_port: int = BOOTSTRAP_PORT
    """Prefill: the port of that, SGLang's --disaggregation-bootstrap-port."""
    metrics: str | None = None
    """Address of its forward-pass metrics, e.g. ipc:///tmp/decode-0.0; none = not published."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise VoltanaError(
                f"a worker's url must be http://HOST:PORT, got {self.url!r} "
                f"({self.phase} {self.instance_id})"
            )
        if not 0 < self.bootstrap_port < 65536:
            raise VoltanaError(
                f"bootstrap_port must be in 1..65535, got {self.bootstrap_port} ({self.url})"
            )

    @property
    def name(self) -> str:
        """E.g. decode-0."""
        return f"{self.phase}-{self.instance_id}"

    @property
    def reachable_host(self) -> str:
        """Host for the KV bootstrap."""
        return self.bootstrap_host or urlsplit(self.url).hostname or LOOPBACK


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """One router. `sim` names the policy and all that the policy may know."""

    workers: tuple[WorkerConfig, ...]
    sim: SimConfig
    host: str = LOOPBACK
    """Address to listen on; beyond this machine give it a token."""
    port: int = 8000
    """0 takes a free one."""
    listen_fd: int | None = None
    """Listening socket that its parent has opened at that address: it outlives this process."""
    state_file: str | None = None
    """Where its parent writes, a line each, why the whole is not well, for the health check."""
    token: str | None = field(default=None, repr=False)
    """Bearer token that every request but /health must carry; none = open."""
    events: str | None = None
    """ZMQ address to publish arrivals on, for agents."""
    reports: str | None = None
    """ZMQ address to take the agents' reports (clock, energy, decisions) on."""
    start_ns: int | None = None
    """Start of the run's clock (CLOCK_MONOTONIC); none = the router's own start."""
    max_open: int = 4096
    """Requests in flight; more wait."""
    max_queued: int = 1024
    """Requests that wait for a place; more are answered 429."""
    max_body_bytes: int = 4 * 2**20
    """Half a million token ids; parsing that many stops all streams for some hundredths of a s."""
    max_bodies_bytes: int = 256 * 2**20
    """Of all requests together, from before they are read to their end; past it 429. One that does
    not say its length counts as the largest."""
    vocab_size: int | None = None
    """The model's: token ids must lie below; none = as the servers tell. SGLang checks no id, and
    one that the model does not have ends the server."""
    max_attempts: int = 3
    """Pairs that a request which has not started may be tried on."""
    max_lost: int = 1
    """A request that was on so many servers when they were lost is given up: it may be the reason.
    More than 1 lets a request that ends servers end as many."""
    connect_s: float = 2.0
    """Longest wait for a connection to a server."""
    first_token_s: float = 600.0
    """Longest wait for a first token, from the sending on. An answer that is not streamed shows no
    token before its end, so it must be whole by then."""
    stall_s: float = 120.0
    """Longest silence in a stream that has begun."""
    client_stall_s: float = 60.0
    """A client that takes nothing for so long is dropped."""
    health_period_s: float = 1.0
    """Between two checks of a server's health; two that fail in a row take it out."""
    health_timeout_s: float = 3.0
    """Longest wait for the answer to one."""
    health_path: str = "/v1/loads?include=core"
    """Cheap and without a side effect; SGLang's /health generates a token on an idle server."""
    stale_s: float = 10.0
    """A server that should compute and is silent for so long gets no new requests where another can
    have them; those on it go on."""
    drain_s: float = 5.0
    """On SIGTERM new requests are refused (503); those that are open have so long to end."""
    access_log: bool = False
    """One line in the log for each request that has ended, with its energy where agents tell it."""
    energy_header: bool = False
    """An answer that is not streamed waits some tenths of a second for its energy, and names it."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise VoltanaError(f"{name} must be > 0 and finite, got {value}")
        if self.max_queued < 0:
            raise VoltanaError(f"max_queued must be >= 0, got {self.max_queued}")
        if not (self.drain_s >= 0 and math.isfinite(self.drain_s)):
            raise VoltanaError(f"drain_s must be >= 0 and finite, got {self.drain_s}")
        if not 0 <= self.port < 65536:
            raise VoltanaError(f"port must be in 0..65535, got {self.port}")
        for phase in self.phases:
            ids = [w.instance_id for w in self.of(phase)]
            if ids != list(range(len(ids))) or not ids:
                raise VoltanaError(f"{phase} workers must be numbered from 0, got {ids}")
        if COLOCATED in self.phases and self.energy_header:
            raise VoltanaError(
                "a request's energy is not told of colocated servers, got energy_header beside "
                "some: leave it out"
            )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Kinds of servers that a request needs one of each."""
        return phases_of(self.workers)

    @property
    def bills(self) -> bool:
        """Whether it is worked out what each request took; of colocated servers nobody can."""
        return COLOCATED not in self.phases and (self.access_log or self.energy_header)

    @property
    def ends(self) -> tuple[Phase, Phase]:
        """Whose servers take a prompt, and whose make its tokens: the same where they do both."""
        return self.phases[0], self.phases[-1]

    def of(self, phase: Phase) -> list[WorkerConfig]:
        """The workers of one phase, in order."""
        return [w for w in self.workers if w.phase == phase]

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


_POSITIVE: Final = (
    "max_open", "max_body_bytes", "max_bodies_bytes", "vocab_size", "max_attempts", "max_lost",
    "connect_s", "first_token_s", "stall_s", "client_stall_s", "health_period_s",
    "health_timeout_s", "stale_s",
)  # fmt: skip


def read_workers(fleet: Mapping[str, Any], where: str) -> tuple[WorkerConfig, ...]:
    """The workers of a `[fleet]` table: lists of URLs or tables.

    `prefill` and `decode`, or `colocated`, of servers that do both.

    Example:
        >>> found = read_workers({"prefill": ["http://h:1"], "decode": [{"url": "http://h:2"}]}, "")
        >>> [(w.name, w.url) for w in found]
        [('prefill-0', 'http://h:1'), ('decode-0', 'http://h:2')]
    """
    workers: list[WorkerConfig] = []
    if COLOCATED in fleet and {PREFILL, DECODE} & fleet.keys():
        raise VoltanaError(
            f"[fleet] must list colocated servers, or prefill and decode ones, got both ({where})"
        )
    phases: tuple[Phase, ...] = (COLOCATED,) if COLOCATED in fleet else (PREFILL, DECODE)
    for phase in phases:
        entries = fleet.get(phase, [])
        if not isinstance(entries, list) or not entries:
            raise VoltanaError(f"[fleet] {phase} must be a list of URLs, got {entries!r} ({where})")
        for instance_id, entry in enumerate(entries):
            values = {"url": entry} if isinstance(entry, str) else entry
            workers.append(_worker(phase, instance_id, values, where))
    return tuple(workers)


def phases_of(workers: Iterable[WorkerConfig]) -> tuple[Phase, ...]:
    """Kinds of servers that a request needs one of each: both phases, or those that do both."""
    return (COLOCATED,) if any(w.phase == COLOCATED for w in workers) else (PREFILL, DECODE)


def counts_of(workers: Sequence[WorkerConfig]) -> dict[str, int]:
    """Keys of [simulate] that say how many there are."""
    return {f"num_{p}": sum(w.phase == p for w in workers) for p in phases_of(workers)}


def _worker(phase: Phase, instance_id: int, values: object, where: str) -> WorkerConfig:
    if not isinstance(values, dict) or "url" not in values:
        raise VoltanaError(f"a worker must be a URL or a table with url, got {values!r} ({where})")
    fixed = {"phase": phase, "instance_id": instance_id}
    return bind(WorkerConfig, values, where, section=" of a worker", fixed=fixed)


def read_limits(limits: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys of a `[router]` table, checked by name and type."""
    without = ("workers", "sim", "token")
    return converted(RouterConfig, limits, where, section=" of [router]", without=without)


def read_router_config(path: Path, *, token: str | None = None) -> RouterConfig:
    """Read `[simulate]`, `[fleet]` and `[router]` of a TOML file.

    Raises:
        VoltanaError: The file cannot be read, or a key or value is wrong.
    """
    data, where = read_toml(path), str(path)
    workers = read_workers(table(data, "fleet", where), where)
    keys = dict(table(data, "simulate", where))
    keys |= counts_of(workers)
    return RouterConfig(
        workers=workers,
        sim=make_config(keys, where=where),
        token=token,
        **read_limits(table(data, "router", where), where),
    )


def open_listener(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        VoltanaError: The address cannot be bound.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise VoltanaError(f"the router cannot listen on {host}:{port}: {error.strerror}") from None


def read_token(path: Path | None) -> str | None:
    """The bearer token in a file; None without one. A file keeps it out of the process list.

    Raises:
        VoltanaError: The file cannot be read or is empty.
    """
    if path is None:
        return None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise VoltanaError(f"cannot read the token in {path}: {error}") from None
    if not token:
        raise VoltanaError(f"the token in {path} must not be empty")
    return token
