"""The privileged actuator: checks who asks, what for and how often, and always gives GPUs back.

It opens one Unix socket (SOCK_SEQPACKET, so that a message arrives whole or not at all), reads
16-byte requests and touches nothing but the GPUs and values its command line allowed.
"""

from __future__ import annotations

import os
import select
import selectors
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final

from voltana.hwreplay.actuator.backends import Backend
from voltana.hwreplay.messages.actuation import (
    SIZE,
    Answer,
    Operation,
    ProtocolError,
    Request,
    Status,
    card_code,
    parse_request,
)
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.signals import STOPPING, handled
from voltana.profiles.device.gpu import DeviceError

MAX_PEERS: Final = 64
MAX_SILENCE_S: Final = 60.0
MAX_RATE_PER_S: Final = 1e6
RETRY_S: Final = 0.5
CREDENTIALS: Final = struct.Struct("3i")
"""SO_PEERCRED: process, user, group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActuatorConfig:
    """Who may ask, and how."""

    socket_path: Path
    allowed_uids: frozenset[int]
    """Users whose processes are heard, by the kernel's word (SO_PEERCRED)."""
    owner_uid: int
    """Owner of the 0600 socket file."""
    silence_s: float = 2.0
    """A peer that says nothing for so long loses its GPUs and its connection."""
    max_rate_per_s: float = 500.0
    """Changes a GPU may see, whoever asks; twice as many in a burst. Giving back is never
    refused."""

    def __post_init__(self) -> None:
        for name, most in (("silence_s", MAX_SILENCE_S), ("max_rate_per_s", MAX_RATE_PER_S)):
            value = getattr(self, name)
            if not 0 < value <= most:
                raise VoltanaError(f"{name} must be > 0 and <= {most:g}, got {value}")


@dataclass(slots=True, eq=False)
class _Peer:
    connection: socket.socket
    heard_ns: int
    held: set[int] = field(default_factory=set)


