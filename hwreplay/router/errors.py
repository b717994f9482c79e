"""How a request can fail, and SGLang's errors inside a stream that began as 200 OK."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from voltana.profiles.common.errors import VoltanaError

EVENT: Final = b"data: "
LAST_EVENT: Final = b"data: [DONE]"
EVENT_END: Final = b"\n\n"
MARKS: Final = (b'{"error":', b'"finish_reason":{"type":"abort"')
"""Inside a JSON text a client's own quotes are escaped, so that no output can look like these."""
SERVER_ERROR: Final = 500
MAX_MESSAGE: Final = 300
MAX_TAIL: Final = 2**16
"""An event that reports an error is shorter than this."""


class RequestFailedError(VoltanaError):
    """The fleet has failed a request; the message goes to the client."""

    def __init__(self, reason: str, message: str) -> None:
        """`reason` is a word for counting."""
        super().__init__(message)
        self.reason = reason


class PassedError(VoltanaError):
    """A server has refused the request itself: its answer goes to the client as it is."""

    def __init__(self, status: int, content_type: str, body: bytes) -> None:
        said = _shorten(body.decode(errors="replace"))
        super().__init__(f"the server answers {status}: {said}")
        self.status = status
        self.content_type = content_type
        self.body = body


class ClientGoneError(VoltanaError):
    """The client has closed its connection, or takes or sends nothing."""


class RejectionError(VoltanaError):
    """The request is not let in; the message goes to the client."""

    def __init__(self, status: int, message: str) -> None:
        """`status` is HTTP's."""
        super().__init__(message)
        self.status = status


def error_body(status: int, message: str) -> bytes:
    """An error of the router's own, as OpenAI's clients expect it."""
    kind = "invalid_request_error" if status < SERVER_ERROR else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": status}
    return msgspec.json.encode({"error": error})


class EventWatch:
    """Looks through a stream of events for failures and its end; its pieces may cut an event."""

    __slots__ = ("_tail", "is_done")

    def __init__(self) -> None:
        self.is_done = False
        """The last event, [DONE], is there."""
        self._tail = b""
        """The event that the last piece broke off in."""

    def look(self, piece: bytes) -> tuple[int, str] | None:
        """Status and message of a failure in the events that this piece completes."""
        data = self._tail + piece if self._tail else piece
        self._tail = b""
        if not data.endswith(EVENT_END):
            data, _, tail = data.rpartition(EVENT_END)
            self._tail = tail[-MAX_TAIL:]
        self.is_done = not self._tail and data.endswith(LAST_EVENT + EVENT_END)
        return engine_error(data)

    def end(self) -> tuple[int, str] | None:
        """The same for what was not completed, the stream having ended."""
        return engine_error(self._tail)


def engine_error(events: bytes) -> tuple[int, str] | None:
    """HTTP status and message of a failure in a piece of a stream; None if there is none.

    Example:
        >>> engine_error(b'data: {"error":{"message":"no KV","code":503}}')
        (503, 'no KV')
        >>> engine_error(b'data: {"text":"fine"}')
    """
    if MARKS[0] not in events and MARKS[1] not in events:
        return None
    for event in events.split(EVENT_END):
        if event.startswith(EVENT) and any(mark in event for mark in MARKS):
            return _describe(event.removeprefix(EVENT))
    return SERVER_ERROR, _shorten(events.decode(errors="replace"))


def _describe(event: bytes) -> tuple[int, str]:
    try:
        data: Any = msgspec.json.decode(event)
        found = data["error"] if "error" in data else data["meta_info"]["finish_reason"]
        status = found.get("code", found.get("status_code"))
        message = str(found.get("message", found))
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return SERVER_ERROR, _shorten(event.decode(errors="replace"))
    return status if isinstance(status, int) else SERVER_ERROR, _shorten(message)


def _shorten(text: str) -> str:
    return " ".join(text.split())[:MAX_MESSAGE]
