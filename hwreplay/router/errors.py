"""Errors that SGLang reports inside a stream that began as 200 OK."""

from __future__ import annotations

from typing import Any, Final

import msgspec

EVENT: Final = b"data: "
MARKS: Final = (b'{"error":', b'"finish_reason":{"type":"abort"')
"""Inside a JSON text a client's own quotes are escaped, so that no output can look like these."""
SERVER_ERROR: Final = 500
MAX_MESSAGE: Final = 300


def engine_error(chunk: bytes) -> tuple[int, str] | None:
    """HTTP status and message of a failure in a piece of a stream; None if there is none.

    Example:
        >>> engine_error(b'data: {"error":{"message":"no KV","code":503}}')
        (503, 'no KV')
        >>> engine_error(b'data: {"text":"fine"}')
    """
    if not any(mark in chunk for mark in MARKS):
        return None
    for event in chunk.split(b"\n\n"):
        if event.startswith(EVENT) and any(mark in event for mark in MARKS):
            return _describe(event.removeprefix(EVENT))
    return SERVER_ERROR, _shorten(chunk.decode(errors="replace"))


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
