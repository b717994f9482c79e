"""HTTP/1.1 to an engine server: POSTs over kept connections, one request a connection at a time.

aiohttp's client does far more than that, and two requests of it were the dearest part of routing
one. llhttp reads the answers, as strictly as it does by default: what is no HTTP ends as an
`UpstreamError`.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Final, cast
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpResponseParser

from voltana.profiles.common.errors import VoltanaError

KEEP_ALIVE_S: Final = 2.0
"""Shorter than SGLang's 5 s, so that no request meets a connection the server is closing."""
MAX_HEAD_BYTES: Final = 2**16
MAX_CHUNK_BYTES: Final = 2**24
PAUSE_BYTES: Final = 2**18
"""Bytes of an answer kept for a slow client; beyond that, reading from the server pauses."""


class UpstreamError(VoltanaError):
    """The exchange with a server has broken."""


class RefusedError(UpstreamError):
    """The server takes no connection."""


class ConnectTimeoutError(UpstreamError):
    """The server has not taken the connection in time."""


class Connection(asyncio.Protocol):
    """One connection, and the answer that is coming on it. The parser calls `on_...`."""

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self.status = 0
        self.content_type = ""
        self.idle_since_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._parser = HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._error: UpstreamError | None = None
        self._pieces: list[bytes] = []
        self._chunk: list[bytes] = []
        self._unread_bytes = 0
        """What has come since the last head or piece of the body was whole."""
        self._has_length = self._is_chunked = self._is_paused = False
        self._is_kept = self._is_over = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so

    def send(self, request: bytes) -> None:
        """Start an exchange."""
        self.status = self._unread_bytes = 0
        self._is_over = False
        self._transport.write(request)

    async def head(self) -> None:
        """Wait for `status` and `content_type`."""
        while not self.status:
            await self._wait()

    async def readany(self) -> bytes:
        """What has come of the body since the last call; empty at its end."""
        while not self._pieces:
            if self._is_over:
                return b""
            await self._wait()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
        return data

    async def read(self) -> bytes:
        """All that is left of the body."""
        pieces = []
        while piece := await self.readany():
            pieces.append(piece)
        return b"".join(pieces)

    @property
    def is_reusable(self) -> bool:
        """Another request may be sent on it."""
        is_read = self._is_over and not self._pieces
        return is_read and self._is_kept and not self._transport.is_closing()

    def close(self) -> None:
        """Drop it at once; a server takes that as the end of its request."""
        self._transport.abort()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        if self._is_over:  # nobody has asked for it
            self._is_kept = False
            return
        self._unread_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            self._break(error.__context__ or error)
        if self._unread_bytes > (MAX_CHUNK_BYTES if self.status else MAX_HEAD_BYTES):
            self._break(f"its {'chunk' if self.status else 'head'} has no end")
        if not self._is_paused and sum(map(len, self._pieces)) > PAUSE_BYTES:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def _break(self, reason: object) -> None:
        self._is_kept = False
        if not self._is_over:
            self._error = UpstreamError(f"its answer is no HTTP: {reason}")
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the loop. It ends an answer of unknown length, and breaks any other."""
        if self.status and not self._has_length and error is None:
            self._is_over = True
        elif not self._is_over and self._error is None:
            self._error = UpstreamError(f"connection lost{f': {error}' if error else ''}")
        self._is_kept = False
        self._wake()

    def on_message_begin(self) -> None:
        """A head begins."""
        if self._is_over:  # nobody has asked for it
            raise HttpParserError("a second answer")
        self.content_type = "application/octet-stream"
        self._has_length = self._is_chunked = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """A line of the head, or of the trailers."""
        if self.status:
            return
        name = name.lower()
        if name == b"content-type":
            self.content_type = value.decode("latin-1")
        elif name == b"content-length":
            self._has_length = True
        elif name == b"transfer-encoding":
            self._has_length = self._is_chunked = True
            if value.lower() != b"chunked":
                raise HttpParserError(f"a transfer encoding of {value[:40]!r}")
        elif name == b"content-encoding" and value.lower() != b"identity":
            raise HttpParserError(f"a content encoding of {value[:40]!r}")

    def on_headers_complete(self) -> None:
        """The head is there."""
        status = self._parser.get_status_code()
        if status == HTTPStatus.SWITCHING_PROTOCOLS:
            raise HttpParserError("it switches protocols")
        if status >= HTTPStatus.OK:  # those below announce another answer
            self.status = status
            self._unread_bytes = 0
            self._is_kept = self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        """A piece of the body, or of a chunk of it."""
        if self._is_chunked:
            self._chunk.append(data)
        else:
            self._unread_bytes = 0
            self._pieces.append(data)

    def on_chunk_complete(self) -> None:
        """Only whole chunks are passed on: a server sends one an event."""
        self._unread_bytes = 0
        self._pieces += self._chunk
        self._chunk.clear()

    def on_message_complete(self) -> None:
        """The answer is over, or the head that announced it."""
        if self.status:
            self._is_over = True


class Upstream:
    """One server's address and the connections kept to it."""

    def __init__(self, url: str, connect_s: float) -> None:
        """`connect_s`: longest wait for a connection."""
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self.port = parts.port or (443 if self._ssl else 80)
        self._start = f"POST {parts.path.rstrip('/')}"
        self._end = (
            f" HTTP/1.1\r\nHost: {parts.netloc.rpartition('@')[2]}\r\n"
            "Content-Type: application/json\r\n"
        )
        self._connect_s = connect_s
        self._idle: deque[Connection] = deque()

    @asynccontextmanager
    async def post(
        self, path: str, data: bytes, sent: Callable[[], None]
    ) -> AsyncIterator[Connection]:
        """Ask; gives the answer once its head is there. Left early, it cancels the request.

        Args:
            path: Below the server's URL.
            data: The body, JSON.
            sent: Called when the request has been written to the connection.

        Raises:
            RefusedError: The server takes no connection.
            ConnectTimeoutError: It does not say whether it takes one.
            UpstreamError: It breaks the connection, or answers something else than HTTP.
        """
        head = f"{self._start}{path}{self._end}Content-Length: {len(data)}\r\n\r\n"
        connection = self._kept() or await self._connect()
        try:
            connection.send(head.encode() + data)
            sent()
            await connection.head()
            yield connection
        finally:
            self._give_back(connection)

    def close(self) -> None:
        """Drop the connections nobody uses."""
        while self._idle:
            self._idle.pop().close()

    def _kept(self) -> Connection | None:
        """The one used last, so that the others can age."""
        oldest_s = asyncio.get_running_loop().time() - KEEP_ALIVE_S
        while self._idle and self._idle[0].idle_since_s < oldest_s:
            self._idle.popleft().close()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection
            connection.close()
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await loop.create_connection(
                    Connection, self._host, self.port, ssl=self._ssl
                )
        except TimeoutError:
            raise ConnectTimeoutError(f"no connection within {self._connect_s:g} s") from None
        except OSError as error:
            raise RefusedError(error.strerror or str(error)) from None
        return connection

    def _give_back(self, connection: Connection) -> None:
        if connection.is_reusable:
            connection.idle_since_s = asyncio.get_running_loop().time()
            self._idle.append(connection)
        else:
            connection.close()
