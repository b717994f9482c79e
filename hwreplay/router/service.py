"""The router's HTTP side: limits, admission, answers, counting. One instance is one service."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import hmac
import logging
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Final

import aiohttp
import uvloop
from aiohttp import web

from voltana.hwreplay.clock import RunClock
from voltana.hwreplay.messages.log_lines import say, start_log
from voltana.hwreplay.router.admission import Admission, read_body
from voltana.hwreplay.router.body import PATHS, BadRequestError, parse_body
from voltana.hwreplay.router.config import BACKLOG, RouterConfig, open_listener
from voltana.hwreplay.router.errors import (
    ClientGoneError,
    PassedError,
    RejectionError,
    RequestFailedError,
)
from voltana.hwreplay.router.openai import errors_as_json, json_error, pick_model
from voltana.hwreplay.router.prometheus import (
    CANCELLED,
    COMPLETED,
    FAILED,
    REJECTED,
    RouterMetrics,
)
from voltana.hwreplay.router.proxy import Call, Proxy
from voltana.hwreplay.router.servers.attempt import NoWorkerError
from voltana.hwreplay.router.servers.fleet import RouterFleet
from voltana.hwreplay.router.sink import ClientSink
from voltana.hwreplay.view.context import PolicySource
from voltana.hwreplay.view.reload import check_sim_reload, refuse_changes
from voltana.profiles.catalog import Profile, load_profile
from voltana.profiles.common.errors import VoltanaError

LOG: Final = logging.getLogger("voltana.router")
SHUTDOWN_S: Final = 1.0
"""What is still open after a drain may take so long to be told."""
RETRY_AFTER_S: Final = 10
"""What a client that is refused for a drain is told."""
LAST_BILLS_S: Final = 2.5
"""What a drain waits for the energy of the last requests."""
POLL_S: Final = 0.05
LEFT: Final = 499
"""Status of a request whose client has gone, as nginx counts it."""
COLLECTION: Final = (20_000, 20, 100)
"""Python's own (700, 10, 10) collects several times for each request, and finds next to nothing."""
Reread = Callable[[], RouterConfig]
"""Reads the configuration again."""


@dataclasses.dataclass(slots=True)
class Entry:
    """One request in the access log."""

    arrival_s: float
    call: Call | None = None
    """None while, or if, it is not one that can be sent on."""


