"""Where an answer goes: to the client, who may be slow, silent or gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from aiohttp import web

from voltana.hwreplay.router.config import RouterConfig
from voltana.hwreplay.router.errors import EVENT, EVENT_END, ClientGoneError, error_body

if TYPE_CHECKING:
    from voltana.hwreplay.router.servers.fleet import Pair

PREFILL_HEADER: Final = "X-Voltana-Prefill"
DECODE_HEADER: Final = "X-Voltana-Decode"
NONE: Final[Mapping[str, str]] = MappingProxyType({})
BAD_GATEWAY: Final = 502
UNBUFFERED_BYTES: Final = 2**14
"""With less in the send buffer a write need not wait: it is full at four times as much."""


class ClientSink:
    """Writes an answer to the client; one that stops reading is dropped.

    Whatever is wrong with the client is a `ClientGoneError`, so that no server is blamed for it.
    """

    def __init__(self, request: web.Request, config: RouterConfig, *, is_stream: bool) -> None:
        self._request = request
        self._stall_s = config.client_stall_s
        self._is_stream = is_stream
        self.response: web.StreamResponse | None = None

    async def begin(
        self, status: int, content_type: str, pair: Pair, more: Mapping[str, str] = NONE
    ) -> None:
        """The head of the answer; it leaves with the first piece.

        Args:
            status: HTTP status.
            content_type: HTTP header.
            pair: The servers that serve it.
            more: Further headers.
        """
        headers = {"Content-Type": content_type, **more} | {
            name: str(worker.config.instance_id)
            for name, worker in zip((PREFILL_HEADER, DECODE_HEADER), pair, strict=True)
        }
        if self._is_stream:
            headers["Cache-Control"] = "no-cache"
        self.response = web.StreamResponse(status=status, headers=headers)
        try:
            await self.response.prepare(self._request)
        except ConnectionError as error:
            raise ClientGoneError(f"the client has closed its connection ({error})") from None

    async def write(self, piece: bytes) -> None:
        """A piece of the answer; waits while the client is slow."""
        assert self.response is not None
        await self._send(self.response.write, piece)

    async def end(self, piece: bytes) -> None:
        """The last piece."""
        assert self.response is not None
        await self._send(self.response.write_eof, piece)

    async def fail(self, message: str) -> web.StreamResponse:
        """End a begun answer: a stream says why, anything else is cut off."""
        assert self.response is not None
        if self._is_stream:
            # The blank line in front ends an event that the server may have broken off in.
            event = EVENT_END + EVENT + error_body(BAD_GATEWAY, message) + EVENT_END
            try:
                await self.write(event)
                await self.end(b"")
            except ClientGoneError:
                self.drop()
        else:
            self.drop()
        return self.response

    def drop(self) -> None:
        """Close the connection without an end of the answer."""
        if self._request.transport is not None:
            self._request.transport.abort()

    async def _send(self, write: Callable[[bytes], Awaitable[None]], piece: bytes) -> None:
        transport = self._request.transport
        if transport is None:
            raise ClientGoneError("the client has closed its connection")
        try:
            if transport.get_write_buffer_size() + len(piece) < UNBUFFERED_BYTES:
                await write(piece)  # does not wait: a timer for every token would cost more
                return
            async with asyncio.timeout(self._stall_s):
                await write(piece)
        except TimeoutError:
            raise ClientGoneError(f"the client took nothing for {self._stall_s:g} s") from None
        except ConnectionError as error:
            raise ClientGoneError(f"the client has closed its connection ({error})") from None
