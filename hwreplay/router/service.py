"""The router's HTTP side: limits, admission, answers, counting. One instance is one service."""

from __future__ import annotations

import asyncio
import gc
import hmac
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import aiohttp
import msgspec
import uvloop
from aiohttp import web

from hwreplay.clock import RunClock
from hwreplay.context import PolicySource
from hwreplay.router.body import PATHS, BadRequestError, parse_body
from hwreplay.router.config import RouterConfig
from hwreplay.router.fleet import NoWorkerError, RouterFleet
from hwreplay.router.prometheus import (
    CANCELLED,
    COMPLETED,
    FAILED,
    REJECTED,
    RouterMetrics,
)
from hwreplay.router.proxy import Call, Pair, PassedError, Proxy, RequestFailedError
from profiles.catalog import Profile, load_profile
from profiles.errors import VoltanaError

LOG: Final = logging.getLogger("voltana.router")
PREFILL_HEADER: Final = "X-Voltana-Prefill"
DECODE_HEADER: Final = "X-Voltana-Decode"
KEEP_ALIVE_S: Final = 2.0
"""Shorter than SGLang's 5 s, so that no request meets a connection the server is closing."""
FORWARDED: Final = ("X-Request-Id",)
SHUTDOWN_S: Final = 5.0


class ClientStalledError(VoltanaError):
    """The client takes or sends nothing."""


class _RejectionError(VoltanaError):
    """The request is not let in."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Admission:
    """So many requests in flight, so many waiting in order of arrival, no more."""

    def __init__(self, config: RouterConfig, metrics: RouterMetrics) -> None:
        self._places = asyncio.Semaphore(config.max_open)
        self._max_queued = config.max_queued
        self._metrics = metrics
        self._queued = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a place; raises a rejection (429) when the queue is full."""
        if self._places.locked():
            if self._queued >= self._max_queued:
                raise _RejectionError(
                    429, f"the queue is full ({self._max_queued} wait): try later"
                )
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

    def _count(self, change: int) -> None:
        self._queued += change
        self._metrics.queued.set(self._queued)


class ClientSink:
    """Writes an answer to the client; a client that stops reading is dropped."""

    def __init__(self, request: web.Request, config: RouterConfig, *, is_stream: bool) -> None:
        self._request = request
        self._stall_s = config.client_stall_s
        self._is_stream = is_stream
        self.response: web.StreamResponse | None = None

    async def begin(self, status: int, content_type: str, pair: Pair) -> None:
        headers = {"Content-Type": content_type} | {
            name: str(worker.config.instance_id)
            for name, worker in zip((PREFILL_HEADER, DECODE_HEADER), pair, strict=True)
        }
        if self._is_stream:
            headers["Cache-Control"] = "no-cache"
        self.response = web.StreamResponse(status=status, headers=headers)
        await self.response.prepare(self._request)

    async def write(self, chunk: bytes) -> None:
        assert self.response is not None
        try:
            async with asyncio.timeout(self._stall_s):
                await self.response.write(chunk)
        except TimeoutError:
            raise ClientStalledError(f"the client took nothing for {self._stall_s:g} s") from None

    async def fail(self, message: str) -> web.StreamResponse:
        """End a begun answer: a stream says why, anything else is cut off."""
        assert self.response is not None
        if self._is_stream:
            await self.write(b"data: " + _error_body(502, message) + b"\n\n")
            await self.response.write_eof()
        else:
            self.drop()
        return self.response

    def drop(self) -> None:
        """Close the connection without an end of the answer."""
        if self._request.transport is not None:
            self._request.transport.abort()