class Actuator:
    """Serves until `stop`, a signal or an error; each way out restores every GPU."""

    def __init__(self, backend: Backend, config: ActuatorConfig) -> None:
        """Bind the socket. The backend is the actuator's from here on, and closed by it.

        Raises:
            VoltanaError: The path is taken, or cannot be made or given to its owner.
        """
        self._backend = backend
        self._config = config
        self._peers: dict[socket.socket, _Peer] = {}
        self._owner: dict[int, _Peer] = {}
        self._orphans: set[int] = set()
        """GPUs whose restoring failed: tried again until it works."""
        self._numbers = _numbers(backend)
        """Of its cards by `card_code`."""
        self._is_stopping = False
        self._tokens = dict.fromkeys(backend.gpus, 2 * config.max_rate_per_s)
        """Changes that each GPU may still see now: a new connection brings no new ones."""
        self._refilled_ns = time.monotonic_ns()
        self._selector = selectors.DefaultSelector()
        self._listener = _listen(config)
        self._selector.register(self._listener, selectors.EVENT_READ)

    def stop(self) -> None:
        """End `serve` within its next turn (half a second at most)."""
        self._is_stopping = True

    def serve(self) -> None:
        """Answer peers until told to stop; call from the main thread for signals to be handled."""
        with handled(STOPPING, _raise_exit):
            try:
                while not self._is_stopping:
                    self._turn()
            finally:
                with handled(STOPPING, signal.SIG_IGN):  # a second Ctrl-C must not stop this
                    self._close()

    def _turn(self) -> None:
        for key, _ in self._selector.select(min(RETRY_S, self._config.silence_s / 4)):
            if key.fileobj is self._listener:
                self._accept()
            elif isinstance(key.fileobj, socket.socket):
                self._read(self._peers[key.fileobj])
        now_ns = time.monotonic_ns()
        self._refill(now_ns)
        for peer in list(self._peers.values()):
            is_silent = (now_ns - peer.heard_ns) * 1e-9 > self._config.silence_s
            if is_silent and not _has_word_from(peer.connection):
                _log(f"silent for {self._config.silence_s:g} s: restored {sorted(peer.held)}")
                self._drop(peer)
        for gpu in list(self._orphans):
            self._restore(gpu)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:  # it has gone, or there are no descriptors left
            _log(f"a peer could not be taken: {error}")
            return
        connection.setblocking(False)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        pid, uid, _ = CREDENTIALS.unpack(credentials)
        if uid not in self._config.allowed_uids or len(self._peers) >= MAX_PEERS:
            _log(f"refused process {pid} of user {uid}")
            connection.close()
            return
        self._peers[connection] = _Peer(connection, time.monotonic_ns())
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(SIZE + 1)
            if not data:
                self._drop(peer)
                return
            peer.heard_ns = time.monotonic_ns()
            request = parse_request(data)
            answer = self._handle(peer, request)
            peer.connection.send(answer.pack())
        except ProtocolError as error:
            _log(f"dropped a peer: {error}")
            self._refuse(peer)
        except OSError:  # gone, or it does not read its answers
            self._drop(peer)

    def _refuse(self, peer: _Peer) -> None:
        try:
            peer.connection.send(Answer(status=Status.MALFORMED).pack())
        except OSError:
            _log("it did not wait for the answer")
        self._drop(peer)

    def _handle(self, peer: _Peer, request: Request) -> Answer:
        gpu, value = request.gpu, request.value
        if request.operation == Operation.HELLO:
            gpu, value = self._backend.operation, round(self._config.silence_s * 1e3)
            status = Status.OK
        elif request.operation == Operation.BEAT:
            status = Status.OK
        elif request.operation == Operation.RELEASE:
            self._release(peer)
            status = Status.OK
        elif request.operation == Operation.FIND:
            found = self._numbers.get(value, gpu if self._backend.is_dry else None)
            gpu = gpu if found is None else found
            status = Status.GPU_NOT_ALLOWED if found is None else Status.OK
        else:
            status = self._change(peer, request)
        return Answer(status=status, gpu=gpu, value=value, sequence=request.sequence)

    def _change(self, peer: _Peer, request: Request) -> Status:
        gpu = request.gpu
        if request.operation != self._backend.operation:
            return Status.UNSUPPORTED
        if gpu not in self._backend.gpus:
            return Status.GPU_NOT_ALLOWED
        if self._owner.get(gpu, peer) is not peer:
            return Status.TAKEN
        try:
            if request.value == 0:
                if gpu in peer.held:
                    self._backend.restore(gpu)
                    self._forget(peer, gpu)
                return self._done
            if not self._backend.allows(gpu, request.value):
                return Status.VALUE_NOT_ALLOWED
            if self._tokens[gpu] < 1.0:
                return Status.RATE_LIMITED
            self._tokens[gpu] -= 1.0
            self._owner[gpu] = peer
            peer.held.add(gpu)
            self._backend.hold(gpu, request.value)
        except DeviceError as error:
            _log(str(error))
            return Status.DEVICE_FAILED
        self._orphans.discard(gpu)
        return self._done

    @property
    def _done(self) -> Status:
        """What is said of a change that was made, or only written down."""
        return Status.RECORDED if self._backend.is_dry else Status.OK

    def _refill(self, now_ns: int) -> None:
        rate = self._config.max_rate_per_s
        gained = (now_ns - self._refilled_ns) * 1e-9 * rate
        self._refilled_ns = now_ns
        for gpu, tokens in self._tokens.items():
            self._tokens[gpu] = min(2 * rate, tokens + gained)

    def _release(self, peer: _Peer) -> None:
        for gpu in sorted(peer.held):
            self._restore(gpu)
            self._forget(peer, gpu)

    def _restore(self, gpu: int) -> None:
        """Give one GPU back; one that fails is kept for the next turn."""
        try:
            self._backend.restore(gpu)
            self._orphans.discard(gpu)
        except DeviceError as error:
            _log(str(error))
            self._orphans.add(gpu)

    def _forget(self, peer: _Peer, gpu: int) -> None:
        peer.held.discard(gpu)
        self._owner.pop(gpu, None)

    def _drop(self, peer: _Peer) -> None:
        self._release(peer)
        self._selector.unregister(peer.connection)
        del self._peers[peer.connection]
        peer.connection.close()

    def _close(self) -> None:
        try:
            self._backend.close()
        finally:
            for peer in self._peers.values():
                peer.connection.close()
            self._selector.close()
            self._listener.close()
            self._config.socket_path.unlink(missing_ok=True)


