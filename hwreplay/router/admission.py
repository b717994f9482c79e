"""Who is let in: so many requests at once, so many waiting, so many bytes of bodies in all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from aiohttp import web

from voltana.hwreplay.router.body import BadRequestError
from voltana.hwreplay.router.config import RouterConfig
from voltana.hwreplay.router.errors import RejectionError
from voltana.hwreplay.router.prometheus import RouterMetrics

TOO_MANY: Final = 429
TOO_LARGE: Final = 413


class Admission:
    """Limit the requests in flight and those that wait, in order of arrival."""

    def __init__(self, config: RouterConfig, metrics: RouterMetrics) -> None:
        self._config = config
        self._places = asyncio.Semaphore(config.max_open)
        self._metrics = metrics
        self._queued = 0
        self._bytes = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a place; raises a rejection (429) when the queue is full."""
        if self._places.locked():
            self._check_queue()
            self._count(1)
            try:
                await self._places.acquire()
            finally:
                self._count(-1)
        else:
            await self._places.acquire()
        self._metrics.in_flight.inc()
        try:
            yield
        finally:
            self._metrics.in_flight.dec()
            self._places.release()

    @contextmanager
    def body_space(self, request: web.Request) -> Iterator[None]:
        """Hold memory for a body that has not been read yet, and refuse it unread.

        Raises:
            RejectionError: It is too large, or there is no room for it now: no place either, or
                bodies of others in the way.
        """
        most = self._config.max_body_bytes
        size = most if request.content_length is None else request.content_length
        if size > most:
            raise too_large(self._config)
        self._check_queue()
        if self._bytes + size > self._config.max_bodies_bytes:
            raise RejectionError(
                TOO_MANY,
                f"the bodies of all requests must have at most {self._config.max_bodies_bytes} "
                "bytes together: try later",
            )
        self._bytes += size
        try:
            yield
        finally:
            self._bytes -= size

    def _check_queue(self) -> None:
        most = self._config.max_queued
        if self._places.locked() and self._queued >= most:
            raise RejectionError(TOO_MANY, f"the queue is full ({most} wait): try later")

    def _count(self, change: int) -> None:
        self._queued += change
        self._metrics.queued.set(self._queued)


async def read_body(request: web.Request, config: RouterConfig) -> bytes:
    """A request's body.

    Raises:
        RejectionError: It is too large or does not come in time.
        BadRequestError: It cannot be read.
    """
    try:
        async with asyncio.timeout(config.client_stall_s):
            return await request.read()
    except TimeoutError:
        raise RejectionError(
            408, f"the body must come within {config.client_stall_s:g} s"
        ) from None
    except web.HTTPRequestEntityTooLarge:
        raise too_large(config) from None
    except web.RequestPayloadError as error:
        raise BadRequestError(f"the body cannot be read: {error}") from None


def too_large(config: RouterConfig) -> RejectionError:
    """What a client with too much to say is told."""
    return RejectionError(TOO_LARGE, f"the body must have at most {config.max_body_bytes} bytes")
