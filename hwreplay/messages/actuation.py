"""Messages between the privileged actuator and its clients: 16 bytes each way, nothing else.

A request is (magic, version, operation, GPU, value, sequence); an answer repeats GPU, value and
sequence and puts a status in place of the operation. Every bit pattern is either a valid message
or a `ProtocolError`; nothing is ever deserialised into an object the peer chooses.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeVar

from voltana.profiles.common.errors import VoltanaError

MAGIC: Final = b"VOLT"
VERSION: Final = 1
LAYOUT: Final = struct.Struct("<4sBBHII")
SIZE: Final = LAYOUT.size
MAX_SEQUENCE: Final = 2**32 - 1

Code = TypeVar("Code", bound=IntEnum)


class ProtocolError(VoltanaError):
    """Bytes that cannot be read as a message."""


class Operation(IntEnum):
    """What a client may ask for."""

    HELLO = 1
    """Value of the answer: silence that is allowed, in ms; its GPU: what is set, LOCK or CAP."""
    BEAT = 2
    LOCK = 3
    """Value in MHz; 0 gives the clock back to the driver."""
    CAP = 4
    """Value in mW; 0 restores the power limit."""
    RELEASE = 5
    """Give back every GPU this connection holds."""
    FIND = 6
    """Value: `card_code` of a card's UUID; the answer's GPU: the actuator's number of that card."""


class Status(IntEnum):
    """What became of a request."""

    OK = 0
    MALFORMED = 1
    GPU_NOT_ALLOWED = 2
    VALUE_NOT_ALLOWED = 3
    RATE_LIMITED = 4
    TAKEN = 5
    """Another connection holds that GPU."""
    DEVICE_FAILED = 6
    UNSUPPORTED = 7
    """This actuator locks clocks and was asked to cap power, or the other way round."""
    RECORDED = 8
    """A dry run has written it down and touched nothing: the clock is what it was."""


def card_code(uuid: str) -> int:
    """A card's UUID in 32 bits: NVML's indices differ between a container and its host.

    Example:
        >>> card_code("GPU-1a2b") == card_code("GPU-1a2b") != card_code("GPU-1a2c")
        True
    """
    return zlib.crc32(uuid.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request."""

    operation: Operation
    gpu: int = 0
    value: int = 0
    sequence: int = 0

    def pack(self) -> bytes:
        """The 16 bytes."""
        return LAYOUT.pack(MAGIC, VERSION, self.operation, self.gpu, self.value, self.sequence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer."""

    status: Status
    gpu: int = 0
    value: int = 0
    sequence: int = 0

    def pack(self) -> bytes:
        """The 16 bytes."""
        return LAYOUT.pack(MAGIC, VERSION, self.status, self.gpu, self.value, self.sequence)


def parse_request(data: bytes) -> Request:
    """Read a request.

    Raises:
        ProtocolError: Wrong size, magic, version or operation.
    """
    operation, gpu, value, sequence = _parse(data, Operation)
    return Request(operation=operation, gpu=gpu, value=value, sequence=sequence)


def parse_answer(data: bytes) -> Answer:
    """Read an answer. Raises as `parse_request` does."""
    status, gpu, value, sequence = _parse(data, Status)
    return Answer(status=status, gpu=gpu, value=value, sequence=sequence)


def _parse(data: bytes, codes: type[Code]) -> tuple[Code, int, int, int]:
    if len(data) != SIZE:
        raise ProtocolError(f"a message must have {SIZE} bytes, got {len(data)}")
    magic, version, code, gpu, value, sequence = LAYOUT.unpack(data)
    if magic != MAGIC or version != VERSION:
        raise ProtocolError(f"a message must begin {MAGIC!r} {VERSION}, got {magic!r} {version}")
    try:
        return codes(code), gpu, value, sequence
    except ValueError:
        raise ProtocolError(f"{codes.__name__} must be one of {[*codes]}, got {code}") from None
