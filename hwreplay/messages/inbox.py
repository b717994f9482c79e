"""A ZMQ socket read in an asyncio program without a future for every message."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

import zmq

MAX_BURST: Final = 256
"""Messages taken in one turn of the loop; others' turn comes between."""


class Inbox:
    """The messages of a socket that only receives."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._messages: deque[list[bytes]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def receive(self) -> bytes:
        """The last frame of the next message."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket.FD, self._drain)
            self._drain()
        while not self._messages:
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._messages.popleft()[-1]

    def close(self) -> None:
        """Stop; the socket stays its owner's to close."""
        if self._loop is not None:
            self._loop.remove_reader(self._socket.FD)
            self._loop = None

    def _drain(self) -> None:
        """Take all there is: the descriptor tells of a message once, not until it is read."""
        if self._loop is None:
            return
        try:
            for _ in range(MAX_BURST):
                self._messages.append(self._socket.recv_multipart(zmq.NOBLOCK))
            self._loop.call_soon(self._drain)
        except zmq.Again:
            pass
        if self._messages and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