def _has_word_from(connection: socket.socket) -> bool:
    """Whether something waits to be read: then it was this process that stood still."""
    return bool(select.select([connection], [], [], 0)[0])


def run_actuator(backend: Backend, config: ActuatorConfig, *, ready: Callable[[], None]) -> None:
    """Serve until a signal ends it; `ready` is called once the socket can be reached.

    Args:
        backend: What it acts on; closed at the end.
        config: Who may ask, and how.
        ready: Called once the socket can be reached.

    Raises:
        VoltanaError: The socket cannot be made; the backend is closed then too.
    """
    try:
        actuator = Actuator(backend, config)
    except VoltanaError:
        backend.close()
        raise
    ready()
    actuator.serve()


def _numbers(backend: Backend) -> dict[int, int]:
    """The numbers of a backend's cards by the codes of their UUIDs.

    Raises:
        VoltanaError: Two cards have one code.
    """
    uuids = {gpu: uuid for gpu in backend.gpus if (uuid := backend.uuid_of(gpu)) is not None}
    found = {card_code(uuid): gpu for gpu, uuid in uuids.items()}
    if len(found) != len(uuids):
        raise VoltanaError(
            f"the cards' UUIDs must differ in their CRC-32, {sorted(uuids.values())} do not: start "
            "one actuator a card"
        )
    return found


def _listen(config: ActuatorConfig) -> socket.socket:
    path = config.socket_path
    if config.owner_uid != os.geteuid():
        _check_directory(path.parent)
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.setblocking(False)
    old_mask = os.umask(0o177)  # 0600 from the first instant
    try:
        listener.bind(str(path))
        if config.owner_uid != os.geteuid():
            os.chown(path, config.owner_uid, -1, follow_symlinks=False)
        listener.listen(MAX_PEERS)
    except OSError as error:
        listener.close()
        is_lost = isinstance(error, FileNotFoundError)
        remedy = (
            f"make the folder {path.parent}" if is_lost else "name another path, or run as root"
        )
        raise VoltanaError(
            f"the socket must be one this process can make for user {config.owner_uid}, got {path} "
            f"({error.strerror or error}): {remedy}"
        ) from None
    finally:
        os.umask(old_mask)
    return listener


def _check_directory(directory: Path) -> None:
    """Refuse a folder where another user could swap the socket for a file before it is given away.

    Raises:
        VoltanaError: It is not ours, or others may rename files in it.
    """
    try:
        found = directory.stat()
    except OSError:
        return  # the bind says why
    is_ours = found.st_uid in (0, os.geteuid())
    is_open = bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    if not is_ours or (is_open and not found.st_mode & stat.S_ISVTX):
        raise VoltanaError(
            f"the socket's folder must be one where only root renames files, {directory} is not: "
            "name a path in /run"
        )


def _remove_stale(path: Path) -> None:
    """Remove the socket of an actuator that was killed; refuse anything else that is there."""
    try:
        found = path.lstat()
    except OSError:
        return  # nothing there; a path that is wrong in another way fails at bind
    if stat.S_ISSOCK(found.st_mode) and _is_refused(path, found.st_uid):
        path.unlink()
        return
    raise VoltanaError(f"the socket's path must be free, {path} is in use: name another path")


def _is_refused(path: Path, owner_uid: int) -> bool:
    """Whether nobody listens there any more.

    Root that was stripped of CAP_DAC_OVERRIDE, as in a container, may open only what is its own.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            try:
                probe.connect(str(path))
            except PermissionError:
                os.chown(path, os.geteuid(), -1, follow_symlinks=False)
                try:
                    probe.connect(str(path))
                finally:
                    os.chown(path, owner_uid, -1, follow_symlinks=False)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _raise_exit(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _log(text: str) -> None:
    sys.stderr.write(f"voltana actuator: {text}\n")
