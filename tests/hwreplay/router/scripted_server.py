"""An HTTP server that sends what it is told, byte for byte, right or wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.hwreplay.stub_worker import HOST

BETWEEN_S = 0.02
"""Pause between two pieces, so that they are read apart."""
HEALTHY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


@dataclass(slots=True, kw_only=True)
class Scripted:
    """The server: each POST is answered with `pieces`."""

    pieces: Sequence[bytes]
    is_kept: bool = False
    """Does not close after an answer."""
    url: str = ""
    seen: list[bytes] = field(default_factory=list)
    """Heads and bodies of the POSTs."""
    num_connections: int = 0
    """Connections that brought a POST."""
    num_lost: int = 0
    """Connections that the other side closed."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        is_new = True
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if head.startswith(b"GET"):
                    writer.write(HEALTHY)
                    continue
                self.num_connections += is_new
                is_new = False
                await self._answer(head, reader, writer)
                if not self.is_kept:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            self.num_lost += 1
        finally:
            writer.close()

    async def _answer(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        self.seen.append(head + await reader.readexactly(length))
        for piece in self.pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(BETWEEN_S)


def chunked(*pieces: bytes, is_ended: bool = True) -> list[bytes]:
    """A stream of events, a chunk a piece."""
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
    return [head, *chunks, b"0\r\n\r\n"] if is_ended else [head, *chunks]


@asynccontextmanager
async def scripted(*pieces: bytes, is_kept: bool = False) -> AsyncIterator[Scripted]:
    """Run one."""
    script = Scripted(pieces=pieces, is_kept=is_kept)
    server = await asyncio.start_server(script.serve, HOST, 0)
    script.url = f"http://{HOST}:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield script