class RouterService:
    """The application and all behind it; `run` it or test its `app`."""

    def __init__(self, config: RouterConfig, profile: Profile) -> None:
        self._config = config
        self._profile = profile
        self._num_open = 0
        self._is_draining = False
        self._drained = asyncio.Event()
        self.clock = RunClock() if config.start_ns is None else RunClock(start_ns=config.start_ns)
        self.metrics = RouterMetrics()
        self.metrics.promise(config.sim.slo_ttft_s, config.sim.slo_itl_s)
        self._source = PolicySource(config=config.sim, profile=profile)
        self.app = web.Application(
            client_max_size=config.max_body_bytes, middlewares=[errors_as_json]
        )
        self.app.cleanup_ctx.append(self._live)
        for path in PATHS:
            self.app.router.add_post(path, self._serve)
        for path in ("/health", "/healthz"):
            self.app.router.add_get(path, self._health)
        self.app.router.add_get("/metrics", self._guarded(self._show_metrics))
        self.app.router.add_get("/v1/models", self._guarded(self._models))
        self.app.router.add_get("/v1/models/{name:.+}", self._guarded(self._model))

    async def _live(self, app: web.Application) -> AsyncIterator[None]:
        self._admission = Admission(self._config, self.metrics)
        self.fleet = RouterFleet(self._config, self._source, self.metrics, self.clock)
        if self.fleet.bills is not None:
            self.metrics.show_energy(self.fleet.bills)
        self._proxy = Proxy(self._config, self.fleet, self.metrics, self.clock)
        async with aiohttp.ClientSession() as self._session:
            await self.fleet.start(self._session)
            yield
            await self.fleet.stop()
            if self.fleet.bills is not None:
                self.fleet.bills.flush()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        """Count each request once, however it ends."""
        if self._is_draining:
            return self._refused()
        outcome, status = FAILED, LEFT
        entry = Entry(self.clock.now_s())
        self._num_open += 1
        try:
            outcome, response = await self._answer(request, entry)
            status = response.status
        except asyncio.CancelledError:
            outcome = CANCELLED
            raise
        finally:
            self.metrics.ended[outcome].inc()
            if outcome == FAILED:
                self.metrics.on_failure()
            self._leave()
            self._close(request, entry, outcome, status)
        return response

    def _leave(self) -> None:
        self._num_open -= 1
        if self._is_draining and not self._num_open:
            self._drained.set()

    def _refused(self) -> web.Response:
        self.metrics.ended[REJECTED].inc()
        answer = json_error(503, "the router is about to end: ask another one, or again later")
        answer.headers["Retry-After"] = str(RETRY_AFTER_S)
        answer.force_close()
        return answer

    def _close(self, request: web.Request, entry: Entry, outcome: str, status: int) -> None:
        """The request's line in the access log, once its energy is known if somebody counts it."""
        fields: dict[str, object] = {
            "path": request.path,
            "outcome": outcome,
            "status": status,
            "duration_s": round(self.clock.now_s() - entry.arrival_s, 6),
        }
        call, bills, is_logged = entry.call, self.fleet.bills, self._config.access_log
        if call is not None:
            fields |= call.as_dict()
        if call is None or bills is None:
            if is_logged:
                say(LOG, logging.INFO, "request", **fields)
            return

        def tell(energy_j: float | None) -> None:
            bills.forget(call.request_id)
            if is_logged:
                energy = {} if energy_j is None else {"energy_j": round(energy_j, 3)}
                say(LOG, logging.INFO, "request", **fields, **energy)

        bills.close(call.request_id, tell)

    async def drain(self, hurry: asyncio.Event) -> None:
        """Refuse new requests and wait for the open ones, `drain_s` at most or until `hurry`."""
        self._is_draining = True
        limit_s = self._config.drain_s
        say(LOG, logging.INFO, "draining", open_requests=self._num_open, limit_s=limit_s)
        if self._num_open:
            waits = [asyncio.create_task(event.wait()) for event in (self._drained, hurry)]
            await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        if self.fleet.bills is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_BILLS_S):
                    while self.fleet.bills.num_waiting and not hurry.is_set():
                        await asyncio.sleep(POLL_S)
        say(LOG, logging.INFO, "drained", cut_off=self._num_open)

    def reload(self, config: RouterConfig) -> None:
        """Take over policy and promises; open requests go on as they are.

        Raises:
            VoltanaError: Something else has changed, or there is no such policy: all stays as it
                was.
        """
        where = "the router's configuration"
        check_sim_reload(self._config.sim, config.sim, where)
        settled = ("sim", "port") if self._config.port == 0 else ("sim",)  # 0: it took a free one
        refuse_changes(self._config, config, where, section="router", but=settled)
        self.fleet.adopt(PolicySource(config=config.sim, profile=self._profile))
        self.metrics.promise(config.sim.slo_ttft_s, config.sim.slo_itl_s)
        self._config = dataclasses.replace(self._config, sim=config.sim)

    async def _answer(self, request: web.Request, entry: Entry) -> tuple[str, web.StreamResponse]:
        try:
            self._authorise(request)
            with self._admission.body_space(request):
                data = await read_body(request, self._config)
                body = parse_body(request.path, data, self.fleet.vocab_size)
                sink = ClientSink(request, self._config, is_stream=body.is_stream)
                entry.call = call = Call(
                    request_id=self.fleet.new_id(),
                    body=body,
                    arrival_s=entry.arrival_s,
                    sink=sink,
                )
                async with self._admission.place():
                    return await self._proxied(call, sink)
        except RejectionError as error:
            return REJECTED, json_error(error.status, str(error))
        except BadRequestError as error:
            return REJECTED, json_error(400, str(error))

    async def _proxied(self, call: Call, sink: ClientSink) -> tuple[str, web.StreamResponse]:
        try:
            await self._proxy.serve(call)
            assert sink.response is not None
        except (RequestFailedError, NoWorkerError) as error:
            reason = error.reason if isinstance(error, RequestFailedError) else "no_worker"
            self.metrics.failures.labels(reason).inc()
            LOG.warning("request %d failed: %s", call.request_id, error)
            if sink.response is not None:
                return FAILED, await sink.fail(str(error))
            return FAILED, json_error(503 if reason == "no_worker" else 502, str(error))
        except PassedError as error:
            headers = {"Content-Type": error.content_type}
            return REJECTED, web.Response(status=error.status, body=error.body, headers=headers)
        except ClientGoneError:
            sink.drop()
            return CANCELLED, sink.response or web.Response(status=LEFT)
        return COMPLETED, sink.response

    def _authorise(self, request: web.Request) -> None:
        token = self._config.token
        if token is None:
            return
        given = request.headers.get("Authorization", "")
        wanted = f"Bearer {token}".encode()
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), wanted):
            raise RejectionError(401, "the header Authorization: Bearer TOKEN is missing or wrong")

    def _guarded(
        self, handler: Callable[[web.Request], Awaitable[web.Response]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def guarded(request: web.Request) -> web.Response:
            try:
                self._authorise(request)
            except RejectionError as error:
                return json_error(error.status, str(error))
            return await handler(request)

        return guarded

    async def _health(self, request: web.Request) -> web.Response:
        out = [w.name for w in self.fleet.all_workers() if not w.is_healthy]
        is_serving = all(
            any(w.is_healthy for w in workers) for workers in self.fleet.workers.values()
        )
        reasons = self._reasons()
        if not is_serving:
            reasons.append("no pair of servers answers")
        if self._is_draining:
            reasons.append("it ends: open requests may finish")
        return web.json_response(
            {
                "serving": is_serving,
                "draining": self._is_draining,
                "reasons": reasons,
                "out": out,
                "died": self.fleet.died,
            },
            status=503 if reasons else 200,
        )

    def _reasons(self) -> list[str]:
        """What the parent says is not well."""
        if self._config.state_file is None:
            return []
        return Path(self._config.state_file).read_text(encoding="utf-8").splitlines()

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
            return json_error(502, f"no server names its model: {error}")

    async def _model(self, request: web.Request) -> web.Response:
        """One model of that list."""
        listing = await self._models(request)
        if listing.status != HTTPStatus.OK:
            return listing
        assert isinstance(listing.body, bytes)
        return pick_model(listing.body, request.match_info["name"])


def run_router(
    config: RouterConfig, ready: Callable[[str], None], reread: Reread | None = None
) -> None:
    """Load the profile and serve until SIGTERM or SIGINT, on uvloop.

    Args:
        config: What to serve.
        ready: Called with the base URL once requests are taken.
        reread: Asked on SIGHUP for a new configuration; None leaves SIGHUP alone.

    Raises:
        VoltanaError: No such profile, or the address cannot be bound.
    """
    start_log("router")
    if not config.is_loopback and config.token is None:
        LOG.warning("open to the network without a token: anybody who reaches it may use it")
    profile = load_profile(config.sim.profile)
    gc.collect()
    gc.set_threshold(*COLLECTION)
    gc.freeze()  # a collection that walks every library's objects stops all streams for 0.1 s
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve_router(config, profile, ready, reread))


async def serve_router(
    config: RouterConfig,
    profile: Profile,
    ready: Callable[[str], None],
    reread: Reread | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second one cuts that short.

    Args:
        config: Of the router.
        profile: What its policy believes in.
        ready: Called with the base URL once it listens.
        reread: As in `run_router`.

    Raises:
        VoltanaError: The address cannot be bound.
    """
    service = RouterService(config, profile)
    runner = web.AppRunner(
        service.app, handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_S
    )
    await runner.setup()
    try:
        listener = (
            open_listener(config.host, config.port)
            if config.listen_fd is None
            else socket.socket(fileno=config.listen_fd)
        )
        await web.SockSite(runner, listener, backlog=BACKLOG).start()
        ended, hurry = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: (hurry if ended.is_set() else ended).set())
        if reread is not None:
            loop.add_signal_handler(signal.SIGHUP, _reload, service, reread)
        ready(f"http://{config.host}:{runner.addresses[0][1]}")
        await ended.wait()
        await service.drain(hurry)
    finally:
        await runner.cleanup()


def _reload(service: RouterService, reread: Reread) -> None:
    try:
        service.reload(reread())
        say(LOG, logging.INFO, "reloaded")
    except VoltanaError as error:
        say(LOG, logging.ERROR, "reload refused", error=str(error))
