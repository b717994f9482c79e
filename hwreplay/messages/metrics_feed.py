"""Subscribes to one server's forward-pass metrics (`voltana.profiles.engines.sglang_metrics`)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Self

import zmq

from voltana.hwreplay.clock import RunClock
from voltana.hwreplay.messages.inbox import Inbox
from voltana.profiles.engines.sglang_metrics import (
    MAX_QUEUED_RECORDS,
    IterationMetrics,
    parse_metrics,
)


class MetricsFeed:
    """Subscribes to one server's records; iterate over it. It outlives the server's restart.

    Example:
        async with MetricsFeed("ipc:///tmp/decode-0.0", clock) as feed:
            async for record in feed: ...
    """

    def __init__(self, address: str, clock: RunClock) -> None:
        """Connect; the server need not be there yet."""
        self._clock = clock
        # All feeds of a process share ZMQ's one thread: one each would wake for every record.
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = context.socket(zmq.SUB)
        self._socket.set_hwm(MAX_QUEUED_RECORDS)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.connect(address)
        self._inbox = Inbox(self._socket)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the subscription."""
        self._inbox.close()
        self._socket.close(linger=0)

    async def __aiter__(self) -> AsyncIterator[IterationMetrics]:
        while True:
            yield await self.receive()

    async def receive(self) -> IterationMetrics:
        """The next record. Raises as `parse_metrics` does."""
        payload = await self._inbox.receive()
        return parse_metrics(payload, received_s=self._clock.now_s())
