"""What the engine's plug-in says before each batch: 30 bytes on a Unix datagram socket.

The other side is hwreplay/engines/sglang/observer, which runs inside SGLang's scheduler.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

from voltana.profiles.common.errors import VoltanaError

ENVIRONMENT: Final = "VOLTANA_BATCH_SOCKET"
"""Names the socket to the engine; set it before the server starts."""
MAGIC: Final = b"VBAT"
VERSION: Final = 2
LAYOUT: Final = struct.Struct("<4sBBHIIQHI")
RECEIVE_BYTES: Final = 1 << 20


class NoticeKind(IntEnum):
    """What a datagram announces."""

    HELLO = 0
    """The plug-in is at work. SGLang only logs an error when a hook cannot be registered."""
    PREFILL = 1
    DECODE = 2
    MIXED = 3
    """Prompts beside decoding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchNotice:
    """A batch that is about to run."""

    kind: NoticeKind
    num_requests: int
    tokens: int
    """New tokens (prefill) or context (decode). Of a mixed batch both are of what is decoded."""
    num_waiting: int
    sent_ns: int
    """CLOCK_MONOTONIC, shared by all processes of the machine."""
    chunk_requests: int = 0
    chunk_tokens: int = 0
    """Of a mixed batch: its prompts, and their new tokens."""


def parse_notice(data: bytes) -> BatchNotice:
    """Read a datagram.

    Raises:
        VoltanaError: It is none of this version.
    """
    if len(data) != LAYOUT.size:
        raise VoltanaError(
            f"a batch notice must have {LAYOUT.size} bytes, got {len(data)}: install "
            "hwreplay/engines/sglang/observer of this version beside SGLang"
        )
    magic, version, kind, num_requests, tokens, num_waiting, sent_ns, *chunk = LAYOUT.unpack(data)
    if magic != MAGIC or version != VERSION or kind not in set(NoticeKind):
        raise VoltanaError(
            f"a batch notice must begin {MAGIC!r} {VERSION}, got {magic!r} {version} kind {kind}: "
            "install hwreplay/engines/sglang/observer of this version beside SGLang"
        )
    return BatchNotice(
        kind=NoticeKind(kind),
        num_requests=num_requests,
        tokens=tokens,
        num_waiting=num_waiting,
        sent_ns=sent_ns,
        chunk_requests=chunk[0],
        chunk_tokens=chunk[1],
    )


class BatchFeed:
    """Receives the notices of one engine; must be there before the engine sends."""

    def __init__(self, path: Path) -> None:
        """Bind the socket, replacing one a killed agent left.

        Raises:
            VoltanaError: The path cannot be bound.
        """
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        try:
            if path.is_socket():
                path.unlink()
            self._socket.bind(str(path))
        except OSError as error:
            self._socket.close()
            raise VoltanaError(f"the batch feed cannot bind {path}: {error.strerror}") from None
        path.chmod(0o600)

    def fileno(self) -> int:
        """For a poll."""
        return self._socket.fileno()

    def receive(self) -> BatchNotice | None:
        """The next notice, or None when there is none. Raises as `parse_notice` does."""
        try:
            return parse_notice(self._socket.recv(LAYOUT.size + 1))
        except BlockingIOError:
            return None

    def close(self) -> None:
        """Unbind."""
        self._socket.close()
        self._path.unlink(missing_ok=True)