class RouterService:
    """The application and all behind it; `run` it or test its `app`."""

    def __init__(self, config: RouterConfig, profile: Profile) -> None:
        self._config = config
        self.clock = RunClock() if config.start_ns is None else RunClock(start_ns=config.start_ns)
        self.metrics = RouterMetrics()
        self._source = PolicySource(config=config.sim, profile=profile)
        self.app = web.Application(client_max_size=config.max_body_bytes)
        self.app.cleanup_ctx.append(self._live)
        for path in PATHS:
            self.app.router.add_post(path, self._serve)
        self.app.router.add_get("/health", self._health)
        self.app.router.add_get("/metrics", self._guarded(self._show_metrics))
        self.app.router.add_get("/v1/models", self._guarded(self._models))

    async def _live(self, app: web.Application) -> AsyncIterator[None]:
        self._admission = Admission(self._config, self.metrics)
        self.fleet = RouterFleet(self._config, self._source, self.metrics, self.clock)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S, ttl_dns_cache=300)
        session = aiohttp.ClientSession(
            connector=connector, read_bufsize=2**18, auto_decompress=False
        )
        self._session = session
        self._proxy = Proxy(self._config, self.fleet, self.metrics, self.clock, session)
        self.fleet.start(session)
        yield
        await self.fleet.stop()
        await session.close()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        """Count each request once, however it ends."""
        outcome = FAILED
        try:
            outcome, response = await self._answer(request)
        except asyncio.CancelledError:
            outcome = CANCELLED
            raise
        finally:
            self.metrics.requests.labels(outcome).inc()
        return response

    async def _answer(self, request: web.Request) -> tuple[str, web.StreamResponse]:
        arrival_s = self.clock.now_s()
        try:
            self._authorise(request)
            data = await self._read(request)
            body = parse_body(request.path, data, self._config.vocab_size)
            sink = ClientSink(request, self._config, is_stream=body.is_stream)
            call = Call(
                request_id=self.fleet.new_id(),
                body=body,
                arrival_s=arrival_s,
                sink=sink,
                headers={n: request.headers[n] for n in FORWARDED if n in request.headers},
            )
            async with self._admission.place():
                return await self._proxied(call, sink)
        except _RejectionError as error:
            return REJECTED, _error(error.status, str(error))
        except BadRequestError as error:
            return REJECTED, _error(400, str(error))

    async def _proxied(self, call: Call, sink: ClientSink) -> tuple[str, web.StreamResponse]:
        try:
            await self._proxy.serve(call)
            assert sink.response is not None
            await sink.response.write_eof()
        except (RequestFailedError, NoWorkerError) as error:
            reason = error.reason if isinstance(error, RequestFailedError) else "no_worker"
            self.metrics.failures.labels(reason).inc()
            LOG.warning("request %d failed: %s", call.request_id, error)
            if sink.response is not None:
                return FAILED, await sink.fail(str(error))
            return FAILED, _error(503 if reason == "no_worker" else 502, str(error))
        except PassedError as error:
            if sink.response is not None:
                return FAILED, await sink.fail(str(error))
            return REJECTED, web.Response(
                status=error.status, body=error.body, content_type=error.content_type
            )
        except (ClientStalledError, ConnectionError):
            sink.drop()
            return CANCELLED, sink.response or web.Response(status=499)
        return COMPLETED, sink.response

    async def _read(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self._config.client_stall_s):
                return await request.read()
        except TimeoutError:
            raise _RejectionError(
                408, f"the body must come within {self._config.client_stall_s:g} s"
            ) from None
        except web.HTTPRequestEntityTooLarge:
            raise _RejectionError(
                413, f"the body must have at most {self._config.max_body_bytes} bytes"
            ) from None
        except web.RequestPayloadError as error:
            raise BadRequestError(f"the body cannot be read: {error}") from None

    def _authorise(self, request: web.Request) -> None:
        token = self._config.token
        if token is None:
            return
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise _RejectionError(401, "the header Authorization: Bearer TOKEN is missing or wrong")

    def _guarded(
        self, handler: Callable[[web.Request], Awaitable[web.Response]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def guarded(request: web.Request) -> web.Response:
            try:
                self._authorise(request)
            except _RejectionError as error:
                return _error(error.status, str(error))
            return await handler(request)

        return guarded

    async def _health(self, request: web.Request) -> web.Response:
        out = [w.name for w in self.fleet.all_workers() if not w.is_healthy]
        is_serving = all(
            any(w.is_healthy for w in workers) for workers in self.fleet.workers.values()
        )
        return web.json_response(
            {"serving": is_serving, "out": out}, status=200 + 303 * (not is_serving)
        )

    async def _show_metrics(self, request: web.Request) -> web.Response:
        self.fleet.refresh_gauges()
        return web.Response(
            body=self.metrics.text(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def _models(self, request: web.Request) -> web.Response:
        """What the first prefill server serves; OpenAI clients ask."""
        url = self._config.workers[0].url.rstrip("/") + "/v1/models"
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=5.0)) as answer:
                return web.Response(
                    status=answer.status, body=await answer.read(), content_type=answer.content_type
                )
        except (aiohttp.ClientError, TimeoutError) as error:
            return _error(502, f"no server names its model: {error}")


def _error_body(status: int, message: str) -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": "router", "code": status}})


def _error(status: int, message: str) -> web.Response:
    return web.Response(
        status=status, body=_error_body(status, message), content_type="application/json"
    )


def run_router(config: RouterConfig, ready: Callable[[str], None]) -> None:
    """Load the profile and serve until SIGTERM or SIGINT, on uvloop.

    Args:
        config: What to serve.
        ready: Called with the base URL once requests are taken.

    Raises:
        VoltanaError: No such profile, or the address cannot be bound.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    if not config.is_loopback and config.token is None:
        LOG.warning("open to the network without a token: anybody who reaches it may use it")
    profile = load_profile(config.sim.profile)
    gc.collect()
    gc.freeze()  # a collection that walks every library's objects stops all streams for 0.1 s
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve_router(config, profile, ready))


async def serve_router(
    config: RouterConfig, profile: Profile, ready: Callable[[str], None]
) -> None:
    """Serve until SIGTERM or SIGINT. `ready` is called with the base URL.

    Raises:
        VoltanaError: The address cannot be bound.
    """
    runner = web.AppRunner(
        RouterService(config, profile).app,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=SHUTDOWN_S,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.host, config.port, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            raise VoltanaError(
                f"the router cannot listen on {config.host}:{config.port}: {error.strerror}"
            ) from None
        ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        ready(f"http://{config.host}:{runner.addresses[0][1]}")
        await ended.wait()
    finally:
        await runner.cleanup()
